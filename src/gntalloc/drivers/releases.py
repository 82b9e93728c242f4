"""Tell waiters when pages are free of peers.

A waiter watches one page that a peer holds. When something changes about that page's extent, and the page is free, the
waiter looks for another page that is held, from there on and around. If there is none, its wait is over. So a change
costs little however many pages a waiter waits for, and however many waiters there are: those that watch other extents
are not asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gntalloc.steps import PAGES_A_STEP

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gntalloc.drivers.chardev import Extent
    from gntalloc.drivers.grefs import Gref
    from gntalloc.steps import Later, Steps

__all__ = ["ReleaseWaiter", "Releases"]


class Releases:
    """Keep all waiters, by the extent of the page that each watches.

    Args:
        is_held: says whether a peer holds a page.
        later: begins to look, see `Later`.
    """

    def __init__(self, is_held: Callable[[Gref], bool], later: Later) -> None:
        self.is_held = is_held
        self._later = later
        self._watching: dict[Extent, dict[ReleaseWaiter, None]] = {}

    def wait(self, pages: Sequence[Gref], done: Callable[[], None]) -> ReleaseWaiter:
        """Call `done` once, when none of the pages is held: at once, or after one of their extents has changed."""
        waiter = ReleaseWaiter(self, pages, done)
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

    __slots__ = ("_again", "_at", "_done", "_looking", "_pages", "_releases", "extent", "over")

    def __init__(self, releases: Releases, pages: Sequence[Gref], done: Callable[[], None]) -> None:
        self.extent: Extent | None = None
        self.over = False
        self._releases = releases
        self._pages = pages
        self._at = 0  # the page that is watched
        self._done = done
        self._looking = False
        self._again = False  # something has changed while it looked

    def look(self) -> Steps[None]:
        """Watch the next page that is held, or end the wait if there is none."""
        if self._looking:
            self._again = True
            return
        if not self.over and self.extent is not None and self._releases.is_held(self._pages[self._at]):
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

    def _find(self) -> Steps[None]:
        """Find the next page that is held, and watch it. None may be."""
        releases, pages = self._releases, self._pages
        releases.forget(self)
        self.extent = None
        for number in range(len(pages)):
            at = (self._at + number) % len(pages)
            if releases.is_held(pages[at]):
                self._at, self.extent = at, pages[at].frame.extent
                releases.watch(self, self.extent)
                return
            if number % PAGES_A_STEP == PAGES_A_STEP - 1:
                yield
                if self.over:
                    return

    def forget(self) -> None:
        """Stop waiting."""
        self.over = True
        self._releases.forget(self)


def _look_in_turn(waiters: list[ReleaseWaiter]) -> Steps[None]:
    for number, waiter in enumerate(waiters):
        yield from waiter.look()
        if number % PAGES_A_STEP == PAGES_A_STEP - 1:
            yield
