"""Carry stretches of a caller's memory in a message, and make a driver's caller of them.

On the wire a region is address u64, length u32, flags u32 (bit 0: writable), and its bytes.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from struct import Struct
from typing import TYPE_CHECKING

from gntalloc.errors import DeviceError
from gntalloc.wire.stream import Garbage

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MAX_REGIONS", "MessageCaller", "Region", "decode_regions", "encode_regions"]

MAX_REGIONS = 4096  # of one ioctl

_REGION = Struct("=QII")
_FEW = 4  # so many regions are tried one by one before the list is searched


class Region:
    """Hold a stretch of a caller's memory.

    Attributes:
        address: where it begins, in the caller's address space.
        data: its bytes, which a driver may change.
        writable: whether the caller may write there.
        written: whether a driver has changed it.
    """

    __slots__ = ("address", "data", "writable", "written")

    def __init__(self, address: int, data: bytearray, *, writable: bool) -> None:
        self.address = address
        self.data = data
        self.writable = writable
        self.written = False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Region):
            return NotImplemented
        return (self.address, self.writable, self.data) == (other.address, other.writable, other.data)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"<Region {self.address:#x} {len(self.data)} bytes{' writable' if self.writable else ''}>"


def encode_regions(regions: Iterable[Region]) -> bytes:
    """Encode regions, one after the other."""
    return b"".join([_REGION.pack(each.address, len(each.data), each.writable) + each.data for each in regions])


def decode_regions(data: bytes) -> list[Region]:
    """Decode regions. Each gets a bytearray of its own.

    Raises:
        Garbage: the last one is not whole, or there are too many.
    """
    if len(data) >= _REGION.size:
        address, length, flags = _REGION.unpack_from(data)
        if len(data) == _REGION.size + length:  # just one, as nearly always
            return [Region(address, bytearray(data[_REGION.size :]), writable=bool(flags & 1))]
    regions: list[Region] = []
    at = 0
    while at < len(data):
        if len(regions) == MAX_REGIONS:
            raise Garbage(f"more than {MAX_REGIONS} regions")
        if len(data) - at < _REGION.size:
            raise Garbage("a region without its head")
        address, length, flags = _REGION.unpack_from(data, at)
        at += _REGION.size
        if len(data) - at < length:
            raise Garbage("a region shorter than it says")
        regions.append(Region(address, bytearray(data[at : at + length]), writable=bool(flags & 1)))
        at += length
    return regions


def _address(region: Region) -> int:
    return region.address


class MessageCaller:
    """Be a driver's caller whose memory is in a message. Outside the message's regions it has none.

    Regions may touch. A copy may then cross several, as far as it gets. See `drivers.chardev.Caller`.
    """

    __slots__ = ("_first", "by_offset", "process", "regions")

    def __init__(self, regions: list[Region], *, process: int = 0, by_offset: bool = False) -> None:
        self.regions = sorted(regions, key=_address) if len(regions) > 1 else regions
        self._first = self.regions[:_FEW]
        self.process = process
        self.by_offset = by_offset

    def read(self, address: int, size: int) -> bytes:
        """Read `size` bytes of the caller's memory.

        Raises:
            DeviceError: EFAULT: not all of them are there.
        """
        for region in self._first:  # nearly always all is in one of few
            start = address - region.address
            if start >= 0 and start + size <= len(region.data):
                return bytes(memoryview(region.data)[start : start + size])
        found = bytearray()
        while len(found) < size:
            region, start = self._find(address + len(found), size - len(found))
            found += region.data[start : start + size - len(found)]
        return bytes(found)

    def write(self, address: int, data: bytes) -> None:
        """Write bytes to the caller's memory.

        Raises:
            DeviceError: EFAULT: not all of them fit; some may be written.
        """
        for region in self._first:
            start = address - region.address
            if start >= 0 and start + len(data) <= len(region.data) and region.writable:
                region.data[start : start + len(data)] = data
                region.written = True
                return
        written = 0
        while written < len(data):
            region, start = self._find(address + written, len(data) - written)
            if not region.writable:
                raise DeviceError(errno.EFAULT, f"the memory at {address + written:#x} is read-only")
            size = min(len(data) - written, len(region.data) - start)
            region.data[start : start + size] = data[written : written + size]
            region.written = True
            written += size

    def _find(self, address: int, size: int) -> tuple[Region, int]:
        at = bisect_right(self.regions, address, key=_address) - 1
        if at >= 0 and address < self.regions[at].address + len(self.regions[at].data):
            return self.regions[at], address - self.regions[at].address
        raise DeviceError(errno.EFAULT, f"the {size} bytes at {address:#x} are not all in the caller's memory")
