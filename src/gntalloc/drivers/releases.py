"""Tell waiters when pages are free of peers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.drivers.chardev import Extent

__all__ = ["ReleaseWaiter", "Releases"]


class Releases:
    """Keep all waiters, by the extents that they wait for."""

    def __init__(self) -> None:
        self._waiting: dict[Extent, dict[ReleaseWaiter, None]] = {}

    def wait(self, extents: set[Extent], is_free: Callable[[], bool], done: Callable[[], None]) -> ReleaseWaiter:
        """Call `done` once, when `is_free` says so: at once, or after one of these extents has changed."""
        waiter = ReleaseWaiter(self, extents, is_free, done)
        for extent in extents:
            self._waiting.setdefault(extent, {})[waiter] = None
        waiter.look()
        return waiter

    def look(self, extent: Extent) -> None:
        """Let the waiters of an extent ask again, as it has changed."""
        for waiter in list(self._waiting.get(extent, ())):
            waiter.look()

    def forget(self, waiter: ReleaseWaiter) -> None:
        """Remove a waiter. The call can be repeated."""
        for extent in waiter.extents:
            waiting = self._waiting.get(extent)
            if waiting is not None:
                waiting.pop(waiter, None)
                if not waiting:
                    del self._waiting[extent]


class ReleaseWaiter:
    """Wait until pages are free of peers."""

    __slots__ = ("_done", "_is_free", "_releases", "extents")

    def __init__(
        self, releases: Releases, extents: set[Extent], is_free: Callable[[], bool], done: Callable[[], None]
    ) -> None:
        self.extents = extents
        self._releases = releases
        self._is_free = is_free
        self._done = done

    def look(self) -> None:
        """Ask again whether the pages are free."""
        if self._is_free():
            self.forget()
            self._done()

    def forget(self) -> None:
        """Stop waiting."""
        self._releases.forget(self)
