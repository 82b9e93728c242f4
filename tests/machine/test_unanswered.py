"""What is told and not asked comes first; what was answered and not heard is undone."""

from __future__ import annotations

import errno
import os
import signal
from struct import pack
from typing import TYPE_CHECKING

import pytest
import rawwire as wire
from raw_client import ALLOC, ARGUMENT, DEALLOC, MAP, UNMAP, Answer, RawClient

import gntalloc
from gntalloc.machine.connection import Connection
from gntalloc.machine.machine import Machine as Core
from gntalloc.machine.server import Server
from gntalloc.maps import PAGE_SIZE
from gntalloc.places import domain_path

if TYPE_CHECKING:
    from pathlib import Path

    from gntalloc import Domain, Machine

READ_WRITE = 3


def free(handle: int, request: int, index: int, count: int = 1) -> bytes:
    region = wire.encode_regions([wire.Region(ARGUMENT, False, pack("=QI4x", index, count))])
    return wire.IOCTL_REQUEST.pack(handle, request, ARGUMENT) + region


def make(handle: int, request: int, argument: bytes, pages: int = 1) -> bytes:
    head = wire.IOCTL_MMAP_REQUEST.pack(handle, request, ARGUMENT, READ_WRITE, 1, pages * PAGE_SIZE, 0x10000)
    return head + wire.encode_regions([wire.Region(ARGUMENT, True, argument)])


def hello(client: RawClient) -> bytes:
    return client.request(wire.HELLO, pack("=I", wire.VERSION))


def test_what_was_told_before_comes_first(machine: Machine, alice: Domain, bob: Domain) -> None:
    with RawClient(alice) as granter, RawClient(bob) as peer:
        files, granters_home = granter.open("gntalloc")
        maps, peers_home = peer.open("gntdev")
        index, refs = granter.alloc(files, bob.domid, count=8)
        noted = peer.map_refs(maps, alice.domid, refs[-1:])
        os.kill(machine.pid, signal.SIGSTOP)
        try:
            peer.sock.sendall(hello(peer))  # so that its channel is the first to be ready
            for page in range(wire.MOST_UNANSWERED):
                granter.send(wire.IOCTL | wire.UNANSWERED, free(files, DEALLOC, index + page * PAGE_SIZE))
            peer.send(wire.MMAP, wire.MMAP_REQUEST.pack(maps, READ_WRITE, 1, noted, PAGE_SIZE))
        finally:
            os.kill(machine.pid, signal.SIGCONT)
        assert peer.answer().error == 0
        assert peer.answer().error == errno.EINVAL
        os.close(granters_home)
        os.close(peers_home)


def test_what_was_told_while_the_machine_was_listening_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(Core(), str(tmp_path))
    clients = []
    for domid in (1, 2):
        server.create(domid, uid=os.getuid())
        clients.append(RawClient(domain_path(str(tmp_path), domid)))
    granter, peer = clients
    server.loop.hear(1)
    server.turns.serve()  # lets them in

    def answer(client: RawClient, kind: int, payload: bytes) -> Answer:
        client.send(kind, payload)
        server.loop.hear(1)
        server.turns.serve()
        reply = client.answer()
        assert reply.error == 0
        return reply

    opened = answer(granter, wire.OPEN, wire.OPEN_REQUEST.pack(os.O_RDWR) + b"gntalloc")
    files = opened.result
    answer(granter, wire.IOCTL_MMAP, make(files, ALLOC, pack("=HHIQQ", 2, 1, 1, 0, 0))).close()
    answer(granter, wire.HELLO, pack("=I", wire.VERSION))
    grants = server.machine.guest(1).gntalloc
    assert grants.in_use == 1

    # The granter's note comes after the peer's question has been received, and before that was sent the peer can have
    # been told: the machine knows no better than to look again.
    admit = Connection.admit

    def admit_and_tell(channel: Connection) -> None:
        admit(channel)
        if channel.guest.domid == 2:
            granter.send(wire.IOCTL | wire.UNANSWERED, free(files, DEALLOC, 0))

    monkeypatch.setattr(Connection, "admit", admit_and_tell)
    seen = []
    serve = Connection.serve

    def serve_and_look(channel: Connection, message: wire.Message) -> None:
        if channel.guest.domid == 2:
            seen.append(grants.in_use)
        serve(channel, message)

    monkeypatch.setattr(Connection, "serve", serve_and_look)
    peer.sock.sendall(hello(peer))
    server.loop.hear(1)
    server.turns.serve()
    assert seen == [0]
    opened.close()
    for client in clients:
        client.close()
    server.close()


@pytest.mark.parametrize("request_", [ALLOC, MAP])
def test_what_nobody_heard_of_is_undone(machine: Machine, alice: Domain, bob: Domain, request_: int) -> None:
    with alice.share(bob, writable=True) as shared:
        before = machine.statistics()
        asker = alice if request_ == ALLOC else bob
        with RawClient(asker) as client:
            handle, home = client.open("gntalloc" if request_ == ALLOC else "gntdev")
            argument = pack("=HHIQQ", 2, 1, 1, 0, 0) if request_ == ALLOC else pack("=IIQII", 1, 0, 0, 1, *shared.refs)
            client.send(wire.IOCTL_MMAP, make(handle, request_, argument))
        with RawClient(asker) as client:
            shown = client.show(home).result
            undo = client.ioctl(shown, DEALLOC if request_ == ALLOC else UNMAP, pack("=QI4x", 0, 1))
            assert undo.error in {errno.EINVAL, errno.ENOENT}
        os.close(home)
        after = machine.statistics()
        assert after.pages == before.pages
        assert not shared.held


def test_what_is_mapped_stays_when_its_program_hangs_up(alice: Domain, bob: Domain) -> None:
    with alice.share(bob, writable=True) as shared:
        alice.devices.close()
        with bob.map(shared.grant) as mapped:
            mapped.memory[0] = 1
            assert shared.memory[0] == 1
            assert shared.mapped_by == (bob.domid,)


def test_many_frees_in_a_row_come_before_what_is_asked_then(machine: Machine) -> None:
    granter, peer = machine.domain(41, limit=100), machine.domain(42)
    for _ in range(20):
        shares = [granter.share(peer) for _ in range(100)]
        grants = [gntalloc.Grant.parse(str(share.grant)) for share in shares]
        for share in shares:
            share.close()
        with pytest.raises(gntalloc.DeviceError):
            peer.map(grants[-1])
    granter.close()
    peer.close()
