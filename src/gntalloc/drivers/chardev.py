"""What every device file does, once: open, ioctl, mmap, read and write, and when release comes.

This is the part of a guest kernel between a program and a driver. A driver says what it serves; an open `File` says
what a program may ask, in what order the checks come, and keeps the file alive until the last descriptor *and* the
last mapping of it are gone.

Sources: mmap(2), ioctl(2); Linux's mm/mmap.c for the order of the checks; ../docs/differences.md.
"""

from __future__ import annotations

import errno
import os
from itertools import count
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

from gntalloc.errors import DeviceError
from gntalloc.maps import PAGE_SIZE, PROT_WRITE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from gntalloc import frames, holders

__all__ = [
    "Caller",
    "Driver",
    "Extent",
    "File",
    "Frame",
    "Frames",
    "Loan",
    "Piece",
    "Plan",
    "Record",
    "Stream",
    "pieces_of",
]


class Caller(Protocol):
    """Whoever makes a call, seen as memory: copy_from_user and copy_to_user."""

    @property
    def process(self) -> int:
        """Whose memory it is: see `Record.place`."""

    @property
    def by_offset(self) -> bool:
        """Whether it maps by calls of its own: pages want an index then that is their place in their file."""

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes of the caller's memory. DeviceError(EFAULT) if any of them is not readable."""

    def write(self, address: int, data: bytes) -> None:
        """Put `data` there. DeviceError(EFAULT) if any byte is not writable; some may then be written."""


class Record:
    """One mmap call: lives until the last piece of it is unmapped, in every process that inherited it."""

    __slots__ = ("addresses", "file", "length", "loans", "payload", "process", "turn")

    _turns: ClassVar[Iterator[int]] = count(1)

    def __init__(self, file: File, length: int, payload: object) -> None:
        self.file = file
        self.length = length
        self.payload = payload  # the driver's: which pages
        self.loans: set[Loan] = set()  # the front end's: what it handed out for this
        self.addresses = range(0)  # the front end's too: where the program has it,
        self.process = 0  # and which program
        self.turn = 0  # of two at one address the later one is there: the other was unmapped to make room

    def place(self, process: int, address: int) -> None:
        """The program `process` has these pages at `address`."""
        self.addresses = range(address, address + self.length)
        self.process = process
        self.turn = next(self._turns)


Frames: TypeAlias = "frames.Frames[Record]"
Extent: TypeAlias = "holders.Extent[Record]"
Loan: TypeAlias = "holders.Loan[Record]"


class Frame(NamedTuple):
    """A page of memory, as a grant table knows it."""

    extent: Extent
    page: int


class Piece(NamedTuple):
    """A run of pages of one extent, to be placed after the piece before it."""

    extent: Extent
    page: int
    pages: int

    @property
    def offset(self) -> int:
        """Where it begins in the extent's file, in bytes."""
        return (self.extent.first + self.page) * PAGE_SIZE


class Plan(NamedTuple):
    """What an mmap shall make: the front end carries it out, piece after piece."""

    record: Record
    pieces: list[Piece]
    writable: bool  # what its descriptions allow; a granter's always do, whatever PROT it asked for
    granters: bool
    confirm: bool = False  # the driver wants to be told when the program has placed it: `Driver.placed`
    locate: bool = False  # the driver wants to know where: `Record.addresses`


class Driver(Protocol):
    """What a driver says of itself. Calls come from `File`, checked."""

    name: str
    unknown_request: int  # the errno for a request that is none of `requests`

    @property
    def requests(self) -> Mapping[int, Callable[[File, int, Caller], int]]:
        """Request number -> what serves it: (file, address, caller) -> result."""

    def open(self) -> object:
        """The state of a new file."""

    def mmap(self, file: File, offset: int, length: int, *, writable: bool, shared: bool) -> Plan:
        """Say what to map. `length` is whole pages, `offset` aligned."""

    def placed(self, record: Record) -> None:
        """The program has placed what a plan with `confirm` said."""

    def unmapped(self, record: Record) -> None:
        """The last piece of this mmap is gone."""

    def release(self, file: File) -> None:
        """The last descriptor and the last mapping are gone."""


@runtime_checkable
class Stream(Protocol):
    """What a driver has besides, if its files can be read and written."""

    def read(self, file: File, size: int) -> bytes:
        """Up to `size` bytes."""

    def write(self, file: File, data: bytes) -> int:
        """How many bytes were taken."""


class File:
    """An open file: `flags` as given to open(2), `state` is the driver's, `opener` a pid for people to read."""

    __slots__ = ("closed", "driver", "flags", "opener", "records", "state")

    def __init__(self, driver: Driver, flags: int, *, opener: int = 0) -> None:
        self.driver = driver
        self.flags = flags
        self.opener = opener
        self.closed = False
        self.records: set[Record] = set()
        self.state = driver.open()

    def ioctl(self, request: int, address: int, caller: Caller) -> int:
        """Serve one ioctl. No driver here looks at the open mode.

        Raises:
            DeviceError: the errno, and why.
        """
        serve = self.driver.requests.get(request)
        if serve is None:
            what = f"{self.driver.name} has no request {request:#010x}"
            raise DeviceError(self.driver.unknown_request, f"{what}; it has {self._request_names()}")
        return serve(self, address, caller)

    def mmap(self, offset: int, length: int, *, prot: int, shared: bool) -> Plan:
        """Check what the kernel checks before any driver is asked, then ask.

        Raises:
            DeviceError: the errno, and why.
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
        self.records.add(plan.record)
        return plan

    def read(self, size: int) -> bytes:
        """What the system call read gives.

        Raises:
            DeviceError: EINVAL this device has no such thing; or what the driver says.
        """
        if not isinstance(self.driver, Stream):
            raise DeviceError(errno.EINVAL, f"{self.driver.name} cannot be read; it is for ioctl and mmap")
        return self.driver.read(self, size)

    def write(self, data: bytes) -> int:
        """What the system call write takes.

        Raises:
            DeviceError: EINVAL this device has no such thing; or what the driver says.
        """
        if not isinstance(self.driver, Stream):
            raise DeviceError(errno.EINVAL, f"{self.driver.name} cannot be written; it is for ioctl and mmap")
        return self.driver.write(self, data)

    def unmapped(self, record: Record) -> None:
        """The kernel has seen the last piece of `record` go."""
        self.records.remove(record)
        self.driver.unmapped(record)
        self._release_if_last()

    def close(self) -> None:
        """The last descriptor is gone. Mappings hold the file, as they do in Linux."""
        self.closed = True
        self._release_if_last()

    def _release_if_last(self) -> None:
        if self.closed and not self.records:
            self.driver.release(self)

    def _request_names(self) -> str:
        return ", ".join(f"{number:#010x}" for number in self.driver.requests)


def pieces_of(frames: Iterable[Frame]) -> list[Piece]:
    """These pages in this order: neighbours within an extent become one piece."""
    pieces: list[Piece] = []
    run: Extent | None = None
    first = end = 0
    for extent, page in frames:
        if extent is run and page == end:
            end += 1
            continue
        if run is not None:
            pieces.append(Piece(run, first, end - first))
        run, first, end = extent, page, page + 1
    if run is not None:
        pieces.append(Piece(run, first, end - first))
    return pieces
