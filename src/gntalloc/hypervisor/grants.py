"""Keep a domain's grant table, version 1: which other domain may map which of its pages, and which domains do.

Pages that are granted together are one `Grant`. As long as they have all else in common they are one `Span`, however
many they are. When something happens to some of them, the span is split at their borders: each part goes its own way.
The table is a flat list: the span that each reference belongs to, and the number of its page within the grant.

The life of a span. `pins` counts mappings.

    state       permit          map              unmap           end
    free        -> permitted    refused          -               -
    permitted   -               pins + 1         pins - 1        pins = 0: -> free
                                                                 pins > 0: -> ending
    ending      -               refused (*)      pins - 1;       -
                                                 at 0: idle hook

(*) Linux's version 1 table leaves an ending entry valid, so Xen accepts new maps of it. `refuse_while_ending=False`
does the same.

The owner ends an `ending` span again from the idle hook: nothing is freed behind its back.

Sources: Xen's public grant_table.h (entry layout, status codes), Linux's grant-table.c (references 0-7 are
reserved, a table grows a frame of 512 entries at a time, full means ENOSPC), Xen's common/grant_table.c (what
a mapping is refused for, and with which status).
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeVar

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
    from collections.abc import Callable, Iterator

__all__ = ["Grant", "GrantTable", "MapRefused", "Span", "TableFull"]

Memory = TypeVar("Memory")
AnyGrant = TypeVar("AnyGrant", bound="Grant")  # type: ignore[type-arg]
AnySpan = TypeVar("AnySpan", bound="Span")  # type: ignore[type-arg]

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


class Grant(Generic[Memory]):
    """Keep what pages that are granted together have in common: `domid` may map those of `memory`.

    `refs` are their references, in order. Those of pages that were taken back may be other pages' by now. `in_a_row`
    says whether each is one more than that before it.
    """

    __slots__ = ("domid", "in_a_row", "memory", "readonly", "refs")

    def __init__(self, domid: int, memory: Memory, readonly: bool) -> None:
        self.domid = domid
        self.memory = memory
        self.readonly = readonly
        self.refs = array("I")
        self.in_a_row = True


class Span(Generic[AnyGrant]):
    """Keep `count` pages of a grant, from `page` on, which have all else in common too."""

    __slots__ = ("count", "ending", "grant", "page", "pins")

    def __init__(self, grant: AnyGrant) -> None:
        self.grant = grant
        self.page = 0
        self.count = 0
        self.ending = False
        self.pins = 0

    @property
    def refs(self) -> array[int]:
        """The references of its pages."""
        return self.grant.refs[self.page : self.page + self.count]

    @property
    def mapped_by(self) -> tuple[int, ...]:
        """The domids that map it: none but that of the grant can."""
        return (self.grant.domid,) if self.pins else ()

    def part(self, page: int, count: int) -> Self:
        """Make another span for some of its pages, to which the same has happened."""
        part = type(self)(self.grant)
        part.page = page
        part.count = count
        part.ending = self.ending
        part.pins = self.pins
        return part


class Usage(NamedTuple):
    """Count the references of a table."""

    live: int
    free: int
    capacity: int


class GrantTable(Generic[AnySpan]):
    """Keep the grants of one domain.

    Args:
        owner: the domain whose pages these are.
        max_frames: the most frames, of 512 references each, that the table may have.
        oldest_first: give out the reference that has been free for longest. Linux gives out the one freed last,
            which lets a slow peer map a stranger's page by an old number.
        refuse_while_ending: refuse new maps of a grant that its owner has ended.

    Attributes:
        live: the number of references in use.
        on_idle: is told the spans that have lost their last mapping.
        on_split: is told a span that was split, and the new one for a part of it.
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
        self.live = 0
        self.on_idle: Callable[[list[AnySpan]], None] | None = None
        self.on_split: Callable[[AnySpan, AnySpan], None] | None = None
        self._max_frames = max_frames
        self._oldest_first = oldest_first
        self._refuse_while_ending = refuse_while_ending
        self._frames = 1
        self._free = References(range(RESERVED_REFS, V1_ENTRIES_PER_FRAME))
        self._slots: list[AnySpan | None] = [None] * V1_ENTRIES_PER_FRAME
        self._pages = array("I", bytes(4 * V1_ENTRIES_PER_FRAME))

    def permit(self, span: AnySpan, count: int) -> None:
        """Grant `count` pages with a new span, or grant none. Any domid will do.

        Raises:
            TableFull: the table is at its maximum.
        """
        self.reserve(span, count)
        self.grant(span)

    def grant(self, span: AnySpan) -> None:
        """Grant the pages that references were reserved for, all at once."""
        span.count = len(span.grant.refs)

    def reserve(self, span: AnySpan, count: int) -> None:
        """Take `count` references more for a new span, or none. Until `grant` they grant nothing: nobody may have them.

        Raises:
            TableFull: the table is at its maximum.
        """
        refs = self._take(count)
        grant, pages = span.grant, self._pages
        page, first = len(grant.refs), refs[0]
        if grant.in_a_row and page and grant.refs[-1] + 1 != first:
            grant.in_a_row = False
        grant.refs.extend(refs)
        if count == 1:
            pages[first] = page
        elif refs == list(range(first, first + count)):
            pages[first : first + count] = array("I", range(page, page + count))
        else:
            grant.in_a_row = False
            for at, ref in enumerate(refs, page):
                pages[ref] = at
        self._put(span, page, count, span)
        self.live += count

    def free(self, span: AnySpan, page: int, count: int) -> None:
        """Give references back: of pages of a span that nobody maps, or that was never granted."""
        self._put(span, page, count, None)
        self._free.extend(span.grant.refs[page : page + count])
        self.live -= count

    def _take(self, count: int) -> list[int]:
        take = self._free.take_oldest if self._oldest_first else self._free.take_newest
        refs = take(count)
        while len(refs) < count:
            try:
                self._grow()
            except TableFull:
                self._free.extend(refs)
                raise
            refs += take(count - len(refs))
        return refs

    def _put(self, those: AnySpan, page: int, count: int, span: AnySpan | None) -> None:
        """Let the references of these pages, which are among `those`, belong to a span, or to none."""
        grant, slots = those.grant, self._slots
        if grant.in_a_row:
            first = grant.refs[page]
            slots[first : first + count] = [span] * count
        else:
            for ref in grant.refs[page : page + count]:
                slots[ref] = span

    def end(self, span: AnySpan, *, busy: bool = False) -> bool:
        """Take a span's grants back. False: they stay, as a domain maps them, or they are `busy`. Call again later."""
        if span.pins or busy:
            span.ending = True
            return False
        self.free(span, span.page, span.count)
        return True

    def look(self, ref: int, mapper: int, *, writable: bool) -> AnySpan:
        """Find the span of which `mapper`, the domid by which Xen knows the caller, would map a page.

        Raises:
            MapRefused: with Xen's status and the reason.
        """
        if ref >= len(self._slots):
            raise MapRefused(BAD_GNTREF, f"reference {ref} is beyond domain {self.owner}'s grant table")
        span = self._slots[ref]
        if span is None or not span.count:  # free, or reserved
            raise MapRefused(GENERAL_ERROR, f"domain {self.owner} grants nothing under reference {ref}")
        grant = span.grant
        if grant.domid != mapper:
            why = f"reference {ref} of domain {self.owner} is not granted to domain {mapper}"
            raise MapRefused(GENERAL_ERROR, why)
        if writable and grant.readonly:
            why = f"reference {ref} of domain {self.owner} is granted read-only, and a writable map was asked for"
            raise MapRefused(GENERAL_ERROR, why)
        if span.ending and self._refuse_while_ending:
            why = f"domain {self.owner} has ended grant {ref}; it only waits for the domains that still map it"
            raise MapRefused(GENERAL_ERROR, why)
        if span.pins >= MAX_PINS:
            raise MapRefused(GENERAL_ERROR, f"reference {ref} is mapped {span.pins} times already")
        return span

    def page_of(self, ref: int) -> int:
        """Give the number of a reference's page within its grant."""
        return self._pages[ref]

    def map(self, grant: Grant[Any], page: int, count: int) -> None:
        """Map pages that `look` has found, all of one span."""
        for span in self.isolate(grant, page, count):
            assert span is not None
            span.pins += 1

    def unmap(self, grant: Grant[Any], page: int, count: int) -> list[AnySpan]:
        """Undo one `map`. Return the spans that have lost their last mapping; the caller tells `on_idle` of them."""
        idle = []
        for span in self.isolate(grant, page, count):
            assert span is not None
            span.pins -= 1
            if span.pins < 0:
                ref = span.grant.refs[span.page]
                raise BooksWrong(f"domain {grant.domid} has unmapped reference {ref} of domain {self.owner} too often")
            if not span.pins:
                idle.append(span)
        return idle

    def readonly(self, ref: int) -> bool:
        """Say whether a live grant gives its peer no right to write."""
        span = self._slots[ref]
        assert span is not None
        return bool(span.grant.readonly)

    def mapped_by(self, ref: int) -> tuple[int, ...]:
        """List the domids that map the reference now, in order."""
        span = self._slots[ref] if ref < len(self._slots) else None
        return span.mapped_by if span is not None else ()

    # Spans.

    def spans(self, grant: Grant[Any], page: int, count: int) -> Iterator[AnySpan | None]:
        """Give the spans of these pages of a grant, in order; None for a page that was taken back.

        The first and the last may have other pages too.
        """
        slots, refs = self._slots, grant.refs
        end = page + count
        while page < end:
            span = slots[refs[page]]
            if span is None or span.grant is not grant:
                page += 1
                yield None
            else:
                page = span.page + span.count
                yield span

    def isolate(self, grant: Grant[Any], page: int, count: int, most: int = 1 << 32) -> Iterator[AnySpan | None]:
        """Give the spans of just these pages, of at most `most` pages each. Those that have others too are split.

        None stands for a page that was taken back. What is done with a span may end it.
        """
        slots, refs = self._slots, grant.refs
        end = page + count
        while page < end:
            span = slots[refs[page]]
            if span is None or span.grant is not grant:
                page += 1
                yield None
                continue
            last = min(end, page + most)
            if span.page < page:
                self.split(span, page)
                span = slots[refs[page]]
                assert span is not None
            if span.page + span.count > last:
                self.split(span, last)
                span = slots[refs[page]]
                assert span is not None
            page = span.page + span.count
            yield span

    def split(self, span: AnySpan, page: int) -> None:
        """Split a span before a page of its grant. The smaller part becomes the new span, as its slots are changed."""
        before, after = page - span.page, span.page + span.count - page
        if before <= after:
            part = span.part(span.page, before)
            span.page = page
        else:
            part = span.part(page, after)
        span.count -= part.count
        self._put(part, part.page, part.count, part)
        if self.on_split is not None:
            self.on_split(span, part)

    def each(self) -> Iterator[tuple[int, AnySpan]]:
        """Give every reference that grants a page, with its span. They may change meanwhile."""
        for ref, there in enumerate(list(self._slots)):
            if there is not None:
                span = self._slots[ref]
                if span is not None and span.count:
                    yield ref, span

    def usage(self) -> Usage:
        """Count the references in use, those free without growing, and all that are possible."""
        return Usage(self.live, len(self._free), self._max_frames * V1_ENTRIES_PER_FRAME - RESERVED_REFS)

    def _grow(self) -> None:
        if self._frames >= self._max_frames:
            raise TableFull
        first = self._frames * V1_ENTRIES_PER_FRAME
        self._free.extend(range(first, first + V1_ENTRIES_PER_FRAME))
        self._slots += [None] * V1_ENTRIES_PER_FRAME
        self._pages.extend([0] * V1_ENTRIES_PER_FRAME)
        self._frames += 1
