"""How an end wakes the other, and how it sleeps.

Always there is the port of an event channel, as libxenvchan has it: it also rings when the peer dies. Between two of
our own ends on one computer there may be a *direct* bell beside it: a pair of datagram sockets, so that a wake-up does
not go through the machine. They have names in the abstract namespace, are connected to each other, and take nothing
from anybody else. Sending never waits: a peer that does not read has enough there to wake up from.

One thread sleeps for all: what it hears is told to those who wait beside it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gntalloc.guest.events import Port

__all__ = ["Bells"]

_AT_ONCE = 64
_DIRECT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Bells:
    """The bells of one end. `news` changes with each that rang."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._own = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._direct: socket.socket | None = None
        self._connected = False
        self._epoll = select.epoll()
        self._epoll.register(self._own, select.EPOLLIN)
        self._epoll.register(port.fileno(), select.EPOLLIN)
        self._changed = threading.Condition()
        self._asleep = False
        self.news = 0

    def offer_direct(self) -> bytes:
        """Open this end's socket. Its name, for the peer; empty if there is none."""
        direct = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            direct.bind(b"")  # the kernel finds a name
        except OSError:
            direct.close()
            return b""
        self._direct = direct
        self._epoll.register(direct.fileno(), select.EPOLLIN)
        return bytes(direct.getsockname())

    def connect_direct(self, name: bytes) -> bool:
        """Use the direct bell from now on, if the peer's can be reached from here."""
        if self._direct is None or len(name) < 2 or name[0]:
            return False
        try:
            self._direct.connect(name)
        except OSError:  # in another network namespace, or on another computer
            return False
        self._connected = True
        return True

    def ring(self) -> None:
        """Wake the peer."""
        if self._connected and self._direct is not None:
            try:
                self._direct.send(b"!", _DIRECT)
                return
            except BlockingIOError:
                return  # it has not heard the last ones yet
            except OSError:
                self._connected = False
        self._port.notify()

    def ring_both(self) -> None:
        """Wake the peer by all means: this end goes."""
        if self._connected:
            self.ring()
        self._port.notify()

    def ring_own(self) -> None:
        """Wake who sleeps here."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._own, 1)

    def sleep(self, seen: int, deadline: float | None) -> None:
        """Until a bell has rung since `news` was `seen`, or the deadline has passed. Spurious ends may be.

        Raises:
            MachineGone: no more bells will ring.
        """
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        with self._changed:
            if self.news != seen:
                return
            if self._asleep:
                self._changed.wait(left)
                return
            self._asleep = True
        self._hear(left)

    def _hear(self, timeout: float | None) -> None:
        """Take what rings, or rings within `timeout` seconds. One thread at a time: who has set `_asleep`."""
        try:
            self._take(timeout)
        finally:
            with self._changed:
                self._asleep = False
                self.news += 1
                self._changed.notify_all()

    def _take(self, timeout: float | None) -> None:
        for descriptor, _ in self._epoll.poll(timeout):
            if self._direct is not None and descriptor == self._direct.fileno():
                with contextlib.suppress(OSError):
                    for _ in range(_AT_ONCE):  # no more: the peer could go on for ever
                        self._direct.recv(1, socket.MSG_DONTWAIT)
            elif descriptor == self._own:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._own)
            elif self._port.take():
                self._port.rearm()

    def hear_now(self) -> None:
        """Take what rings, and let those know who wait here. If a thread sleeps here, it hears that by itself."""
        with self._changed:
            if self._asleep:
                return
            self._asleep = True
        self._hear(0)

    def fileno(self) -> int:
        """Readable while something rings."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Take them down. Who slept has been woken before, and is gone."""
        self._epoll.close()
        if self._own >= 0:
            os.close(self._own)
            self._own = -1
        if self._direct is not None:
            self._direct.close()
            self._direct = None
        self._connected = False
        self._port.close()
