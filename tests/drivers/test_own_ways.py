"""An ALLOC whose pages go their own ways, in every way, is still what its pages are, one by one."""

from __future__ import annotations

import contextlib
import errno
import random
from dataclasses import dataclass
from itertools import product
from struct import pack
from typing import TYPE_CHECKING

import pytest
from event_program import pair
from fake_program import MAP, Program, refused
from notifying import EVENT, set_notify

from gntalloc.abi.gntalloc import AllocGref
from gntalloc.drivers import chardev, gntdev
from gntalloc.drivers.chardev import Plan
from gntalloc.drivers.gntalloc import Allocated
from gntalloc.errors import DeviceError
from gntalloc.maps import PAGE_SIZE
from gntalloc.steps import finish_steps
from gntalloc.testing import recount

if TYPE_CHECKING:
    from collections.abc import Callable

    from fake_program import Map

    from gntalloc.drivers.chardev import Piece
    from gntalloc.machine.machine import Machine as Core
    from gntalloc.steps import Steps


@dataclass
class Page:
    ref: int
    listed: bool = True
    maps: int = 0
    pins: int = 0

    @property
    def users(self) -> int:
        return self.listed + self.maps

    @property
    def there(self) -> bool:
        return self.users > 0 or self.pins > 0


class Pages:
    """A granter's pages by index, and what was done to each; the drivers must say the same after each call."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.granter, self.peer = Program(core, 1, "gntalloc"), Program(core, 2, "gntdev")
        self.refuses_ended = core._behaviour.refuse_while_ending
        self.port = pair(core)[1]
        self.pages: list[Page] = []
        self.mine: list[tuple[Map, range]] = []
        self.theirs: list[tuple[Map, list[Page]]] = []

    def alloc(self, count: int) -> None:
        granted = self.granter.alloc(2, count)
        assert granted.at == len(self.pages) * PAGE_SIZE
        self.pages += [Page(ref) for ref in granted.refs]

    def at(self, where: range) -> list[Page]:
        return self.pages[where.start : where.stop]

    def are_listed(self, where: range) -> bool:
        return len(self.at(where)) == len(where) > 0 and all(page.listed for page in self.at(where))

    def call(self, code: int, deed: Callable[[], None]) -> bool:
        if not code:
            deed()
            return True
        with refused(code):
            deed()
        return False

    def dealloc(self, where: range) -> None:
        code = 0 if self.are_listed(where) else errno.EINVAL
        if self.call(code, lambda: self.granter.dealloc(where.start * PAGE_SIZE, len(where))):
            for page in self.at(where):
                page.listed = False

    def mmap(self, where: range) -> None:
        def deed() -> None:
            self.mine.append((self.granter.mmap(where.start * PAGE_SIZE, len(where)), where))

        if self.call(0 if self.are_listed(where) else errno.ENOENT, deed):
            for page in self.at(where):
                page.maps += 1

    def munmap(self, where: range) -> None:
        """The last map, whatever it is of."""
        if self.mine:
            mapped, whole = self.mine.pop()
            mapped.unmap()
            for page in self.at(whole):
                page.maps -= 1

    def map(self, where: range) -> None:
        """By the peer. Pages of different ALLOCs, and twice the same page, may be among them."""
        under = {
            page.ref: page for page in self.pages if page.there
        }  # that of a page that is gone may be another's now
        pages = [under.get(page.ref, page) for page in self.at(where)]
        if not pages:
            return
        fine = all(page.users > 0 or (page.pins > 0 and not self.refuses_ended) for page in pages)

        def deed() -> None:
            self.theirs.append((self.peer.map(1, *[page.ref for page in pages]), pages))

        if self.call(0 if fine else errno.EINVAL, deed):
            for page in pages:
                page.pins += 1

    def unmap(self, where: range) -> None:
        """The peer's last map, whatever it is of."""
        if self.theirs:
            mapped, pages = self.theirs.pop()
            mapped.unmap()
            for page in pages:
                page.pins -= 1

    def promise(self, where: range) -> None:
        """For the first page."""
        code = 0 if self.are_listed(where[:1]) else errno.ENOENT
        self.call(code, lambda: set_notify(self.granter, where.start * PAGE_SIZE, EVENT, self.port))

    def check(self) -> None:
        recount(self.core)
        there = [page for page in self.pages if page.there]
        said = [(grant.ref, grant.users, grant.held) for grant in self.granter.guest.gntalloc.grants()]
        assert sorted(said) == sorted((page.ref, page.users, page.pins > 0) for page in there)
        assert self.granter.references() == len(there)
        for number, page in enumerate(self.pages):
            held = finish_steps(self.granter.guest.gntalloc.holders(self.granter.file, number * PAGE_SIZE, 1))
            assert held == (page.pins > 0, (2,) * (page.pins > 0))

    def end(self) -> None:
        """Everything ends, and nothing is left."""
        while self.theirs:
            self.unmap(range(0))
        while self.mine:
            self.munmap(range(0))
        self.granter.close()
        for page in self.pages:
            page.listed = False
        self.check()
        assert self.granter.in_use() == self.core.frames.pages == 0


DEEDS = ("dealloc", "mmap", "munmap", "map", "unmap", "promise")
PAGES = 4
RANGES = [range(first, end) for first in range(PAGES) for end in range(first + 1, PAGES + 1)]


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("where", RANGES, ids=str)
def test_any_two_parts_of_an_alloc_go_their_own_ways(core: Core, deed: str, where: range) -> None:
    """One part is mapped on both sides first, so that there is something to undo."""
    for then, part in product(DEEDS, RANGES):
        pages = Pages(core)
        pages.alloc(PAGES)
        pages.map(range(1, 3))
        pages.mmap(range(PAGES - 1))
        for each, of in ((deed, where), (then, part)):
            getattr(pages, each)(of)
            pages.check()
        pages.end()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [6, 700], ids=["small", "large"])
def test_in_any_order_of_calls_each_page_is_what_was_done_to_it(
    make_core: Callable[..., Core], behaviour: str, most: int, seed: int
) -> None:
    """Large ALLOCs are those whose calls take steps."""
    chance = random.Random(seed)
    pages = Pages(make_core(behaviour, limit=5000, table_frames=10))
    for _ in range(60):
        deed = chance.choice(("alloc", *DEEDS, *DEEDS))
        if deed == "alloc" or not pages.pages:
            if sum(page.there for page in pages.pages) < 3 * most:
                pages.alloc(chance.randint(1, most))
        else:
            first = chance.randrange(len(pages.pages))
            getattr(pages, deed)(range(first, first + chance.choice((1, 2, 3, chance.randint(1, most)))))
        pages.check()
    pages.end()


@pytest.mark.parametrize(
    "chosen", [(2, 3, 4), (4, 3, 2), (1, 1, 2), (0, 4, 5, 6, 1), (3, 4, 3, 4), (5, 0, 1, 5)], ids=str
)
@pytest.mark.parametrize("cut", [(), (3,), (2, 4)], ids=str)
def test_pages_in_any_order_are_mapped_where_they_were_asked_for(
    core: Core, chosen: tuple[int, ...], cut: tuple[int, ...]
) -> None:
    """Of two ALLOCs, of five pages and three, some of them cut already."""
    pages = Pages(core)
    pages.alloc(5)
    pages.alloc(3)
    mine = pages.granter.mmap(0, 8)
    for number in range(8):
        mine.memory[number * PAGE_SIZE] = 1 + number
    for number in cut:
        pages.promise(range(number, number + 1))
    theirs = pages.peer.map(1, *[pages.pages[number].ref for number in chosen])
    assert [theirs.memory[place * PAGE_SIZE] for place in range(len(chosen))] == [1 + number for number in chosen]
    recount(core)
    theirs.unmap()
    mine.unmap()
    pages.end()


def test_a_part_of_what_is_ended_is_mapped_again(core: Core) -> None:
    """As Linux lets a peer do; ours refuses that."""
    pages = Pages(core)
    pages.alloc(5)
    pages.map(range(5))
    pages.dealloc(range(5))
    pages.map(range(1, 2))
    pages.check()
    pages.map(range(3, 5))
    pages.check()
    pages.end()


# What takes steps.


@pytest.fixture
def large(make_core: Callable[..., Core]) -> Core:
    return make_core("ours", limit=20_000, table_frames=40)


def begin_alloc(program: Program, count: int) -> Steps[Allocated]:
    steps = program.guest.gntalloc.allocate(program.file, AllocGref(2, 1, count, 0))
    assert not isinstance(steps, Allocated)
    return steps


@pytest.mark.parametrize("done", range(1, 40, 3))
def test_while_a_large_alloc_is_made_others_use_the_file_and_guess(large: Core, done: int) -> None:
    """After each step of it another thread allocates in the file, frees, maps; and the peer maps what it guesses."""
    granter, peer = Program(large, 1, "gntalloc"), Program(large, 2, "gntdev")
    steps = begin_alloc(granter, 9000)
    for _ in range(done):
        next(steps, None)
    other = granter.alloc(2, 3)
    assert other.at == 9000 * PAGE_SIZE
    maps = []
    for call in (
        lambda: peer.map(1, 8),
        lambda: peer.map(1, 4000, 4001),
        lambda: granter.mmap(10 * PAGE_SIZE, 2),
        lambda: granter.mmap(other.at + PAGE_SIZE),
        lambda: granter.dealloc(100 * PAGE_SIZE, 3),
    ):
        with contextlib.suppress(DeviceError):
            maps.append(call())
    made = finish_steps(steps)
    assert made is None or len(made.refs) == 36_000  # None: it was made before
    recount(large)
    granter.mmap(8000 * PAGE_SIZE, 2).unmap()  # within the first, and within the second
    granter.dealloc(other.at + 2 * PAGE_SIZE)
    recount(large)
    for each in maps:
        if each is not None:
            each.unmap()
    granter.close()
    recount(large)
    assert granter.in_use() == 0


@pytest.mark.parametrize("done", range(0, 40, 3))
def test_a_large_alloc_that_its_program_does_not_live_to_see(large: Core, done: int) -> None:
    granter = Program(large, 1, "gntalloc")
    steps = begin_alloc(granter, 9000)
    for _ in range(done):
        next(steps, None)
    steps.close()
    there = granter.in_use()
    assert there in {0, 9000}
    assert granter.next_index() == there * PAGE_SIZE
    recount(large)


def test_a_map_of_what_is_freed_meanwhile_is_undone(large: Core) -> None:
    granter = Program(large, 1, "gntalloc")
    granter.alloc(2, 1000)
    for page in range(1000):
        granter.file.unmapped(granter.plan(page * PAGE_SIZE).record)
    steps = granter.file.begin_mmap(0, 1000 * PAGE_SIZE, prot=3, shared=True)
    assert not isinstance(steps, Plan)
    for _ in range(20):
        next(steps)
    granter.dealloc(900 * PAGE_SIZE)
    granter.dealloc(3 * PAGE_SIZE)  # counted already: it goes when the map is undone
    assert granter.in_use() == 999
    with refused(errno.ENOENT):
        finish_steps(steps)
    assert granter.in_use() == 998
    recount(large)


def test_pages_that_linger_are_freed_though_they_are_split_meanwhile(make_core: Callable[..., Core]) -> None:
    """In Linux's behaviour a peer can map again what has ended."""
    core = make_core("linux", limit=20_000, table_frames=40)
    granter, peer = Program(core, 1, "gntalloc"), Program(core, 2, "gntdev")
    refs = [ref for _ in range(3) for ref in granter.alloc(2, 400).refs]
    theirs = peer.map(1, *refs)
    granter.dealloc(0, 1200)
    chores: list[Steps[None]] = []
    core.later = lambda _domid, work: chores.append(work)
    theirs.unmap()  # some steps of which are done, then the peer maps a page of each ALLOC again
    undoing = chores.pop(0)
    next(undoing)
    (ending,) = chores
    again = [peer.map(1, refs[number]) for number in (250, 650, 1050)]
    for _ in ending:
        pass
    for _ in undoing:
        pass
    for each in again:
        each.unmap()
    for chore in chores[1:]:
        for _ in chore:
            pass
    recount(core)
    assert granter.references() == 0


def test_pages_of_two_granters_are_mapped_in_their_order(core: Core) -> None:
    """Domain 2 maps pages of its own, too."""
    granters = [Program(core, domid, "gntalloc") for domid in (1, 2)]
    peer = Program(core, 2, "gntdev")
    refs = [granter.alloc(2, 4).refs for granter in granters]
    mine = [granter.mmap(0, 4) for granter in granters]
    for domid, page in product((0, 1), range(4)):
        mine[domid].memory[page * PAGE_SIZE] = 10 * domid + page + 1
    for order in ("00001111", "01010101", "00110011", "0", "01", "10001"):
        asked, expected = [], []
        for place, which in enumerate(map(int, order)):
            page = order[:place].count(order[place]) % 4
            asked.append(pack("=II", 1 + which, refs[which][page]))
            expected.append(10 * which + page + 1)
        argument = pack("=IIQ", len(asked), 0, 0) + b"".join(asked)
        index = int.from_bytes(peer.ioctl(MAP, argument.ljust(24, b"\0"))[8:16], "little")
        theirs = peer.mmap(index, len(asked))
        assert [theirs.memory[place * PAGE_SIZE] for place in range(len(asked))] == expected
        recount(core)
        peer.unmap_refs(index, len(asked))
        theirs.unmap()
    for each in mine:
        each.unmap()


def test_a_step_maps_a_few_pages_however_many_are_out_of_order(large: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    granter, peer = Program(large, 1, "gntalloc"), Program(large, 2, "gntdev")
    index = peer.map_refs(1, granter.alloc(2, 3000).refs[::-1])
    joined: list[Piece] = []

    def join(pieces: list[Piece], piece: Piece) -> None:
        joined.append(piece)
        chardev.join(pieces, piece)

    monkeypatch.setattr(gntdev, "join", join)
    steps = peer.file.begin_mmap(index, 3000 * PAGE_SIZE, prot=3, shared=True)
    assert not isinstance(steps, Plan)
    done = 0
    with contextlib.suppress(StopIteration):
        while True:
            next(steps)
            assert 0 < len(joined) - done <= 64
            done = len(joined)
    assert len(joined) == 3000
    (record,) = peer.file.records
    peer.file.unmapped(record)
