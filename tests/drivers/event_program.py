"""A program's event channel file on an in-process machine, and its end of the ring."""

from __future__ import annotations

import os
from collections import deque
from struct import pack
from typing import TYPE_CHECKING

from gntalloc.abi.evtchn import BIND_INTERDOMAIN, BIND_UNBOUND_PORT, BIND_VIRQ, NOTIFY, RESET, UNBIND
from gntalloc.testing import FakeMemory

if TYPE_CHECKING:
    from gntalloc.machine.machine import Guest, Machine

ADDRESS = 0x7F00_0000_1000


class Queue:
    """An outlet of so many events."""

    def __init__(self, room: int = 10_000) -> None:
        self.room = room
        self.events: deque[int] = deque()

    def put(self, port: int) -> bool:
        if len(self.events) >= self.room:
            return False
        self.events.append(port)
        return True

    def unread(self) -> int:
        return len(self.events)


class Events:
    """One open evtchn file."""

    def __init__(self, machine: Machine, domid: int, *, room: int = 10_000) -> None:
        self.machine = machine
        self.guest: Guest = machine.guest(domid)
        self.driver = self.guest.evtchn
        self.file = machine.open(self.guest, "evtchn", os.O_RDWR, opener=1)
        self.queue = Queue(room)
        self.driver.attach_outlet(self.file, self.queue)

    def ioctl(self, request: int, *words: int) -> int:
        """The argument ends where its memory does."""
        memory = FakeMemory()
        memory.put(ADDRESS, pack(f"={len(words)}I", *words))
        return self.file.ioctl(request, ADDRESS, memory)

    def bind_unbound(self, peer: int) -> int:
        return self.ioctl(BIND_UNBOUND_PORT, peer)

    def bind(self, peer: int, port: int) -> int:
        return self.ioctl(BIND_INTERDOMAIN, peer, port)

    def bind_virq(self, virq: int) -> int:
        return self.ioctl(BIND_VIRQ, virq)

    def unbind(self, port: int) -> None:
        assert self.ioctl(UNBIND, port) == 0

    def notify(self, port: int) -> None:
        assert self.ioctl(NOTIFY, port) == 0

    def reset(self) -> None:
        assert self.ioctl(RESET) == 0

    def read(self) -> list[int]:
        """All there is, as a native program reads: without asking."""
        events = list(self.queue.events)
        self.queue.events.clear()
        return events

    def write(self, *ports: int) -> int:
        return self.file.write(pack(f"={len(ports)}I", *ports))

    def close(self) -> None:
        self.machine.close(self.guest, self.file)


def pair(machine: Machine) -> tuple[Events, int, Events, int]:
    """A channel between domains 1 and 2. The second end has had its first event."""
    first, second = Events(machine, 1), Events(machine, 2)
    port = first.bind_unbound(2)
    remote = second.bind(1, port)
    assert second.read() == [remote]
    second.write(remote)
    return first, port, second, remote
