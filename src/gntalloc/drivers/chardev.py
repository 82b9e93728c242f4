"""Do once what every device file does: open, ioctl, mmap, read and write, and release in time.

This is the part of a guest kernel between a program and a driver. A driver names the requests that it serves. An open
`File` makes the checks, in the kernel's order, and keeps the file alive until its last descriptor *and* its last
mapping are gone.

Sources: mmap(2), ioctl(2); Linux's mm/mmap.c for the order of the checks; ../docs/differences.md.
"""

from __future__ import annotations

import errno
import os
from itertools import count
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

from gntalloc.descriptions import is_at, mark_of
from gntalloc.errors import DeviceError
from gntalloc.maps import PAGE_SIZE, PROT_WRITE
from gntalloc.steps import Steps, finish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gntalloc import frames, holders

__all__ = [
    "Caller",
    "Driver",
    "Extent",
    "File",
    "Frames",
    "Loan",
    "Piece",
    "Plan",
    "Record",
    "Serve",
    "Stream",
    "join",
]

T = TypeVar("T")


class Caller(Protocol):
    """Give a driver the memory of the program that makes a call: copy_from_user and copy_to_user."""

    @property
    def process(self) -> int:
        """The process that has this memory: see `Record.place`."""

    @property
    def by_offset(self) -> bool:
        """Whether it makes its maps itself. Then the index of pages should be their place in their file."""

    def read(self, address: int, size: int) -> bytes:
        """Read `size` bytes of the caller's memory.

        Raises:
            DeviceError: EFAULT: one of them is not readable.
        """

    def write(self, address: int, data: bytes) -> None:
        """Write `data` to the caller's memory.

        Raises:
            DeviceError: EFAULT: one byte is not writable; some may be written then.
        """


class Record:
    """Stand for one mmap call. It lives until its last piece is unmapped, in every process that inherited it."""

    __slots__ = ("addresses", "ends", "file", "length", "loans", "made", "payload", "placed", "process", "turn")

    _turns: ClassVar[Iterator[int]] = count(1)

    def __init__(self, file: File, length: int, payload: object) -> None:
        self.file = file
        self.length = length
        self.payload = payload  # the driver's note of the pages
        self.loans: set[Loan] = set()  # the loans that the front end handed out for this map
        self.made = False  # whether all of them were made, noted by the front end
        self.ends = False  # what is mapped goes off the file's list with it, noted by the front end
        self.addresses: range | None = None  # where the program has it. None: it says so by locks
        self.placed = False  # whether such a lock of the granter's was seen
        self.process = 0  # the program, noted by the front end
        self.turn = next(self._turns)  # of two at one address the later one is there: the other was unmapped for it

    @property
    def mark(self) -> int:
        """The mark by which the program locks the place of this map: see `descriptions`."""
        return mark_of(self.turn)

    def place(self, address: int) -> None:
        """Note that the program has these pages at `address`."""
        self.addresses = range(address, address + self.length)

    def is_at(self, address: int) -> bool:
        """Say whether the program has this map at `address`."""
        if self.addresses is not None:
            return address in self.addresses
        return any(is_at(loan.extent.master, self.mark, address) for loan in self.loans)


Frames: TypeAlias = "frames.Frames[Record]"
Extent: TypeAlias = "holders.Extent[Record]"
Loan: TypeAlias = "holders.Loan[Record]"


class Piece(NamedTuple):
    """Name a run of pages of one extent, to be placed after the piece before it."""

    extent: Extent
    page: int
    pages: int

    @property
    def offset(self) -> int:
        """The place where it begins in the extent's file, in bytes."""
        return (self.extent.first + self.page) * PAGE_SIZE


class Plan(NamedTuple):
    """Say what an mmap shall make. The front end carries it out, piece after piece."""

    record: Record
    pieces: list[Piece]
    writable: bool  # whether its descriptions allow writing; a granter's always do, whatever PROT it asked for
    granters: bool
    locks: bool = False  # the program locks its place, so that the driver can ask for it


Serve: TypeAlias = "Callable[[File, int, Caller], int | Steps[int]]"
"""Serves an ioctl: (file, address, caller) -> the result, or the steps to it."""


class Driver(Protocol):
    """Serve a device. The calls come from `File`, which has checked them."""

    name: str
    unknown_request: int  # the errno for a request that is none of `requests`

    @property
    def requests(self) -> Mapping[int, Serve]:
        """Request number -> the function that serves it."""

    def open(self) -> object:
        """Make the state of a new file."""

    def mmap(self, file: File, offset: int, length: int, *, writable: bool, shared: bool) -> Plan | Steps[Plan]:
        """Say what to map. `length` is whole pages, `offset` aligned."""

    def unmapped(self, record: Record) -> None:
        """Note that the last piece of this mmap is gone."""

    def release(self, file: File) -> None:
        """Give up all that the file has: its last descriptor and its last mapping are gone."""


@runtime_checkable
class Stream(Protocol):
    """Serve read and write too, if a driver's files have them."""

    def read(self, file: File, size: int) -> bytes:
        """Read up to `size` bytes."""

    def write(self, file: File, data: bytes) -> int:
        """Take `data`, and return how many bytes were taken."""


class File:
    """Be an open file: `flags` as given to open(2), `state` is the driver's, `opener` a pid for people to read."""

    __slots__ = ("calls", "closed", "driver", "flags", "opener", "records", "state")

    def __init__(self, driver: Driver, flags: int, *, opener: int = 0) -> None:
        self.driver = driver
        self.flags = flags
        self.opener = opener
        self.closed = False
        self.calls = 0  # that are served in part
        self.records: set[Record] = set()
        self.state = driver.open()

    def ioctl(self, request: int, address: int, caller: Caller) -> int:
        """Serve one ioctl, all of it at once.

        Raises:
            DeviceError: the errno, and why.
        """
        return finish(self.begin_ioctl(request, address, caller))

    def begin_ioctl(self, request: int, address: int, caller: Caller) -> int | Steps[int]:
        """Serve one ioctl, or give the steps to it if it may take long. No driver here looks at the open mode.

        Raises:
            DeviceError: the errno, and why. A step raises it too.
        """
        serve = self.driver.requests.get(request)
        if serve is None:
            what = f"{self.driver.name} has no request {request:#010x}"
            raise DeviceError(self.driver.unknown_request, f"{what}; it has {self._request_names()}")
        result = serve(self, address, caller)
        return result if isinstance(result, int) else self._hold(result)

    def mmap(self, offset: int, length: int, *, prot: int, shared: bool) -> Plan:
        """Plan a map, all of it at once.

        Raises:
            DeviceError: the errno, and why.
        """
        return finish(self.begin_mmap(offset, length, prot=prot, shared=shared))

    def begin_mmap(self, offset: int, length: int, *, prot: int, shared: bool) -> Plan | Steps[Plan]:
        """Make the kernel's own checks of an mmap, then ask the driver for the plan, or the steps to it.

        Raises:
            DeviceError: the errno, and why. A step raises it too.
        """
        mode = self.flags & os.O_ACCMODE
        if length <= 0:
            raise DeviceError(errno.EINVAL, "a map of no bytes was asked for")
        if offset % PAGE_SIZE:
            raise DeviceError(errno.EINVAL, f"offset {offset:#x} is not a multiple of {PAGE_SIZE}")
        if offset < 0 or offset + length >= 1 << 63:
            raise DeviceError(errno.EOVERFLOW, f"offset {offset:#x} plus {length} bytes is beyond any file")
        if mode == os.O_WRONLY:
            raise DeviceError(errno.EACCES, "a file opened O_WRONLY cannot be mapped; open it O_RDWR")
        writable = bool(prot & PROT_WRITE)
        if mode == os.O_RDONLY and shared:
            if writable:
                raise DeviceError(errno.EACCES, "a file opened O_RDONLY cannot be mapped writable; open it O_RDWR")
            shared = False  # so does Linux: a shared map of a read-only file can never become writable
        length = -(-length // PAGE_SIZE) * PAGE_SIZE
        plan = self.driver.mmap(self, offset, length, writable=writable, shared=shared)
        if not isinstance(plan, Plan):
            return self._hold(self._note(plan))
        self.records.add(plan.record)
        return plan

    def _note(self, steps: Steps[Plan]) -> Steps[Plan]:
        plan = yield from steps
        self.records.add(plan.record)
        return plan

    def _hold(self, steps: Steps[T]) -> Steps[T]:
        """Keep the file until these steps are done, as a call holds its file in a kernel."""
        self.calls += 1
        try:
            return (yield from steps)
        finally:
            self.calls -= 1
            self._release_if_last()

    def read(self, size: int) -> bytes:
        """Carry out the system call read.

        Raises:
            DeviceError: EINVAL: this device cannot be read. Or the driver's own error.
        """
        if not isinstance(self.driver, Stream):
            raise DeviceError(errno.EINVAL, f"{self.driver.name} cannot be read; it is for ioctl and mmap")
        return self.driver.read(self, size)

    def write(self, data: bytes) -> int:
        """Carry out the system call write.

        Raises:
            DeviceError: EINVAL: this device cannot be written. Or the driver's own error.
        """
        if not isinstance(self.driver, Stream):
            raise DeviceError(errno.EINVAL, f"{self.driver.name} cannot be written; it is for ioctl and mmap")
        return self.driver.write(self, data)

    def unmapped(self, record: Record) -> None:
        """Forget a map, as the kernel has seen the last piece of `record` go."""
        self.records.remove(record)
        self.driver.unmapped(record)
        self._release_if_last()

    def close(self) -> None:
        """Close the file, as its last descriptor is gone. Mappings still hold it, as they do in Linux."""
        self.closed = True
        self._release_if_last()

    def _release_if_last(self) -> None:
        if self.closed and not (self.records or self.calls):
            self.driver.release(self)

    def _request_names(self) -> str:
        return ", ".join(f"{number:#010x}" for number in self.driver.requests)


def join(pieces: list[Piece], piece: Piece) -> None:
    """Add a piece to others. If it follows the last one within an extent, they become one."""
    last = pieces[-1] if pieces else None
    if last is not None and last.extent is piece.extent and last.page + last.pages == piece.page:
        pieces[-1] = last._replace(pages=last.pages + piece.pages)
    else:
        pieces.append(piece)
