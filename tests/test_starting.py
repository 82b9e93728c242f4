"""Starting imports no more than what is used: the package, the machine's process and each command."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import gntalloc
from gntalloc.cli import COMMANDS

PATIENCE = 50.0
SOURCE = str(Path(gntalloc.__file__).parent.parent)

# What takes long to import. `typing`, `re`, `enum` and `socket` are everywhere.
HEAVY = {
    "_ssl", "argparse", "ast", "asyncio", "click", "concurrent.futures", "dataclasses", "decimal", "difflib", "dis",
    "email", "hashlib", "http", "importlib.metadata", "importlib.resources", "inspect", "json", "logging",
    "multiprocessing", "numpy", "pathlib", "pickle", "platform", "pydoc", "pytest", "queue", "rich",
    "secrets", "shutil", "sqlite3", "ssl", "statistics", "subprocess", "tempfile", "tkinter", "unittest",
    "urllib", "uuid", "xml", "zipfile",
}  # fmt: skip
# From Python 3.14 on a named tuple imports `ast`.
NAMED_TUPLE = """
class Pair(typing.NamedTuple):
    first: "int"
"""
# What one part or the other uses for what it is for, and what the others have of Python's by way of these.
MACHINE = {"json", "logging"}
COMMAND = {"click", "json", "shutil"}
OTHERS = {"aio", "cli", "demo", "domain", "embed", "frontend", "guest", "lab", "run", "testing", "vchan"}

CHILD = """
import os, socket, tempfile, sys
ours, theirs = socket.socketpair()
folder = tempfile.mkdtemp()
for name in set(sys.modules) - before:
    del sys.modules[name]  # what only this program uses
from gntalloc.machine.process import child_main
ours.close()  # the machine's owner is gone, so it ends
child_main(theirs.detach(), folder, "{}")
"""


@cache
def modules(program: str, *flags: str) -> frozenset[str]:
    """Run a program, and give the modules that Python has imported for it at its end."""
    whole = (
        f"import sys; before = set(sys.modules); sys.path.append({SOURCE!r})\n"
        f"{program}\n"
        "print('\\nmodules', *(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, *flags, "-c", whole], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return frozenset(done.stdout.splitlines()[-1].split()[1:])


def heavy(program: str, *flags: str, allowed: set[str]) -> list[str]:
    """Give the heavy modules that a program has, but for those that are allowed and what these import."""
    python = "import " + ", ".join(sorted({"socket", "typing", "ctypes", *allowed})) + NAMED_TUPLE
    needed = modules(python, *flags)
    return sorted((modules(program, *flags) & HEAVY) - needed)


def command(arguments: list[str]) -> str:
    return f"from gntalloc.cli import main\ntry:\n    main({json.dumps(arguments)})\nexcept SystemExit:\n    pass"


def test_the_package_by_itself_imports_nothing() -> None:
    assert modules("import gntalloc", "-I", "-S") == {"gntalloc"}


def test_every_name_can_be_had_each_way() -> None:
    for name in gntalloc.__all__:
        modules_by_name = modules(f"import gntalloc; gntalloc.{name}; from gntalloc import {name}", "-I", "-S")
        assert "gntalloc" in modules_by_name
        assert name in dir(gntalloc)


def test_a_name_that_is_not_there_is_told_of_as_usual() -> None:
    with pytest.raises(AttributeError, match="module 'gntalloc' has no attribute 'Domian'"):
        gntalloc.Domian  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Domian' from 'gntalloc'"):
        from gntalloc import Domian  # type: ignore[attr-defined]  # noqa: F401


@pytest.mark.parametrize("program", ["from gntalloc import *", "import gntalloc; gntalloc.errors.Busy"])
def test_modules_and_stars(program: str) -> None:
    assert "gntalloc.errors" in modules(program, "-I", "-S")


def test_what_a_program_uses_first_is_light() -> None:
    program = "from gntalloc import BadGrantText, Domain, Grant, Machine, current_domain"
    assert heavy(program, "-I", "-S", allowed=set()) == []


def test_the_machines_process_has_what_it_needs() -> None:
    found = modules(CHILD, "-I", "-S")
    assert "gntalloc.machine.server" in found
    assert heavy(CHILD, "-I", "-S", allowed=MACHINE) == []
    assert sorted(OTHERS & {name.split(".")[1] for name in found if name.startswith("gntalloc.")}) == []


ASKS = {name: [name, "--help"] for name in COMMANDS} | {
    f"disk {name}": ["disk", name, "--help"] for name in ("info", "read", "write", "serve", "nbd")
}
OF_A_COMMAND = {
    "demo": {"hashlib", "subprocess"},
    "doctor": {"platform", "subprocess"},
    "lab": {"dataclasses", "pathlib", "subprocess", "tempfile", "urllib", "zipfile", "hashlib", "platform"},
}


@pytest.mark.parametrize("name", ASKS)
def test_a_command_has_what_it_needs(name: str) -> None:
    allowed = COMMAND | OF_A_COMMAND.get(name, set())
    assert heavy(command(ASKS[name]), allowed=allowed) == []


@pytest.mark.parametrize("asked", [["--version"], ["--help"]])
def test_help_imports_no_command(asked: list[str]) -> None:
    found = modules(command(asked))
    assert sorted({f"gntalloc.cli.{name}" for name in COMMANDS} & found) == []
    assert sorted(name for name in found if name.startswith("gntalloc.")) == ["gntalloc.cli", "gntalloc.errors"]
    assert heavy(command(asked), allowed=COMMAND) == []
