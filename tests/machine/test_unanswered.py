"""What was given up comes before what is asked; what was answered and not heard is undone."""

from __future__ import annotations

import errno
import os
import signal
from struct import pack, unpack_from
from typing import TYPE_CHECKING

import pytest
import rawwire as wire
from raw_client import ALLOC, DEALLOC, MAP, UNMAP, Answer, RawClient

import gntalloc
from gntalloc.machine.connection import Connection
from gntalloc.machine.machine import Machine as Core
from gntalloc.machine.server import Server
from gntalloc.places import domain_path

if TYPE_CHECKING:
    from pathlib import Path

    from gntalloc import Domain, Machine


def share(handle: int, peer: int, pages: int = 1, *, keep: int = 0) -> bytes:
    return wire.SHARE_REQUEST.pack(handle, peer, 1, pages, keep)


def attach(handle: int, granter: int, *refs: int) -> bytes:
    return wire.ATTACH_REQUEST.pack(handle, granter, 1, 0, 0x10000) + pack(f"={len(refs)}I", *refs)


def hello(client: RawClient) -> bytes:
    return client.request(wire.HELLO, pack("=I", wire.VERSION))


def test_what_was_given_up_before_comes_first(machine: Machine, alice: Domain, bob: Domain) -> None:
    """Pages by munmap, a file by close: the peer's channel is the first to be ready all the same."""
    with RawClient(alice) as granter, RawClient(bob) as peer:
        files, granters_home = granter.open("gntalloc")
        maps, peers_home = peer.open("gntdev")
        shared = granter.call(wire.SHARE, share(files, bob.domid))
        (ref,) = unpack_from("=I", shared.body, wire.SHARE_ANSWER.size)
        _, (kept,) = granter.alloc(files, bob.domid)
        os.kill(machine.pid, signal.SIGSTOP)
        try:
            peer.sock.sendall(hello(peer))
            shared.close()
            os.close(granters_home)
            peer.send(wire.ATTACH, attach(maps, alice.domid, ref))
            peer.send(wire.ATTACH, attach(maps, alice.domid, kept))
        finally:
            os.kill(machine.pid, signal.SIGCONT)
        assert [peer.answer().error for _ in range(3)] == [0, errno.EINVAL, errno.EINVAL]
        os.close(peers_home)


def test_what_was_given_up_while_the_machine_was_listening_comes_first(
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
    shared = answer(granter, wire.SHARE, share(opened.result, 2))
    grants = server.machine.guest(1).gntalloc
    assert grants.in_use == 1

    # The granter lets go after the peer's question has been received, and before that was sent the peer can have been
    # told: the machine knows no better than to look again.
    admit = Connection.admit

    def admit_and_let_go(channel: Connection) -> None:
        admit(channel)
        if channel.guest.domid == 2:
            shared.close()

    monkeypatch.setattr(Connection, "admit", admit_and_let_go)
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
            if request_ == ALLOC:
                client.send(wire.SHARE, share(handle, bob.domid))
            else:
                client.send(wire.ATTACH, attach(handle, alice.domid, *shared.refs))
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


def test_what_is_kept_stays_on_the_list_without_a_map(alice: Domain, bob: Domain) -> None:
    with RawClient(alice) as client:
        handle, home = client.open("gntalloc")
        for keep in (0, 1):
            answer = client.call(wire.SHARE, share(handle, bob.domid, keep=keep)).close()
            client.call(wire.HELLO, pack("=I", wire.VERSION))
            assert client.ioctl(handle, DEALLOC, pack("=QI4x", answer.result, 1)).error == (0 if keep else errno.EINVAL)
        os.close(home)


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
