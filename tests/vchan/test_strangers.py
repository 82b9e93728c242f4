"""Descriptors that a hostile peer, or a stranger, sends over the direct bell of a channel: nobody waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from gntalloc import PeerDied, TimedOut, aio, unasked
from gntalloc.clock import now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc import Domain, Machine
    from gntalloc.vchan.channel import Channel

PATIENCE = 20.0
FOR_EVER = 10_000  # seconds
THIS, OLD = "this kernel", "before 6.16"


@pytest.fixture(params=[THIS, OLD])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the kernel can. Without the refusal a thread is held up in place of those who use the channel."""
    if request.param == OLD:
        monkeypatch.setattr(unasked, "_SO_PASSRIGHTS", 9999)
    else:
        with socket.socket(socket.AF_UNIX) as sock:
            if not unasked.refuse(sock):
                pytest.skip("this kernel cannot refuse descriptors: Linux 6.16 can")
    return str(request.param)


@pytest.fixture
def lingering(machine: Machine) -> Iterator[Callable[[], int]]:
    """Makes TCP sockets whose last close waits, until the test is over."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def make() -> int:
            sock = socket.create_connection(server.getsockname())
            stack.enter_context(server.accept()[0])
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(65536))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, FOR_EVER))
            return sock.detach()

        yield make


def send(number: int, descriptor: int, kernel: str) -> None:
    """Send a descriptor over a bell, and give it up. Where it is refused it stays here, and is made harmless."""
    with socket.socket(fileno=os.dup(number)) as bell:
        try:
            socket.send_fds(bell, [b"!"], [descriptor])
        except PermissionError:
            assert kernel == THIS
            with socket.socket(fileno=os.dup(descriptor)) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        else:
            assert kernel == OLD
    os.close(descriptor)


def bell_of(channel: Channel | aio.Channel) -> int:
    bell = channel._core.end.bells.direct
    assert bell is not None
    return bell.fileno()


def test_a_peer_that_sends_some_holds_up_nobody(
    kernel: str, lingering: Callable[[], int], pair: Callable[..., tuple[Channel, Channel]]
) -> None:
    server, client = pair()
    for _ in range(3):
        with contextlib.suppress(BrokenPipeError):  # it is not listened to any more
            send(bell_of(client), lingering(), kernel)
    with pytest.raises(TimedOut if kernel == THIS else PeerDied):  # one who does so does not speak our protocol
        server.recv(timeout=0.05)
    for _ in range(20 if kernel == THIS else 0):
        client.send(b"hello", timeout=PATIENCE)
        assert server.recv(timeout=PATIENCE) == b"hello"
        server.send(b"hi", timeout=PATIENCE)
        assert client.recv(timeout=PATIENCE) == b"hi"


def test_the_end_of_a_channel_waits_for_none(
    kernel: str, lingering: Callable[[], int], pair: Callable[..., tuple[Channel, Channel]]
) -> None:
    """They are in the queue that is closed."""
    server, client = pair()
    send(bell_of(client), lingering(), kernel)
    begun = now()
    server.close()
    assert now() - begun < FOR_EVER / 100


def test_an_event_loop_goes_on(kernel: str, lingering: Callable[[], int], alice: Domain, bob: Domain) -> None:
    async def main() -> None:
        async with asyncio.timeout(PATIENCE), aio.listen(alice, 2, "test") as listener:
            server, client = await asyncio.gather(listener.accept(), aio.connect(bob, 1, "test"))
            send(bell_of(client), lingering(), kernel)
            async with server, client:
                for _ in range(20):
                    await client.send(b"hello")
                    if kernel == THIS:
                        assert await server.recv() == b"hello"
                    else:
                        with contextlib.suppress(PeerDied):
                            await server.recv()
                        break

    asyncio.run(main())


def test_a_stranger_at_the_listening_bell_holds_up_nobody(
    kernel: str, lingering: Callable[[], int], alice: Domain, bob: Domain
) -> None:
    """Its name is no secret, and anybody may connect before the client does."""
    with alice.listen(2, "test") as listener:
        listening = listener.offer()._core.end.bells._listening
        assert listening is not None
        strangers = []
        for _ in range(3):
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stranger.connect(listening.getsockname())
            send(stranger.fileno(), lingering(), kernel)
            strangers.append(stranger)
        with ThreadPoolExecutor(1) as other:
            future = other.submit(bob.connect, 1, "test", timeout=PATIENCE)
            with listener.accept(timeout=PATIENCE) as server, future.result(PATIENCE) as client:
                client.send(b"hello", timeout=PATIENCE)
                assert server.recv(timeout=PATIENCE) == b"hello"
        for stranger in strangers:
            stranger.close()
