"""NBD: structured replies, block status and zeroes, byte by byte; real clients are in test_disk_images.py."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from struct import Struct, pack
from typing import TYPE_CHECKING

import pytest
from tests.frontend.conftest import PATIENCE
from tests.frontend.kit import SIZE, run

from gntalloc import aio
from gntalloc.frontend.nbd import LARGEST, NbdServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.frontend.conftest import Setting

OPTION = Struct(">8sII")
REQUEST = Struct(">IHHQQI")
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
NONE, DATA, HOLE, STATUS, ERROR = 0, 1, 2, 5, 0x8001
ACK, UNSUPPORTED, INVALID, UNKNOWN = 1, 0x80000001, 0x80000003, 0x80000006
STRUCTURED, LIST_CONTEXT, SET_CONTEXT = 8, 9, 10
CONTEXT = b"base:allocation"
DATA_AT, DATA_LENGTH = 1 << 20, 64 << 10


def text(data: bytes) -> bytes:
    return pack(">I", len(data)) + data


def queries(name: bytes, *asked: bytes) -> bytes:
    return text(name) + pack(">I", len(asked)) + b"".join(map(text, asked))


class Client:
    """A connection that has greeted."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        self.writer.write(OPTION.pack(b"IHAVEOPT", number, len(data)) + data)
        answers = []
        while True:
            magic, to, kind, length = Struct(">QIII").unpack(await self.reader.readexactly(20))
            assert (magic, to) == (0x3E889045565A9, number)
            answers.append((kind, await self.reader.readexactly(length)))
            if kind == 1 or kind & 0x8000_0000:
                return answers

    async def go(self, *, structured: bool = True, allocation: bool = True) -> int:
        """To transmission. The export's flags."""
        if structured:
            assert await self.option(STRUCTURED) == [(ACK, b"")]
        if allocation:
            (_, told), _ = await self.option(SET_CONTEXT, queries(b"", CONTEXT))
            assert told[4:] == CONTEXT
        answers = await self.option(7, text(b"") + b"\0\0")
        return int(Struct(">HQH").unpack(answers[0][1])[2])

    async def ask(self, command: int, offset: int, length: int, data: bytes = b"", flags: int = 0) -> tuple[int, bytes]:
        """The type of the reply's only chunk, and what is in it. A simple reply is of type -1, and is its error."""
        self.writer.write(REQUEST.pack(0x25609513, flags, command, 9, offset, length) + data)
        (magic,) = Struct(">I").unpack(await self.reader.readexactly(4))
        if magic == 0x67446698:
            error, cookie = Struct(">IQ").unpack(await self.reader.readexactly(12))
            assert cookie == 9
            return -1, error.to_bytes(4, "big")
        assert magic == 0x668E33EF
        done, kind, cookie, size = Struct(">HHQI").unpack(await self.reader.readexactly(16))
        assert (done, cookie) == (1, 9)
        return kind, await self.reader.readexactly(size)

    async def extents(self, offset: int, length: int, flags: int = 0) -> list[tuple[int, int]]:
        kind, told = await self.ask(BLOCK_STATUS, offset, length, flags=flags)
        assert kind == STATUS, (kind, told)
        return list(Struct(">II").iter_unpack(told[4:]))


FINE = (-1, bytes(4))


def error(told: tuple[int, bytes]) -> int:
    """NBD's number; the text that comes with it is all there, and says something."""
    kind, body = told
    if kind == -1:
        return int.from_bytes(body, "big")
    assert kind == ERROR, told
    number, length = Struct(">IH").unpack_from(body)
    assert len(body[6:]) == length > 0
    return int(number)


def exported(
    setting: Setting, main: Callable[[Callable[[], Awaitable[Client]]], Awaitable[None]], *, read_only: bool = False
) -> None:
    """A sparse disk with a little data."""
    setting.path.unlink()
    with setting.path.open("wb") as file:
        file.truncate(SIZE)
        file.seek(DATA_AT)
        file.write(b"d" * DATA_LENGTH)
    setting.attach()
    setting.backend()

    async def serve() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        writers: list[asyncio.StreamWriter] = []

        async def connect() -> Client:
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writers.append(writer)
            await reader.readexactly(18)
            writer.write(pack(">I", 3))
            return Client(reader, writer)

        async with (
            await aio.disk(setting.guest, timeout=PATIENCE) as disk,
            NbdServer(disk, name="it", read_only=read_only) as server,
        ):
            await server.listen(listener)
            try:
                async with asyncio.timeout(PATIENCE):
                    await main(connect)
                    assert not server.failed.done()
            finally:
                for writer in writers:
                    writer.close()
                await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)

    run(serve)


def test_block_status_tells_the_holes(setting: Setting) -> None:
    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.go()
        end = DATA_AT + DATA_LENGTH
        assert await client.extents(0, SIZE) == [(DATA_AT, 3), (DATA_LENGTH, 0), (SIZE - end, 3)]
        assert await client.extents(0, SIZE, flags=REQ_ONE) == [(DATA_AT, 3)]
        assert await client.extents(DATA_AT - 512, 1024) == [(512, 3), (512, 0)]
        assert await client.extents(end, 512) == [(512, 3)]
        assert error(await client.ask(BLOCK_STATUS, 0, 0)) == 22
        assert error(await client.ask(BLOCK_STATUS, SIZE, 512)) == 22
        assert await client.ask(WRITE, 0, 512, b"x" * 512) == FINE
        assert (await client.extents(0, 4096))[0][1] == 0
        assert await client.ask(TRIM, 0, 4096) == FINE
        assert await client.extents(0, 4096) == [(4096, 3)]

    exported(setting, main)


def test_without_the_context_there_is_no_block_status(setting: Setting) -> None:
    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        for structured in (True, False):
            client = await connect()
            await client.go(structured=structured, allocation=False)
            assert error(await client.ask(BLOCK_STATUS, 0, 512)) == 22
        client = await connect()
        assert await client.option(STRUCTURED) == [(ACK, b"")]
        await client.option(SET_CONTEXT, queries(b"it", CONTEXT))
        await client.option(7, text(b"") + b"\0\0")  # another name than it was asked for
        assert error(await client.ask(BLOCK_STATUS, 0, 512)) == 22

    exported(setting, main)


def test_contexts(setting: Setting) -> None:
    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        for number in (LIST_CONTEXT, SET_CONTEXT):
            assert await client.option(number, queries(b"", CONTEXT)) == [(INVALID, b"")]  # structured replies first
        assert await client.option(STRUCTURED, b"x") == [(INVALID, b"")]
        assert await client.option(STRUCTURED) == [(ACK, b"")]
        for name, asked, lists, sets in (
            (b"", [CONTEXT], True, True),
            (b"it", [b"base:"], True, False),
            (b"it", [], True, False),
            (b"it", [b"qemu:dirty-bitmap:x", CONTEXT, b""], True, True),
            (b"it", [b"qemu:"], False, False),
        ):
            for number, found in ((LIST_CONTEXT, lists), (SET_CONTEXT, sets)):
                kinds = [kind for kind, _ in await client.option(number, queries(name, *asked))]
                assert kinds == ([4, ACK] if found else [ACK]), (number, name, asked)
        assert await client.option(LIST_CONTEXT, queries(b"other")) == [(UNKNOWN, b"")]
        whole = queries(b"it", CONTEXT)
        for wrong in (b"", whole[:-1], whole + b"\0", pack(">I", 1 << 31) + b"it", text(b"it") + pack(">I", 1 << 30)):
            assert await client.option(SET_CONTEXT, wrong) == [(INVALID, b"")], wrong

    exported(setting, main)


def test_reads_are_chunks_and_zeros_are_holes(setting: Setting) -> None:
    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        assert await client.go() & 128  # DF: a reply is never in pieces
        assert await client.ask(READ, DATA_AT, 4096) == (DATA, pack(">Q", DATA_AT) + b"d" * 4096)
        assert await client.ask(READ, 0, 1 << 20, flags=DF) == (HOLE, pack(">QI", 0, 1 << 20))
        assert await client.ask(READ, DATA_AT - 512, 513) == (DATA, pack(">Q", DATA_AT - 512) + bytes(512) + b"d")
        assert await client.ask(WRITE, 0, 512, bytes(255) + b"x" + bytes(256)) == FINE
        kind, told = await client.ask(READ, 0, 512)
        assert (kind, told[8:]) == (DATA, bytes(255) + b"x" + bytes(256))
        assert await client.ask(READ, 0, 0) == (NONE, b"")
        for offset, length in ((SIZE, 1), (0, LARGEST + 1), (1 << 63, 512)):
            assert error(await client.ask(READ, offset, length)) == 22

    exported(setting, main)


def test_zeroes_are_written_with_a_hole_or_without(setting: Setting) -> None:
    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        for structured in (True, False):
            client = await connect()
            assert await client.go(structured=structured, allocation=structured) & 0x840 == 0x840
            size = 3 << 19  # more than is written at a time
            for flags, hole in ((0, True), (NO_HOLE, False), (FAST_ZERO, True), (FUA, True)):
                assert await client.ask(WRITE, 0, size, random.Random(1).randbytes(size)) == FINE
                assert await client.ask(WRITE_ZEROES, 512, size - 1024, flags=flags) == FINE
                now = setting.now()[:size]
                assert now == now[:512] + bytes(size - 1024) + now[-512:]
                assert now[0]
                with setting.path.open("rb") as file:
                    assert (os.lseek(file.fileno(), 8192, os.SEEK_DATA) > 8192) == hole
            assert error(await client.ask(WRITE_ZEROES, 0, 512, flags=NO_HOLE | FAST_ZERO)) == 95
            assert error(await client.ask(WRITE_ZEROES, SIZE - 512, 1024)) == 28
            assert error(await client.ask(WRITE_ZEROES, 1, 512)) == 22
            assert error(await client.ask(WRITE_ZEROES, 0, 100)) == 22
            assert await client.ask(WRITE_ZEROES, 0, SIZE) == FINE
            assert setting.now() == bytes(SIZE)

    exported(setting, main)


def test_a_read_only_export_zeroes_nothing(setting: Setting) -> None:
    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        assert await client.go() & (0x840 | 32 | 2) == 2
        assert error(await client.ask(WRITE_ZEROES, 0, 512)) == 1
        assert error(await client.ask(TRIM, 0, 512)) == 1
        assert len(await client.extents(0, SIZE)) == 3

    exported(setting, main, read_only=True)


def test_a_disk_that_grew_is_larger_for_who_connects_then(setting: Setting) -> None:
    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        old = await connect()
        await old.go()
        os.truncate(setting.path, SIZE + 8192)
        size = SIZE
        while size == SIZE:  # the backend looks once a second
            client = await connect()
            size = Struct(">HQH").unpack((await client.option(6, text(b"") + b"\0\0"))[0][1])[1]
            client.writer.close()
        assert size == SIZE + 8192
        assert await old.ask(WRITE, SIZE + 4096, 512, b"n" * 512) == FINE  # nobody told it, but it may
        assert setting.now()[SIZE + 4096 : SIZE + 4608] == b"n" * 512

    exported(setting, main)


@pytest.mark.parametrize("allocation", [True, False])
def test_noise_after_the_agreement_hurts_nobody(setting: Setting, *, allocation: bool) -> None:
    async def main(connect: Callable[[], Awaitable[Client]]) -> None:
        chance = random.Random(4)
        for _ in range(60):
            client = await connect()
            await client.go(allocation=allocation)
            for _ in range(20):
                command = chance.choice([READ, FLUSH, CACHE, BLOCK_STATUS, 77])
                offset, length = (
                    chance.choice([0, 1, SIZE - 1, SIZE, 1 << 63]),
                    chance.choice([0, 1, 4096, 0xFFFF_FFFF]),
                )
                flags = chance.randrange(1 << 16)
                client.writer.write(REQUEST.pack(0x25609513, flags, command, 9, offset, length))
            client.writer.write(chance.randbytes(40))
            client.writer.write_eof()
            while await client.reader.read(65536):
                pass
        with setting.path.open("rb") as file:
            file.seek(DATA_AT)
            assert file.read(DATA_LENGTH) == b"d" * DATA_LENGTH

    exported(setting, main)
