"""What is easily written by mistake is refused at once, and says what to write."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from gntalloc import aio

if TYPE_CHECKING:
    from gntalloc import Domain

PUBLIC = [
    "gntalloc.domain:Domain",
    "gntalloc.embed:Machine",
    "gntalloc.guest.events:Events",
    "gntalloc.guest.events:Port",
    "gntalloc.guest.pages:SharedPages",
    "gntalloc.guest.pages:MappedPages",
    "gntalloc.vchan.channel:Channel",
    "gntalloc.vchan.server:Listener",
    "gntalloc.vchan.aio:Channel",
    "gntalloc.vchan.aio:Listener",
    "gntalloc.xenstore.client:Store",
    "gntalloc.xenstore.client:Transaction",
    "gntalloc.xenstore.watch:Watch",
    "gntalloc.frontend.blkfront:BlockDevice",
    "gntalloc.frontend.aio:Disk",
    "gntalloc.frontend.link:Link",
    "gntalloc.frontend.link",
    "gntalloc.frontend.xenbus:End",
    "gntalloc.frontend.blkback:Backend",
    "gntalloc.testing.program:Program",
    "gntalloc.testing.faults",
    "gntalloc.aio",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_timeout_is_named_in_the_call(name: str) -> None:
    module, _, of = name.partition(":")
    where: Any = importlib.import_module(module)
    where = getattr(where, of) if of else where
    calls = {call: value for call, value in vars(where).items() if call[0] != "_" or call == "__init__"}
    found = 0
    for call, value in calls.items():
        if not inspect.isfunction(value):
            continue
        for parameter in inspect.signature(value).parameters.values():
            found += 1
            if parameter.name in {"timeout", "patience", "seconds", "linger"}:
                assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{name}.{call}({parameter.name}=)"
    assert found, f"{name} has no calls: the list here is out of date"


def test_a_with_that_should_be_an_async_with_says_so(alice: Domain, bob: Domain) -> None:
    async def main() -> None:
        with (
            pytest.raises(TypeError, match="is used in an `async with`"),
            aio.listen(alice, bob, "test"),  # type: ignore[attr-defined]
        ):
            pass
        listener = aio.listen(alice, bob, "test")
        for early in (listener.accept(), anext(aiter(listener))):
            with pytest.raises(TypeError, match="inside `async with` only"):
                await early
        async with listener:
            client, server = await asyncio.gather(aio.connect(bob, alice, "test"), listener.accept())
            async with client, server:
                with pytest.raises(TypeError, match="is used in an `async with`"), client:  # type: ignore[attr-defined]
                    pass

    asyncio.run(main())


def test_a_listener_that_is_left_ends_the_tasks_that_accept(alice: Domain, bob: Domain) -> None:
    async def serve(listener: aio.Listener, served: asyncio.Queue[aio.Channel]) -> None:
        async for channel in listener:
            served.put_nowait(channel)

    async def main() -> None:
        served: asyncio.Queue[aio.Channel] = asyncio.Queue()
        async with asyncio.timeout(60):
            async with aio.listen(alice, bob, "test", size=0) as listener:
                tasks = [asyncio.create_task(serve(listener, served)) for _ in range(3)]
                for _ in range(2):
                    async with await aio.connect(bob, alice, "test"), await served.get():
                        pass
            await asyncio.gather(*tasks)

    for _ in range(5):
        asyncio.run(main())


def test_what_users_name_is_at_the_top_and_costs_nothing_until_then() -> None:
    program = """
import sys, gntalloc
loaded = set(sys.modules)
assert not [name for name in loaded if name.startswith(("gntalloc.vchan", "gntalloc.frontend"))], loaded
assert set(gntalloc.__all__) <= set(dir(gntalloc))
for name in gntalloc.__all__:
    assert getattr(gntalloc, name) is not None
from gntalloc import BlockDevice, Channel, Listener, Port, StoreError
import gntalloc.vchan.channel, gntalloc.frontend.blkfront
assert Channel is gntalloc.vchan.channel.Channel and BlockDevice is gntalloc.frontend.blkfront.BlockDevice
assert issubclass(StoreError, gntalloc.GntallocError)
try:
    gntalloc.Chanel
except AttributeError as error:
    assert "Chanel" in str(error)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
