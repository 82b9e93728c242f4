"""blkif: the numbers and structs of a Xen block device, as x86-64 and ARM lay them out. Pure.

A slot has 112 bytes. Sectors are of 512 bytes here, whatever a device calls its own. A segment is a piece of one page:
sectors `first` to `last` of it, 0 to 7.

Source: Xen's public io/blkif.h.
"""

from __future__ import annotations

import os
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ENTRY", "ERROR", "INFO_READ_ONLY", "NOT_SUPPORTED", "NO_SPACE", "OKAY", "PROTOCOL", "RESPONSE", "SECTOR",
    "SEGMENT", "SEGMENTS", "SEGMENTS_OF_A_PAGE", "TELLS_FULL", "Malformed", "Operation", "Request", "Response",
    "Segment", "pack_direct", "pack_indirect", "pack_segments", "parse_segments",
]  # fmt: skip

ENTRY = 112
"""Bytes of a slot."""
RESPONSE = 16
"""Bytes of a response."""
SECTOR = 512
SECTORS_OF_A_PAGE = 8
SEGMENTS = 11
"""That fit a request itself."""
SEGMENTS_OF_A_PAGE = 512
"""That fit a page of an indirect request."""
_INDIRECT_PAGES = 8
OKAY, ERROR, NOT_SUPPORTED = 0, -1, -2
NO_SPACE = -28
"""Of our own: a backend of ours answers it to a frontend that has published TELLS_FULL; others get ERROR."""
TELLS_FULL = "feature-gntalloc-no-space"
INFO_READ_ONLY = 4
PROTOCOL = "arm-abi" if os.uname().machine in {"aarch64", "arm64"} else "x86_64-abi"
"""What a frontend calls this layout."""

SEGMENT = 8
"""Bytes of a segment."""
_HEAD = Struct("=BBH4xQQ")  # operation, segments, handle, id, sector
_SEGMENT = Struct("=IBB2x")
_DISCARD = Struct("=BBH4xQQQ")  # operation, flag, reserved, id, sector, count
_INDIRECT = Struct("=BBH4xQQH2x8I")  # operation, real operation, segments, id, sector, handle, pages
_RESPONSE = Struct("=QBxh4x")


class Operation(IntEnum):
    """What a request asks for."""

    READ = 0
    WRITE = 1
    BARRIER = 2
    FLUSH = 3
    DISCARD = 5
    INDIRECT = 6
    EXTENTS = 103  # of our own: see gntalloc.frontend.extents


class Malformed(ValueError):
    """A request that cannot be."""


class Segment(NamedTuple):
    """Sectors `first` to `last` of the page with the reference `ref`."""

    ref: int
    first: int
    last: int

    @property
    def length(self) -> int:
        """Bytes."""
        return (self.last - self.first + 1) * SECTOR


class Request(NamedTuple):
    """One request. `sectors` are those of a DISCARD. `pages` hold the segments of an indirect one."""

    operation: int
    id: int
    sector: int
    segments: tuple[Segment, ...] = ()
    handle: int = 0
    sectors: int = 0
    indirect: int = 0  # how many segments its `pages` hold
    pages: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """As it lies in a slot."""
        if self.operation == Operation.DISCARD:
            return _DISCARD.pack(self.operation, 0, 0, self.id, self.sector, self.sectors)
        if self.pages:
            return pack_indirect(self.operation, self.id, self.sector, self.handle, self.indirect, self.pages)
        return pack_direct(self.operation, self.id, self.sector, self.handle, pack_segments(self.segments))

    @classmethod
    def parse(cls, raw: bytes, most: int = SEGMENTS) -> Request:
        """Read a slot that a frontend has filled, of 112 bytes. Nothing but its layout is looked at.

        Args:
            raw: the slot.
            most: segments that an indirect request may have.

        Raises:
            Malformed: too many segments.
        """
        operation, number, handle, id_, sector = _HEAD.unpack_from(raw)
        if operation == Operation.DISCARD:
            return cls(operation, id_, sector, sectors=_DISCARD.unpack_from(raw)[5])
        if operation == Operation.INDIRECT:
            _, real, number, id_, sector, handle, *pages = _INDIRECT.unpack_from(raw)
            if not 0 < number <= most or real not in {Operation.READ, Operation.WRITE}:
                raise Malformed(f"an indirect request for operation {real} with {number} segments, where {most} may be")
            used = tuple(pages[: -(-number // SEGMENTS_OF_A_PAGE)])
            return cls(real, id_, sector, handle=handle, indirect=number, pages=used)
        if number > SEGMENTS:
            raise Malformed(f"a request with {number} segments; it holds {SEGMENTS}")
        return cls(operation, id_, sector, parse_segments(raw, number, _HEAD.size), handle)

    @staticmethod
    def id_of(raw: bytes) -> tuple[int, int]:
        """Operation and id of any slot: where they lie is common to all."""
        operation, _, _, id_, _ = _HEAD.unpack_from(raw)
        return operation, id_


class Response(NamedTuple):
    """The answer to the request of that id."""

    id: int
    operation: int
    status: int

    def pack(self) -> bytes:
        """As it lies in a slot. Its padding is zero, so that nothing of ours leaks."""
        return _RESPONSE.pack(*self)

    @classmethod
    def parse(cls, raw: bytes) -> Response:
        """Read 16 bytes."""
        return cls(*_RESPONSE.unpack(raw))


def pack_direct(operation: int, id_: int, sector: int, handle: int, segments: bytes) -> bytes:
    """Pack a request that holds its segments, as it lies in a slot."""
    return _HEAD.pack(operation, len(segments) // SEGMENT, handle, id_, sector) + segments


def pack_indirect(operation: int, id_: int, sector: int, handle: int, number: int, pages: Sequence[int]) -> bytes:
    """Pack a request whose segments lie in pages of their own."""
    padding = (0,) * (_INDIRECT_PAGES - len(pages))
    return _INDIRECT.pack(Operation.INDIRECT, operation, number, id_, sector, handle, *pages, *padding)


def pack_segments(segments: Sequence[Segment]) -> bytes:
    """Segments in a row."""
    return b"".join(_SEGMENT.pack(*segment) for segment in segments)


def parse_segments(raw: bytes, number: int, at: int = 0) -> tuple[Segment, ...]:
    """Read `number` segments from byte `at` on."""
    return tuple(Segment(*_SEGMENT.unpack_from(raw, at + 8 * each)) for each in range(number))
