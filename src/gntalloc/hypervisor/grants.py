"""Keep a domain's grant table, version 1: which other domain may map which of its pages, and which domains do.

The life of an entry. `pins` counts mappings, of any domain and kind.

    state       permit          map              unmap           end
    free        -> permitted    refused          -               -
    permitted   -               pins + 1         pins - 1        pins = 0: -> free
                                                                 pins > 0: -> ending
    ending      -               refused (*)      pins - 1;       -
                                                 at 0: idle hook

(*) Linux's version 1 table leaves an ending entry valid, so Xen accepts new maps of it. `refuse_while_ending=False`
does the same.

The owner ends an `ending` entry again from the idle hook: nothing is freed behind its back.

Sources: Xen's public grant_table.h (entry layout, status codes), Linux's grant-table.c (references 0-7 are
reserved, a table grows a frame of 512 entries at a time, full means ENOSPC), Xen's common/grant_table.c (what
a mapping is refused for, and with which status).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from gntalloc.abi.grants import (
    BAD_GNTREF,
    GENERAL_ERROR,
    MAX_FRAMES,
    RESERVED_REFS,
    V1_ENTRIES_PER_FRAME,
)
from gntalloc.errors import BooksWrong
from gntalloc.hypervisor.references import References

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["Entry", "GrantTable", "MapRefused", "TableFull"]

Frame = TypeVar("Frame")

# Xen counts mappings of one kind in eight bits, and refuses when the top one is set.
MAX_PINS = 128


class TableFull(Exception):
    """No reference is free and the table may not grow."""


class MapRefused(Exception):
    """Xen would not map the page: `status` is the GNTST code, the text the reason."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(status, why)
        self.status = status
        self.why = why


class Entry(Generic[Frame]):
    """Keep one reference in use: `domid` may map `frame`, writable unless `readonly`."""

    __slots__ = ("domid", "ending", "frame", "mappers", "pins", "readonly")

    def __init__(self, domid: int, frame: Frame, readonly: bool) -> None:
        self.domid = domid
        self.frame = frame
        self.readonly = readonly
        self.ending = False
        self.pins = 0
        self.mappers: dict[int, int] = {}


class Usage(NamedTuple):
    """Count the references of a table."""

    live: int
    free: int
    capacity: int


class GrantTable(Generic[Frame]):
    """Keep the grants of one domain.

    Args:
        owner: the domain whose pages these are.
        max_frames: the most frames, of 512 references each, that the table may have.
        oldest_first: give out the reference that has been free for longest. Linux gives out the one freed last,
            which lets a slow peer map a stranger's page by an old number.
        refuse_while_ending: refuse new maps of a grant that its owner has ended.
    """

    def __init__(
        self,
        owner: int,
        *,
        max_frames: int = MAX_FRAMES,
        oldest_first: bool = True,
        refuse_while_ending: bool = True,
    ) -> None:
        self.owner = owner
        self.on_idle: Callable[[list[tuple[int, Frame]]], None] | None = None  # these entries lost their last mapping
        self._max_frames = max_frames
        self._oldest_first = oldest_first
        self._refuse_while_ending = refuse_while_ending
        self._frames = 1
        self._free = References(range(RESERVED_REFS, V1_ENTRIES_PER_FRAME))
        self._entries: dict[int, Entry[Frame]] = {}

    def permit(self, domid: int, frames: Sequence[Frame], *, readonly: bool) -> list[int]:
        """Grant each of `frames` to `domid` and return the references, or grant none. Any domid is accepted.

        Raises:
            TableFull: the table is at its maximum.
        """
        take = self._free.take_oldest if self._oldest_first else self._free.take_newest
        refs = take(len(frames))
        while len(refs) < len(frames):
            try:
                self._grow()
            except TableFull:
                self._free.extend(refs)
                raise
            refs += take(len(frames) - len(refs))
        self._entries.update(zip(refs, [Entry(domid, frame, readonly) for frame in frames], strict=True))
        return refs

    def end(self, refs: Iterable[int], *, busy: bool = False) -> list[int]:
        """Take grants back, and return those that stay: a domain maps them, or they are `busy`. Call again later."""
        kept: list[int] = []
        freed: list[int] = []
        for ref in refs:
            entry = self._entries[ref]
            if entry.pins or busy:
                entry.ending = True
                kept.append(ref)
            else:
                del self._entries[ref]
                freed.append(ref)
        self._free.extend(freed)
        if not self._entries:
            self._entries.clear()  # gives the memory of very many back
        return kept

    def look(self, ref: int, mapper: int, *, writable: bool) -> Entry[Frame]:
        """Find the entry that `mapper`, the domid by which Xen knows the caller, would map.

        Raises:
            MapRefused: with Xen's status and the reason.
        """
        if ref >= self._frames * V1_ENTRIES_PER_FRAME:
            raise MapRefused(BAD_GNTREF, f"reference {ref} is beyond domain {self.owner}'s grant table")
        entry = self._entries.get(ref)
        if entry is None:
            raise MapRefused(GENERAL_ERROR, f"domain {self.owner} grants nothing under reference {ref}")
        if entry.domid != mapper:
            why = f"reference {ref} of domain {self.owner} is not granted to domain {mapper}"
            raise MapRefused(GENERAL_ERROR, why)
        if writable and entry.readonly:
            why = f"reference {ref} of domain {self.owner} is granted read-only, and a writable map was asked for"
            raise MapRefused(GENERAL_ERROR, why)
        if entry.ending and self._refuse_while_ending:
            why = f"domain {self.owner} has ended grant {ref}; it only waits for the domains that still map it"
            raise MapRefused(GENERAL_ERROR, why)
        if entry.pins >= MAX_PINS:
            raise MapRefused(GENERAL_ERROR, f"reference {ref} is mapped {entry.pins} times already")
        return entry

    def map(self, ref: int, mapper: int, *, writable: bool) -> Entry[Frame]:
        """Map a reference for `mapper`.

        Raises:
            MapRefused: as `look`.
        """
        entry = self.look(ref, mapper, writable=writable)
        entry.pins += 1
        entry.mappers[mapper] = entry.mappers.get(mapper, 0) + 1
        return entry

    def unmap(self, ref: int, mapper: int) -> bool:
        """Undo one `map` of `mapper`. True: it was the last of all, and the caller tells `on_idle` of it."""
        entry = self._entries[ref]
        entry.pins -= 1
        entry.mappers[mapper] -= 1
        if entry.mappers[mapper] < 0:
            raise BooksWrong(f"domain {mapper} has unmapped reference {ref} of domain {self.owner} too often")
        if not entry.mappers[mapper]:
            del entry.mappers[mapper]
        return not entry.pins

    def is_mapped(self, ref: int) -> bool:
        """Say whether any domain maps the reference now."""
        entry = self._entries.get(ref)
        return entry is not None and entry.pins > 0

    def readonly(self, ref: int) -> bool:
        """Say whether a live grant gives its peer no right to write."""
        return self._entries[ref].readonly

    def mapped_by(self, ref: int) -> tuple[int, ...]:
        """List the domids that map the reference now, in order."""
        entry = self._entries.get(ref)
        return tuple(sorted(entry.mappers)) if entry else ()

    @property
    def live(self) -> int:
        """The number of references in use."""
        return len(self._entries)

    def usage(self) -> Usage:
        """Count the references in use, those free without growing, and all that are possible."""
        return Usage(len(self._entries), len(self._free), self._max_frames * V1_ENTRIES_PER_FRAME - RESERVED_REFS)

    def _grow(self) -> None:
        if self._frames >= self._max_frames:
            raise TableFull
        first = self._frames * V1_ENTRIES_PER_FRAME
        self._free.extend(range(first, first + V1_ENTRIES_PER_FRAME))
        self._frames += 1
