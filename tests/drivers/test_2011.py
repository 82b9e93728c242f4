"""What the 2011 code got wrong, and the code after it: each mistake has a test of its name.

Each is told in the first lines of its test, with what must hold instead. All of it holds in either behaviour: what
Linux does on purpose is a switch, what it does by mistake is not.
"""

from __future__ import annotations

import errno
from struct import pack
from typing import TYPE_CHECKING, NamedTuple

import pytest
from fake_program import ADDRESS, ALLOC, Map, Program, refused
from scarce import descriptors_left

from gntalloc.errors import DeviceError
from gntalloc.maps import PAGE_SIZE
from gntalloc.steps import finish_steps
from gntalloc.testing import FakeMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.machine.machine import Machine as Core

COUNT = 4
TABLE = 504  # references of a table of one frame


class Counts(NamedTuple):
    """What must be as it was."""

    in_use: int  # units of the limit
    references: int
    pages: int  # of memory
    extents: int


def counts(program: Program) -> Counts:
    frames = program.machine.frames
    return Counts(program.in_use(), program.references(), frames.pages, frames.extents)


NOTHING = Counts(0, 0, 0, 0)


def all_but(core: Core, left: int) -> Program:
    """A file that has used up the grant table but for `left` references, with room enough below the limit."""
    program = Program(core, 1, "gntalloc")
    program.guest.gntalloc.limit = TABLE + COUNT
    program.alloc(2, TABLE - left)
    return program


@pytest.mark.parametrize("left", range(COUNT))
def test_the_double_decrement_in_the_undo(core: Core, left: int) -> None:
    """An ALLOC that failed at page i took the pages not made yet off the count, and then those made, and one page was
    in both: the limit grew by one each time. The count must be what it was, after any number of failures."""
    filler = all_but(core, left)
    for _ in range(3):
        with refused(errno.ENOSPC, "grant table"):
            Program(core, 1, "gntalloc").alloc(2, COUNT)
        assert filler.in_use() == TABLE - left
    filler.guest.gntalloc.limit = TABLE  # where one too many subtracted would show
    filler.alloc(2, left)
    with refused(errno.ENOSPC, "limit"):
        filler.alloc(2)


def test_the_index_not_put_back(make_core: Callable[..., Core]) -> None:
    """A failed ALLOC left a hole in the file's indexes, and a range over the ALLOCs before and after it was none any
    more. The next ALLOC must get the index that the failed one would have had. (Linux has kept the hole.)"""
    core = make_core()
    filler = all_but(core, 2)
    program = Program(core, 1, "gntalloc")
    program.alloc(2)
    for _ in range(3):
        with refused(errno.ENOSPC, "grant table"):
            program.alloc(2, COUNT)
        assert program.next_index() == PAGE_SIZE
    filler.dealloc(0, COUNT)
    assert program.alloc(2, COUNT).at == PAGE_SIZE
    program.mmap(0, 1 + COUNT).unmap()


def test_the_negative_ref_lost_in_an_unsigned_field(core: Core) -> None:
    """ "No reference is free" came as a negative number, was stored in an unsigned field and never noticed: ALLOC
    succeeded, with a reference that was none. It must fail, and write nothing into the caller's memory."""
    program = all_but(core, 0)
    memory = FakeMemory()
    argument = pack("=HHIQ", 2, 1, 1, 0xABCD).ljust(24, b"\xee")
    there = memory.put(ADDRESS, argument)
    with refused(errno.ENOSPC, "grant table"):
        program.file.ioctl(ALLOC, ADDRESS, memory)
    assert there == argument
    program.dealloc(0, TABLE)
    refs = program.alloc(2, TABLE).refs  # all of them, so a bogus one would be among them
    assert sorted(refs) == list(range(8, 512))


@pytest.mark.parametrize("left", range(1, COUNT))
def test_the_use_after_free_in_the_undo_loop(core: Core, left: int) -> None:
    """The undo walked a list while it freed its elements, so that it could free one twice, or others not at all. Each
    reference that the failed ALLOC had taken must be free again exactly once."""
    filler = all_but(core, left)
    before = counts(filler)
    with refused(errno.ENOSPC):
        Program(core, 1, "gntalloc").alloc(2, COUNT)
    assert counts(filler) == before
    refs = [filler.alloc(2).refs[0] for _ in range(left)]
    assert len(set(refs)) == left
    with refused(errno.ENOSPC, "grant table"):
        filler.alloc(2)


class Meanwhile(FakeMemory):
    """A caller's memory that cannot be written to, and while that is being found out, something happens."""

    def __init__(self, happens: Callable[[], None]) -> None:
        super().__init__()
        self._happens = happens

    def write(self, address: int, data: bytes) -> None:
        self._happens()
        raise DeviceError(errno.EFAULT, f"the {len(data)} bytes at {address:#x} are read-only memory")


def guess(peer: Program) -> Map:
    """Try one reference after the other."""
    for ref in range(8, 512):
        try:
            return peer.map(1, ref)
        except DeviceError:
            continue
    raise AssertionError("nothing is granted")


def test_a_guessed_and_mapped_ref_left_in_use_for_ever(core: Core, behaviour: str) -> None:
    """A peer can guess a reference and map it before the ALLOC fails. The undo then put the page aside with a user that
    did not exist: never freed, always counted. It must be free when the peer lets go, and count until then."""
    program, peer = Program(core, 1, "gntalloc"), Program(core, 2, "gntdev")
    theirs: list[Map] = []
    memory = Meanwhile(lambda: theirs.append(guess(peer)))
    memory.put(ADDRESS, pack("=HHIQ", 2, 1, COUNT, 0).ljust(32, b"\0"))
    with refused(errno.EFAULT):
        program.file.ioctl(ALLOC, ADDRESS, memory)
    if behaviour == "linux":
        program.close()  # without its index nobody else can free them
    else:
        assert program.in_use() == 1
        again = program.alloc(2, COUNT)  # at other indexes: what lingers keeps its own
        program.dealloc(again.at, COUNT)
    assert program.references() == 1
    theirs[0].unmap()
    assert counts(program) == NOTHING


@pytest.mark.parametrize("pages", [2, 3, COUNT])
def test_a_mapping_of_several_pages_that_released_only_its_first(core: Core, pages: int) -> None:
    """mmap raised the use count of every page and munmap lowered that of the first: the others were never freed. All
    of them must be."""
    program = Program(core, 1, "gntalloc")
    program.alloc(2, pages)
    mapped = program.mmap(0, pages)
    program.dealloc(0, pages)
    assert program.in_use() == pages
    mapped.unmap()
    assert counts(program) == NOTHING


@pytest.mark.parametrize("hole", range(COUNT))
def test_a_split_mapping_closed_twice_for_one_count(core: Core, hole: int) -> None:
    """munmap of a part splits a mapping in two, each part was closed for itself, and two closes took away one mmap's
    count: pages still on the file's list were freed. The mapping must count once, until its last part goes."""
    program = Program(core, 1, "gntalloc")
    program.alloc(2, COUNT)
    mapped, other = program.mmap(0, COUNT), program.mmap(0, COUNT)
    other.memory[0] = 7
    for page in (hole, *(page for page in range(COUNT) if page != hole)):
        mapped.unmap(page, 1)
        assert program.in_use() == COUNT
    program.dealloc(0, COUNT)
    assert (program.in_use(), other.memory[0]) == (COUNT, 7)  # the other mapping still counts
    other.unmap()
    assert counts(program) == NOTHING


@pytest.mark.parametrize("left", range(COUNT))
def test_use_counts_kept_when_an_insertion_fails(core: Core, left: int) -> None:
    """When the pages of an mmap could not all be put in place, the use counts it had raised stayed, and with them the
    pages. An mmap that fails must leave no use behind: DEALLOC frees the pages at once."""
    program = Program(core, 1, "gntalloc")
    for _ in range(COUNT):
        program.alloc(2)
    plan = program.plan(0, COUNT)
    with descriptors_left(left), refused(errno.ENOMEM):
        finish_steps(core.carry_out(plan))
    program.dealloc(0, COUNT)
    assert counts(program) == NOTHING


@pytest.mark.parametrize("count", [(1 << 32) - 1, (1 << 32) - COUNT, (1 << 32) - COUNT + 1, 1 << 31, (1 << 30) + 1])
def test_the_count_that_overflows_the_limit_check(core: Core, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages in use plus pages asked for were added in 32 bits, and a count near the top came out below the limit; times
    four, as the size of an array, it came out small too. No count may pass because a sum or a product wraps."""
    program = Program(core, 1, "gntalloc")
    program.alloc(2, COUNT)
    before = counts(program)
    memory = FakeMemory()
    memory.put(ADDRESS, pack("=HHIQ", 2, 1, count, 0).ljust(4096, b"\0"))
    monkeypatch.setattr(
        core.frames, "allocate", lambda *_, **__: pytest.fail("it would take all of the memory there is")
    )
    with refused(errno.ENOSPC, "limit"):
        program.file.ioctl(ALLOC, ADDRESS, memory)
    assert counts(program) == before
    assert program.next_index() == COUNT * PAGE_SIZE


def test_the_mapping_that_walks_the_wrong_list_across_two_allocs(core: Core) -> None:
    """munmap walked the list of all files' pages from the mapping's first one: with a stranger's ALLOC between two of
    one's own it lowered the stranger's count, and freed a page that was listed. It must lower those mmap raised."""
    program, stranger = Program(core, 1, "gntalloc"), Program(core, 1, "gntalloc")
    program.alloc(2)
    stranger.alloc(2)
    program.alloc(2)
    mapped = program.mmap(0, 2)
    theirs = stranger.mmap(0)
    theirs.memory[0] = 7
    program.dealloc(0, 2)
    assert program.in_use() == 3
    mapped.unmap()
    assert (program.in_use(), program.references()) == (1, 1)
    theirs.unmap()
    again = stranger.mmap(0)
    assert again.memory[0] == 7
    again.unmap()
    stranger.dealloc(0)
    assert counts(program) == NOTHING


@pytest.mark.parametrize("left", range(COUNT))
def test_pages_leaked_when_a_grant_fails(core: Core, left: int) -> None:
    """A page was freed through its grant, so the one whose grant could not be had was never freed. Every page of a
    failed ALLOC must go back."""
    filler = all_but(core, left)
    pages = core.frames.pages
    for _ in range(3):
        with refused(errno.ENOSPC, "grant table"):
            Program(core, 1, "gntalloc").alloc(2, COUNT)
    assert (core.frames.pages, core.frames.extents) == (pages, 1)
    filler.close()
    assert counts(filler) == NOTHING
