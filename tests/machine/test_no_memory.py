"""The machine runs out of memory: the program that asked is refused or dropped, and no other notices."""

from __future__ import annotations

import errno
import os
import resource
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import rawwire as wire
from raw_client import RawClient

import gntalloc
from gntalloc.errors import DeviceError, GntallocError
from gntalloc.guest.devices.machine import MachineDevices
from gntalloc.machine.connection import Connection
from gntalloc.machine.machine import Machine as Core
from gntalloc.machine.server import Server
from gntalloc.places import domain_path
from gntalloc.wire.stream import HEADER, MAX_PAYLOAD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc.wire.stream import Message

PATIENCE = 20.0


@pytest.mark.parametrize("room", [2, 8, 24])
def test_half_messages_use_up_the_address_space(room: int) -> None:
    """A real machine under RLIMIT_AS, with `room` MiB more than it needs."""
    with gntalloc.Machine() as machine:
        hostile, quiet = machine.domain(1), machine.domain(2)
        pages = int(Path(f"/proc/{machine.pid}/statm").read_text().split()[0])
        limit = pages * 4096 + (room << 20)
        before = resource.prlimit(machine.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        held: list[socket.socket] = []
        for _ in range(room + 40):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(0.05)  # beyond some the machine hears one after the other
            held.append(sock)
            try:
                sock.connect(hostile.address)
                sock.sendall(HEADER.pack(MAX_PAYLOAD, 2, 0, 1) + bytes(MAX_PAYLOAD - 10))
            except OSError:
                pass  # it was dropped
        with pytest.raises(GntallocError) as caught:
            quiet.share(1, 4096)
        assert caught.value.errno in {errno.ENOMEM, errno.ENOSPC}
        assert quiet.store.read("domid") == b"2"
        for sock in held:
            sock.close()
        resource.prlimit(machine.pid, resource.RLIMIT_AS, before)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                quiet.share(1, 4).close()
                break
            except DeviceError:  # it looks at its limits only now and then
                time.sleep(0.01)
        assert machine.statistics().pages == 0


class Setting:
    """A machine on a thread, whose domain 1 meets no memory wherever the test says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = Server(Core(), str(folder))
        for domid in (1, 2):
            self.server.create(domid, uid=os.getuid())
        self.folder = str(folder)
        self._monkeypatch = monkeypatch
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        self.quiet = gntalloc.Domain(MachineDevices(domain_path(self.folder, 2)))

    def no_memory_in(self, name: str) -> None:
        real = getattr(Connection, name)

        def lacks(connection: Connection, *arguments: Any) -> Any:
            if connection.guest.domid == 1:
                raise MemoryError
            return real(connection, *arguments)

        self._monkeypatch.setattr(Connection, name, lacks)

    def close(self) -> None:
        with self.quiet.share(1, 2):
            assert self.quiet.store.read("domid") == b"2"
        self.quiet.close()
        self.server.stopping = True
        with RawClient(domain_path(self.folder, 2)):  # ends its wait
            self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        self.server.close()


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    setting = Setting(tmp_path, monkeypatch)
    yield setting
    setting.close()


@pytest.mark.parametrize("where", ["receive", "admit", "serve"])
def test_who_meets_it_while_it_is_heard_or_served_is_dropped(setting: Setting, where: str) -> None:
    with RawClient(domain_path(setting.folder, 1)) as client:
        setting.no_memory_in(where)
        client.send(wire.HELLO, wire.VERSION.to_bytes(4, "little"))
        assert client.dropped()


@pytest.mark.parametrize("steps", [False, True])
def test_a_call_that_meets_it_is_refused(setting: Setting, monkeypatch: pytest.MonkeyPatch, steps: bool) -> None:
    def lacks(_connection: Connection, _message: Message, *_rest: object) -> Any:
        if steps:
            return lacks_later()
        raise MemoryError

    def lacks_later() -> Iterator[None]:
        yield
        raise MemoryError

    for kind, (form, _) in list(setting.server._handlers.items()):
        if form.__name__ == "Open":
            monkeypatch.setitem(setting.server._handlers, kind, (form, lacks))
    with RawClient(domain_path(setting.folder, 1)) as client:
        for _ in range(2):
            answer = client.call(wire.OPEN, wire.OPEN_REQUEST.pack(os.O_RDWR) + b"gntalloc")
            assert answer.error == errno.ENOMEM
            assert "memory" in answer.why
    monkeypatch.undo()
