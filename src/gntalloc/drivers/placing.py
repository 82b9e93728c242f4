"""Find out whether a granter has its pages mapped: it says so by locks, which the kernel keeps. See `descriptions`."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from gntalloc.descriptions import is_placed

if TYPE_CHECKING:
    from gntalloc.drivers.chardev import Extent, Record
    from gntalloc.drivers.grefs import Range
    from gntalloc.steps import Steps

__all__ = ["note_placed", "see_placed"]

_ASKED_AT_ONCE = 8  # maps of an extent: the kernel goes through all locks of a file for each question


def see_placed(extent: Extent) -> Steps[None]:
    """Note, in steps, which pages of an extent its granter has mapped by now."""
    asked = 0
    for loan in list(extent.loans):
        record = loan.holder
        if not loan.granters or record.placed:
            continue
        if is_placed(extent.master, record.mark):
            note_placed(record)
        asked += 1
        if asked % _ASKED_AT_ONCE == 0:
            yield


def note_placed(record: Record) -> None:
    """Note that the granter has, or had, this map of its pages. Now a peer may map them read-only, which seals them."""
    record.placed = True
    for alloc, page, count in cast("list[Range]", record.payload):
        alloc.memory.placed[page : page + count] = b"\1" * count
