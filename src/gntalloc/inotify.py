"""Hear of memory files of which a description was closed.

A watch is for one event, so that no program can flood the queue. Its end is an event of its own.

Source: inotify(7).
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Generic, TypeVar

from gntalloc.descriptions import see_to_rights
from gntalloc.errors import DeviceError
from gntalloc.libc import check, libc

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Watches"]

Thing = TypeVar("Thing")

_IN_CLOSE = 0x08 | 0x10
_IN_ONESHOT = 0x80000000
_IN_Q_OVERFLOW = 0x4000
_IN_IGNORED = 0x8000
_EVENT = struct.Struct("=iIII")
_QUEUE_A_READ = 4096  # bytes of events; of much more the C library would map memory for each read


class Watches(Generic[Thing]):
    """Watch memory files, each on behalf of a thing.

    Raises:
        DeviceError: EMFILE: this user can have no more inotify instances.
    """

    def __init__(self) -> None:
        try:
            self._inotify = check(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            why = f"this user can have no more inotify instances ({error.strerror}): each machine needs one"
            raise DeviceError(error.errno, f"{why}; end some, or raise fs.inotify.max_user_instances") from error
        self.things: dict[int, Thing] = {}
        """What each watch is for, by the kernel's number of it."""

    def fileno(self) -> int:
        """Give the descriptor that is readable when `take` has something to tell."""
        return self._inotify

    def close(self) -> None:
        """Stop listening."""
        os.close(self._inotify)

    def add(self, thing: Thing, descriptor: int) -> int:
        """Watch the file of `descriptor` until the next event, and return the number of the watch.

        Raises:
            DeviceError: ENOMEM: the computer gives no watch.
        """
        path = b"/proc/self/fd/%d" % descriptor
        try:
            watch: int = libc.inotify_add_watch(self._inotify, path, _IN_CLOSE | _IN_ONESHOT)
            if watch < 0:
                see_to_rights(descriptor)
                watch = check(libc.inotify_add_watch(self._inotify, path, _IN_CLOSE | _IN_ONESHOT))
        except OSError as error:
            why = f"the computer gives no inotify watch for the page's memory ({error.strerror})"
            why += "; raise fs.inotify.max_user_watches" * (error.errno == errno.ENOSPC)
            raise DeviceError(errno.ENOMEM, why) from error
        self.things[watch] = thing
        return watch

    def discard(self, watch: int) -> None:
        """End a watch."""
        libc.inotify_rm_watch(self._inotify, watch)
        del self.things[watch]

    def take(self) -> Iterator[tuple[Thing, bool]]:
        """Give the things whose watch has ended. True: a description was closed. False: the kernel does not say."""
        for watch, mask in self._events():
            if mask & _IN_Q_OVERFLOW:  # some events were lost, anyone's
                for each, thing in list(self.things.items()):
                    self.discard(each)
                    yield thing, False
            elif mask & (_IN_CLOSE | _IN_IGNORED) and watch in self.things:
                # IN_IGNORED alone: the watch was renewed while the event that ended it was under way. The kernel gave
                # the old one, and took it away then.
                yield self.things.pop(watch), bool(mask & _IN_CLOSE)

    def _events(self) -> Iterator[tuple[int, int]]:
        """Read the queue empty: watch and mask of each event."""
        while True:
            try:
                events = os.read(self._inotify, _QUEUE_A_READ)
            except OSError:
                return  # nothing is there; or what is there stays there
            for watch, mask, _cookie, _length in _EVENT.iter_unpack(events):
                yield watch, mask
            if len(events) <= _QUEUE_A_READ - _EVENT.size:
                return
