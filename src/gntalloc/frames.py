"""Pages: memory files, seals, locks, leases; and who still maps them, as the kernel counts it.

One memory file (memfd) an ALLOC, an `Extent`: all its pages have the same grantee and the same rights. It is never
used again for another allocation, so whoever held on to it can learn nothing of what comes later.

Who maps it? Every mmap, the granter's or a peer's, is made on an open file description of its own, a `Loan`: the
memory file opened once more through /proc/self/fd. The kernel keeps such a description for as long as a descriptor
or a piece of a mapping of it is left in any process; it survives fork and partial munmap, and dies with SIGKILL.
Three things tell about it:

* an OFD lock on a byte of the loan's own says that it lives (the lock dies with the description);
* inotify says when to look again: a description is being closed. The event is queued before munmap(2) returns, but
  also a moment before the lock goes, so an extent in the news is looked at a few times more;
* a write lease on the machine's own description is granted only when no other description is left at all.

A program can take its own lock off, or open the file a second time, so locks are bookkeeping and the lease is
the truth: nothing is let go before both agree. The granter's loans hold write locks, a peer's read locks: a peer
with read-only descriptors cannot make a granter's dead mapping look alive. (A peer that may write can; it gains what
it would by keeping the page mapped.)

Read-only means read-only: a descriptor opened O_RDONLY alone can be opened again for writing by whoever gets it.
So before a read-only grant goes to a peer the file is sealed against all future writable maps; the granter's
earlier map goes on writing, and so does the machine's own `window`, which is made before the seal. A peer that may
write gets a file to which no seal can be added: one of its own would shut out the granter, and the machine.

A descriptor opened with O_PATH is counted by nothing, and can be opened again at any time. So freed pages are emptied,
each when it is freed: whoever kept a way to them finds zeros.

Sources: fcntl(2), memfd_create(2), inotify(7).
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from gntalloc import clock
from gntalloc.errors import DeviceError
from gntalloc.headroom import Headroom
from gntalloc.libc import check, libc
from gntalloc.maps import PAGE_SIZE, Mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Extent", "Frames", "Loan", "NewsOfFrames"]

Holder = TypeVar("Holder")

_F_SEAL_FUTURE_WRITE = 0x0010  # not in fcntl before Python 3.13
_MFD_NOEXEC_SEAL = 0x0008
_FALLOC_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02
_IN_CLOSE = 0x08 | 0x10
_IN_ONESHOT = 0x80000000
_IN_Q_OVERFLOW = 0x4000
_EVENT = struct.Struct("=iIII")
_QUEUE_A_READ = 65536  # bytes of events
_FLOCK = struct.Struct("=hh4xqqi4x")
# Live loans of an extent, of its granter and of its peers each, and one more for each page: a look asks for every one,
# and everybody waits for it. Xen lets a page be mapped so often.
_MOST_LOANS = 128
# How far into their file pages may begin, in pages. A peer that may write may also fill what is before them, which is
# memory that goes with the extent, and that it could have from the kernel itself.
_FARTHEST = 1 << 16
_LOOKS = (0.001, 0.004, 0.016, 0.064, 0.25, 1.0)  # seconds between looks at an extent in the news
_FRESH = 2  # until so many of them it is looked at for every request as well: its lock may go at any moment


class Loan(Generic[Holder]):
    """A description handed to a program, which maps it. `descriptor` is the machine's copy: send it, then close."""

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
    """The pages of one ALLOC."""

    __slots__ = (
        "changed",
        "first",
        "in_use",
        "lent",
        "live",
        "loans",
        "master",
        "next_byte",
        "pages",
        "placed",
        "sealed",
        "watch",
        "window",
    )

    def __init__(self, pages: int, master: int, changed: Callable[[Extent[Holder]], None], *, first: int = 0) -> None:
        self.pages = pages
        self.first = first  # of the pages in the file: before it there is nothing
        self.changed = changed  # its owner's: who holds it may have changed
        self.master = master  # the machine's description: leases and locks are asked on it
        self.in_use = pages  # pages not given back yet
        self.loans: dict[Loan[Holder], None] = {}  # believed alive
        self.live = [0, 0]  # how many of them are its peers', and how many its granter's
        self.lent = False  # somebody outside may hold a description, loan or not
        self.next_byte = 0
        self.placed = bytearray(pages)  # 1: the granter has, or had, this page mapped
        self.sealed = False
        self.watch = -1
        self.window: Mapping | None = None


class NewsOfFrames(NamedTuple, Generic[Holder]):
    """What the kernel told since the last look: loans that died, extents where anything at all was closed."""

    died: list[Loan[Holder]]
    touched: list[Extent[Holder]]


class Frames(Generic[Holder]):
    """The machine's memory. One object a process: it takes charge of SIGIO."""

    def __init__(self) -> None:
        # A program that opens a memory file just while a lease is being tried breaks it, and the kernel says so
        # with SIGIO, whose default is death.
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        try:
            self._inotify = check(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            why = f"this user can have no more inotify instances ({error.strerror}): each machine needs one"
            raise DeviceError(error.errno, f"{why}; end some, or raise fs.inotify.max_user_instances") from error
        self._headroom = Headroom()
        self._watches: dict[int, Extent[Holder]] = {}
        self._suspects: dict[Extent[Holder], tuple[int, float]] = {}  # looks so far, time of the next
        self._fresh: dict[Extent[Holder], None] = {}  # suspects of few looks
        self._next_looks: list[tuple[float, int, Extent[Holder]]] = []  # a heap; the number only keeps order
        self._number = count()
        self.pages = 0  # held by extents, in use or not
        self.extents = 0

    def fileno(self) -> int:
        """Readable when `news` has something to tell."""
        return self._inotify

    def close(self) -> None:
        """Stop listening. The extents live on until they are discarded."""
        os.close(self._inotify)

    # Making and giving back.

    def allocate(
        self, pages: int, changed: Callable[[Extent[Holder]], None], *, writable: bool = True, first: int = 0
    ) -> Extent[Holder]:
        """Make `pages` zeroed pages, all of them present, so that a lack of memory is an error now and no SIGBUS later.

        If peers shall only read them, not `writable`, `seal` can be called later on. They begin at page `first` of
        their file, if that is not too far: who is served by its own mmap call can have them only at that offset.

        Raises:
            DeviceError: ENOMEM, with the reason.
        """
        first = first if first + pages <= _FARTHEST else 0
        self._see_to_room(pages * PAGE_SIZE, f"{pages} pages" if pages != 1 else "1 page")
        try:
            fresh = _memory_file()
        except OSError as error:
            todo = "; raise the machine's ulimit -n" * (error.errno == errno.EMFILE)
            raise DeviceError(errno.ENOMEM, f"no memory file could be made: {error.strerror}{todo}") from error
        try:
            os.posix_fallocate(fresh, first * PAGE_SIZE, pages * PAGE_SIZE)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | (fcntl.F_SEAL_SEAL if writable else 0)
            fcntl.fcntl(fresh, fcntl.F_ADD_SEALS, seals)
            # memfd_create's own description is not counted among the writers a lease looks at; this one is.
            master = _open_again(fresh, os.O_RDWR)
        except OSError as error:
            what = "1 page" if pages == 1 else f"{pages} pages"
            todo = "; each ALLOC needs one: raise the machine's ulimit -n, or allocate more pages at once"
            why = f"{what} could not be had from the computer: {error.strerror}"
            raise DeviceError(errno.ENOMEM, why + todo * (error.errno == errno.EMFILE)) from error
        finally:
            os.close(fresh)
        self.pages += pages
        self.extents += 1
        return Extent(pages, master, changed, first=first)

    def _see_to_room(self, size: int, what: str) -> None:
        shortage = self._headroom.shortage(size)
        if shortage is not None:
            raise DeviceError(errno.ENOMEM, f"{what} cannot be had: {shortage}; free some, or raise that limit")

    def give_back(self, extent: Extent[Holder], page: int, pages: int = 1) -> None:
        """Pages are free. Their contents go at once; the extent goes with its last page."""
        extent.in_use -= pages
        if extent.next_byte:  # else nobody has ever had it
            offset, length = (extent.first + page) * PAGE_SIZE, pages * PAGE_SIZE
            # A hole gives the memory back too. It is refused (EPERM) once the file is sealed, which the granter itself
            # can have done with read-only pages: then there may be no window, and no peer has ever had them.
            punched = libc.fallocate(extent.master, _FALLOC_KEEP_SIZE_PUNCH_HOLE, offset, length) == 0
            if not punched and extent.window is not None:
                extent.window.memory[page * PAGE_SIZE : (page + pages) * PAGE_SIZE] = bytes(length)
        if not extent.in_use:
            self._discard(extent)

    def _discard(self, extent: Extent[Holder]) -> None:
        if extent.watch >= 0:  # a watch keeps the memory alive
            del self._watches[extent.watch]
            libc.inotify_rm_watch(self._inotify, extent.watch)
        if extent.window is not None:
            extent.window.close()
        self._acquit(extent)
        os.close(extent.master)
        self.pages -= extent.pages
        self.extents -= 1

    # Handing out.

    def lend(self, extent: Extent[Holder], holder: Holder, *, writable: bool, granters: bool) -> Loan[Holder]:
        """A description of the extent for one mmap of `holder`. It lives until the kernel has seen its last piece go.

        Raises:
            DeviceError: ENOMEM, it is mapped too often; or the machine is out of descriptors or watches.
        """
        if extent.live[granters] >= _MOST_LOANS + extent.pages:
            whose = "its granter" if granters else "its peers"
            why = f"these {extent.pages} pages of one ALLOC are mapped {extent.live[granters]} times by {whose} already"
            raise DeviceError(errno.ENOMEM, f"{why}; unmap some, or map more pages at once")
        self._see_to_room(PAGE_SIZE, "another mapping")  # a page of ours, or so, for its books
        if extent.watch < 0:  # before the description exists, or its end could be missed
            self._listen(extent)
        try:
            descriptor = _open_again(extent.master, os.O_RDWR if writable else os.O_RDONLY)
        except OSError as error:
            why = f"the machine could not open the page's memory again: {error.strerror}"
            raise DeviceError(errno.ENOMEM, why) from error
        byte: int | None = extent.next_byte
        extent.next_byte += 1
        exclusive = granters and writable
        kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
        except BlockingIOError:
            byte = None
        loan = Loan(extent, descriptor, byte, exclusive, granters, holder)
        extent.loans[loan] = None
        extent.live[granters] += 1
        extent.lent = True
        return loan

    def seal(self, extent: Extent[Holder]) -> None:
        """From now on nobody can make a writable map of it; maps that exist go on writing.

        Raises:
            DeviceError: ENOMEM, no window could be made.
        """
        if extent.sealed:
            return
        self.open_window(extent)
        try:
            fcntl.fcntl(extent.master, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
        except OSError as error:
            raise DeviceError(errno.ENOMEM, f"a read-only grant could not be sealed: {error.strerror}") from error
        extent.sealed = True

    # The machine's own access.

    def open_window(self, extent: Extent[Holder]) -> None:
        """Map the extent into the machine, for as long as it lives: what it has to do later must not fail then.

        Raises:
            DeviceError: ENOMEM.
        """
        if extent.window is not None:
            return
        try:
            window = Mapping(extent.pages * PAGE_SIZE, name="the machine's window")
            try:
                window.place(0, window.length, extent.master, extent.first * PAGE_SIZE)
            except OSError:
                window.close()
                raise
        except OSError as error:
            raise DeviceError(errno.ENOMEM, f"the machine could not map granted pages: {error.strerror}") from error
        extent.window = window

    def page(self, extent: Extent[Holder], page: int) -> memoryview:
        """The bytes of one page, writable whatever was granted. The window must be open."""
        assert extent.window is not None
        return extent.window.memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]

    # Who still holds it.

    def held(self, extent: Extent[Holder]) -> bool:
        """Whether the kernel knows of any description outside the machine, whatever the locks say."""
        if extent.lent and not extent.loans:
            extent.lent = not _lease_is_free(extent.master)
        return extent.lent

    def news(self, *, heard: bool = True) -> NewsOfFrames[Holder]:
        """Look at every extent of which a description was closed. Never blocks.

        Args:
            heard: whether `fileno` is readable, as far as is known. If not, only extents of earlier news are looked at.
        """
        touched = self._due()
        for watch, mask in self._events() if heard else ():
            if mask & _IN_Q_OVERFLOW:  # some news was lost: look everywhere
                for extent in list(self._watches.values()):
                    self._stop_listening(extent)
                    touched[extent] = 0
            elif watch in self._watches and mask & _IN_CLOSE:
                extent = self._watches.pop(watch)  # one event a watch, so that nobody can flood the queue
                extent.watch = -1
                touched[extent] = 0
        died: list[Loan[Holder]] = []
        for extent, looks in touched.items():
            died += self._look(extent)
            if extent.lent and looks < len(_LOOKS):
                self._suspect(extent, looks)
            else:
                self._acquit(extent)
        return NewsOfFrames(died, list(touched))

    @property
    def restless(self) -> bool:
        """Whether `news` should be called before anything else is done, even if nothing has happened."""
        return bool(self._fresh) or (bool(self._next_looks) and self._next_looks[0][0] <= clock.now())

    def patience(self) -> float | None:
        """Seconds until `news` should be called even if nothing happens. None: there is no need."""
        if not self._suspects:
            return None
        return max(0.0, self._next_looks[0][0] - clock.now())

    def _suspect(self, extent: Extent[Holder], looks: int) -> None:
        if extent in self._suspects and self._suspects[extent][0] == looks:
            return  # the time of its next look stands
        due = clock.now() + _LOOKS[looks]
        self._suspects[extent] = looks, due
        heappush(self._next_looks, (due, next(self._number), extent))
        if looks < _FRESH:
            self._fresh[extent] = None
        else:
            self._fresh.pop(extent, None)

    def _acquit(self, extent: Extent[Holder]) -> None:
        self._suspects.pop(extent, None)
        self._fresh.pop(extent, None)

    def _due(self) -> dict[Extent[Holder], int]:
        """Extents recently in the news that must be looked at now, each with the number of looks at it so far."""
        if not self._suspects:
            self._next_looks.clear()
            return {}
        now = clock.now()
        found = {extent: self._suspects[extent][0] for extent in self._fresh}
        while self._next_looks and self._next_looks[0][0] <= now:
            due, _, extent = heappop(self._next_looks)
            looks, really_due = self._suspects.get(extent, (0, 0.0))
            if really_due == due:
                self._acquit(extent)  # until the look that follows
                found[extent] = looks + 1
        return found

    def _events(self) -> Iterator[tuple[int, int]]:
        while True:
            try:
                events = os.read(self._inotify, _QUEUE_A_READ)
            except BlockingIOError:
                return
            for watch, mask, _cookie, _length in _EVENT.iter_unpack(events):
                yield watch, mask
            if len(events) <= _QUEUE_A_READ - _EVENT.size:
                return

    def _look(self, extent: Extent[Holder]) -> list[Loan[Holder]]:
        died = self._bury(extent)
        if extent.watch < 0 and self.held(extent):
            # Somebody is left: listen again, and look again, for it may have gone in between.
            try:
                self._listen(extent)
            except DeviceError:  # no watches to be had just now: stay suspicious
                extent.lent = True
            died += self._bury(extent)
        self.held(extent)
        return died

    def _bury(self, extent: Extent[Holder]) -> list[Loan[Holder]]:
        died = [loan for loan in extent.loans if not _lives(loan)]
        if any(loan.byte is None for loan in extent.loans) and _lease_is_free(extent.master):
            died = list(extent.loans)
        for loan in died:
            del extent.loans[loan]
            extent.live[loan.granters] -= 1
        return died

    def _listen(self, extent: Extent[Holder]) -> None:
        path = f"/proc/self/fd/{extent.master}".encode()
        try:
            extent.watch = check(libc.inotify_add_watch(self._inotify, path, _IN_CLOSE | _IN_ONESHOT))
        except OSError as error:
            why = f"the computer gives no more inotify watches ({error.strerror}); raise fs.inotify.max_user_watches"
            raise DeviceError(errno.ENOMEM, why) from error
        self._watches[extent.watch] = extent

    def _stop_listening(self, extent: Extent[Holder]) -> None:
        libc.inotify_rm_watch(self._inotify, extent.watch)
        del self._watches[extent.watch]
        extent.watch = -1


def _memory_file() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("gntalloc", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # older than Linux 6.3
            raise
        return os.memfd_create("gntalloc", flags)


def _open_again(descriptor: int, flags: int) -> int:
    return os.open(f"/proc/self/fd/{descriptor}", flags | os.O_CLOEXEC)


def _lives(loan: Loan[Holder]) -> bool:
    if loan.byte is None:
        return True
    # Asking as a reader sees write locks only, so a peer's read locks cannot pose as the granter's.
    kind = fcntl.F_RDLCK if loan.exclusive else fcntl.F_WRLCK
    answer = fcntl.fcntl(loan.extent.master, fcntl.F_OFD_GETLK, _FLOCK.pack(kind, os.SEEK_SET, loan.byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _lease_is_free(master: int) -> bool:
    try:
        fcntl.fcntl(master, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return False
    fcntl.fcntl(master, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True
