"""Switch where our drivers differ from Linux's. Each switch is a row of docs/differences.md."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LINUX", "OURS", "Behaviour"]


class Behaviour(NamedTuple):
    """Choose between our behaviour and Linux's. The defaults are ours; `LINUX` switches every row but `strict`."""

    count_held_pages: bool = True
    """A page that its owner has released counts against the limit until no peer maps it (Linux: not since 5.17)."""

    put_index_back: bool = True
    """After an ALLOC that failed, the file's next index is what it was (Linux: a hole stays)."""

    undo_unwritable_reply: bool = True
    """An ALLOC whose reply cannot be written grants nothing (Linux: the grants stay, unreachable)."""

    refuse_while_ending: bool = True
    """A grant that its owner has ended takes no new maps (Linux, table version 1: it does)."""

    oldest_reference_first: bool = True
    """The reference that has been free for longest is given out next (Linux: the last freed)."""

    munmap_releases: bool = True
    """The last munmap of a gntdev map releases the grant (Linux in a PVH guest: UNMAP_GRANT_REF too, or close)."""

    permissions_by_number: bool = True
    """A permission in xenstore is for any domain that gets its number (xenstored: only for the one that has it now)."""

    strict: bool = False
    """An ALLOC of no pages, with unknown flags or for no other domain is refused (by default and in Linux: not)."""


OURS = Behaviour()
LINUX = Behaviour(
    count_held_pages=False,
    put_index_back=False,
    undo_unwritable_reply=False,
    refuse_while_ending=False,
    oldest_reference_first=False,
    munmap_releases=False,
    permissions_by_number=False,
)
