"""The pace of NBD clients: what waits for each of them is bounded, and one that stands still is dropped.

A client has a little memory that is always its own. More than that comes from a pool of all clients together. Whoever
stands still for long is dropped; while another waits for the pool, also whoever has stood still for a short time.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter
    from collections.abc import Awaitable, Sequence

__all__ = ["Pace", "Pool"]

T = TypeVar("T")

OWN = 1 << 20
"""Bytes of requests in flight that each client can always have."""
POOL = 256 << 20
"""Bytes for what is more than that, of all clients together."""
STILL = 30.0
"""Seconds in which a client must take, or give, the next piece of what it has asked for."""
IN_THE_WAY = 2.0
"""The same, while another client waits for memory."""

_PIECE = 256 << 10  # bytes
_LOOK_AGAIN = 0.25  # seconds


class Pool:
    """Memory for the requests of all clients of a server."""

    def __init__(self) -> None:
        self.clients: set[Pace] = set()
        self._left = POOL
        self._more = asyncio.Event()

    async def take(self, size: int) -> None:
        """Wait until there is so much, and take it."""
        while self._left < size:
            self._drop_one_in_the_way()
            self._more.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._more.wait(), _LOOK_AGAIN)
        self._left -= size

    def give_back(self, size: int) -> None:
        """Give back what `take` took."""
        self._left += size
        if size:
            self._more.set()

    def _drop_one_in_the_way(self) -> None:
        stuck = [pace for pace in self.clients if pace.of_the_pool and pace.still > IN_THE_WAY]
        if stuck:
            max(stuck, key=lambda pace: pace.still).drop()


class Pace:
    """One client: its streams, and the memory of its requests in flight.

    Attributes:
        used: bytes of its requests in flight.
        of_the_pool: how many of these are the pool's.
    """

    def __init__(self, reader: StreamReader, writer: StreamWriter, pool: Pool) -> None:
        self.used = 0
        self.of_the_pool = 0
        self._reader = reader
        self._writer = writer
        self._pool = pool
        self._sending = asyncio.Lock()  # a reply is whole before the next begins
        self._since: float | None = None  # when the piece was begun that is on its way now

    @property
    def still(self) -> float:
        """Seconds for which a piece has been on its way. 0: none is."""
        return 0.0 if self._since is None else asyncio.get_running_loop().time() - self._since

    def drop(self) -> None:
        """Leave the client, with whatever was on its way."""
        self._writer.transport.abort()
        self._reader.feed_eof()

    async def take(self, weight: int) -> None:
        """Wait for the memory of another request."""
        more = max(0, self.used + weight - OWN) - self.of_the_pool
        await self._pool.take(more)
        self.used += weight
        self.of_the_pool += more

    def give_back(self, weight: int) -> None:
        """Give the memory of a request back."""
        self.used -= weight
        less = self.of_the_pool - max(0, self.used - OWN)
        self.of_the_pool -= less
        self._pool.give_back(less)

    async def receive(self, length: int) -> bytes | bytearray:
        """Receive the data of a request.

        Raises:
            IncompleteReadError: the client has left, or was dropped.
        """
        data = bytearray(length)
        for at in range(0, length, _PIECE):
            size = min(_PIECE, length - at)
            data[at : at + size] = await self._in_time(self._reader.readexactly(size))
        return data

    async def send(self, parts: Sequence[bytes | bytearray]) -> None:
        """Send a reply.

        Raises:
            OSError: the client has left, or was dropped.
        """
        async with self._sending:
            for part in parts:
                whole = memoryview(part)
                for at in range(0, len(part), _PIECE):
                    self._writer.write(whole[at : at + _PIECE])
                    await self._in_time(self._writer.drain())

    async def finish(self) -> None:
        """Close the connection once the client has taken its answers."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._in_time(self._writer.wait_closed())

    async def _in_time(self, piece: Awaitable[T]) -> T:
        self._since = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(STILL):
                return await piece
        except TimeoutError:
            self.drop()
            raise
        finally:
            self._since = None
