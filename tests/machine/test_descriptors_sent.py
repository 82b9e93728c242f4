"""Descriptors that a hostile program sends: to let go of one is never to wait. Here without the kernel's refusal."""

from __future__ import annotations

import os
import socket
import struct
import threading
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from gntalloc.machine import descriptors as foreign
from gntalloc.machine.speaker import Dropped
from gntalloc.machine.stream import MessageStream as Channel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOR_EVER = 100_000  # seconds
MANY = 20


@pytest.fixture
def lingering() -> Iterator[int]:
    """A TCP socket whose last close waits, since nobody reads at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        reader, _ = server.accept()
        with reader:
            sock.setblocking(False)
            try:
                while True:
                    sock.send(bytes(65536))
            except BlockingIOError:
                pass
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, FOR_EVER))
            yield sock.detach()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def post(sock: socket.socket, data: bytes, descriptor: int, count: int = 1) -> None:
    """Send it so often, and give it up."""
    socket.send_fds(sock, [data], [descriptor] * count)
    os.close(descriptor)


def test_what_came_unasked(pair: tuple[socket.socket, socket.socket], lingering: int) -> None:
    ours, theirs = pair
    post(theirs, b"hello", lingering, MANY)
    data, descriptors = foreign.receive(ours, 100)
    assert (data, len(descriptors)) == (b"hello", MANY)
    foreign.let_go(descriptors)


def test_a_file_that_is_slow_to_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on FUSE, which is asked at each close(2): who asks there cannot be killed, so here only close(2) is slow."""
    enough, closed = threading.Event(), threading.Event()

    def close(descriptor: int) -> None:
        assert enough.wait(20)
        os.close(descriptor)
        closed.set()

    monkeypatch.setattr(foreign, "_close", close)
    foreign.let_go([os.open(tmp_path, os.O_RDONLY)])
    assert not closed.is_set()
    enough.set()
    assert closed.wait(20)


def test_what_is_still_in_the_queue(pair: tuple[socket.socket, socket.socket], lingering: int) -> None:
    ours, theirs = pair
    theirs.send(b"hello")
    post(theirs, b"hello", lingering)
    foreign.hang_up(ours)
    with pytest.raises(BrokenPipeError):
        theirs.send(b"more")


def test_more_than_any_message_has(pair: tuple[socket.socket, socket.socket], lingering: int) -> None:
    ours, theirs = pair
    had = len(os.listdir("/proc/self/fd"))
    post(theirs, b"hello", lingering, MANY)
    with closing(Channel(ours)) as channel, pytest.raises(Dropped):
        channel.receive(0)
    assert len(os.listdir("/proc/self/fd")) == had - 2  # it, and ours


def test_nothing_is_there(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    with pytest.raises(BlockingIOError):
        foreign.receive(ours, 100)
    theirs.close()
    assert foreign.receive(ours, 100) == (b"", [])


def test_where_none_has_reason_to_send_any(pair: tuple[socket.socket, socket.socket], lingering: int) -> None:
    """Refused, or taken and let go of, as the kernel can."""
    ours, theirs = pair
    foreign.refuse(ours)
    try:
        post(theirs, b"hello", lingering)
    except PermissionError:
        foreign.let_go([lingering])
    theirs.close()
    foreign.hang_up(ours)
