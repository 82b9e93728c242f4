"""Find out which mappings of the machine's memory still live, as the kernel counts them.

Each mmap of a program, the granter's or a peer's, is made on an open file description of its own, a `Loan`: the
extent's memory file, opened once more through /proc/self/fd. The kernel keeps such a description for as long as a
descriptor or a piece of a mapping of it is left in any process. It survives fork and partial munmap, and ends with
SIGKILL. The kernel tells of it in three ways:

* An OFD lock on a byte of the loan's own says that the loan lives. The lock ends with the description.
* inotify says when to look: a description is being closed. The event is queued before munmap(2) returns, but also a
  moment before the lock goes. So after an event an extent is looked at several times, at growing intervals. An extent
  for which there is no watch, or whose event had no end, is looked at now and then for as long as it is lent.
* A lease on memfd_create's own description, which is the machine's, says whether there is no other one, or just one
  that can be written.

A program can take its own lock off, or open the file a second time. So locks are bookkeeping and the lease is the
truth: an extent is let go only when both agree. While its granter has one description of it and no peer has any by the
locks, the lease says whether that is so; else a peer *hides*. The granter's loans hold write locks, a peer's read
locks, so a peer with read-only descriptors cannot make a granter's dead mapping look alive. (A peer that may write can.
It gains no more than by keeping the page mapped.)

Source: fcntl(2).
"""

from __future__ import annotations

import errno
import os
import signal
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from gntalloc import clock
from gntalloc.descriptions import is_locked, lock, nobody_has, one_writer_has, open_again
from gntalloc.errors import DeviceError
from gntalloc.headroom import Headroom
from gntalloc.inotify import Watches
from gntalloc.maps import PAGE_SIZE
from gntalloc.parties import Parties
from gntalloc.rounds import Rounds
from gntalloc.steps import finish_steps
from gntalloc.timetable import Timetable

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from gntalloc.steps import Steps
    from gntalloc.window import Window

__all__ = ["Extent", "Holder", "Loan", "Loans", "News"]

Holder = TypeVar("Holder")

# The most live loans of an extent: so many of its granter's, so many of its peers', and one more of each for each page.
# A look asks for every loan, and all programs wait for the look. Xen lets a page be mapped so often.
_MOST_LOANS = 128
_INTERVALS = (0.001, 0.004, 0.016, 0.064, 0.25, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before a look, after an event
# Looks, if a loan has ended and no peer has another. Others get more: on a busy computer locks go late.
_USUAL = 6
_UNHEARD = 1.0  # seconds between looks at an extent that no event will tell of, since there is no watch for it
_UNSOLVED = 60.0  # the same, if an event came and none of its looks has seen an end
_ASKED_AT_ONCE = 8  # loans of an extent
_FEW = 4  # extents in the news that need not be looked at in turn
_EAGER = 2  # during the first looks each request looks too, not the clock alone: a lock may go at any moment


class Loan(Generic[Holder]):
    """Stand for a description that a program maps. `descriptor` is the machine's copy: send it, then close it."""

    __slots__ = ("byte", "descriptor", "exclusive", "extent", "granters", "holder")

    def __init__(
        self, extent: Extent[Holder], descriptor: int, byte: int | None, exclusive: bool, granters: bool, holder: Holder
    ) -> None:
        self.extent = extent
        self.descriptor = descriptor
        self.byte = byte  # None: a hostile lock was in the way, so only the lease can tell
        self.exclusive = exclusive  # whether its lock is a write lock
        self.granters = granters
        self.holder = holder

    def close(self) -> None:
        """Close the machine's copy, once."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Extent(Generic[Holder]):
    """Keep the pages of one ALLOC, their memory file, and the loans of it."""

    __slots__ = (
        "changed",
        "first",
        "hidden",
        "in_use",
        "lent",
        "live",
        "loans",
        "master",
        "next_byte",
        "pages",
        "party",
        "placed",
        "sealed",
        "shown",
        "unsolved",
        "watch",
        "window",
    )

    def __init__(self, pages: int, master: int, changed: Callable[[Extent[Holder]], None], *, first: int = 0) -> None:
        self.pages = pages
        self.party: Hashable = None  # those whose extents are looked at in turn with others'
        self.first = first  # where the pages begin in the file: nothing is before them
        self.changed = changed  # tells its owner that the set of its holders may have changed
        self.master = master  # the machine's description, on which leases and locks are asked for
        self.in_use = pages  # pages not given back yet
        self.loans: dict[Loan[Holder], None] = {}  # believed alive
        self.live = [0, 0]  # the number of its peers' loans, and the number of its granter's
        self.lent = False  # a process outside may hold a description, with a loan or without
        self.shown = False  # a process of a peer may: such a one can open another that no loan tells of
        self.hidden = False  # the last look found that a peer does, though it has no loan
        self.next_byte = 0
        self.placed = bytearray(pages)  # 1: the granter has, or had, this page mapped
        self.sealed = False
        self.watch = -1
        self.unsolved = False  # a description was closed, and no loan has been seen to end since
        self.window: Window | None = None


class News(NamedTuple, Generic[Holder]):
    """Tell what changed since the last look: loans that ended, and every extent that was looked at."""

    ended: list[Loan[Holder]]
    touched: list[Extent[Holder]]


class Loans(Generic[Holder]):
    """Make loans of extents, and see them end. A process has one such object, which makes the process ignore SIGIO."""

    def __init__(self) -> None:
        # A program that opens a memory file while a lease is being tried breaks the lease. The kernel tells that with
        # SIGIO, which kills by default.
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        self._watches: Watches[Extent[Holder]] = Watches()
        self._headroom = Headroom()
        self._planned: Timetable[Extent[Holder]] = Timetable(_INTERVALS, _EAGER)
        self._queue: Parties[Extent[Holder]] = Parties()  # to be looked at now
        self._so_far: dict[Extent[Holder], int] = {}  # looks since the last event, of those in the queue
        self._looking: dict[Extent[Holder], Steps[list[Loan[Holder]]]] = {}  # at these in part
        self._unheard: Rounds[Extent[Holder]] = Rounds(_UNHEARD)
        self._unsolved: Rounds[Extent[Holder]] = Rounds(_UNSOLVED)

    def fileno(self) -> int:
        """Give the descriptor that is readable when `news` has something to tell."""
        return self._watches.fileno()

    def close(self) -> None:
        """Stop listening. The extents live on until they are discarded."""
        self._watches.close()

    def lend(self, extent: Extent[Holder], holder: Holder, *, writable: bool, granters: bool) -> Loan[Holder]:
        """Make a description of the extent for one mmap of `holder`. It lives until the kernel drops its last piece.

        Raises:
            DeviceError: ENOMEM: it is mapped too often, or the machine is out of descriptors or watches.
        """
        if extent.live[granters] >= _MOST_LOANS + extent.pages:
            whose = "its granter" if granters else "its peers"
            why = f"these {extent.pages} pages of one ALLOC are mapped {extent.live[granters]} times by {whose} already"
            raise DeviceError(errno.ENOMEM, f"{why}; unmap some, or map more pages at once")
        self._see_to_room(PAGE_SIZE, "another mapping")  # the machine's books of it take about a page
        if extent.watch < 0:  # before the description exists, or its end could be missed
            self._listen(extent)
        try:
            descriptor = open_again(extent.master, writable=writable)
        except OSError as error:
            why = f"the machine could not open the page's memory again: {error.strerror}"
            raise DeviceError(errno.ENOMEM, why) from error
        exclusive = granters and writable
        try:
            byte = lock(descriptor, extent.next_byte, exclusive=exclusive)
        except OSError as error:
            os.close(descriptor)
            why = f"the computer gives no more locks for the page's memory: {error.strerror}"
            raise DeviceError(errno.ENOMEM, why) from error
        extent.next_byte += 1
        loan = Loan(extent, descriptor, byte, exclusive, granters, holder)
        extent.loans[loan] = None
        extent.live[granters] += 1
        extent.lent = True
        if not granters:
            extent.shown = True
        return loan

    def _see_to_room(self, size: int, what: str) -> None:
        shortage = self._headroom.shortage(size)
        if shortage is not None:
            raise DeviceError(errno.ENOMEM, f"{what} cannot be had: {shortage}; free some, or raise that limit")

    def held(self, extent: Extent[Holder]) -> bool:
        """Say whether the kernel knows of any description outside the machine, whatever the locks say."""
        if extent.lent and not extent.loans:
            extent.lent = nobody_has(extent.master, readers=extent.shown) is False
        return extent.lent

    def _find_hidden(self, extent: Extent[Holder]) -> None:
        """Find out whether a peer that has no loan has the extent, as far as the kernel tells that.

        It tells nothing of readers while there are two writers. So a peer can hide while the granter has two maps.
        """
        others, own = extent.live
        if not extent.shown or others or own > 1:
            extent.hidden = False
        elif own:
            extent.shown = extent.hidden = one_writer_has(extent.master) is False
        else:
            extent.shown = extent.hidden = self.held(extent)

    def forget(self, extent: Extent[Holder]) -> None:
        """Stop looking at the extent. Its watch would keep the memory alive."""
        if self._queue:
            self._queue.discard(extent.party, extent)
            self._so_far.pop(extent, None)
            self._looking.pop(extent, None)
        if extent.watch >= 0:
            self._watches.discard(extent.watch)
            extent.watch = -1
        self._look_no_more(extent)

    # Looking.

    def news(self, *, heard: bool = True, until: float | None = None) -> News[Holder]:
        """Look at every extent of which a description was closed. Never blocks.

        Args:
            heard: whether `fileno` is readable, as far as is known. If it is not, only looks that are due are made.
            until: when to stop, by `clock.now`. What is left is looked at next time, each party's extents in turn.
        """
        looks = self._planned.take()  # each look itself plans the one that follows
        rare = [*self._unheard.take(), *self._unsolved.take()] if self._unheard.things or self._unsolved.things else []
        for extent in rare:
            looks.setdefault(extent, len(_INTERVALS))
        for extent, closed in self._watches.take() if heard else ():
            extent.watch = -1
            extent.unsolved = extent.unsolved or closed
            looks[extent] = 0
        began = clock.now() if rare else 0.0
        ended: list[Loan[Holder]] = []
        touched: list[Extent[Holder]] = []
        at_once = len(looks) <= _FEW and not self._queue  # as nearly always
        for extent, so_far in looks.items():
            if at_once and len(extent.loans) < _ASKED_AT_ONCE:
                ended += self._look_at_once(extent, so_far)
                touched.append(extent)
                continue
            self._so_far[extent] = so_far
            self._queue.add(extent.party, extent)
        while self._queue:
            extent = self._queue.take()
            those = self._go_on_looking(extent)
            if those is None:
                self._queue.add(extent.party, extent)
            else:
                ended += those
                touched.append(extent)
            if until is not None and clock.now() >= until:
                break
        if rare:
            for rounds in self._unheard, self._unsolved:
                rounds.took(clock.now() - began)
        return News(ended, touched)

    def _look_at_once(self, extent: Extent[Holder], so_far: int) -> list[Loan[Holder]]:
        """Look at an extent with few loans, and plan the next look. Return the loans that ended."""
        unheard = extent.watch < 0
        ended = finish_steps(self._look(extent))
        self._note_look(extent, so_far, unheard=unheard, found=bool(ended))
        return ended

    def _go_on_looking(self, extent: Extent[Holder]) -> list[Loan[Holder]] | None:
        """Do a piece of a look, and plan the next one at its end. Return the loans that ended. None: there is more."""
        looking = self._looking.pop(extent, None) or self._look(extent)
        unheard = extent.watch < 0
        try:
            next(looking)
        except StopIteration as end:
            those: list[Loan[Holder]] = end.value
        else:
            self._looking[extent] = looking
            return None
        self._note_look(extent, self._so_far.pop(extent), unheard=unheard, found=bool(those))
        return those

    def _note_look(self, extent: Extent[Holder], so_far: int, *, unheard: bool, found: bool) -> None:
        if found:
            extent.unsolved = False
        if unheard and extent.watch >= 0:  # an end may have come just before the watch, and its lock goes later
            so_far = min(so_far, _EAGER)
        self._plan(extent, so_far)

    def _plan(self, extent: Extent[Holder], so_far: int) -> None:
        """See that an extent is looked at again, if that may bring anything."""
        hidden = not extent.loans or extent.hidden
        uncertain = extent.unsolved or hidden or extent.live[False] > 0
        if not extent.lent:
            self._look_no_more(extent)
        elif so_far < _USUAL or (uncertain and extent.watch >= 0 and so_far < len(_INTERVALS)):
            self._planned.plan(extent, so_far)
            self._unheard.discard(extent)
            self._unsolved.discard(extent)
        else:
            self._look_no_more(extent)
            if extent.watch < 0:
                self._unheard.add(extent)
            elif extent.unsolved or hidden:
                self._unsolved.add(extent)

    @property
    def restless(self) -> bool:
        """Whether `news` should be called before anything else is done, even if nothing has happened."""
        if self._planned.eager or self._queue:
            return True
        due = self._next()
        return due is not None and due <= clock.now()

    def patience(self) -> float | None:
        """Give the seconds until `news` should be called even if nothing happens. None: there is no need."""
        if self._queue:
            return 0.0
        due = self._next()
        return None if due is None else max(0.0, due - clock.now())

    def _next(self) -> float | None:
        """Give the time of the next look that is planned."""
        if not (self._planned or self._unheard.things or self._unsolved.things):  # as often
            return None
        times = self._planned.due, self._unheard.due, self._unsolved.due
        return min((due for due in times if due is not None), default=None)

    def _look_no_more(self, extent: Extent[Holder]) -> None:
        """Take the extent off the timetable and the rounds, until its next event."""
        self._planned.discard(extent)
        self._unheard.discard(extent)
        self._unsolved.discard(extent)

    def _look(self, extent: Extent[Holder]) -> Steps[list[Loan[Holder]]]:
        """Drop the loans that ended, and return them. Go on listening if the extent is still held."""
        ended = yield from _drop_ended(extent)
        if extent.watch < 0 and self.held(extent):
            # A holder is left: listen again, and look again, for it may have gone in between.
            try:
                self._listen(extent)
            except DeviceError:  # no watch can be had just now: go on looking
                extent.lent = True
            ended += yield from _drop_ended(extent)
        self._find_hidden(extent)
        if not extent.loans:
            self.held(extent)
        return ended

    def _listen(self, extent: Extent[Holder]) -> None:
        extent.watch = self._watches.add(extent, extent.master)


def _drop_ended(extent: Extent[Holder]) -> Steps[list[Loan[Holder]]]:
    """Find the loans that ended. A peer can make each question slow: the kernel goes through all locks of a file."""
    ended = []
    for number, loan in enumerate(list(extent.loans)):
        if number % _ASKED_AT_ONCE == _ASKED_AT_ONCE - 1:
            yield
        if not _lives(loan):
            ended.append(loan)
    if any(loan.byte is None for loan in extent.loans) and nobody_has(extent.master, readers=extent.shown):
        ended = list(extent.loans)
    for loan in ended:
        del extent.loans[loan]
        extent.live[loan.granters] -= 1
    return ended


def _lives(loan: Loan[Holder]) -> bool:
    if loan.byte is None:
        return True
    locked = is_locked(loan.extent.master, loan.byte, exclusive=loan.exclusive)
    if locked is None:
        loan.extent.unsolved = True  # look again
    return locked is not False
