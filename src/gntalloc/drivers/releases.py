"""Who wants to know when pages are free of peers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.drivers.chardev import Extent

__all__ = ["ReleaseWaiter", "Releases"]


class Releases:
    """All who wait, by the extents that they wait for."""

    def __init__(self) -> None:
        self._waiting: dict[Extent, dict[ReleaseWaiter, None]] = {}

    def wait(self, extents: set[Extent], is_free: Callable[[], bool], done: Callable[[], None]) -> ReleaseWaiter:
        """Call `done` once, when it `is_free`: at once, or after something has changed about one of these extents."""
        waiter = ReleaseWaiter(self, extents, is_free, done)
        for extent in extents:
            self._waiting.setdefault(extent, {})[waiter] = None
        waiter.look()
        return waiter

    def look(self, extent: Extent) -> None:
        """Something has changed about it."""
        for waiter in list(self._waiting.get(extent, ())):
            waiter.look()

    def forget(self, waiter: ReleaseWaiter) -> None:
        """It is done, or nobody wants to know any more. Can be repeated."""
        for extent in waiter.extents:
            waiting = self._waiting.get(extent)
            if waiting is not None:
                waiting.pop(waiter, None)
                if not waiting:
                    del self._waiting[extent]


class ReleaseWaiter:
    """One of them."""

    __slots__ = ("_done", "_is_free", "_releases", "extents")

    def __init__(
        self, releases: Releases, extents: set[Extent], is_free: Callable[[], bool], done: Callable[[], None]
    ) -> None:
        self.extents = extents
        self._releases = releases
        self._is_free = is_free
        self._done = done

    def look(self) -> None:
        """Ask again."""
        if self._is_free():
            self.forget()
            self._done()

    def forget(self) -> None:
        """Nobody wants to know any more."""
        self._releases.forget(self)
