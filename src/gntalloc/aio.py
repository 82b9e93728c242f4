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
from typing import TYPE_CHECKING, Any

from gntalloc.vchan.aio import Channel, Listener, adopt, connect, listen

if TYPE_CHECKING:
    from gntalloc.domain import Domain
    from gntalloc.frontend.aio import Disk
    from gntalloc.guest.events import Port
    from gntalloc.guest.pages import SharedPages

__all__ = ["Channel", "Listener", "adopt", "connect", "disk", "listen", "wait", "wait_released"]


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

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    loop.add_reader(descriptor, wake)
    try:
        await waiter
    finally:
        with contextlib.suppress(ValueError):
            loop.remove_reader(descriptor)
