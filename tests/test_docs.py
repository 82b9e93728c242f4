"""Every page of the docs: its links, and its examples as they stand there.

A block of code in sh or python is run, unless the line before it says otherwise, in a comment that readers do not see:

    <!-- file: NAME -->       it is saved under this name, for the blocks after it
    <!-- with: SETTING -->    it is run with what SETTINGS has of that name
    <!-- needs: NAME, … -->   it is run where these programs and headers are
    <!-- run by: TEST -->     that test file runs it
    <!-- not run: WHY -->     it is not run

The blocks of a page are run one after another in one folder. A block of text right after one that was run is what it
prints; … there stands for anything within a line.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *(path.name for path in sorted(ROOT.glob("*.md"))),
    *(f"docs/{path.relative_to(DOCS)}" for path in sorted(DOCS.rglob("*.md"))),
    "examples/README.md",
]
LIMIT = 50.0  # seconds for a block

BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>file|with|needs|run by|not run): (?P<what>[^\n]*) -->\n)?"
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```$"
    r"(?:\n\n```text\n(?P<prints>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
RUN = {"python", "sh"}
CHANGES_THE_COMPUTER = re.compile(r"\b(sudo|apt|apt-get|pip|git|twine|make)\b")

DISK = """
import threading, gntalloc
from gntalloc.frontend.blkback import Backend
from gntalloc.frontend.blkfront import BlockDevice
from gntalloc.frontend.blkif import Operation
from gntalloc.frontend.nodes import Device, attach

open("disk.img", "wb").truncate(1 << 20)
with gntalloc.Machine() as machine:
    dom0, guest = machine.domain(0), machine.domain(1)
    device = Device("vbd", 51712, frontend=1, backend=0)
    attach(dom0.store, device, {"virtual-device": "51712", "device-type": "disk"}, {"mode": "w"})
    with Backend(dom0, device, "disk.img") as backend:
        serving = threading.Thread(target=backend.serve)
        serving.start()
        wanted = [(4096 * number, bytearray(4096)) for number in range(8)]
"""
SETTINGS = {
    "domain": """
import gntalloc
with gntalloc.Machine() as machine:
    domain, peer = machine.domain(1), machine.domain(2)
{block:4}
""",
    "domain 0": """
import gntalloc
from gntalloc.frontend.nodes import Device, attach
with gntalloc.Machine() as machine:
    dom0, guest = machine.domain(0), machine.domain(1)
{block:4}
""",
    "disk": DISK
    + """
        with BlockDevice(guest) as disk:
{block:12}
        backend.stop()
        serving.join(30)
""",
    "disk in asyncio": DISK
    + """
        import asyncio
        from gntalloc import aio
        domain, data = guest, bytes(4096)

        async def example():
{block:12}

        asyncio.run(example())
        backend.stop()
        serving.join(30)
""",
}


class Block(NamedTuple):
    """One block of code of a page."""

    place: str  # page:line
    mark: str
    what: str
    language: str
    text: str
    prints: str | None


def blocks(page: str) -> list[Block]:
    """All fenced blocks, also those in languages that are not run."""
    text = (ROOT / page).read_text()
    return [
        Block(
            f"{page}:{text.count(chr(10), 0, found.start()) + 1}",
            found["mark"] or "",
            found["what"] or "",
            found["language"],
            found["text"],
            found["prints"],
        )
        for found in BLOCK.finditer(text)
    ]


def runs(block: Block) -> bool:
    return block.language in RUN and block.mark in {"", "with", "needs"}


WITH_EXAMPLES = [page for page in PAGES if any(runs(block) for block in blocks(page))]


def command_of(block: Block) -> list[str]:
    if block.language == "sh":
        return ["sh", "-e", "-c", block.text]
    text = block.text
    if block.mark == "with":
        setting = SETTINGS[block.what]
        text = re.sub(r"\{block:(\d+)\}", lambda depth: textwrap.indent(block.text, " " * int(depth[1])), setting)
    return [sys.executable, "-W", "error", "-c", text]


def environment() -> dict[str, str]:
    """As after `. .venv/bin/activate`, and in no domain."""
    here = {name: value for name, value in os.environ.items() if not name.startswith("GNTALLOC_")}
    return {**here, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}


def run(block: Block, folder: Path) -> None:
    """Run it. Whatever it has left in the background ends with it."""
    process = subprocess.Popen(
        command_of(block),
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=LIMIT)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait(LIMIT)
    assert process.returncode == 0, f"{block.place} ended with {process.returncode}:\n{said}"
    if block.prints is not None:
        assert re.fullmatch(pattern(block.prints), said), f"{block.place} prints something else:\n{said}"


def pattern(prints: str) -> str:
    """The text as a regular expression: … is anything within a line, and columns are as wide as they are."""
    words = [re.escape(part) for part in re.split(r"…", prints)]
    return re.sub(r"(?:\\ )+", " +", r"[^\n]*".join(words))


def lacking(names: str) -> str | None:
    for name in names.split(", "):
        if not (Path("/usr/include", name).exists() if name.endswith(".h") else shutil.which(name)):
            return name
    return None


@pytest.mark.timeout(200)
@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_the_examples_of_a_page(page: str, tmp_path: Path) -> None:
    left_out = None
    for block in blocks(page):
        if block.mark == "file":
            (tmp_path / block.what).write_text(block.text)
        elif not runs(block) or CHANGES_THE_COMPUTER.search(block.text):
            continue
        elif block.mark == "needs" and (missing := lacking(block.what)):
            left_out = f"{block.place}: there is no {missing} (apt install gcc libxen-dev)"
        else:
            run(block, tmp_path)
    if left_out:
        pytest.skip(left_out)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_here_says_why(page: str) -> None:
    for block in blocks(page):
        if block.mark == "run by":
            test = ROOT / block.what
            assert test.exists(), block
            known = test.read_text()
            assert page in known or Path(page).name in known, f"{block.place}: {block.what} does not name this page"
        elif block.mark == "with":
            assert block.what in SETTINGS, block
        elif block.mark == "not run":
            assert len(block.what.split()) > 3, block
        elif runs(block):
            assert not CHANGES_THE_COMPUTER.search(block.text), f"{block.place}: this is not for a test, mark it"


def anchors(page: Path) -> set[str]:
    """What a code host makes of the headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    made: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        found.add(name if name not in made else f"{name}-{made[name]}")
        made[name] = made.get(name, 0) + 1
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    source = ROOT / page
    text = re.sub(r"^```.*?^```$", "", source.read_text(), flags=re.DOTALL | re.MULTILINE)
    for path, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if "://" in path:
            continue
        target = source.parent / path if path else source
        assert target.exists(), f"{page} links to {path}, which is not there"
        if anchor:
            assert anchor in anchors(target), f"{page} links to {path}#{anchor}; there is {sorted(anchors(target))}"


def test_every_page_is_in_the_site() -> None:
    index = (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        if page.name != "index.md":
            assert f"]({page.name})" in index, page.name
            assert re.search(rf"^{page.stem}$", index, re.MULTILINE), page.name


def prose() -> list[tuple[str, str]]:
    """Each line of prose with its place: not code, not a table, not what is indented as code."""
    lines = []
    for page in PAGES:
        inside = False
        for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
            if line.startswith("```"):
                inside = not inside
            elif not inside and not line.startswith(("|", "    ", "<!--")):
                lines.append((f"{page}:{number}", line))
    return lines


def test_no_line_of_prose_is_too_long() -> None:
    assert [place for place, line in prose() if len(line) > 120] == []


def test_no_sentence_begins_with_who_or_what() -> None:
    """But a question. A sentence has a noun for its subject."""
    found = [
        f"{place}: {words}"
        for place, line in prose()
        if not line.startswith("#")
        for words in re.findall(r"(?:^[*\- ]*|[.:] )((?:Who|Whoever|Whose|What)\b[^.?]*[^?]{0,1})", line)
    ]
    assert found == []
