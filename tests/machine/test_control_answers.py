"""The answer to an order may be long, may fail, and may come while things change. The machine goes on."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

import gntalloc
from gntalloc import waits
from gntalloc.errors import DeviceError, MachineBroke
from gntalloc.guest import control as client
from gntalloc.guest.control import ControlClient
from gntalloc.machine.control import Control
from gntalloc.machine.machine import Machine as Core
from gntalloc.machine.server import Server
from gntalloc.unasked import Disposal
from gntalloc.wire.messages import MORE, kind_of
from gntalloc.wire.messages import Control as Order
from gntalloc.wire.stream import MAX_PAYLOAD, Decoder, encode_reply

PATIENCE = 30.0

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DOMAINS = 15
PAGES = 1024  # the default limit of each


def test_every_page_of_a_full_machine_can_be_listed() -> None:
    with gntalloc.Machine() as machine:
        kept = [machine.domain(domid).share(99, PAGES) for domid in range(1, DOMAINS + 1)]
        there = machine.grants()
        assert len(there) == DOMAINS * PAGES
        assert {grant.granter for grant in there} == set(range(1, DOMAINS + 1))
        assert len({(grant.granter, grant.ref) for grant in there}) == DOMAINS * PAGES
        assert machine.statistics().pages == DOMAINS * PAGES
        for pages in kept:
            pages.close()


def test_a_list_that_is_made_while_pages_come_and_go() -> None:
    with gntalloc.Machine() as machine:
        kept = machine.domain(1).share(2, 1000)
        over = threading.Event()

        def come_and_go() -> None:
            while not over.is_set():
                machine.domain(2).share(1, 64).close()

        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            for _ in range(20):
                mine = [grant.ref for grant in machine.grants() if grant.granter == 1]
                assert mine == list(kept.refs)
        finally:
            over.set()
            thread.join(PATIENCE)
            kept.close()


class Pair:
    """A control connection between a client and orders of our own, on a machine in a thread."""

    def __init__(self, folder: Path, orders: dict[str, Callable[..., Any]]) -> None:
        self.server = Server(Core(), str(folder))
        ours, theirs = socket.socketpair()
        self.server._add_control(Control(ours, orders, Disposal()), ends_the_machine=True)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        self.client = ControlClient(str(folder), sock=waits.Socket(fileno=theirs.detach()))

    def close(self) -> None:
        self.client.close()
        self.thread.join(PATIENCE)
        self.server.close()


def _fails(error: BaseException) -> Callable[..., Any]:
    def order(_owner: object) -> None:
        raise error

    return order


def _fails_later(_owner: object) -> Iterator[int]:
    yield from range(100_000)
    raise MemoryError


ORDERS: dict[str, Callable[..., Any]] = {
    "long": lambda _owner: "é" * MAX_PAYLOAD,
    "rows": lambda _owner: iter(range(1_000_000)),
    "nested": lambda _owner: {"a": iter([]), "b": {"c": iter([[1], None, "x"])}, "d": [1]},
    "empty": lambda _owner: iter([]),
    "nothing": lambda _owner: None,
    "no descriptor": _fails(OSError(errno.EMFILE, "Too many open files")),
    "no memory": _fails(MemoryError()),
    "no memory later": _fails_later,
    "our fault": _fails(IndexError("ours")),
}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path, ORDERS)
    yield pair
    pair.close()


def test_an_answer_of_any_length_arrives(pair: Pair) -> None:
    assert pair.client.order("long") == "é" * MAX_PAYLOAD
    assert pair.client.order("rows") == list(range(1_000_000))
    assert pair.client.order("nested") == {"a": [], "b": {"c": [[1], None, "x"]}, "d": [1]}
    assert pair.client.order("empty") == []
    assert pair.client.order("nothing") is None


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("no descriptor", errno.EMFILE),
        ("no memory", errno.ENOMEM),
        ("no memory later", errno.ENOMEM),
        ("our fault", errno.EIO),
    ],
)
def test_an_order_that_fails_says_so_and_the_connection_goes_on(pair: Pair, name: str, code: int) -> None:
    for _ in range(2):
        with pytest.raises(DeviceError) as caught:
            pair.client.order(name)
        assert caught.value.errno == code
        assert pair.client.order("nothing") is None


def test_a_client_takes_no_more_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MOST_ANSWERED", 100_000)
    ours, theirs = socket.socketpair()

    def answer_for_ever() -> None:
        (message,) = Decoder().feed(ours.recv(65536))
        assert message.kind == kind_of(Order)
        try:
            while True:
                ours.sendall(encode_reply(message.kind, message.id, result=MORE, body=b"x" * 10_000))
        except OSError:
            pass  # it has hung up

    thread = threading.Thread(target=answer_for_ever)
    thread.start()
    try:
        with pytest.raises(MachineBroke, match="100000 bytes"):
            ControlClient("/nowhere", sock=waits.Socket(fileno=theirs.detach())).order("grants")
    finally:
        thread.join(PATIENCE)
        ours.close()


def test_an_answer_that_nobody_reads_is_not_made(tmp_path: Path) -> None:
    """What does not fit the socket waits as rows that are not made yet, not as bytes."""
    server = Server(Core(), str(tmp_path))
    made = 0

    def rows(_owner: object) -> Iterator[int]:
        nonlocal made
        while True:
            made += 1
            yield made

    ours, theirs = socket.socketpair()
    server._add_control(Control(ours, {"rows": rows}, Disposal()), ends_the_machine=True)
    payload = json.dumps({"do": "rows"}).encode()
    with theirs:
        theirs.sendall(
            len(payload).to_bytes(4, "little") + kind_of(Order).to_bytes(2, "little") + b"\0\0" + b"\1\0\0\0"
        )
        theirs.sendall(payload)
        before = -1
        while before != made or not made:
            before = made
            for _ in range(20):
                server.loop.hear(0)
                server.turns.serve()
        assert made < 1_000_000
    server.close()
    assert os.listdir(tmp_path) == []
