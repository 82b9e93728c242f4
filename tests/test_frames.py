"""Memory files as the kernel counts them: real descriptors, real maps, real processes; and peers that cheat."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import struct
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from limits import status_of
from scarce import descriptors_left

from gntalloc import clock, holders, rounds
from gntalloc.errors import DeviceError
from gntalloc.frames import Frames
from gntalloc.libc import check, libc
from gntalloc.maps import PAGE_SIZE, PROT_READ, Mapping
from gntalloc.testing import Snapshot, assert_cleaned_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc.holders import Extent, Loan

RW = mmap.PROT_READ | mmap.PROT_WRITE
FLOCK = struct.Struct("=hh4xqqi4x")


class Bench:
    """Frames, with a note of every loan that died."""

    def __init__(self) -> None:
        self.frames: Frames[str] = Frames()
        self.died: list[str] = []

    def allocate(self, pages: int = 1, *, writable: bool = True) -> Extent[str]:
        return self.frames.allocate(pages, lambda _extent: None, writable=writable)

    def lend(self, extent: Extent[str], holder: str = "peer", *, writable: bool = True) -> Loan[str]:
        return self.frames.lend(extent, holder, writable=writable, granters=holder.startswith("granter"))

    def map(self, extent: Extent[str], holder: str = "peer", *, writable: bool = True) -> Mapping:
        """What a process does with a loan: map it all, keep no descriptor."""
        loan = self.lend(extent, holder, writable=writable)
        mapping = Mapping(extent.pages * PAGE_SIZE, prot=RW if writable else PROT_READ)
        try:
            mapping.place(0, mapping.length, loan.descriptor, 0)
        finally:
            loan.close()
        return mapping

    def look(self) -> list[str]:
        """Take in the news; who died since the last look."""
        died = [loan.holder for loan in self.frames.news().ended]
        self.died += died
        return died

    def look_until(self, holder: str) -> None:
        """For the end of another process, which is a little later than its wait(2)."""
        import select

        while holder not in self.died:
            self.look()
            if holder not in self.died:
                select.select([self.frames], [], [], self.frames.patience())

    def give_back(self, extent: Extent[str]) -> None:
        for page in range(extent.in_use):
            self.frames.give_back(extent, page)


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = Snapshot.of(None)
    bench = Bench()
    yield bench
    assert (bench.frames.pages, bench.frames.extents) == (0, 0)
    bench.frames.close()
    assert_cleaned_up(None, before)


def in_child(work: Callable[[], None]) -> int:
    """fork; the child does this and then waits to be killed. Its pid, once it has done it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            work()
            os.write(writing, b"!")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"!"
    os.close(reading)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert status_of(pid) == signal.SIGKILL


# Making and giving back.


def test_pages_are_present_zero_and_cannot_be_made_fewer(bench: Bench) -> None:
    extent = bench.allocate(3)
    status = os.fstat(extent.master)
    assert (status.st_size, status.st_blocks * 512) == (3 * PAGE_SIZE, 3 * PAGE_SIZE)
    assert os.pread(extent.master, 3 * PAGE_SIZE, 0) == bytes(3 * PAGE_SIZE)
    loan = bench.lend(extent)
    for size in (0, 2 * PAGE_SIZE, 4 * PAGE_SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(loan.descriptor, size)
    loan.close()
    assert bench.look() == ["peer"]
    assert (bench.frames.pages, bench.frames.extents) == (3, 1)
    bench.give_back(extent)


def test_no_descriptors_is_enomem_and_leaves_nothing(bench: Bench) -> None:
    with descriptors_left(0), pytest.raises(DeviceError) as caught:
        bench.allocate()
    assert caught.value.errno == errno.ENOMEM
    assert "Too many open files" in str(caught.value)


def test_no_memory_is_enomem_and_leaves_nothing(bench: Bench) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_SIZE, limits[1]))
    try:
        with pytest.raises(DeviceError) as caught:
            bench.allocate(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.ENOMEM
    assert "2 pages" in str(caught.value)


def test_no_descriptor_for_a_loan_is_enomem(bench: Bench) -> None:
    extent = bench.allocate()
    with descriptors_left(0), pytest.raises(DeviceError) as caught:
        bench.lend(extent)
    assert caught.value.errno == errno.ENOMEM
    assert not bench.frames.held(extent)
    bench.give_back(extent)


@pytest.mark.parametrize("pages", [1, 3])
def test_loans_of_an_extent_are_bounded_for_each_side(bench: Bench, pages: int) -> None:
    """Each is asked about in every look, so a side that had thousands would make everybody wait."""
    extent = bench.allocate(pages)
    theirs = [bench.map(extent) for _ in range(128 + pages)]
    mine = [bench.map(extent, "granter") for _ in range(128 + pages)]
    for holder in ("peer", "granter"):
        with pytest.raises(DeviceError, match=rf"mapped {128 + pages} times by its {holder}") as caught:
            bench.lend(extent, holder)
        assert caught.value.errno == errno.ENOMEM
    mine.pop().close()
    assert bench.look() == ["granter"]
    with pytest.raises(DeviceError, match="by its peer"):
        bench.lend(extent, "peer")
    mine.append(bench.map(extent, "granter"))
    for mapping in mine + theirs:
        mapping.close()
    bench.look()
    assert extent.live == [0, 0]
    bench.give_back(extent)


def test_no_address_space_for_the_window_is_enomem_and_seals_nothing(bench: Bench) -> None:
    extent = bench.allocate(writable=False)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r".") as caught:
            bench.frames.seal(extent)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert isinstance(caught.value, DeviceError)
    assert caught.value.errno == errno.ENOMEM
    assert not extent.sealed
    bench.give_back(extent)


# Loans live as their mappings do.


def test_a_loan_lives_until_its_last_piece_is_unmapped(bench: Bench) -> None:
    extent = bench.allocate(3)
    mapping = bench.map(extent)
    assert bench.look() == []
    mapping.unmap(0, PAGE_SIZE)
    mapping.unmap(2 * PAGE_SIZE, PAGE_SIZE)
    assert bench.look() == []
    assert bench.frames.held(extent)
    mapping.unmap(PAGE_SIZE, PAGE_SIZE)
    assert bench.look() == ["peer"]
    assert not bench.frames.held(extent)
    mapping.close()
    bench.give_back(extent)


def test_munmap_is_synchronous(bench: Bench) -> None:
    """Not once in a thousand is the news later than the call that made it."""
    extent = bench.allocate()
    for _ in range(1000):
        mapping = bench.map(extent)
        mapping.close()
        assert bench.look() == ["peer"]
    bench.give_back(extent)


def test_each_loan_dies_for_itself(bench: Bench) -> None:
    extent = bench.allocate()
    maps = {name: bench.map(extent, name) for name in ("granter", "a", "b", "granter two", "c")}
    for name in ("b", "granter", "c", "granter two"):
        maps.pop(name).close()
        assert bench.look() == [name]
    maps["a"].close()
    bench.look()
    bench.give_back(extent)


def test_a_loan_survives_fork_and_dies_with_sigkill(bench: Bench) -> None:
    extent = bench.allocate(2)
    mapping = bench.map(extent)
    child = in_child(lambda: None)
    grandchild_too = in_child(lambda: mapping.unmap(0, PAGE_SIZE))
    mapping.close()
    assert bench.look() == []
    kill(child)
    bench.look()
    assert bench.died == []
    assert bench.frames.held(extent)
    kill(grandchild_too)
    bench.look_until("peer")
    assert not bench.frames.held(extent)
    bench.give_back(extent)


def test_a_descriptor_that_was_never_mapped_is_a_loan_too(bench: Bench) -> None:
    extent = bench.allocate()
    loan = bench.lend(extent)
    copy = os.dup(loan.descriptor)
    loan.close()
    assert bench.look() == []
    os.close(copy)
    assert bench.look() == ["peer"]
    bench.give_back(extent)


# Peers that cheat.


def test_a_peer_that_takes_its_lock_off_still_holds(bench: Bench) -> None:
    extent = bench.allocate()
    loan = bench.lend(extent)
    spare = bench.lend(extent, "spare")
    fcntl.fcntl(loan.descriptor, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
    spare.close()
    assert sorted(bench.look()) == ["peer", "spare"]
    assert bench.frames.held(extent)
    loan.close()
    bench.look()
    assert not bench.frames.held(extent)
    bench.give_back(extent)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY])
def test_a_peer_that_opens_the_file_again_still_holds(bench: Bench, flags: int) -> None:
    extent = bench.allocate()
    loan = bench.lend(extent)
    again = os.open(f"/proc/self/fd/{loan.descriptor}", flags)
    loan.close()
    assert bench.look() == ["peer"]
    assert bench.frames.held(extent)
    os.close(again)
    bench.look()
    assert not bench.frames.held(extent)
    bench.give_back(extent)


@pytest.mark.parametrize("how", ["reader", "writer", "reader that was opened again", "writer that was opened again"])
def test_a_peer_that_hides_while_the_granter_has_its_map_is_seen(bench: Bench, how: str) -> None:
    writable = "writer" in how
    extent = bench.allocate()
    granters = bench.map(extent, "granter")
    loan = bench.lend(extent, writable=writable)
    hidden = os.dup(loan.descriptor)
    loan.close()
    if "again" in how:
        again = os.open(f"/proc/self/fd/{hidden}", os.O_RDWR if writable else os.O_RDONLY)
        os.close(hidden)
        hidden = again
    else:
        fcntl.fcntl(hidden, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, 0, 0, 0, 0))
        os.close(os.open(f"/proc/self/fd/{hidden}", os.O_RDONLY))  # an event, so that it is looked at
    bench.look()
    assert bench.died == ["peer"]
    assert (extent.live, extent.hidden) == ([0, 1], True)
    other = bench.map(extent, "granter")  # with two of the granter's nobody can tell
    bench.look()
    other.close()
    bench.look()
    assert (extent.live, extent.hidden) == ([0, 1], True)
    os.close(hidden)
    bench.look()
    assert (extent.live, extent.hidden, extent.shown) == ([0, 1], False, False)
    granters.close()
    bench.look()
    assert not bench.frames.held(extent)
    bench.give_back(extent)


@pytest.mark.parametrize("kind", [fcntl.F_RDLCK, fcntl.F_WRLCK])
def test_a_peer_that_locks_everything_gains_what_a_map_would_give_it(bench: Bench, kind: int) -> None:
    extent = bench.allocate()
    loan = bench.lend(extent)
    fcntl.fcntl(loan.descriptor, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    mine, theirs = bench.map(extent, "granter"), bench.map(extent, "second")
    mine.close()
    theirs.close()
    bench.look()
    assert bench.frames.held(extent)
    loan.close()
    bench.look()
    assert sorted(bench.died) == ["granter", "peer", "second"]
    assert not bench.frames.held(extent)
    bench.give_back(extent)


def test_a_reader_cannot_keep_the_granters_dead_map_alive(bench: Bench) -> None:
    extent = bench.allocate()
    mine = bench.map(extent, "granter")
    loan = bench.lend(extent, writable=False)
    with contextlib.suppress(BlockingIOError):
        fcntl.fcntl(loan.descriptor, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
    mine.close()
    for byte in range(4):
        fcntl.fcntl(loan.descriptor, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    assert bench.look() == ["granter"]
    loan.close()
    assert bench.look() == ["peer"]
    bench.give_back(extent)


def test_a_peer_that_opens_and_closes_without_end_fills_no_queue(bench: Bench) -> None:
    extent, other = bench.allocate(), bench.allocate()
    loan, quiet = bench.lend(extent), bench.lend(other, "quiet")
    for flags in (os.O_RDONLY, os.O_RDWR) * 1000:  # two kinds of event, or the queue makes one of them all
        os.close(os.open(f"/proc/self/fd/{loan.descriptor}", flags))
    events = [mask for _, mask in bench.frames._watches._events()]
    assert len(events) <= 2  # the one it was told of, and that the watch is spent
    extent.watch = -1  # these events are read now: as if the look had come
    bench.frames._watches.things.clear()
    quiet.close()
    loan.close()
    other.watch = -1
    for each in (extent, other):
        bench.frames._planned.plan(each, 0)
    assert sorted(bench.look()) == ["peer", "quiet"]
    bench.give_back(extent)
    bench.give_back(other)


def test_a_peer_that_may_write_cannot_add_seals(bench: Bench) -> None:
    """With F_SEAL_FUTURE_WRITE of a peer's the granter could not map again, nor the machine empty a page."""
    extent = bench.allocate(2)
    loan = bench.lend(extent)
    for seal in (0x0010, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SEAL):
        with pytest.raises(PermissionError):
            fcntl.fcntl(loan.descriptor, fcntl.F_ADD_SEALS, seal)
    bench.frames.give_back(extent, 0)
    loan.close()
    bench.look()
    bench.frames.give_back(extent, 1)


def test_a_granter_that_seals_its_read_only_pages_itself_harms_itself(bench: Bench) -> None:
    extent = bench.allocate(2, writable=False)
    loan = bench.lend(extent, "granter")
    fcntl.fcntl(loan.descriptor, fcntl.F_ADD_SEALS, 0x0010 | fcntl.F_SEAL_SEAL)
    with pytest.raises(DeviceError, match="Operation not permitted"):
        bench.frames.seal(extent)
    loan.close()
    bench.look()
    bench.give_back(extent)


@pytest.mark.parametrize("writable", [True, False])
def test_what_was_freed_is_empty_whoever_kept_a_way_to_it(bench: Bench, writable: bool) -> None:
    """A descriptor opened with O_PATH counts for no lease, and can be opened again at any time."""
    extent = bench.allocate(2, writable=writable)
    mine = bench.map(extent, "granter")
    mine.memory[:6] = mine.memory[PAGE_SIZE : PAGE_SIZE + 6] = b"secret"
    if not writable:
        bench.frames.seal(extent)
    loan = bench.lend(extent, writable=writable)
    path = os.open(f"/proc/self/fd/{loan.descriptor}", os.O_PATH)
    loan.close()
    mine.close()
    bench.look()
    assert not bench.frames.held(extent)
    bench.give_back(extent)
    again = os.open(f"/proc/self/fd/{path}", os.O_RDONLY)
    assert os.pread(again, 2 * PAGE_SIZE, 0) == bytes(2 * PAGE_SIZE)
    os.close(again)
    os.close(path)


def test_an_open_during_the_look_does_not_kill(bench: Bench) -> None:
    """Opening breaks a lease, and the kernel tells with SIGIO, whose default is death."""
    assert signal.getsignal(signal.SIGIO) == signal.SIG_IGN
    extent = bench.allocate()
    loan = bench.lend(extent)

    child = os.fork()
    if not child:
        while True:
            os.close(os.open(f"/proc/self/fd/{loan.descriptor}", os.O_RDONLY))
    loan.close()
    for _ in range(2000):
        extent.loans.clear()
        assert bench.frames.held(extent)
        bench.look()
    kill(child)
    while bench.frames.held(extent):
        bench.look()
    bench.give_back(extent)


# Seals and the window.


def test_sealed_pages_can_be_written_by_maps_that_exist_and_by_the_machine(bench: Bench) -> None:
    extent = bench.allocate(2, writable=False)
    mine = bench.map(extent, "granter")
    bench.frames.seal(extent)
    bench.frames.seal(extent)  # once is enough
    theirs = bench.map(extent, writable=False)
    mine.memory[:4] = b"mine"
    assert bytes(theirs.memory[:4]) == b"mine"
    with pytest.raises(PermissionError):
        bench.map(extent, "late")
    assert extent.window is not None
    mine.memory[PAGE_SIZE] = 1
    bench.frames.give_back(extent, 1)
    assert (theirs.memory[0], theirs.memory[PAGE_SIZE]) == (ord("m"), 0)
    theirs.close()
    mine.close()
    bench.look()
    bench.frames.give_back(extent, 0)


@pytest.mark.parametrize("writable", [True, False])
def test_a_page_freed_among_others_is_empty_at_once(bench: Bench, writable: bool) -> None:
    extent = bench.allocate(3, writable=writable)
    mine = bench.map(extent, "granter")
    mine.memory[:] = b"\xff" * (3 * PAGE_SIZE)
    if not writable:
        bench.frames.seal(extent)
    theirs = bench.map(extent, writable=writable)
    bench.frames.give_back(extent, 1)
    assert bytes(theirs.memory[PAGE_SIZE : 2 * PAGE_SIZE]) == bytes(PAGE_SIZE)
    assert theirs.memory[PAGE_SIZE - 1] == theirs.memory[2 * PAGE_SIZE] == 0xFF
    theirs.close()
    mine.close()
    bench.look()
    bench.frames.give_back(extent, 0)
    bench.frames.give_back(extent, 2)


def test_the_memory_of_many_pages_goes_back_piece_by_piece(bench: Bench) -> None:
    """Also if nobody ever mapped them: to take it all back at once is long."""
    extent = bench.allocate(2000)
    before = os.fstat(extent.master).st_blocks
    bench.frames.give_back(extent, 0, 1500)
    assert os.fstat(extent.master).st_blocks <= before // 2
    bench.frames.give_back(extent, 1500, 500)


def test_an_event_just_when_a_look_is_due_is_not_the_last(bench: Bench) -> None:
    extent = bench.allocate()
    kept = bench.map(extent, "granter")
    for _ in range(300):
        bench.map(extent).close()
        assert bench.look() == ["peer"]
        patience = bench.frames.patience()
        assert patience is not None
        time.sleep(min(patience, 0.001))  # the due time of the next look, as exactly as can be met
        os.close(os.open(f"/proc/self/fd/{extent.master}", os.O_RDONLY))
        bench.look()
    kept.close()
    assert bench.look() == ["granter"]
    bench.give_back(extent)
    assert bench.frames.patience() is None


def test_a_busy_neighbour_is_not_looked_at_for_ever(bench: Bench) -> None:
    """However often news is asked for, an extent in it is looked at a few times more, and then left alone."""
    extent = bench.allocate()
    kept = bench.map(extent, "granter")
    bench.map(extent).close()
    deadline = time.monotonic() + 20
    while (patience := bench.frames.patience()) is not None or not bench.died:
        bench.look()
        assert time.monotonic() < deadline, patience
    kept.close()
    bench.look()
    bench.give_back(extent)


def test_a_lock_that_goes_long_after_its_event_is_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy computer that may be more than the second and a bit for which every extent in the news is looked at."""
    moment = clock.now()
    monkeypatch.setattr(clock, "now", lambda: moment)
    lives = holders._lives
    monkeypatch.setattr(holders, "_lives", lambda _loan: True)  # the kernel has not got round to it
    monkeypatch.setattr(holders, "nobody_has", lambda _master, readers: False)
    extent = bench.allocate()
    bench.map(extent).close()
    bench.look()
    for _ in range(8):
        patience = bench.frames.patience()
        assert patience is not None, "nobody looks any more"
        moment += patience
        bench.look()
    assert not bench.died
    monkeypatch.setattr(holders, "_lives", lives)
    patience = bench.frames.patience()
    assert patience is not None
    moment += patience
    bench.look()
    assert bench.died == ["peer"]
    bench.give_back(extent)


# Extents of which no event tells.


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let so many seconds pass, by a clock that stands still otherwise."""
    moment = clock.now()
    monkeypatch.setattr(clock, "now", lambda: moment)

    def pass_by(seconds: float) -> None:
        nonlocal moment
        moment += seconds

    return pass_by


def look_for(bench: Bench, seconds: float, wait: Callable[[float], None]) -> int:
    """Look whenever the bench asks for it, for so long. How often that was."""
    looks = 0
    while (patience := bench.frames.patience()) is not None and patience <= seconds:
        wait(patience)
        seconds -= patience
        bench.look()
        looks += 1
    wait(seconds)
    return looks


def no_watches(monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(libc, "inotify_add_watch", refuse)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM, errno.EACCES])
@pytest.mark.parametrize("hidden", [False, True])
def test_without_a_watch_the_end_is_seen_however_late_it_comes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, wait: Callable[[float], None], code: int, hidden: bool
) -> None:
    extent = bench.allocate()
    mine, theirs = bench.map(extent, "granter"), bench.lend(extent)
    if hidden:
        fcntl.fcntl(theirs.descriptor, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
    no_watches(monkeypatch, code)
    mine.close()
    bench.look()
    assert look_for(bench, 1000, wait) < 1100
    assert bench.frames.held(extent)
    theirs.close()
    look_for(bench, 1.1, wait)
    assert sorted(bench.died) == ["granter", "peer"]
    assert not bench.frames.held(extent)
    bench.give_back(extent)
    assert bench.frames.patience() is None


def test_a_watch_that_can_be_had_again_is_taken(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, wait: Callable[[float], None]
) -> None:
    extent = bench.allocate()
    mine, theirs = bench.map(extent, "granter"), bench.map(extent)
    with monkeypatch.context() as meanwhile:
        no_watches(meanwhile)
        theirs.close()
        bench.look()
        look_for(bench, 100, wait)
        assert extent.watch < 0
    look_for(bench, 100, wait)
    assert bench.frames.patience() is None  # an event will tell
    mine.close()
    assert bench.look() == ["granter"]
    bench.give_back(extent)


def test_a_watch_that_the_kernel_took_away_is_made_again(bench: Bench, wait: Callable[[float], None]) -> None:
    """So it goes where a watch is renewed just when another processor carries out the event that ends it."""
    extent = bench.allocate()
    mapping = bench.map(extent)
    check(libc.inotify_rm_watch(bench.frames.fileno(), extent.watch))
    bench.look()
    look_for(bench, 200, wait)  # until nobody looks any more without an event
    mapping.close()
    assert bench.look() == ["peer"]
    bench.give_back(extent)


def test_very_many_without_a_watch_cost_little(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, wait: Callable[[float], None]
) -> None:
    extents = [bench.allocate() for _ in range(400)]
    loans = [bench.lend(extent, str(number)) for number, extent in enumerate(extents)]
    spare = [bench.lend(extent, "spare") for extent in extents]
    no_watches(monkeypatch)
    for loan in spare:
        loan.close()
    bench.look()
    look_for(bench, 100, wait)
    for loan in loans:
        loan.close()
    bench.died.clear()
    most = 0
    deadline = 40
    while len(bench.died) < len(loans):
        patience = bench.frames.patience()
        assert patience is not None
        wait(patience)
        most = max(most, len(bench.look()))
        deadline -= 1
        assert deadline, len(bench.died)
    assert most <= 16
    for extent in extents:
        bench.give_back(extent)


def test_looks_that_take_long_are_rare() -> None:
    things = rounds.Rounds[int](1.0)
    things.add(1)
    things.took(0.25)
    assert things.due is not None
    assert things.due > clock.now() + 20


def test_an_event_without_an_end_is_never_forgotten(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, wait: Callable[[float], None]
) -> None:
    """The lock of a process that the computer lets run once an hour."""
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(holders, "_lives", lambda _loan: True)
        meanwhile.setattr(holders, "nobody_has", lambda _master, readers: False)
        extent = bench.allocate()
        bench.map(extent).close()
        bench.look()
        assert look_for(bench, 3600, wait) < 100
    look_for(bench, 61, wait)
    assert bench.died == ["peer"]
    bench.give_back(extent)


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EACCES, errno.EINVAL])
def test_a_lease_that_cannot_be_asked_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, wait: Callable[[float], None], code: int
) -> None:
    """For want of memory: it is asked again. Root gave the file away, or fs.leases-enable is 0: locks decide."""
    real = fcntl.fcntl

    def refuse(descriptor: int, command: int, argument: Any = 0) -> Any:
        if command == fcntl.F_SETLEASE:
            raise OSError(code, os.strerror(code))
        return real(descriptor, command, argument)

    extent = bench.allocate()
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(fcntl, "fcntl", refuse)
        bench.map(extent).close()
        assert bench.look() == ["peer"]
        look_for(bench, 100, wait)
        assert bench.frames.held(extent) == (code == errno.ENOMEM)
    look_for(bench, 61, wait)
    assert not bench.frames.held(extent)
    bench.give_back(extent)


def test_no_lock_for_a_loan_is_enomem_and_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def refuse(descriptor: int, command: int, argument: Any = 0) -> Any:
        if command == fcntl.F_OFD_SETLK:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        return real(descriptor, command, argument)

    extent = bench.allocate()
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(fcntl, "fcntl", refuse)
        with pytest.raises(DeviceError, match="no more locks") as caught:
            bench.lend(extent)
    assert caught.value.errno == errno.ENOMEM
    assert len(os.listdir("/proc/self/fd")) == before
    assert (extent.loans, extent.live, extent.lent) == ({}, [0, 0], False)
    bench.give_back(extent)


def in_a_child(program: Callable[[], object]) -> int:
    """Run in a process of its own, which may change its user. Returns its exit status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            program()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(status_of(child))


def test_a_peer_that_takes_the_rights_away_keeps_nothing() -> None:
    """fchmod(0): the machine can neither open the memory nor watch it, if it is not root's."""

    def program() -> None:
        if os.getuid() == 0:
            os.setresuid(65534, 65534, 65534)
            libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: or /proc/self would be root's
        bench = Bench()
        extent = bench.allocate()
        mine, theirs = bench.map(extent, "granter"), bench.lend(extent)
        os.fchmod(theirs.descriptor, 0)
        mine.close()
        assert bench.look() == ["granter"]
        assert extent.watch >= 0
        os.fchmod(theirs.descriptor, 0)
        bench.map(extent, "granter").close()  # no peer can forbid that
        theirs.close()
        assert sorted(bench.look()) == ["granter", "peer"]
        assert not bench.frames.held(extent)

    assert in_a_child(program) == 0


def test_pages_come_back_while_another_program_has_all_watches() -> None:
    """In a user namespace of its own, where the number of watches can be chosen."""
    apart = 77

    def program() -> None:
        most = Path("/proc/sys/user/max_inotify_watches")
        try:
            check(libc.unshare(0x10000000))  # CLONE_NEWUSER
            most.write_text("1000")
        except OSError:
            os._exit(apart)
        bench = Bench()
        extent = bench.allocate()
        mine, theirs = bench.map(extent, "granter"), bench.map(extent)
        most.write_text("0")
        mine.close()
        until(bench, time.monotonic() + 2)  # more than an event's first looks
        assert bench.died == ["granter"]
        assert extent.watch < 0
        with pytest.raises(DeviceError, match="max_user_watches"):
            bench.map(extent)
        theirs.close()
        until(bench, time.monotonic() + 30, lambda: len(bench.died) == 2)
        assert bench.died == ["granter", "peer"]
        assert not bench.frames.held(extent)

    status = in_a_child(program)
    if status == apart:
        pytest.skip("no user namespace can be made here")
    assert status == 0


def until(bench: Bench, deadline: float, done: Callable[[], bool] = lambda: False) -> None:
    """Look whenever the bench asks for it."""
    while time.monotonic() < deadline and not done():
        patience = bench.frames.patience()
        left = max(0.0, deadline - time.monotonic())
        time.sleep(left if patience is None else min(left, patience))
        bench.look()


# News that was lost.


def test_an_overflow_of_the_queue_means_looking_everywhere(bench: Bench) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = most // 2 + 200
    if hard != resource.RLIM_INFINITY and hard < enough + 200:
        pytest.skip(f"{enough} descriptors are needed to fill the queue, and {hard} can be had")
    resource.setrlimit(resource.RLIMIT_NOFILE, (enough + 200, hard))
    try:
        extents = [bench.allocate() for _ in range(enough)]
        for number, extent in enumerate(extents):
            bench.lend(extent, str(number)).close()
        assert len(bench.look()) == enough
        for extent in extents:
            assert not bench.frames.held(extent)
            bench.give_back(extent)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
