"""Pages of one ALLOC are kept together until some go their own way: little memory, few steps, and the same answers."""

from __future__ import annotations

import errno
import tracemalloc
from struct import pack
from types import GeneratorType
from typing import TYPE_CHECKING

import pytest
from fake_program import ADDRESS, DEALLOC, Program, refused
from notifying import BYTE, set_notify

from gntalloc.frames import Frames
from gntalloc.holders import Extent
from gntalloc.machine.machine import Machine as Core
from gntalloc.maps import PAGE_SIZE
from gntalloc.testing import recount
from gntalloc.wire.memory import MessageCaller, Region

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.steps import Steps

MILLION = 1_000_000
LARGEST = 65536


@pytest.fixture
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without memory behind them: a million would be 4 GB."""

    def begin_allocate(
        frames: Frames[object], pages: int, changed: Callable[[Extent[object]], None], **_: object
    ) -> Steps[Extent[object]]:
        frames.pages += pages
        frames.extents += 1
        yield
        return Extent(pages, -1, changed)

    def give_back(frames: Frames[object], extent: Extent[object], _page: int, pages: int = 1) -> None:
        extent.in_use -= pages
        assert extent.in_use >= 0
        assert pages <= 1024, "it takes the kernel too long to empty so many at once"
        if not extent.in_use:
            frames.pages -= extent.pages
            frames.extents -= 1

    monkeypatch.setattr(Frames, "begin_allocate", begin_allocate)
    monkeypatch.setattr(Frames, "give_back", give_back)


@pytest.mark.usefixtures("_no_memory")
def test_a_million_grants_take_little_memory_and_end_in_pieces() -> None:
    core = Core(limit=1 << 21, table_frames=2200)
    core.create(1, uid=0)
    program = Program(core, 1, "gntalloc")
    program.alloc(2, LARGEST)  # what is made once for all
    tracemalloc.start()
    try:
        left = MILLION
        while left:
            left -= len(program.alloc(2, min(LARGEST, left)).refs)
        took, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert program.references() == MILLION + LARGEST
    assert took <= 32 << 20
    chores: list[Steps[None]] = []
    core.later = lambda _domid, work: chores.append(work)
    program.close()
    steps = sum(1 for chore in chores for _ in chore)
    assert steps >= MILLION // 1024
    assert (program.references(), program.in_use(), core.frames.extents) == (0, 0, 0)
    core.frames.close()


def spans(program: Program) -> list[tuple[int, int, bool]]:
    """Of each span in turn: its pages, its users, and whether it is on the list."""
    there = sorted({span for _, span in program.guest.table.each()}, key=lambda span: span.page)
    return [(span.count, span.users, span.listed) for span in there]


def test_an_alloc_is_one_until_pages_go_their_own_way(core: Core) -> None:
    program, peer = Program(core, 1, "gntalloc"), Program(core, 2, "gntdev")
    granted = program.alloc(2, 16)
    assert spans(program) == [(16, 1, True)]
    whole = program.mmap(granted.at, 16)
    assert spans(program) == [(16, 2, True)]
    some = program.mmap(granted.at + 2 * PAGE_SIZE, 3)
    assert spans(program) == [(2, 2, True), (3, 3, True), (11, 2, True)]
    recount(core)
    theirs = peer.map(1, *granted.refs[1:6])
    assert [count for count, _, _ in spans(program)] == [1, 1, 3, 1, 10]
    recount(core)
    program.dealloc(granted.at + 8 * PAGE_SIZE, 8)
    assert spans(program)[-2:] == [(2, 2, True), (8, 1, False)]
    with refused(errno.EINVAL, f"no page at index {granted.at + 8 * PAGE_SIZE:#x}"):
        program.dealloc(granted.at, 16)
    with refused(errno.ENOENT, f"no page at index {granted.at + 8 * PAGE_SIZE:#x}"):
        program.mmap(granted.at + 7 * PAGE_SIZE, 2)
    set_notify(program, granted.at + 7 * PAGE_SIZE + 5, BYTE, 0)
    recount(core)
    whole.unmap()
    some.unmap()
    recount(core)
    program.dealloc(granted.at, 8)
    assert spans(program) == [(1, 0, False), (3, 0, False), (1, 0, False)]  # those that the peer maps
    recount(core)
    theirs.unmap()
    assert spans(program) == []


def test_references_out_of_order_are_kept_as_well(core: Core) -> None:
    program, peer = Program(core, 1, "gntalloc"), Program(core, 2, "gntdev")
    singles = [program.alloc(2) for _ in range(20)]
    for single in singles[::3] + singles[1::3]:
        program.dealloc(single.at)
    granted = program.alloc(2, 30)
    mapped = program.mmap(granted.at, 30)
    order = (*granted.refs[10:20], *granted.refs[:5], granted.refs[29], granted.refs[3])
    theirs = peer.map(1, *order)
    for page in range(30):
        mapped.memory[page * PAGE_SIZE] = page + 1
    there = [theirs.memory[at * PAGE_SIZE] for at in range(len(order))]
    assert there == [granted.refs.index(ref) + 1 for ref in order]
    recount(core)
    theirs.unmap()
    mapped.unmap()


def test_pages_taken_apart_one_by_one_are_dealt_with_in_steps() -> None:
    """A program may have each page go its own way. No call of it keeps others waiting for all of them."""
    pages = 2000
    core = Core(limit=2 * pages)
    for domid in (1, 2):
        core.create(domid, uid=0)
    program, peer = Program(core, 1, "gntalloc"), Program(core, 2, "gntdev")
    granted = program.alloc(2, pages)
    backwards = granted.refs[::-1]
    index = peer.map_refs(1, backwards)
    least = pages // 64 - 1

    def steps_of(work: object) -> int:
        assert isinstance(work, GeneratorType)
        return sum(1 for _ in work)

    assert steps_of(peer.file.begin_mmap(index, pages * PAGE_SIZE, prot=3, shared=True)) >= least
    assert len(spans(program)) == pages
    assert steps_of(program.file.begin_mmap(granted.at, pages * PAGE_SIZE, prot=3, shared=True)) >= 2 * least
    chores: list[Steps[None]] = []
    core.later = lambda _domid, work: chores.append(work)
    argument = MessageCaller([Region(ADDRESS, bytearray(pack("=QII", granted.at, pages, 0)), writable=False)])
    assert steps_of(program.file.begin_ioctl(DEALLOC, ADDRESS, argument)) >= least
    assert sum(1 for chore in chores for _ in chore) >= least
    for file in (peer.file, program.file):
        for record in list(file.records):  # as no description was made for them, they end here
            file.unmapped(record)
    peer.close()
    assert sum(1 for chore in chores for _ in chore) >= 2 * least
    program.close()
    core.settle()
    assert (program.references(), core.frames.extents) == (0, 0)
    core.frames.close()
