"""Keep the homes of all open files. A home is a program's hold on an open file.

Each home ends when its last copy is closed, in any program. The machine sees that here: `fileno` is readable then.

A home can also be kept, while anything is mapped of its file. That is for programs under a debugger: for a while they
have the pages' memory in place of the home (run/debugged.py). Nothing is lost by it: a file lives as long as its maps.
"""

from __future__ import annotations

import errno
import os
import select
from typing import TYPE_CHECKING

from gntalloc.errors import DeviceError
from gntalloc.machine.home import Home, identity_of
from gntalloc.machine.loop import HUNG_UP, READABLE, WRITABLE
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    import socket

    from gntalloc.drivers.chardev import File
    from gntalloc.machine.loop import Loop
    from gntalloc.machine.machine import Guest, Machine

__all__ = ["Homes"]


class Homes:
    """Keep the homes of all files.

    Args:
        loop: waits for bytes that programs write to homes of evtchn.
        machine: opens and closes the files.
    """

    def __init__(self, loop: Loop, machine: Machine) -> None:
        self._loop = loop
        self._machine = machine
        self._homes: dict[int, Home] = {}
        self._by_identity: dict[tuple[int, int], Home] = {}
        self._kept: dict[File, int] = {}  # programs' ends
        self._hang_ups = select.epoll()  # of homes that carry nothing: their ends, and bytes that programs write there

    def fileno(self) -> int:
        """Give a descriptor that is readable when `settle` has something to do."""
        return self._hang_ups.fileno()

    def close(self) -> None:
        """End all homes."""
        for home in self._homes.values():
            home.close()
        for descriptor in self._kept.values():
            os.close(descriptor)
        self._hang_ups.close()

    def settle(self) -> None:
        """Take in the files that programs have closed."""
        for descriptor, events in self._hang_ups.poll(0, len(self._homes) + 1):
            if descriptor in self._homes:
                self._serve(self._homes[descriptor], events)

    # Files.

    def open(self, guest: Guest, name: str, flags: int, *, opener: int) -> tuple[File, socket.socket]:
        """Open a device file and make its home. The second is the program's end.

        Raises:
            DeviceError: ENOENT: no such device. ENFILE, EMFILE: too many files.
        """
        file = self._machine.open(guest, name, flags, opener=opener)
        try:
            guest.descriptors.take(1, errno.ENFILE, "an open file")
        except DeviceError:
            self._machine.close(guest, file)
            raise
        try:
            home, theirs = Home.make(guest, file)
        except OSError as error:
            guest.descriptors.give(1)
            self._machine.close(guest, file)
            raise DeviceError(errno.EMFILE, f"the machine has no descriptors left: {error.strerror}") from None
        try:
            self._attach(home)
        except OSError as error:
            home.close()
            theirs.close()
            guest.descriptors.give(1)
            self._machine.close(guest, file)
            raise DeviceError(errno.ENOMEM, f"the computer gives no home to another file: {error.strerror}") from None
        return file, theirs

    def _attach(self, home: Home) -> None:
        """Listen to a new home.

        Raises:
            OSError: it cannot be listened to. Nothing is left then.
        """
        descriptor, guest = home.sock.fileno(), home.guest
        if home.file.driver is guest.evtchn:
            home.carry_events(self._want_room)
            self._loop.watch(descriptor, lambda events: self._serve(home, events))
            guest.evtchn.attach_outlet(home.file, home)
        else:
            home.carry_nothing()
            # Any holder may write to a home, and may send the home through itself. Then only its own queue holds it. So
            # all that comes is taken out.
            self._hang_ups.register(descriptor, select.EPOLLIN)
        self._homes[descriptor] = home
        self._by_identity[home.identity] = home

    def file_of(self, guest: Guest, identity: tuple[int, int]) -> File | None:
        """Find the file whose home has this identity. None: it is no file of this domain."""
        home = self._by_identity.get(identity)
        return home.file if home is not None and home.guest is guest else None

    def close_those_of(self, guest: Guest) -> None:
        """Close the homes of a domain that ends."""
        for descriptor, home in list(self._homes.items()):
            if home.guest is guest:
                self._close(descriptor)

    def _serve(self, home: Home, events: int) -> None:
        if events & WRITABLE:
            self._loop.change(home.sock.fileno(), READABLE)
            home.guest.evtchn.hand_over(home.file)
        data = b"" if events & HUNG_UP else home.receive(PAGE_SIZE)
        if data == b"":
            self._close(home.sock.fileno())
        elif data and home.carries_events:
            home.guest.evtchn.write(home.file, data)

    def _want_room(self, home: Home) -> None:
        self._loop.change(home.sock.fileno(), READABLE | WRITABLE)

    def _close(self, descriptor: int) -> None:
        home = self._homes.pop(descriptor)
        del self._by_identity[home.identity]
        if home.carries_events:
            self._loop.unwatch(descriptor)
        home.close()  # and with it, it is out of the epoll
        home.guest.descriptors.give(1)
        self._let_go(home.file)
        self._machine.close(home.guest, home.file)

    # Homes that are kept.

    def keep(self, file: File, descriptors: list[int]) -> None:
        """Hold a copy of a home, as long as something is mapped of its file.

        Raises:
            DeviceError: EBADF: that is not its home. EINVAL: nothing is mapped of it.
        """
        home = self._by_identity.get(identity_of(descriptors[0])) if descriptors else None
        if home is None or home.file is not file:
            raise DeviceError(errno.EBADF, "only the home of that very file is kept")
        if not file.records:
            raise DeviceError(errno.EINVAL, "nothing is mapped of that file")
        if file not in self._kept:
            self._kept[file] = os.dup(descriptors[0])

    def kept(self, file: File) -> int:
        """Give the copy of a home that is kept.

        Raises:
            DeviceError: EBADF: there is none.
        """
        descriptor = self._kept.get(file)
        if descriptor is None:
            raise DeviceError(errno.EBADF, "the home of this file is not kept")
        return descriptor

    def keep_no_longer(self) -> None:
        """Close the kept homes of files of which nothing is mapped any more."""
        for file in [file for file in self._kept if not file.records]:
            self._let_go(file)

    def _let_go(self, file: File) -> None:
        descriptor = self._kept.pop(file, None)
        if descriptor is not None:
            os.close(descriptor)
