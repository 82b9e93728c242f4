"""Wait for descriptors, in one epoll, and call the function that was left for each."""

from __future__ import annotations

import errno
import logging
import os
import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HUNG_UP", "NOT_NOW", "READABLE", "SOMETHING_CAME", "WRITABLE", "Loop"]

READABLE, WRITABLE, HUNG_UP = int(select.EPOLLIN), int(select.EPOLLOUT), int(select.EPOLLHUP)
SOMETHING_CAME = int(select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR)

NOT_NOW = frozenset({errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS})
"""Errors of a socket that has nothing, or no room, or for which the kernel has no memory just now: try again later."""
_SWALLOW = 4096

log = logging.getLogger("gntalloc.machine")
_MOST_AT_ONCE = 1024


class Loop:
    """Keep one epoll, and a function for each descriptor in it."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[int], None]] = {}

    def watch(self, descriptor: int, ready: Callable[[int], None], events: int = READABLE) -> None:
        """Call `ready` with the events of `descriptor` whenever there are any of these, or it has hung up.

        Raises:
            OSError: the kernel waits for no more descriptors (ENOSPC, ENOMEM).
        """
        self._epoll.register(descriptor, events)
        self._ready[descriptor] = ready

    def change(self, descriptor: int, events: int) -> None:
        """Wait for these events of a descriptor instead."""
        self._epoll.modify(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        """Wait for nothing of a descriptor any more."""
        del self._ready[descriptor]
        self._epoll.unregister(descriptor)

    def forget(self, descriptor: int) -> None:
        """Wait for nothing of a descriptor any more, if anything is waited for."""
        if descriptor in self._ready:
            self.unwatch(descriptor)

    def wake_by(self, descriptor: int) -> None:
        """Let bytes on `descriptor` end a wait."""
        self.watch(descriptor, lambda _events: _swallow(descriptor))

    def fileno(self) -> int:
        """Give a descriptor that is readable when a descriptor in this loop has events."""
        return self._epoll.fileno()

    def hear(self, patience: float, most: int = _MOST_AT_ONCE) -> int:
        """Call the function of each descriptor that has events, those that have had some for longest first.

        Args:
            patience: seconds to wait for the first event. 0 takes only the events that are there, -1 waits for ever.
            most: the most descriptors that are looked at. The others come first next time.

        Returns:
            the number of descriptors that had events.
        """
        ready = self._ready
        found = self._epoll.poll(patience, most)
        for descriptor, events in found:
            call = ready.get(descriptor)
            if call is not None:  # a function that was called before may have ended this one
                try:
                    call(events)
                except Exception:
                    log.exception("what has come could not be taken in")  # a fault of ours: the others are heard
        return len(found)

    def close(self) -> None:
        """Close the epoll."""
        self._epoll.close()


def _swallow(descriptor: int) -> None:
    os.read(descriptor, _SWALLOW)
