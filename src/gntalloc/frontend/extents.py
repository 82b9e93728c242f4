"""Extents: which parts of a disk hold data, and which are holes, that read as zeros. Pure.

blkif has no request for that. A backend of ours answers one of its own, EXTENTS, and says so in the node NODE: its one
segment is a whole page, which gets up to MOST extents, from the request's sector on, each followed by the next. One of
length 0 ends them. Other frontends do not ask, and other backends do not offer it: then all is data.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.frontend.blkif import SECTOR

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["DISCARD_ZEROES", "MOST", "NODE", "Extent", "pack", "parse"]

NODE = "feature-gntalloc-extents"
DISCARD_ZEROES = "feature-gntalloc-discard-zeroes"
"""With this a backend of ours says that what was discarded reads as zeros, which blkif leaves open."""
MOST = 512
"""Extents of one answer."""
_EXTENT = Struct("=Q")  # sectors, and in the lowest bit whether it is a hole


class Extent(NamedTuple):
    """So many bytes that are all data, or all a hole."""

    length: int
    hole: bool


def pack(extents: Iterable[Extent]) -> bytes:
    """As they lie in the page."""
    raw = b"".join(_EXTENT.pack(length // SECTOR << 1 | hole) for length, hole in extents)
    return raw.ljust(MOST * _EXTENT.size, b"\0")


def parse(raw: bytes | bytearray, before: int, length: int) -> tuple[Extent, ...]:
    """Parse what a backend says of a range. Neighbours of one kind become one.

    Args:
        raw: the page.
        before: bytes by which the backend's first extent begins before the range.
        length: bytes of the range. What goes beyond it is left out; a backend that says nothing says that all is data.
    """
    found: list[Extent] = []
    end, done = -before, 0  # of the extent, and of what is told already; seen from the range's first byte
    for (word,) in _EXTENT.iter_unpack(raw):
        size, hole = (word >> 1) * SECTOR, bool(word & 1)
        if not size or done >= length:
            break
        end += size
        more = min(end, length) - done
        if more <= 0:
            continue
        if found and found[-1].hole == hole:
            found[-1] = Extent(found[-1].length + more, hole)
        else:
            found.append(Extent(more, hole))
        done += more
    return tuple(found) or (Extent(length, hole=False),)
