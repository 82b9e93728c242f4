"""NBD clients that break the protocol, against an export of a disk; real clients are in tests/cli/test_disk.py."""

from __future__ import annotations

import asyncio
import random
import socket
from struct import Struct, pack
from typing import TYPE_CHECKING, Any

import pytest
from tests.frontend.conftest import PATIENCE
from tests.frontend.kit import SIZE, run

from gntalloc import aio
from gntalloc.cli.exporting import _listener
from gntalloc.clock import Deadline
from gntalloc.frontend import nbdpace
from gntalloc.frontend.nbd import LARGEST, NbdServer
from gntalloc.unasked import refuse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.frontend.conftest import Setting

OPTION = Struct(">8sII")
REQUEST = Struct(">IHHQQI")
READ, WRITE, DISC, FLUSH, TRIM = range(5)
FUA = 1
MAGIC = 0x25609513


flushed = 0


def counting(flush: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """The same, counted."""

    async def counted() -> None:
        global flushed  # noqa: PLW0603  one client at a time looks at it
        flushed += 1
        await flush()

    return counted


class Client:
    """Bytes, one way and the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def agree(self, flags: int = 3) -> int:
        """By the oldest way: the export's flags."""
        assert await self.reader.readexactly(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.send(pack(">I", flags), OPTION.pack(b"IHAVEOPT", 1, 0))
        size, export = Struct(">QH").unpack(await self.reader.readexactly(10))
        assert size == SIZE
        if not flags & 2:
            assert await self.reader.readexactly(124) == bytes(124)
        return int(export)

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))  # after writelines, Python 3.12.1 never comes to the end of closing

    def ask(
        self, command: int, offset: int, length: int, data: bytes = b"", *, cookie: int = 7, flags: int = 0
    ) -> None:
        self.send(REQUEST.pack(MAGIC, flags, command, cookie, offset, length), data)

    async def answer(self, length: int = 0) -> tuple[int, int, bytes]:
        """Error, cookie, data."""
        magic, error, cookie = Struct(">IIQ").unpack(await self.reader.readexactly(16))
        assert magic == 0x67446698
        return error, cookie, await self.reader.readexactly(0 if error else length)

    async def left(self) -> bool:
        """Whether the server closes the connection. What it says before does not matter."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            pass
        return True


async def close(writers: list[asyncio.StreamWriter]) -> None:
    """And wait until they are: a transport that is only about to close is a ResourceWarning (Python 3.12)."""
    for writer in writers:
        writer.close()
    for ended in await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True):
        assert ended is None or isinstance(ended, ConnectionError), ended


def exported(
    setting: Setting, main: Callable[[Callable[[], Awaitable[Client]]], Awaitable[None]], *, read_only: bool = False
) -> None:
    """Runs `main` with something that connects. At the end the disk is as good as before."""
    setting.attach()
    setting.backend()

    async def serve() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        writers: list[asyncio.StreamWriter] = []

        async def connect() -> Client:
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writers.append(writer)
            return Client(reader, writer)

        async with await aio.disk(setting.guest, timeout=PATIENCE) as disk:
            disk.flush = counting(disk.flush)  # type: ignore[method-assign, assignment]
            async with NbdServer(disk, name="it", read_only=read_only) as server:
                await server.listen(listener)
                try:
                    await main(connect)
                    assert not server.failed.done()
                    good = await connect()
                    await good.agree(flags=1)
                    good.ask(READ, 4096, 4096)
                    assert (await good.answer(4096))[2] == (await disk.read(4096, 4096))
                finally:
                    await close(writers)
            assert await disk.read(SIZE - 512, 512) == setting.now()[-512:]

    run(serve)


def test_errors_have_nbds_numbers(setting: Setting) -> None:
    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        assert await client.agree() & 0x12D == 0x12D  # flags, FLUSH, FUA, TRIM, MULTI_CONN
        cases: list[tuple[tuple[Any, ...], int]] = [
            ((READ, SIZE, 1), 22),
            ((READ, 1 << 63, 512), 22),
            ((READ, 0, LARGEST + 1), 22),
            ((WRITE, SIZE, 512, bytes(512)), 28),
            ((WRITE, 100, 512, bytes(512)), 22),
            ((TRIM, 1, 512), 22),
            ((TRIM, 0, 0xFFFF_FE00), 22),
            ((9, 0, 512), 22),
            ((READ, 5, 3), 0),  # a read may begin anywhere
            ((WRITE, 0, 512, b"w" * 512), 0),
            ((FLUSH, 0, 0), 0),
            ((TRIM, 4096, 4096), 0),
        ]
        for cookie, (request, error) in enumerate(cases):
            client.ask(*request, cookie=cookie)
            assert (await client.answer(request[2] if request[0] == READ else 0))[:2] == (error, cookie), request
        assert setting.now()[:512] == b"w" * 512
        before = flushed
        for flags, more in ((0, 0), (FUA, 1)):
            client.ask(WRITE, 0, 512, b"v" * 512, flags=flags)
            assert (await client.answer())[0] == 0
            assert flushed - before == more

    exported(setting, main)


def test_a_read_only_export_is_not_written(setting: Setting) -> None:
    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        assert await client.agree() & 0x22 == 2
        for request in ((WRITE, 0, 512, b"w" * 512), (TRIM, 0, 512)):
            client.ask(*request)
            assert (await client.answer())[0] == 1
        assert setting.now() == setting.content

    exported(setting, main, read_only=True)


def test_many_requests_at_once_are_all_answered(setting: Setting) -> None:
    """More than a connection may have in flight, of 1 MiB, from a client that reads only when all are sent."""

    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.agree()
        for cookie in range(200):
            client.ask(READ, cookie * 512, 1 << 20, cookie=cookie)
        await client.writer.drain()
        seen = set()
        for _ in range(200):
            _, cookie, data = await client.answer(1 << 20)
            assert data == setting.content[cookie * 512 : cookie * 512 + (1 << 20)]
            seen.add(cookie)
        assert len(seen) == 200
        client.ask(DISC, 0, 0)
        assert await client.left()

    exported(setting, main)


def test_options(setting: Setting) -> None:
    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.reader.readexactly(18)
        client.send(pack(">I", 3))

        async def option(number: int, data: bytes) -> list[tuple[int, bytes]]:
            client.send(OPTION.pack(b"IHAVEOPT", number, len(data)), data)
            answers = []
            while True:
                magic, to, kind, length = Struct(">QIII").unpack(await client.reader.readexactly(20))
                assert (magic, to) == (0x3E889045565A9, number)
                answers.append((kind, await client.reader.readexactly(length)))
                if kind == 1 or kind & 0x8000_0000:
                    return answers

        assert await option(3, b"") == [(2, b"\0\0\0\2it"), (1, b"")]
        assert await option(3, b"x") == [(0x80000003, b"")]
        assert await option(5, b"") == [(0x80000001, b"")]  # TLS
        for wrong in (b"", b"\0" * 5, pack(">I", 900) + b"\0\0", b"\0\0\0\0\0\1", b"\xff" * 6):
            assert await option(7, wrong) == [(0x80000003, b"")]
        assert await option(7, b"\0\0\0\5other\0\0") == [(0x80000006, b"")]
        (_, export), (_, blocks), _ = await option(6, b"\0\0\0\2it\0\1\0\3")
        assert Struct(">HQH").unpack(export)[:2] == (0, SIZE)
        assert Struct(">HIII").unpack(blocks) == (3, 512, 4096, LARGEST)
        assert (await option(7, b"\0\0\0\0\0\0"))[-1] == (1, b"")
        client.ask(READ, 0, 512)
        assert (await client.answer(512))[2] == setting.content[:512]

    exported(setting, main)


GREETED = pack(">I", 3)
AGREED = GREETED + OPTION.pack(b"IHAVEOPT", 1, 0)
BROKEN = {
    "flags": pack(">I", 0xFFFF_FFFF),
    "an option's magic number": GREETED + OPTION.pack(b"ihaveopt", 1, 0),
    "a long option": GREETED + OPTION.pack(b"IHAVEOPT", 7, 1 << 30),
    "no such export": GREETED + OPTION.pack(b"IHAVEOPT", 1, 5) + b"other",
    "abort": GREETED + OPTION.pack(b"IHAVEOPT", 2, 0),
    "a request's magic number": AGREED + REQUEST.pack(1, 0, READ, 0, 0, 512),
    "a large write": AGREED + REQUEST.pack(MAGIC, 0, WRITE, 0, 0, LARGEST + 1),
}


@pytest.mark.parametrize("what", BROKEN)
def test_who_breaks_the_protocol_is_left(setting: Setting, what: str) -> None:
    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        client.send(BROKEN[what])
        assert await client.left()

    exported(setting, main)


def test_who_leaves_in_the_middle_is_forgotten(setting: Setting) -> None:
    """At each byte of a write, and with reads that nobody takes."""

    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        whole = AGREED + REQUEST.pack(MAGIC, 0, WRITE, 0, 8192, 512) + b"z" * 512
        chance = random.Random(8)
        for cut in [*range(len(AGREED) + 30), *(chance.randrange(len(whole)) for _ in range(20))]:
            client = await connect()
            client.send(whole[:cut])
            client.writer.close()
        for _ in range(10):
            client = await connect()
            client.send(AGREED)
            for _ in range(40):
                client.ask(READ, 0, 1 << 20)
            client.writer.transport.abort()
        assert setting.now() == setting.content

    exported(setting, main)


def test_noise(setting: Setting) -> None:
    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        chance = random.Random(6)
        for start in (b"", GREETED, AGREED):
            for _ in range(40):
                client = await connect()
                client.send(start, chance.randbytes(chance.randrange(1, 3000)))
                client.writer.write_eof()
                assert await client.left()
        assert setting.now() == setting.content

    exported(setting, main)


def test_a_server_closes_though_nobody_takes_its_answers(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves nothing open: what is in flight is given up, not waited for."""
    setting.attach()
    setting.backend()
    served: list[asyncio.StreamWriter] = []
    accepted = NbdServer._accepted

    def accept(server: NbdServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(writer)
        accepted(server, reader, writer)

    monkeypatch.setattr(NbdServer, "_accepted", accept)

    async def serve() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        writers = []
        async with await aio.disk(setting.guest, timeout=PATIENCE) as disk:
            async with NbdServer(disk) as server:
                await server.listen(listener)
                for end in (b"", REQUEST.pack(1, 0, READ, 0, 0, 512)):  # one is served, the other is being left
                    reader, writer = await asyncio.open_connection(*listener.getsockname(), limit=1)
                    writers.append(writer)
                    client = Client(reader, writer)
                    client.send(AGREED)
                    for _ in range(40):
                        client.ask(READ, 0, 1 << 20)
                    client.send(end)
                while not (len(served) == 2 and all(each.transport.get_write_buffer_size() for each in served)):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await close(writers)

    run(serve)


# Clients that stand still.


def beside_a_server(
    setting: Setting, main: Callable[[NbdServer, Callable[[], Awaitable[Client]]], Awaitable[None]]
) -> None:
    """Runs `main` with a server and something that connects to it, and reads no more than is asked for."""
    setting.attach()
    setting.backend()

    async def serve() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        writers: list[asyncio.StreamWriter] = []

        async def connect() -> Client:
            reader, writer = await asyncio.open_connection(*listener.getsockname(), limit=1)
            writers.append(writer)
            return Client(reader, writer)

        async with await aio.disk(setting.guest, timeout=PATIENCE) as disk:
            async with NbdServer(disk) as server:
                await server.listen(listener)
                await main(server, connect)
            await close(writers)

    run(serve)


async def until(done: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline = Deadline(PATIENCE)
    while not done():
        assert not deadline.expired, what()
        await asyncio.sleep(0.01)


async def greedy(connect: Callable[[], Awaitable[Client]], mebibytes: int = 40) -> Client:
    """Asks for more than sockets hold, and takes nothing."""
    client = await connect()
    client.send(AGREED)
    for _ in range(mebibytes):
        client.ask(READ, 0, 1 << 20)
    return client


async def see_served(connect: Callable[[], Awaitable[Client]], length: int) -> None:
    client = await connect()
    await client.agree()
    client.ask(READ, 0, length)
    assert (await asyncio.wait_for(client.answer(length), PATIENCE))[0] == 0
    client.ask(DISC, 0, 0)


def test_little_waits_for_each_client_that_does_not_read(setting: Setting) -> None:
    async def main(server: NbdServer, connect: Callable[[], Awaitable[Client]]) -> None:
        for _ in range(8):
            await greedy(connect, 80)
        pool = server._pool
        full = nbdpace.POOL // 8

        def held() -> list[int]:
            return [pace.used for pace in pool.clients]

        await until(lambda: len(held()) == 8 and min(held()) > full // 2, held)
        assert max(held()) <= LARGEST
        buffered = [pace._writer.transport.get_write_buffer_size() for pace in pool.clients]
        assert max(buffered) < 300 << 10, buffered
        await see_served(connect, 1 << 20)

    beside_a_server(setting, main)


@pytest.mark.parametrize("how", ["takes no answer", "gives half a write", "leaves, and takes no answer"])
def test_a_client_that_stands_still_is_dropped(setting: Setting, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(nbdpace, "STILL", 0.5)

    async def main(server: NbdServer, connect: Callable[[], Awaitable[Client]]) -> None:
        if how == "gives half a write":
            client = await connect()
            client.send(AGREED)
            client.ask(WRITE, 0, 1 << 20, b"x" * 1000)
        else:
            client = await greedy(connect)
            if how == "leaves, and takes no answer":
                client.ask(DISC, 0, 0)
        await until(lambda: len(server._clients) == 1, lambda: server._clients)
        await until(lambda: not server._clients, lambda: server._clients)
        assert await client.left()
        assert setting.now() == setting.content
        await see_served(connect, 4096)

    beside_a_server(setting, main)


def test_a_client_that_stands_still_is_not_in_the_way(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbdpace, "POOL", 24 << 20)
    monkeypatch.setattr(nbdpace, "IN_THE_WAY", 0.1)

    async def main(server: NbdServer, connect: Callable[[], Awaitable[Client]]) -> None:
        for _ in range(2):
            await greedy(connect)
        await until(lambda: server._pool._left < 1 << 20, lambda: server._pool._left)
        for _ in range(3):
            await see_served(connect, SIZE)

    beside_a_server(setting, main)


@pytest.mark.parametrize("maker", ["the command's", "a program's"])
def test_clients_cannot_send_descriptors(setting: Setting, tmp_path: Path, maker: str) -> None:
    """One that lingers would hold the server up: see docs/security.md."""
    with socket.socket(socket.AF_UNIX) as trial:
        if not refuse(trial):
            pytest.skip("this kernel cannot refuse descriptors: Linux 6.16 can")
    setting.attach()
    setting.backend()
    path = str(tmp_path / "nbd")

    async def serve() -> None:
        if maker == "a program's":
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
        else:
            listener = _listener(path, 0)
        with socket.socket(socket.AF_UNIX) as client:
            async with await aio.disk(setting.guest, timeout=PATIENCE) as disk, NbdServer(disk, name="it") as server:
                if maker == "a program's":
                    await server.listen(listener)
                    client.connect(path)
                else:
                    client.connect(path)  # before the server knows of the socket
                    await server.listen(listener)
                with pytest.raises(PermissionError):
                    socket.send_fds(client, [b"x"], [0])

    run(serve)
