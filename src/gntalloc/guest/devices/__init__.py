"""Device files, shaped like the kernel's own: two providers, one seam.

    machine   asks the machine of this package
    kernel    opens /dev/xen

Everything above is written once, on the two protocols here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from gntalloc.abi.gntalloc import DEALLOC_GREF, DeallocGref
from gntalloc.abi.gntdev import UNMAP_GRANT_REF, UnmapGrantRef

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gntalloc.maps import Mapping

__all__ = ["Attached", "Buffer", "DeviceFile", "Devices", "Holders", "Shared", "end_of"]


Buffer: TypeAlias = "bytearray | bytes | memoryview"
"""Memory of a program; `bytes` and read-only views cannot be written."""


class Shared(NamedTuple):
    """Pages that were allocated: the index of the first, their references, and their map."""

    first: int
    refs: tuple[int, ...]
    mapping: Mapping


class Attached(NamedTuple):
    """Pages that were granted, mapped: the index of the first, and their map."""

    first: int
    mapping: Mapping


class Holders(NamedTuple):
    """Who holds some pages. `released` is readable (at its end of file) when nobody does; the receiver closes it."""

    held: bool
    mapped_by: tuple[int, ...]
    released: int | None


def end_of(device: str, index: int, count: int) -> tuple[int, bytes]:
    """Give the request, and its argument, that takes pages off a file's list: DEALLOC_GREF or UNMAP_GRANT_REF."""
    if device == "gntalloc":
        return DEALLOC_GREF, DeallocGref(index, count).pack()
    return UNMAP_GRANT_REF, UnmapGrantRef(index, count).pack()


class DeviceFile(Protocol):
    """An open device file. A dup, a fork and SCM_RIGHTS carry it, and its last close is the driver's release."""

    def ioctl(
        self, request: int, argument: bytearray | bytes | None, *, memory: Sequence[tuple[int, Buffer]] = ()
    ) -> int:
        """Call the driver, which changes `argument` in place. `bytes` is read-only memory, None the null pointer.

        What `argument` points to (GRANT_COPY's segments and buffers) is named in `memory`: its address, as
        ctypes.addressof tells, and itself. Where the driver writes, all of it is copied back.

        Raises:
            DeviceError: the driver's errno; on the machine also its reason.
            MachineGone: there is nobody to ask any more.
        """

    def share(self, domid: int, count: int, *, writable: bool, times: int = 1, keep: bool = False) -> Shared:
        """ALLOC_GREF of `count` pages, and mmap of them all, several `times` in a row.

        They are taken back with the last of this map, in whatever process. With `keep` they stay on the file's list
        as well, until `end` or the file's end.

        Raises:
            DeviceError: the driver's errno, or mmap(2)'s. Nothing is left then.
        """

    def attach(self, granter: int, refs: Sequence[int], *, writable: bool, keep: bool = False) -> Attached:
        """MAP_GRANT_REF of pages of one domain, and mmap of them all, in this order. The rest is as of `share`.

        Raises:
            DeviceError: the driver's errno, or mmap(2)'s. EAGAIN: the granter of read-only pages has not mapped them
                yet. Nothing is left then.
        """

    def end(self, index: int, count: int, *, kept: bool) -> None:
        """Give up what `share` or `attach` has made, as its map is closed: DEALLOC_GREF or UNMAP_GRANT_REF."""

    def notify(self, port: int) -> None:
        """Send an event through a port of evtchn: NOTIFY. It is not waited for."""

    def mmap(self, offset: int, length: int, *, prot: int, shared: bool = True, times: int = 1) -> Mapping:
        """Map `length` bytes at the driver's `offset` (an index), several `times` in a row.

        Raises:
            DeviceError: the driver's errno, or mmap(2)'s.
        """

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, as the system call gives them."""

    def write(self, data: bytes) -> int:
        """How many bytes were taken, as the system call tells."""

    def holders(self, index: int, count: int, *, wait: bool = False) -> Holders:
        """Who holds `count` pages of gntalloc from `index` on.

        Raises:
            NotKnownHere: on real Xen.
        """

    def fileno(self) -> int:
        """Give the descriptor that is this file."""

    @property
    def lost(self) -> bool:
        """Whether the machine or the domain that this was opened in has ended."""

    def close(self) -> None:
        """Close it. Mappings stay."""


class Devices(Protocol):
    """A domain's /dev/xen. `address` is a text that finds it again from another process of this computer."""

    address: str

    @property
    def domid(self) -> int:
        """The number of the domain."""

    @property
    def limit(self) -> int:
        """Pages the domain may have in use at once."""

    @limit.setter
    def limit(self, pages: int) -> None: ...

    def open(self, name: str, flags: int = ...) -> DeviceFile:
        """Open a device: gntalloc, gntdev, evtchn."""

    def is_back(self) -> bool:
        """Tell after MachineGone whether the domain can be talked with again."""

    def reopen(self, name: str, descriptor: int) -> DeviceFile:
        """Take over an open file of that device, by a descriptor that another process gave. It is owned then."""
