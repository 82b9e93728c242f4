"""Tell programs, by sockets, when no peer holds their pages any more: each comes to its end of file then."""

from __future__ import annotations

import errno
import select
import socket
from typing import TYPE_CHECKING

from gntalloc.errors import DeviceError

if TYPE_CHECKING:
    from gntalloc.drivers.chardev import File
    from gntalloc.drivers.releases import ReleaseWaiter
    from gntalloc.machine.machine import Guest

__all__ = ["MAX_WAITS", "Waits"]

MAX_WAITS = 1024
"""The most waits of one domain, so that it cannot use up the machine's descriptors."""


_FORGOTTEN_AT_ONCE = 64


class Waits:
    """Keep the waits of all programs."""

    def __init__(self) -> None:
        self._waiters: dict[int, tuple[socket.socket, Guest, ReleaseWaiter]] = {}
        self._hang_ups = select.epoll()

    def fileno(self) -> int:
        """Give a descriptor that is readable when `settle` has something to do."""
        return self._hang_ups.fileno()

    def settle(self) -> None:
        """Forget waits that their programs have ended, some of them if they are many: the others are told again."""
        for descriptor, _ in self._hang_ups.poll(0, _FORGOTTEN_AT_ONCE):
            if descriptor in self._waiters:
                _, _, waiter = self._waiters[descriptor]
                waiter.forget()
                self._end(descriptor)

    def wait_released(self, guest: Guest, file: File, index: int, count: int) -> socket.socket:
        """Make a socket that comes to its end of file when no peer holds these pages any more.

        Return the program's end.

        Raises:
            DeviceError: EMFILE: the machine has no descriptors left, or the domain has too many waits.
        """
        if guest.waits >= MAX_WAITS:
            raise DeviceError(errno.EMFILE, f"programs of this domain wait for {MAX_WAITS} releases already; end some")
        ours, theirs = guest.descriptors.socketpair("a wait")
        descriptor = ours.fileno()
        try:
            ours.shutdown(socket.SHUT_RD)  # nothing can be sent here, so nothing can hide here
            self._hang_ups.register(descriptor, 0)
        except OSError as error:
            ours.close()
            theirs.close()
            guest.descriptors.give(1)
            raise DeviceError(errno.EMFILE, f"the computer waits for no more sockets: {error.strerror}") from None
        guest.waits += 1
        waiter = guest.gntalloc.when_released(file, index, count, lambda: self._end(descriptor))
        self._waiters[descriptor] = ours, guest, waiter
        return theirs

    def close(self) -> None:
        """End all waits."""
        for sock, _, _ in self._waiters.values():
            sock.close()
        self._hang_ups.close()

    def _end(self, descriptor: int) -> None:
        if descriptor in self._waiters:
            sock, guest, _ = self._waiters.pop(descriptor)
            self._hang_ups.unregister(descriptor)
            sock.close()
            guest.waits -= 1
            guest.descriptors.give(1)
