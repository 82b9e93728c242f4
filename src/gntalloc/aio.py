"""asyncio: the calls that wait on a peer, awaitable. Everything else is as it is.

    async with await aio.connect(domain, 1, "echo") as channel:
        await channel.send(b"hello")
        print(await channel.recv())

    async with aio.listen(domain, 2, "echo") as listener:
        async for channel in listener:
            ...

    async with await aio.disk(domain) as disk:
        await disk.read(0, 4096)

    await aio.wait(port)                    # a port of domain.events
    await aio.wait_released(shared)         # pages that a peer maps

A call that is cancelled has done nothing, or what `TimedOut.done` would have said; use asyncio.timeout for deadlines.
What needs xenstore or the machine (connect's looking for the nodes, listen's making of pages) runs in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any, Self, TypeVar

from gntalloc.errors import Busy, PeerBroke, PeerClosed, TimedOut
from gntalloc.vchan.layout import NOTIFY_READ, NOTIFY_WRITE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gntalloc.domain import Domain
    from gntalloc.frontend.aio import Disk
    from gntalloc.guest.events import Port
    from gntalloc.guest.pages import SharedPages
    from gntalloc.vchan import channel as blocking
    from gntalloc.vchan import server
    from gntalloc.vchan.ticket import Ticket

__all__ = ["Channel", "Listener", "adopt", "connect", "disk", "listen", "wait", "wait_released"]

Result = TypeVar("Result")

_A_WHILE = 0.5  # seconds: how long a thread waits before it looks whether anybody still wants it to


class Channel:
    """A `gntalloc.vchan` channel whose waiting calls are coroutines. `blocking` is that channel.

    One event loop. Several tasks may use it; each direction serves one of them at a time.
    """

    def __init__(self, channel: blocking.Channel) -> None:
        self.blocking = channel
        self._waiters: set[asyncio.Future[None]] = set()
        self._reading = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._draining = asyncio.Lock()  # its waiters hold up nobody who writes

    async def read(self, size: int | None = None) -> bytes:
        """See `read` of the blocking channel."""
        return await self._when_read(lambda: self.blocking.read(size, 0))

    async def readinto(self, buffer: bytearray | memoryview | Any) -> int:
        """See `readinto` of the blocking channel."""
        return await self._when_read(lambda: self.blocking.readinto(buffer, 0))

    async def recv(self) -> bytes:
        """See `recv` of the blocking channel."""
        return await self._when_read(lambda: self.blocking.recv(0))

    async def recv_into(self, buffer: bytearray | memoryview | Any) -> int:
        """See `recv_into` of the blocking channel."""
        return await self._when_read(lambda: self.blocking.recv_into(buffer, 0))

    async def peek(self, size: int | None = None, *, message: bool = False) -> memoryview:
        """See `peek` of the blocking channel."""
        return await self._when_read(lambda: self.blocking.peek(size, 0, message=message))

    async def write(self, data: bytes | bytearray | memoryview | Any) -> None:
        """See `write` of the blocking channel. If it is cancelled, a part may have been written."""
        view = memoryview(data).cast("B")
        done = 0

        def write() -> None:
            nonlocal done
            try:
                self.blocking.write(view[done:], 0)
            except TimedOut as late:
                done += late.done
                raise

        await self._when_written(write)

    async def send(self, message: bytes | bytearray | memoryview | Any) -> None:
        """See `send` of the blocking channel. If it is cancelled, nothing was written."""
        await self._when_written(lambda: self.blocking.send(message, 0))

    async def reserve(self, size: int | None = None, *, message: bool = False) -> memoryview:
        """See `reserve` of the blocking channel."""
        return await self._when_written(lambda: self.blocking.reserve(size, 0, message=message))

    async def drain(self) -> None:
        """See `drain` of the blocking channel."""
        async with self._draining:
            await self._repeat(lambda: self.blocking.drain(0), NOTIFY_READ)

    async def wait_connected(self) -> None:
        """See `wait_connected` of the blocking channel."""
        async with self._draining:
            await self._repeat(lambda: self.blocking.wait_connected(0), NOTIFY_READ)

    async def finish(self) -> None:
        """See `finish` of the blocking channel."""
        await self._when_written(lambda: self.blocking.finish(0))

    def commit(self, size: int | None = None) -> None:
        """See `commit` of the blocking channel."""
        self.blocking.commit(size)

    def release(self, size: int | None = None) -> None:
        """See `release` of the blocking channel."""
        self.blocking.release(size)

    def detach(self) -> Ticket:
        """See `detach` of the blocking channel.

        Raises:
            Busy: a task is in a call of it; and as there.
        """
        if self._waiters:
            raise Busy(f"{self.blocking!r} cannot be detached: a task is in a call of it")
        return self.blocking.detach()

    def close(self) -> None:
        """See `close` of the blocking channel. Tasks that wait get Closed."""
        waiters, self._waiters = self._waiters, set()
        if waiters:
            asyncio.get_running_loop().remove_reader(self.blocking.fileno())
        try:
            self.blocking.close()
        finally:
            _wake(waiters)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Messages, until the peer closes or finishes."""
        while True:
            try:
                message = await self.recv()
            except PeerClosed:
                return
            yield message

    async def _when_read(self, attempt: Callable[[], Result]) -> Result:
        async with self._reading:
            return await self._repeat(attempt, NOTIFY_WRITE)

    async def _when_written(self, attempt: Callable[[], Result]) -> Result:
        async with self._writing:
            return await self._repeat(attempt, NOTIFY_READ)

    async def _repeat(self, attempt: Callable[[], Result], bit: int) -> Result:
        """Until it does not want to wait. The peer is asked to ring before the attempt that counts."""
        try:
            return attempt()
        except TimedOut:
            pass
        asked = self.blocking.asking(bit)
        with asked:
            while True:
                try:
                    return attempt()
                except TimedOut:
                    await self._bell()
                    asked.again()

    async def _bell(self) -> None:
        """Until one rings. One reader of the loop serves all tasks that wait."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        if not self._waiters:
            loop.add_reader(self.blocking.fileno(), self._rang)
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.discard(waiter)
                if not self._waiters:
                    loop.remove_reader(self.blocking.fileno())

    def _rang(self) -> None:
        waiters, self._waiters = self._waiters, set()
        asyncio.get_running_loop().remove_reader(self.blocking.fileno())
        try:
            self.blocking.heard()
        except OSError as error:
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(error)
        _wake(waiters)


class Listener:
    """A `gntalloc.vchan` listener whose `accept` is a coroutine. `blocking` is that listener, once it is entered."""

    blocking: server.Listener

    def __init__(self, domain: Domain, peer: int | Domain, path: str, **settings: Any) -> None:
        self._make = lambda: domain.listen(peer, path, **settings)

    async def accept(self) -> Channel:
        """See `accept` of the blocking listener."""
        while True:
            offered = await self._offer()
            with contextlib.suppress(PeerBroke):  # accept deals with it, and then there is another offer
                await offered.wait_connected()
            with contextlib.suppress(TimedOut):
                return Channel(self.blocking.accept(0))

    async def _offer(self) -> Channel:
        """Also if this is cancelled, the thread comes to its end before `close` closes what it has made."""
        offering = asyncio.ensure_future(asyncio.to_thread(self.blocking.offer))
        try:
            return Channel(await asyncio.shield(offering))
        except asyncio.CancelledError:
            await asyncio.wait([offering])
            offering.exception()  # nobody else asks for it
            raise

    async def __aenter__(self) -> Self:
        self.blocking = await asyncio.to_thread(self._make)
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.blocking.close)

    async def __aiter__(self) -> AsyncIterator[Channel]:
        """A channel for each client that comes."""
        while True:
            yield await self.accept()


def listen(domain: Domain, peer: int | Domain, path: str, **settings: Any) -> Listener:
    """`async with aio.listen(domain, 2, "echo") as listener`. See `Domain.listen`, whose settings these are."""
    return Listener(domain, peer, path, **settings)


async def connect(domain: Domain, peer: int | Domain, path: str, **settings: Any) -> Channel:
    """Wait for a server: `await aio.connect(domain, 1, "echo")`. See `Domain.connect`, whose settings these are."""
    wanted = True

    def attempt() -> blocking.Channel:
        while True:
            try:
                channel = domain.connect(peer, path, timeout=_A_WHILE, **settings)
            except TimedOut:
                if not wanted:
                    raise
                continue
            if not wanted:
                channel.close()
            return channel

    try:
        return Channel(await asyncio.to_thread(attempt))
    finally:
        wanted = False  # if this was cancelled, the thread finds out


def adopt(domain: Domain, ticket: Ticket) -> Channel:
    """Have a channel that another process has detached. See `Domain.adopt`; it waits for nobody."""
    return Channel(domain.adopt(ticket))


async def disk(domain: Domain, number: int | None = None, **settings: Any) -> Disk:
    """Open a disk: `await aio.disk(domain)`. See `gntalloc.frontend.aio.disk`, whose settings these are."""
    from gntalloc.frontend import aio

    return await aio.disk(domain, number, **settings)


async def wait(port: Port) -> None:
    """Wait for an event, as `port.wait` does; the port stays masked until the next wait or `rearm`."""
    port.rearm()
    while not port.take():
        await _readable(port.fileno())


async def wait_released(shared: SharedPages) -> None:
    """Wait until no peer has any of the pages mapped. See `SharedPages.wait_released`."""
    while (released := shared.released_descriptor()) is not None:
        try:
            await _readable(released)
        finally:
            os.close(released)


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, _wake, {waiter})
    try:
        await waiter
    finally:
        with contextlib.suppress(ValueError):
            loop.remove_reader(descriptor)


def _wake(waiters: set[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
