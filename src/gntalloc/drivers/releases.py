"""Tell waiters when pages are free of peers.

A waiter watches one page that a peer holds. When something changes about that page's extent, and the page is free, the
waiter looks for another page that is held, from there on and around. If there is none, its wait is over. So a change
costs little however many pages a waiter waits for, and however many waiters there are: those that watch other extents
are not asked. Pages that have all in common are looked at together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gntalloc.steps import PAGES_A_STEP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gntalloc.drivers.chardev import Extent
    from gntalloc.drivers.grefs import Pages, Range
    from gntalloc.hypervisor.grants import GrantTable
    from gntalloc.steps import Later, Steps

__all__ = ["ReleaseWaiter", "Releases", "is_held"]


def is_held(span: Pages) -> bool:
    """Say whether a peer holds these pages."""
    return not span.users or span.pins > 0 or span.grant.memory.hidden


class Releases:
    """Keep all waiters, by the extent of the page that each watches.

    Args:
        table: the grants.
        later: begins to look, see `Later`.
    """

    def __init__(self, table: GrantTable[Pages], later: Later) -> None:
        self.table = table
        self._later = later
        self._watching: dict[Extent, dict[ReleaseWaiter, None]] = {}

    def wait(self, ranges: Sequence[Range], done: Callable[[], None]) -> ReleaseWaiter:
        """Call `done` once, when none of the pages is held: at once, or after one of their extents has changed."""
        waiter = ReleaseWaiter(self, ranges, done)
        self._later(waiter.look())
        return waiter

    def look(self, extent: Extent) -> None:
        """Let the waiters that watch a page of this extent look again, as it has changed."""
        waiters = self._watching.get(extent)
        if waiters:
            self._later(_look_in_turn(list(waiters)))

    def watch(self, waiter: ReleaseWaiter, extent: Extent) -> None:
        """Let a waiter be asked when this extent changes."""
        self._watching.setdefault(extent, {})[waiter] = None

    def forget(self, waiter: ReleaseWaiter) -> None:
        """Remove a waiter. The call can be repeated."""
        extent = waiter.extent
        watching = self._watching.get(extent) if extent is not None else None
        if watching is not None and extent is not None:
            watching.pop(waiter, None)
            if not watching:
                del self._watching[extent]


class ReleaseWaiter:
    """Wait until pages are free of peers.

    Attributes:
        extent: the extent of the page that it watches. None: it has not found one that is held.
        over: whether nobody waits any more.
    """

    __slots__ = ("_again", "_at", "_done", "_looking", "_page", "_ranges", "_releases", "extent", "over")

    def __init__(self, releases: Releases, ranges: Sequence[Range], done: Callable[[], None]) -> None:
        self.extent: Extent | None = None
        self.over = False
        self._releases = releases
        self._ranges = ranges
        self._at = self._page = 0  # the page that is watched: of which range, and which of the ALLOC's
        self._done = done
        self._looking = False
        self._again = False  # something has changed while it looked

    def look(self) -> Steps[None]:
        """Watch the next page that is held, or end the wait if there is none."""
        if self._looking:
            self._again = True
            return
        if not self.over and self.extent is not None and self._still_held():
            return
        self._looking = self._again = True
        try:
            while self._again and not self.over:
                self._again = False
                yield from self._find()
        finally:
            self._looking = False
        if not self.over and self.extent is None:
            self.over = True
            self._done()

    def _still_held(self) -> bool:
        span = next(self._releases.table.spans(self._ranges[self._at].alloc, self._page, 1))
        return span is not None and is_held(span)

    def _find(self) -> Steps[None]:
        """Find the next page that is held, and watch it. None may be."""
        releases = self._releases
        releases.forget(self)
        self.extent = None
        for number, (at, page, span) in enumerate(self._from_here(), 1):
            if span is not None and is_held(span):
                self._at, self._page, self.extent = at, page, span.grant.memory
                releases.watch(self, self.extent)
                return
            if number % PAGES_A_STEP == 0:
                yield
                if self.over:
                    return

    def _from_here(self) -> Iterator[tuple[int, int, Pages | None]]:
        """Give the spans of all ranges, from the page that is watched on and around, each with one of its pages."""
        table, ranges, here = self._releases.table, self._ranges, self._at
        for number in range(len(ranges) + 1):
            at = (here + number) % len(ranges)
            alloc, first, count = ranges[at]
            page, end = first, first + count
            if at == here:
                page, end = (self._page, end) if number == 0 else (first, self._page)
                page = max(page, first)
            for span in table.spans(alloc, page, end - page):
                yield at, page, span
                page = page + 1 if span is None else span.page + span.count

    def forget(self) -> None:
        """Stop waiting."""
        self.over = True
        self._releases.forget(self)


def _look_in_turn(waiters: list[ReleaseWaiter]) -> Steps[None]:
    for number, waiter in enumerate(waiters):
        yield from waiter.look()
        if number % PAGES_A_STEP == PAGES_A_STEP - 1:
            yield
