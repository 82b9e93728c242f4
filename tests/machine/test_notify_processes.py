"""Unmap notifications of programs that end, in whatever way: what vchan lives by."""

from __future__ import annotations

import os
import select
import signal
from struct import pack
from typing import TYPE_CHECKING

import pytest
from limits import status_of

from gntalloc.abi.evtchn import BIND_INTERDOMAIN, BIND_UNBOUND_PORT
from gntalloc.abi.gntalloc import DEALLOC_GREF, SET_UNMAP_NOTIFY, DeallocGref, UnmapNotify
from gntalloc.abi.gntdev import MAP_GRANT_REF, MapGrantRef

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc import Domain, Machine

PATIENCE = 20.0
RW = 3
BOTH = 3


class Killed:
    """A child that does something, says so, and waits to be killed. It sends us a number."""

    def __init__(self, body: Callable[[], int]) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.write(writing, pack("=I", body()))
                signal.pause()
            finally:
                os._exit(1)
        os.close(writing)
        self.said = int.from_bytes(os.read(reading, 4), "little")
        os.close(reading)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert status_of(self.pid) == signal.SIGKILL


def wait_for_event(home: int, port: int) -> None:
    assert select.select([home], [], [], PATIENCE)[0]
    assert os.read(home, 4096) == pack("=I", port)


@pytest.mark.parametrize("evtchn_first", [True, False])
def test_a_peer_is_killed(machine: Machine, alice: Domain, bob: Domain, evtchn_first: bool) -> None:
    """The grantee's end, as libxenvchan's client sets it: its liveness byte and an event. Files close in order."""
    events = alice.devices.open("evtchn")
    port = events.ioctl(BIND_UNBOUND_PORT, pack("=I", 2))
    with alice.share(bob, writable=True) as shared:
        shared.memory[20] = 1

        def body() -> int:
            names = ["evtchn", "gntdev"] if evtchn_first else ["gntdev", "evtchn"]
            files = {name: bob.devices.open(name) for name in names}
            remote = files["evtchn"].ioctl(BIND_INTERDOMAIN, pack("=II", 1, port))
            argument = bytearray(MapGrantRef(1, 0).pack() + pack("=II", 1, shared.refs[0]))
            files["gntdev"].ioctl(MAP_GRANT_REF, argument)
            index = MapGrantRef.unpack_from(argument).index
            files["mapping"] = files["gntdev"].mmap(index, 4096, prot=RW)  # type: ignore[assignment]
            files["gntdev"].ioctl(SET_UNMAP_NOTIFY, UnmapNotify(index + 20, BOTH, remote).pack())
            globals()["_kept"] = files
            return remote

        client = Killed(body)
        assert shared.mapped_by == (2,)
        assert shared.memory[20] == 1
        client.kill()
        wait_for_event(events.fileno(), port)
        assert shared.memory[20] == 0
    events.close()


def test_a_granter_is_killed(machine: Machine, alice: Domain, bob: Domain) -> None:
    """Pages freed at once after they were mapped, as libxengntshr does: the map alone keeps them."""
    events = bob.devices.open("evtchn")
    port = events.ioctl(BIND_UNBOUND_PORT, pack("=I", 1))

    def body() -> int:
        shared = alice.share(bob, writable=True)
        mine = alice.devices.open("evtchn")
        remote = mine.ioctl(BIND_INTERDOMAIN, pack("=II", 2, port))
        shared.memory[8] = 1
        shared._file.ioctl(SET_UNMAP_NOTIFY, UnmapNotify(shared._index + 8, BOTH, remote).pack())
        shared._file.ioctl(DEALLOC_GREF, DeallocGref(shared._index, 1).pack())
        globals()["_kept"] = shared, mine
        return shared.refs[0]

    server = Killed(body)
    with bob.map(1, server.said, writable=True) as mapped:
        assert mapped.memory[8] == 1
        server.kill()
        wait_for_event(events.fileno(), port)
        assert mapped.memory[8] == 0
    events.close()
