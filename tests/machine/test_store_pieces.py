"""A long request over xenstore is served in turns: others are served in between, and get all their events."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

import pytest

from gntalloc.machine.machine import Machine as Core
from gntalloc.machine.server import Server
from gntalloc.machine.speaker import RUNNABLE
from gntalloc.places import store_path
from gntalloc.xenstore import wire
from gntalloc.xenstore.wire import Decoder, Message, Type, join

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gntalloc.machine.store import StoreLine

NODES = 300
PATIENCE = 30.0
PAST = 0.0
SOCKETS: list[socket.socket] = []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(Core(), str(tmp_path))
    for domid in (1, 2):
        server.create(domid, uid=os.getuid())
    yield server
    server.close()
    while SOCKETS:
        SOCKETS.pop().close()


class Client:
    """A connection to a domain's store in this very thread: `rounds` lets the server work."""

    def __init__(self, server: Server, domid: int) -> None:
        self.server = server
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(store_path(server.folder, domid))
        self.sock.setblocking(False)
        SOCKETS.append(self.sock)
        self.came: list[Message] = []
        self._decoder = Decoder()
        before = set(server.turns)
        while not (new := set(server.turns) - before):
            rounds(server, 1)
        self.line: StoreLine = new.pop()  # type: ignore[assignment]

    def send(self, kind: int, body: bytes, tx_id: int = 0) -> None:
        self.sock.sendall(wire.encode(Message(kind, 7, tx_id, body)))

    def read(self) -> None:
        try:
            while data := self.sock.recv(65536):
                self.came += self._decoder.feed(data)
        except BlockingIOError:
            pass

    @property
    def answers(self) -> list[bytes]:
        self.read()
        return [message.body for message in self.came if message.type != Type.WATCH_EVENT]

    @property
    def events(self) -> int:
        self.read()
        return sum(message.type == Type.WATCH_EVENT for message in self.came)

    def ask(self, kind: int, body: bytes, tx_id: int = 0) -> bytes:
        there = len(self.answers)
        self.send(kind, body, tx_id)
        while len(self.answers) == there:
            rounds(self.server, 1)
        return self.answers[-1]


def rounds(server: Server, number: int) -> None:
    for _ in range(number):
        server.loop.hear(0)
        server.turns.serve()


def rounds_until(server: Server, done: Callable[[], bool], seen: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, seen()
        rounds(server, 1)


def a_long_commit(server: Server) -> Client:
    """A client whose commit fires the watches of 30 tokens for each of many nodes, sent and heard but not served."""
    client = Client(server, 1)
    for number in range(30):
        client.ask(Type.WATCH, join("data", str(number)))
    tx_id = int(client.ask(Type.TRANSACTION_START, b"\0").rstrip(b"\0"))
    for number in range(NODES):
        client.ask(Type.WRITE, join(f"data/{number % 20}/{number}"), tx_id)
    client.send(Type.TRANSACTION_END, b"T\0", tx_id)
    client.send(Type.READ, join("domid"))
    client.line.receive(0)
    client.line.admit()
    return client


def test_a_turn_is_a_piece_and_the_rest_waits(server: Server) -> None:
    other = Client(server, 2)
    client = a_long_commit(server)
    there = len(client.answers)
    turns = 0
    while len(client.answers) == there:
        if not client.line.standing & RUNNABLE:  # it is served, and the answer goes as soon as there is room
            rounds_until(server, lambda: len(client.answers) > there, lambda: client.line.standing)
            break
        client.line.take_turn(PAST)
        turns += 1
        if turns < 5:
            assert other.ask(Type.READ, join("domid")) == b"2"
            assert len(client.answers) == there or turns > NODES
    assert turns > 1
    assert client.answers[there:][:1] == [b"OK\0"], "the next request was served before the one in front of it"
    rounds_until(
        server,
        lambda: len(client.answers) >= there + 2 and client.events >= 30 + 30 * NODES,
        lambda: (client.answers[there:], client.events),
    )
    assert client.answers[there:] == [b"OK\0", b"1"]
    assert client.events == 30 + 30 * NODES


@pytest.mark.parametrize("end", ["hangs up", "its domain ends"])
def test_others_hear_of_it_though_its_client_has_gone(server: Server, end: str) -> None:
    server.create(0, uid=os.getuid())
    listener = Client(server, 0)
    listener.ask(Type.WATCH, join("/local/domain/1/data", "t"))
    rounds(server, 5)
    heard = listener.events
    client = a_long_commit(server)
    client.line.take_turn(PAST)
    if end == "hangs up":
        server.turns.drop(client.line, "the test says so")
        rounds_until(server, lambda: listener.events >= heard + NODES, lambda: listener.events - heard)
        assert listener.events == heard + NODES
    else:
        server.destroy(1)
        rounds_until(server, lambda: listener.events >= heard + NODES, lambda: listener.events - heard)
        rounds(server, NODES)  # and what else its end causes
    assert not server.machine.store._watches._lagging
    assert Client(server, 2).ask(Type.READ, join("domid")) == b"2"
