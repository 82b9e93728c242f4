"""A home as the outlet of events: what the kernel says of what was read, and what happens when it is full."""

from __future__ import annotations

import os
import socket
from struct import pack
from typing import TYPE_CHECKING

import pytest
from event_program import Events

from gntalloc import unasked
from gntalloc.abi.evtchn import BIND_INTERDOMAIN, BIND_UNBOUND_PORT
from gntalloc.machine.home import Home
from gntalloc.machine.machine import Machine as Core
from gntalloc.machine.server import Server
from gntalloc.testing import FakeMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NO_OPTION = 9999


class Rig:
    """An evtchn file of domain 2 with a home, and how often that asked for room."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.events = Events(core, 2)
        self.home, self.theirs = Home.make(self.events.guest, self.events.file)
        self.asked = 0
        self.home.carry_events(self.want_room)
        self.events.driver.attach_outlet(self.events.file, self.home)

    def want_room(self, home: Home) -> None:
        assert home is self.home
        self.asked += 1

    def bind(self, count: int) -> list[int]:
        """Ports that have an event at once."""
        peer = Events(self.core, 1)
        return [self.events.bind(1, peer.bind_unbound(2)) for _ in range(count)]

    def read(self, size: int) -> list[int]:
        return list(memoryview(self.theirs.recv(size, socket.MSG_DONTWAIT)).cast("I"))


@pytest.fixture(params=[True, False], ids=["only bytes", "descriptors may come"])
def rig(
    make_core: Callable[..., Core], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Rig]:
    if not request.param:
        monkeypatch.setattr(unasked, "_SO_PASSRIGHTS", NO_OPTION)  # as before Linux 6.16
    rig = Rig(make_core())
    yield rig
    rig.home.sock.close()
    rig.theirs.close()


def test_unread_counts_events(rig: Rig) -> None:
    assert rig.home.unread() == 0
    ports = rig.bind(100)
    assert rig.home.unread() == 100
    assert rig.read(4 * 30) == ports[:30]
    assert rig.home.unread() == 70
    assert rig.read(4096) == ports[30:]
    assert rig.home.unread() == 0


def test_a_full_home_gets_the_rest_later(rig: Rig) -> None:
    rig.home.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
    ports = rig.bind(200)
    assert 0 < rig.home.unread() < 200
    assert rig.asked > 0
    seen: list[int] = []
    while len(seen) < 200:
        seen += rig.read(4096)
        rig.events.driver.hand_over(rig.events.file)
    assert seen == ports


def test_a_program_that_is_gone_is_not_waited_for(rig: Rig) -> None:
    rig.theirs.close()
    rig.bind(200)
    assert (rig.asked, rig.home.unread()) == (0, 0)
    assert rig.home.receive(4096) == b""


def test_what_the_program_wrote(rig: Rig) -> None:
    assert rig.home.receive(4096) is None
    rig.theirs.send(pack("=II", 5, 6))
    assert rig.home.receive(4096) == pack("=II", 5, 6)


def test_a_home_is_as_blocking_as_the_file(make_core: Callable[..., Core]) -> None:
    core = make_core()
    for flags, blocking in ((os.O_RDWR, True), (os.O_RDWR | os.O_NONBLOCK, False)):
        file = core.open(core.guest(1), "evtchn", flags, opener=1)
        home, theirs = Home.make(core.guest(1), file)
        assert os.get_blocking(theirs.fileno()) is blocking
        home.sock.close()
        theirs.close()


def test_the_server_goes_on_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gntalloc.machine.home._QUEUE", 1)  # the least there is
    server = Server(Core(), str(tmp_path))
    server.create(1, uid=os.getuid())
    file, theirs = server.homes.open(server.machine.guest(1), "evtchn", os.O_RDWR, opener=1)
    memory = FakeMemory()
    argument = memory.put(0x1000, bytes(8))
    bound = []
    for _ in range(100):
        argument[:] = pack("=II", 1, 0)
        argument[:] = pack("=II", 1, file.ioctl(BIND_UNBOUND_PORT, 0x1000, memory))
        bound.append(file.ioctl(BIND_INTERDOMAIN, 0x1000, memory))
    seen: list[int] = []
    while len(seen) < 100:
        seen += memoryview(theirs.recv(4096, socket.MSG_DONTWAIT)).cast("I")
        server.loop.hear(0)
        server.turns.serve()
    assert seen == bound
    theirs.close()
    server.close()


@pytest.mark.parametrize("taken_out", [True, False])
def test_a_descriptor_that_a_program_sends_is_refused_or_closed(rig: Rig, taken_out: bool) -> None:
    reading, writing = os.pipe()
    try:
        try:
            socket.send_fds(rig.theirs, [bytes(4)], [writing])
        except PermissionError:
            pass
        if taken_out:
            assert rig.home.receive(100) in {b"", None}
        else:
            rig.home.close()
    finally:
        os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)
