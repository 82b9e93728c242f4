"""asyncio: what waits on a peer waits without holding anybody up."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from gntalloc import Closed, PeerClosed, PeerDied, TimedOut, aio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from gntalloc import Domain

PATIENCE = 20.0


def run(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE):
            await main

    asyncio.run(bounded())


async def two(alice: Domain, bob: Domain, **settings: Any) -> tuple[aio.Channel, aio.Channel]:
    async with aio.listen(alice, 2, "test", **settings) as listener:
        server, client = await asyncio.gather(listener.accept(), aio.connect(bob, 1, "test"))
        return server, client


@pytest.mark.parametrize("extensions", [None, False])
def test_bytes_messages_and_places_both_ways_at_once(alice: Domain, bob: Domain, extensions: bool | None) -> None:
    async def main() -> None:
        server, client = await two(alice, bob, size=4096, extensions=extensions)
        data = os.urandom(200_000)

        async def stream(channel: aio.Channel) -> None:
            await channel.write(data)
            for number in range(100):
                await channel.send(bytes([number]) * 100)
            view = await channel.reserve(50, message=True)
            view[:] = b"p" * 50
            channel.commit()

        async def check(channel: aio.Channel) -> None:
            got = bytearray()
            buffer = bytearray(3000)
            while len(got) < len(data):
                limit = min(3000, len(data) - len(got))
                got += await channel.read(limit) if len(got) % 2 else b""
                limit = min(3000, len(data) - len(got))
                if limit:
                    got += buffer[: await channel.readinto(memoryview(buffer)[:limit])]
            assert got == data
            for number in range(100):
                assert await channel.recv() == bytes([number]) * 100
            assert bytes(await channel.peek(message=True)) == b"p" * 50
            channel.release()

        await asyncio.gather(stream(server), stream(client), check(server), check(client))
        await server.drain()
        async with server, client:
            pass

    run(main())


def test_a_listener_serves_one_after_another_and_iterates(alice: Domain, bob: Domain) -> None:
    async def serve(ready: asyncio.Event) -> None:
        async with aio.listen(alice, 2, "test", size=0) as listener:
            ready.set()
            async for channel in listener:
                async with channel:
                    async for message in channel:
                        await channel.send(message.upper())
                        if message == b"last":
                            await channel.drain()
                            return

    async def main() -> None:
        ready = asyncio.Event()
        server = asyncio.create_task(serve(ready))
        for name in (b"one", b"two", b"last"):
            async with await aio.connect(bob, 1, "test") as channel:
                await channel.send(name)
                assert await channel.recv() == name.upper()
        await server

    run(main())


def test_a_cancelled_call_leaves_the_channel_good(alice: Domain, bob: Domain) -> None:
    async def main() -> None:
        server, client = await two(alice, bob)
        for wait in (server.recv, server.read, server.peek):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await wait()
        await client.send(b"x")
        assert await server.recv() == b"x"
        server.close()
        client.close()

    run(main())


def test_close_here_and_there(alice: Domain, bob: Domain) -> None:
    async def main() -> None:
        server, client = await two(alice, bob)
        here, there = asyncio.create_task(server.recv()), asyncio.create_task(client.recv())
        await asyncio.sleep(0.02)
        server.close()
        with pytest.raises(Closed):
            await here
        with pytest.raises(PeerClosed):
            await there
        client.close()

    run(main())


def test_half_an_end(alice: Domain, bob: Domain) -> None:
    async def main() -> None:
        server, client = await two(alice, bob)
        await server.send(b"question")
        await server.finish()
        questions = [message async for message in client]
        await client.send(b"answer")
        await client.finish()
        assert (questions, [message async for message in server]) == ([b"question"], [b"answer"])
        server.close()
        client.close()

    run(main())


def test_a_cancelled_connect_ends(bob: Domain) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await aio.connect(bob, 1, "none")

    run(main())


def test_a_killed_peer(with_program: Callable[..., Any]) -> None:
    blocking, process = with_program("channel.send(b'ready'); time.sleep(60)")

    async def main() -> None:
        channel = aio.Channel(blocking)
        assert await channel.recv() == b"ready"
        waiting = asyncio.create_task(channel.recv())
        await asyncio.sleep(0.02)
        process.kill()
        with pytest.raises(PeerDied):
            await waiting

    run(main())


def test_others_run_meanwhile(alice: Domain, bob: Domain) -> None:
    async def ticks() -> AsyncIterator[int]:
        for tick in range(5):
            await asyncio.sleep(0.001)
            yield tick

    async def main() -> None:
        server, client = await two(alice, bob)
        waiting = asyncio.create_task(server.recv())
        assert [tick async for tick in ticks()] == list(range(5))
        await client.send(b"x")
        assert await waiting == b"x"
        server.close()
        client.close()

    run(main())


def test_ports_and_pages(alice: Domain, bob: Domain) -> None:
    async def main() -> None:
        with alice.events.bind(2) as port, bob.events.connect(1, port.number) as other:
            await aio.wait(other)
            asyncio.get_running_loop().call_later(0.02, port.notify)
            await aio.wait(other)
            with pytest.raises(TimedOut):
                other.wait(timeout=0)
        with alice.share(2, writable=True) as shared:
            await aio.wait_released(shared)
            mapped = bob.map(shared.grant)
            asyncio.get_running_loop().call_later(0.02, mapped.close)
            await aio.wait_released(shared)
            assert not shared.held

    run(main())


def test_a_cancelled_accept_leaves_nothing(alice: Domain) -> None:
    """Though the thread that makes the next channel comes to its end only afterwards. The fixtures see what is left."""

    async def main() -> None:
        begun, go_on = threading.Event(), threading.Event()
        async with aio.listen(alice, 2, "test", size=0) as listener:
            offer = listener._offers.offer

            def late() -> Any:
                begun.set()
                assert go_on.wait(30)
                return offer()

            listener._offers.offer = late  # type: ignore[method-assign]
            accepting = asyncio.create_task(listener.accept())
            await asyncio.to_thread(begun.wait, 30)
            accepting.cancel()
            asyncio.get_running_loop().call_later(0.05, go_on.set)
            with pytest.raises(asyncio.CancelledError):
                await accepting
            assert go_on.is_set()

    run(main())
