"""Each package's own map holds: its docstring names every module of it, and none that is not there. No circles."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import grimp
import pytest

SOURCE = Path(__file__).parents[2] / "src" / "gntalloc"
PACKAGES = sorted(path.parent for path in SOURCE.rglob("__init__.py") if path.parent != SOURCE)
_ENTRY = re.compile(r"^ *(\w+)/?(?:, \w+/?)*  +\S", re.MULTILINE)
ALONE = {"cli"}  # its map is its table of commands


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_the_map_names_each_module(package: Path) -> None:
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    there = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    there -= {"__init__", "__main__"}
    if package.name in ALONE:
        pytest.skip("its map is its table of commands")
    named: set[str] = set()
    for line in text.splitlines():
        if _ENTRY.match(line):
            named |= {name.strip().rstrip("/") for name in re.split(r"  +", line.strip())[0].split(",")}
    assert named == there


def _circles() -> list[list[str]]:
    """Modules that import each other, type hints included: Tarjan's strongly connected components."""
    graph = grimp.build_graph("gntalloc", exclude_type_checking_imports=False)
    after = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for each in after[module]:
            if each not in order:
                visit(each)
            if each in stack:
                lowest[module] = min(lowest[module], lowest[each])
        if lowest[module] == order[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for module in sorted(graph.modules):
        if module not in order:
            visit(module)
    return found


def test_no_modules_import_each_other() -> None:
    assert _circles() == []
