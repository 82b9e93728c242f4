"""Be the home of an open device file: the descriptor that a program holds, and the machine's end of it.

Each open file has a socketpair. dup, fork, exec and SCM_RIGHTS carry the program's end. Its last close gives the
machine the end of file, which means release().

On a home of evtchn ports travel, four bytes each: ports that had an event go to the program, and ports to re-arm come
back. So read, poll and select are the kernel's own there, also for programs that do not know this package. On any other
home nothing travels: a read finds the end of file, and a poll finds it ready, as with the real devices.

A program shows that it holds a home by a token that it writes there. For evtchn a token is ports that no file has.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
from functools import cache
from typing import TYPE_CHECKING

from gntalloc.abi.evtchn import PORT
from gntalloc.machine.loop import NOT_NOW
from gntalloc.unasked import Inlet
from gntalloc.wire.token import SIZE_OF_TOKEN

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.drivers.chardev import File
    from gntalloc.machine.machine import Guest

__all__ = ["Home", "identity_of"]

_QUEUE = 1 << 20  # the most bytes of kernel memory for events that are not read; hardly any are used
_NEVER_WAIT = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)  # as a number: flag by flag it costs as much as the call
_INT = struct.Struct("=i")
_MOST_WRITTEN = 64 * SIZE_OF_TOKEN  # bytes that are remembered


class Home:
    """Be the machine's end. As an `Outlet` of evtchn it never waits for the program."""

    __slots__ = ("_inlet", "_want_room", "_written", "file", "guest", "identity", "sock")

    def __init__(self, sock: socket.socket, identity: tuple[int, int], guest: Guest, file: File) -> None:
        self.sock = sock
        self._inlet = Inlet(sock, guest.disposal)
        self.identity = identity  # tells a copy of the program's end from other files
        self.guest = guest
        self.file = file
        self._written = b""
        self._want_room: Callable[[Home], None] | None = None

    @classmethod
    def make(cls, guest: Guest, file: File) -> tuple[Home, socket.socket]:
        """Make a home for `file`, and the program's end of it.

        Raises:
            OSError: there are no descriptors left.
        """
        ours, theirs = socket.socketpair()
        if file.flags & os.O_NONBLOCK:
            theirs.setblocking(False)
        return cls(ours, identity_of(theirs.fileno()), guest, file), theirs

    @property
    def carries_events(self) -> bool:
        """Whether bytes that the program writes here are for the driver."""
        return self._want_room is not None

    def carry_nothing(self) -> None:
        """Carry no bytes: a program that reads its end gets end of file, and a poll finds it ready."""
        self.sock.shutdown(socket.SHUT_WR)

    def carry_events(self, want_room: Callable[[Home], None]) -> None:
        """Be an outlet. `want_room` is called when it is full: the owner of this home shall watch for room."""
        self._want_room = want_room
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _QUEUE)
        _bytes_of_one_event()

    def put(self, port: int) -> bool:
        """See `Outlet`."""
        try:
            self.sock.send(PORT.pack(port), _NEVER_WAIT)
        except OSError as error:
            if error.errno in NOT_NOW:
                if self._want_room is not None:
                    self._want_room(self)
                return False
            # no program can read there any more, so none misses it
        return True

    def unread(self) -> int:
        """See `Outlet`. The kernel tells the memory of all that was sent and not read; each event takes as much."""
        return _queued(self.sock) // _bytes_of_one_event()

    def receive(self, size: int) -> bytes | None:
        """Receive the bytes that the program wrote. Empty: its end is closed. None: nothing has come."""
        try:
            data = self._inlet.receive(size)
        except OSError as error:  # also if its holder sent a descriptor
            return None if error.errno in NOT_NOW else b""
        if len(data) >= SIZE_OF_TOKEN:
            self._written = (self._written + data)[-_MOST_WRITTEN:]
        return data

    def has_heard(self, token: bytes) -> bool:
        """Say whether a holder of the program's end has written this lately."""
        return token in self._written

    def close(self) -> None:
        """Close the machine's end, as the file is closed."""
        self._inlet.close()


def identity_of(descriptor: int) -> tuple[int, int]:
    """Give what tells one open file from another, in any process."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _queued(sock: socket.socket) -> int:
    size: int = _INT.unpack(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(_INT.size)))[0]
    return size


@cache
def _bytes_of_one_event() -> int:
    """Measure the memory that the kernel takes for four bytes sent: a whole buffer, of the same size each time."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(bytes(PORT.size))
        return _queued(ours)
