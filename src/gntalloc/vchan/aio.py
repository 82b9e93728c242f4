"""Channels for asyncio: an event loop drives the same steps as `channel` does. Users have them from `gntalloc.aio`.

The loop watches one descriptor of a channel for all tasks that wait in it. What needs xenstore or the machine runs in a
thread: connect's looking for the nodes, listen's making of pages.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self, TypeVar

from gntalloc.async_only import AsyncOnly
from gntalloc.errors import Busy, Closed, GntallocError, PeerBroke, PeerClosed, TimedOut
from gntalloc.guest.peers import domid_of
from gntalloc.vchan import adopting, client, lending
from gntalloc.vchan.channel import Described, core_of
from gntalloc.vchan.core import bytes_of
from gntalloc.vchan.offers import SIZE, Offers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gntalloc.guest.domain import BareDomain
    from gntalloc.vchan import channel as threads
    from gntalloc.vchan.ticket import Ticket
    from gntalloc.vchan.waiting import Need, Steps

__all__ = ["Channel", "Listener", "adopt", "connect", "listen"]

Result = TypeVar("Result")

_A_WHILE = 0.5  # seconds: how long a thread waits before it looks whether anybody still wants it to


class Channel(Described, AsyncOnly):
    """A channel whose waiting calls are coroutines. One event loop; several tasks may use it.

    Each direction serves one task at a time.

    Args:
        channel: connected, or made by a listener; it is of no more use by itself, but for calls that never wait.

    Attributes:
        blocking: that channel.
        peer: the domid at the other end.
    """

    def __init__(self, channel: threads.Channel) -> None:
        super().__init__(core_of(channel))
        self.blocking = channel
        self._waiters: set[asyncio.Future[None]] = set()
        self._reading = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._draining = asyncio.Lock()  # its waiters hold up nobody who writes

    async def read(self, size: int | None = None) -> bytes:
        """See `read` of the blocking channel."""
        if size is not None and size < 0:
            raise ValueError(f"{size} bytes cannot be read")
        data = await self._in_turn(self._reading, self._core.read(size))
        self._core.has_read()
        return data

    async def readinto(self, buffer: bytearray | memoryview | Any) -> int:
        """See `readinto` of the blocking channel."""
        done = await self._in_turn(self._reading, self._core.read_into(bytes_of(buffer)))
        self._core.has_read()
        return done

    async def recv(self) -> bytes:
        """See `recv` of the blocking channel."""
        message = await self._in_turn(self._reading, self._core.receive())
        self._core.has_read()
        return message

    async def recv_into(self, buffer: bytearray | memoryview | Any) -> int:
        """See `recv_into` of the blocking channel."""
        length = await self._in_turn(self._reading, self._core.receive_into(bytes_of(buffer)))
        self._core.has_read()
        return length

    async def peek(self, size: int | None = None, *, message: bool = False) -> memoryview:
        """See `peek` of the blocking channel."""
        return await self._in_turn(self._reading, lending.peek(self._core, size, message=message))

    async def write(self, data: bytes | bytearray | memoryview | Any) -> None:
        """See `write` of the blocking channel. If it is cancelled, a part may have been written."""
        await self._in_turn(self._writing, self._core.write(bytes_of(data)))
        self._core.has_written()

    async def send(self, message: bytes | bytearray | memoryview | Any) -> None:
        """See `send` of the blocking channel. If it is cancelled, nothing was written."""
        await self._in_turn(self._writing, self._core.send(message if type(message) is bytes else bytes_of(message)))
        self._core.has_written()

    async def reserve(self, size: int | None = None, *, message: bool = False) -> memoryview:
        """See `reserve` of the blocking channel."""
        return await self._in_turn(self._writing, lending.reserve(self._core, size, message=message))

    async def drain(self) -> None:
        """See `drain` of the blocking channel."""
        await self._in_turn(self._draining, self._core.drain())

    async def wait_connected(self) -> None:
        """See `wait_connected` of the blocking channel."""
        await self._in_turn(self._draining, self._core.peer_comes())

    async def finish(self) -> None:
        """See `finish` of the blocking channel."""
        await self._in_turn(self._writing, self._core.finish())

    def detach(self) -> Ticket:
        """See `detach` of the blocking channel.

        Raises:
            Busy: a task is in a call of it; and as there.
        """
        if self._waiters or any(lock.locked() for lock in (self._reading, self._writing, self._draining)):
            raise Busy(f"{self!r} cannot be detached: a task is in a call of it")
        return super().detach()

    def close(self) -> None:
        """See `close` of the blocking channel. Tasks that wait get Closed."""
        waiters, self._waiters = self._waiters, set()
        if waiters:
            asyncio.get_running_loop().remove_reader(self._end.bells.fileno())
        try:
            super().close()
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

    async def _in_turn(self, lock: asyncio.Lock, steps: Steps[Result]) -> Result:
        """Drive steps to their end, one task at a time: what `waiting.run` does for threads."""
        async with lock:
            try:
                need = next(steps)
                while True:
                    try:
                        met = await self._wait(need)
                    except BaseException as error:
                        need = steps.throw(error)
                    else:
                        need = steps.send(met)
            except StopIteration as done:
                result: Result = done.value
                return result

    async def _wait(self, need: Need) -> bool:
        """Wait until a need is met. False: it never will be. The peer is asked to ring before the look that counts."""
        bit, refresh, wanted, over, _ = need
        end = self._end
        try:
            if refresh() >= wanted:
                return True
            if bit:
                end.ask(bit)
            try:
                while True:
                    if refresh() >= wanted:
                        return True
                    if over():
                        return refresh() >= wanted
                    await self._bell()
                    end.check_open()
                    if bit:
                        end.ask_again()
            finally:
                if bit:
                    end.ask_no_more(bit)
        except PeerBroke as broken:
            raise end.give_up(broken) from None

    async def _bell(self) -> None:
        """Until one rings. One reader of the loop serves all tasks that wait."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        if not self._waiters:
            loop.add_reader(self._end.bells.fileno(), self._rang)
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.discard(waiter)
                if not self._waiters:
                    loop.remove_reader(self._end.bells.fileno())

    def _rang(self) -> None:
        waiters, self._waiters = self._waiters, set()
        bells = self._end.bells
        asyncio.get_running_loop().remove_reader(bells.fileno())
        try:
            bells.hear_now()
        except OSError as error:
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(error)
        _wake(waiters)


class Listener(AsyncOnly):
    """A listener whose `accept` is a coroutine; `async with` makes it.

    Attributes:
        peer: whose clients.
    """

    def __init__(
        self,
        domain: BareDomain,
        peer: int,
        path: str,
        *,
        size: int | tuple[int, int],
        extensions: bool | None,
        spin: float | None,
        most_per_peer: int | None,
    ) -> None:
        self.peer = peer
        how: dict[str, Any] = {"size": size, "extensions": extensions, "spin": spin, "most_per_peer": most_per_peer}
        self._make = lambda: Offers(domain, peer, path, **how)
        self._made: Offers | None = None
        self._offered: Channel | None = None  # that a task waits with
        self._accepting = asyncio.Lock()  # the tasks that accept take turns

    @property
    def path(self) -> str:
        """Where the nodes are, in full.

        Raises:
            TypeError: before `async with`.
        """
        return self._offers.path

    async def accept(self) -> Channel:
        """See `accept` of the blocking listener.

        Raises:
            TypeError: before `async with`; and as there.
        """
        offers = self._offers
        async with self._accepting:
            while True:
                channel = await self._next_offer()
                offers.check_open()  # `__aexit__` closes what waits, and nothing may begin to wait after it
                self._offered = channel
                try:
                    await channel.wait_connected()
                except GntallocError as error:
                    await asyncio.to_thread(offers.go_on_after, error, channel.blocking)
                else:
                    offers.take()
                    return channel
                finally:
                    self._offered = None

    async def _next_offer(self) -> Channel:
        """Also if this is cancelled, the thread comes to its end before `close` closes what it has made."""
        offering = asyncio.ensure_future(asyncio.to_thread(self._offers.offer))
        try:
            return Channel(await asyncio.shield(offering))
        except asyncio.CancelledError:
            await asyncio.wait([offering])
            offering.exception()  # nobody else asks for it
            raise

    @property
    def _offers(self) -> Offers:
        if self._made is None:
            raise TypeError(f"{self!r} listens inside `async with` only: async with aio.listen(…) as listener")
        return self._made

    async def __aenter__(self) -> Self:
        self._made = await asyncio.to_thread(self._make)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._offers.stop()
        if self._offered is not None:
            self._offered.close()  # here, where its descriptor is watched
        await asyncio.to_thread(self._offers.close)

    async def __aiter__(self) -> AsyncIterator[Channel]:
        """Yield a channel for each client that comes, until the listener is closed."""
        while True:
            try:
                channel = await self.accept()
            except Closed:
                return
            yield channel

    def __repr__(self) -> str:
        return f"<Listener for domain {self.peer}, not entered yet>" if self._made is None else repr(self._made)


def listen(
    domain: BareDomain,
    peer: int | BareDomain,
    path: str,
    *,
    size: int | tuple[int, int] = SIZE,
    extensions: bool | None = None,
    spin: float | None = None,
    most_per_peer: int | None = None,
) -> Listener:
    """Wait for clients: `async with aio.listen(domain, 2, "echo") as listener`.

    See `Domain.listen`, whose arguments and errors these are; it is `async with` that raises them.
    """
    return Listener(
        domain,
        domid_of(peer),
        path,
        size=size,
        extensions=extensions,
        spin=spin,
        most_per_peer=most_per_peer,
    )


async def connect(
    domain: BareDomain,
    peer: int | BareDomain,
    path: str,
    *,
    extensions: bool | None = None,
    spin: float | None = None,
) -> Channel:
    """Wait for a server: `await aio.connect(domain, 1, "echo")`. See `Domain.connect`, whose arguments these are."""
    domid = domid_of(peer)
    wanted = True

    def attempt() -> threads.Channel:
        while True:
            try:
                channel = client.connect(domain, domid, path, timeout=_A_WHILE, extensions=extensions, spin=spin)
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


def adopt(domain: BareDomain, ticket: Ticket) -> Channel:
    """Have a channel that another process has detached. See `Domain.adopt`; it waits for nobody."""
    return Channel(adopting.adopt(domain, ticket))


def _wake(waiters: set[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
