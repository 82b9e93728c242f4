"""Read sockets of strangers: bytes only. Refuse descriptors that nobody asked for, or close them without waiting.

The process that closes a descriptor may have to wait: for a TCP socket that lingers, as long as its owner said; for a
file on FUSE, until the program that plays the file system answers. No event ends that wait. A descriptor in a queue is
closed by the process that closes the socket, or reads from it without room for descriptors.

Since Linux 6.16 the sender is refused, with EPERM. Then no descriptor ever comes. A connection has this from its
listener, so nothing comes before accept(2) either. On older kernels the descriptors are taken, and a few threads close
them. These may be held up; nobody waits for them, and no more are started.

Sources: unix(7), socket(7) on SO_LINGER, linux/net.h on SO_PASSRIGHTS.
"""

from __future__ import annotations

import _thread
import fcntl
import os
import socket
import termios
from collections import deque
from typing import TYPE_CHECKING

from gntalloc.descriptors import receive_with

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gntalloc import waits

    AnySocket = socket.socket | waits.Socket

__all__ = ["Disposal", "Inlet", "Unasked", "refuse"]

_SO_PASSRIGHTS = 83  # since Linux 6.16
_NOW = int(socket.MSG_DONTWAIT)  # as a number: a flag costs as much as the call
_SIZE_OF_INT = 4


class Unasked(OSError):
    """Descriptors came, and none are due. They are taken care of."""


def refuse(sock: AnySocket) -> bool:
    """Refuse descriptors to `sock` at the sender: EPERM. False: this kernel (before 6.16) cannot, so some may come."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


class Disposal:
    """Close descriptors of strangers in threads, which may be held up.

    Args:
        most: with so many not closed yet it is `full`: no more shall be taken in from those that sent them.
        threads: the most threads at a time. What they have not come to yet stays open.
    """

    def __init__(self, most: int = 1024, threads: int = 2) -> None:
        self._most = most
        self._most_threads = threads
        self._threads = 0
        self._lock = _thread.allocate_lock()
        self._waiting: deque[int] = deque()
        self._closing = 0

    @property
    def held(self) -> int:
        """The number of descriptors that are not closed yet."""
        return len(self._waiting) + self._closing

    @property
    def full(self) -> bool:
        """Whether too many are not closed yet."""
        return self.held >= self._most

    def close(self, descriptors: Iterable[int]) -> None:
        """Have these descriptors closed. It never waits."""
        with self._lock:
            self._waiting.extend(descriptors)
            if not self._waiting or self._threads >= self._most_threads:
                return
            try:
                _thread.start_new_thread(self._work, ())
            except RuntimeError:  # no thread is to be had: they wait for the next time
                return
            self._threads += 1

    def hang_up(self, sock: AnySocket) -> None:
        """Close a socket, and whatever is in its queue. Connections that a listener has not accepted are there too."""
        try:
            sock.shutdown(socket.SHUT_RDWR)  # so the other end hears of it now, and nothing more comes
        except OSError:
            pass  # the other end is gone
        if sock.type == socket.SOCK_STREAM and _is_empty(sock):  # a descriptor travels with a byte there
            sock.close()
        else:
            self.close([sock.detach()])

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                descriptor = self._waiting.popleft()
                self._closing += 1
            try:
                os.close(descriptor)
            except OSError:
                pass  # its file system reports an error, which does not concern us; the descriptor is closed
            with self._lock:
                self._closing -= 1


class Inlet:
    """Read the bytes that a stranger sends.

    Args:
        sock: the socket to the stranger.
        disposal: closes descriptors, where they cannot be refused.
    """

    __slots__ = ("_disposal", "_only_bytes", "_sock")

    def __init__(self, sock: AnySocket, disposal: Disposal) -> None:
        self._sock = sock
        self._only_bytes = refuse(sock)
        self._disposal = disposal

    def receive(self, size: int, how: int = _NOW) -> bytes:
        """Receive up to `size` bytes.

        Raises:
            Unasked: descriptors came too.
            OSError: EAGAIN: nothing is there. Another: the socket cannot be read any more.
        """
        if self._only_bytes:
            return self._sock.recv(size, how)
        if self._disposal.full:
            raise Unasked("too many descriptors that were sent beside it cannot be closed")
        data, descriptors = receive_with(self._sock, size, how=how)
        if descriptors:
            self._disposal.close(descriptors)
            raise Unasked("it sent descriptors, and none are due")
        return data

    def close(self) -> None:
        """Close the socket, without waiting for what is in its queue."""
        if self._only_bytes:
            self._sock.close()
        else:
            self._disposal.hang_up(self._sock)


def _is_empty(sock: AnySocket) -> bool:
    try:
        return not any(fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(_SIZE_OF_INT)))
    except OSError:
        return False  # a listener does not tell
