"""A service for many clients at once, in asyncio: a dictionary that the programs of another domain share.

    python examples/asyncio_service.py                                         a machine of its own, and five clients
    GNTALLOC_DOMAIN=default/1 python examples/asyncio_service.py serve 2       for clients in domain 2, until Ctrl-C

A message is one request, `set KEY VALUE` or `get KEY`, and gets one answer. A client that dies ends its own task only.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress

import gntalloc
from gntalloc import aio

PATH = "dictionary"


async def serve(domain: gntalloc.Domain, peer: int) -> None:
    """Take each client that comes, until this is cancelled."""
    words: dict[str, str] = {}
    async with aio.listen(domain, peer, PATH) as listener, asyncio.TaskGroup() as clients:
        async for channel in listener:
            clients.create_task(serve_one(channel, words))


async def serve_one(channel: aio.Channel, words: dict[str, str]) -> None:
    async with channel:
        with suppress(gntalloc.PeerGone):  # it died: what it has set stays
            async for request in channel:
                await channel.send(answer(request.decode(errors="replace"), words).encode())


def answer(request: str, words: dict[str, str]) -> str:
    match request.split(maxsplit=2):
        case ["set", key, value]:
            words[key] = value
            return "ok"
        case ["get", key]:
            return words.get(key, "?")
        case _:
            return "say `set KEY VALUE` or `get KEY`"


async def ask(domain: gntalloc.Domain, *requests: str) -> list[str]:
    """A client: its requests, one after the other."""
    answers = []
    async with asyncio.timeout(30), await aio.connect(domain, 1, PATH) as channel:
        for request in requests:
            await channel.send(request.encode())
            answers.append((await channel.recv()).decode())
    return answers


async def both(machine: gntalloc.Machine) -> None:
    server = asyncio.create_task(serve(machine.domain(1), 2))
    domain = machine.domain(2)
    await asyncio.gather(*(ask(domain, f"set {number} {number**2}") for number in range(4)))
    print(*await ask(domain, "get 2", "get 3", "get 4", "put 5"), sep="\n")
    server.cancel()
    with suppress(asyncio.CancelledError):
        await server
    domain.close()


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        with suppress(KeyboardInterrupt):
            asyncio.run(serve(gntalloc.current_domain(), int(sys.argv[2])))
        return
    with gntalloc.Machine() as machine:
        asyncio.run(both(machine))


if __name__ == "__main__":
    main()
