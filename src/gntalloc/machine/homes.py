"""Keep the homes of all open files. A home is a program's hold on an open file.

Each home ends when its last copy is closed, in any program. The machine hears that, as it hears messages.

A file can also be kept without a home, while anything is mapped of it, and get another home then. That is for programs
under a debugger: for a while they have the pages' memory in place of the home (run/debugged.py). Nothing is lost by it:
a file lives as long as its maps.
"""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from gntalloc.errors import DeviceError
from gntalloc.machine.home import Home, identity_of
from gntalloc.machine.loop import HUNG_UP, READABLE, WRITABLE
from gntalloc.maps import PAGE_SIZE
from gntalloc.steps import batches
from gntalloc.wire.token import is_token

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.drivers.chardev import File
    from gntalloc.machine.machine import Guest, Machine
    from gntalloc.machine.speaker import Speaker
    from gntalloc.machine.turns import Turns
    from gntalloc.steps import Steps

__all__ = ["Homes"]

_MOST_HOMES = 16  # of one file
_CLOSED_AT_ONCE = 16


class _Kept:
    """Count the homes of a file that is kept."""

    __slots__ = ("guest", "homes")

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.homes = 1


class Writer:
    """Hear what programs write to a home, its end, and when it has room again: a `Speaker` that is never answered.

    Args:
        home: the home.
        serve: takes what was written, or the end of the home.
    """

    companion: Speaker | None = None
    weight = 0
    standing = READABLE

    def __init__(self, home: Home, serve: Callable[[Home, int], None]) -> None:
        self._home = home
        self._serve = serve

    def fileno(self) -> int:
        """See `Speaker`."""
        return self._home.sock.fileno()

    def receive(self, events: int) -> None:
        """See `Speaker`. What was written is served at once, as it is short."""
        self._serve(self._home, events)

    def flush(self) -> None:
        """See `Speaker`. There is room for events again."""
        self.standing = READABLE
        self._home.guest.evtchn.hand_over(self._home.file)

    def admit(self) -> None:
        """See `Speaker`."""

    def take_turn(self, until: float) -> None:
        """See `Speaker`."""

    def stalled(self, now: float) -> bool:
        """See `Speaker`."""
        return False

    def close(self) -> None:
        """See `Speaker`. `Homes` closes the home."""


class Homes:
    """Keep the homes of all files.

    Args:
        turns: hears what programs write to homes, and their ends.
        machine: opens and closes the files.
    """

    def __init__(self, turns: Turns, machine: Machine) -> None:
        self._turns = turns
        self._machine = machine
        self._homes: dict[int, Home] = {}
        self._writers: dict[Home, Writer] = {}
        self._by_identity: dict[tuple[int, int], Home] = {}
        self._kept: dict[File, _Kept] = {}
        with socket.socket(socket.AF_UNIX) as sock:
            self._device, _ = identity_of(sock.fileno())  # the file system of all sockets

    def close(self) -> None:
        """End all homes."""
        for home in self._homes.values():
            home.close()

    # Files.

    def open(self, guest: Guest, name: str, flags: int, *, opener: int) -> tuple[File, socket.socket]:
        """Open a device file and make its home. The second is the program's end.

        Raises:
            DeviceError: ENOENT: no such device. ENFILE, EMFILE: too many files.
        """
        file = self._machine.open(guest, name, flags, opener=opener)
        try:
            return file, self._make(guest, file)
        except DeviceError:
            self._machine.close(guest, file)
            raise

    def _make(self, guest: Guest, file: File) -> socket.socket:
        guest.descriptors.take(1, errno.ENFILE, "an open file")
        try:
            home, theirs = Home.make(guest, file)
        except OSError as error:
            guest.descriptors.give(1)
            raise DeviceError(errno.EMFILE, f"the machine has no descriptors left: {error.strerror}") from None
        try:
            self._attach(home)
        except OSError as error:
            home.close()
            theirs.close()
            guest.descriptors.give(1)
            raise DeviceError(errno.ENOMEM, f"the computer gives no home to another file: {error.strerror}") from None
        return theirs

    def _attach(self, home: Home) -> None:
        """Listen to a new home.

        Raises:
            OSError: it cannot be listened to. Nothing is left then.
        """
        guest, writer = home.guest, Writer(home, self._serve)
        if home.file.driver is guest.evtchn:
            home.carry_events(self._want_room)
        else:
            home.carry_nothing()
        # Any holder may write to a home, and may send the home through itself. Then only its own queue holds it. So all
        # that comes is taken out.
        self._turns.add(writer, guest.domid)
        self._writers[home] = writer
        if home.file.driver is guest.evtchn:
            guest.evtchn.attach_outlet(home.file, home)
        self._homes[home.sock.fileno()] = home
        self._by_identity[home.identity] = home

    def file_of(self, guest: Guest, identity: tuple[int, int]) -> File | None:
        """Find the file whose home has this identity. None: it is no file of this domain."""
        home = self._by_identity.get(identity)
        return home.file if home is not None and home.guest is guest else None

    def shown(self, guest: Guest, inode: int, token: bytes) -> File:
        """Find the file whose home has this inode, for a program that holds the home: it has written the token there.

        Raises:
            DeviceError: EBADF: it is no home of this domain. EACCES: no such token has come there.
        """
        home = self._by_identity.get((self._device, inode))
        if home is None or home.guest is not guest:
            raise DeviceError(errno.EBADF, f"inode {inode} is no open device file of domain {guest.domid}")
        if not (is_token(token) and home.has_heard(token)):
            raise DeviceError(errno.EACCES, "this token was not written to that file; write it there first")
        return home.file

    def close_those_of(self, guest: Guest) -> Steps[None]:
        """Close the homes of a domain that ends, in steps."""
        theirs = [descriptor for descriptor, home in self._homes.items() if home.guest is guest]
        for descriptors in batches(theirs, _CLOSED_AT_ONCE):
            for descriptor in descriptors:
                home = self._homes.get(descriptor)
                if home is not None and home.guest is guest:  # else its program was faster
                    self._close(descriptor)
            yield
        for file, kept in list(self._kept.items()):
            if kept.guest is guest:
                self._end(file)

    def _serve(self, home: Home, events: int) -> None:
        data = b"" if events & HUNG_UP else home.receive(PAGE_SIZE)
        if data == b"":
            self._close(home.sock.fileno())
        elif data and home.carries_events:
            home.guest.evtchn.write(home.file, data)

    def _want_room(self, home: Home) -> None:
        writer = self._writers.get(home)
        if writer is not None:
            writer.standing = READABLE | WRITABLE
            self._turns.plan(writer)

    def _close(self, descriptor: int) -> None:
        home = self._homes.pop(descriptor)
        del self._by_identity[home.identity]
        writer = self._writers.pop(home, None)
        if writer is not None:
            self._turns.drop(writer, "its file is closed")
        home.close()  # and with it, it is out of the epoll
        home.guest.descriptors.give(1)
        kept = self._kept.get(home.file)
        if kept is None:
            self._machine.close(home.guest, home.file)
            return
        kept.homes -= 1
        if not (kept.homes or home.file.records):
            self._end(home.file)

    # Files that are kept.

    def keep(self, guest: Guest, file: File) -> None:
        """Keep a file open as long as something is mapped of it, also without a home.

        Raises:
            DeviceError: EINVAL: nothing is mapped of it.
        """
        if not file.records:
            raise DeviceError(errno.EINVAL, "nothing is mapped of that file")
        self._kept.setdefault(file, _Kept(guest))

    def another(self, file: File) -> socket.socket:
        """Make another home of a file that is kept, and return the program's end.

        Raises:
            DeviceError: EBADF: it is not kept. EMFILE: it has too many homes, or the machine has no descriptors left.
        """
        kept = self._kept.get(file)
        if kept is None:
            raise DeviceError(errno.EBADF, "this file is not kept, so it has the home that it had")
        if kept.homes >= _MOST_HOMES:
            raise DeviceError(errno.EMFILE, f"this file has {_MOST_HOMES} homes already; close some")
        theirs = self._make(kept.guest, file)
        kept.homes += 1
        return theirs

    def keep_no_longer(self) -> None:
        """Close the kept files that have neither a map nor a home."""
        for file, kept in list(self._kept.items()):
            if not file.records:
                if not kept.homes:
                    self._end(file)
                elif kept.homes == 1:
                    del self._kept[file]

    def _end(self, file: File) -> None:
        self._machine.close(self._kept.pop(file).guest, file)
