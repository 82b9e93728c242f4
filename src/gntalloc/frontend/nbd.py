"""NBD: a disk as a network block device, for clients such as qemu-img, nbdcopy, or a kernel's nbd.

    async with await aio.disk(domain) as disk, Server(disk) as server:
        await server.listen(listener)          # a bound socket; several are fine
        await server.failed                    # for ever, or until the disk's backend has gone

The fixed newstyle handshake (EXPORT_NAME, GO, INFO, LIST, ABORT), then READ, WRITE, FLUSH, TRIM, DISC, and FUA. No
structured replies and no TLS: this is for a Unix socket, or a port of this computer.

A client is not believed. What it asks that cannot be gets an error; what breaks the protocol ends its connection. It
has so many bytes and requests in flight at most, and then it is not read from before an answer has gone.

Source: the NBD project's doc/proto.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple, Self

from gntalloc.errors import DeviceError, GntallocError

if TYPE_CHECKING:
    import socket
    from asyncio import StreamReader, StreamWriter

    from gntalloc.frontend.aio import Disk

__all__ = ["LARGEST", "Server"]

LARGEST = 32 << 20
"""Bytes of one request; what a client may count on that was told nothing."""
_BYTES, _REQUESTS = 64 << 20, 128  # of one connection, in flight
_CLIENTS = 64
_PATIENCE = 30.0  # seconds for a handshake
_LONGEST_OPTION = 8192

_GREETING = Struct(">QQH")
_OPTION = Struct(">QII")  # magic, option, length
_OPTION_REPLY = Struct(">QIII")  # magic, option, type, length
_EXPORT = Struct(">QH")  # size, flags
_INFO_EXPORT, _INFO_BLOCKS = Struct(">HQH"), Struct(">HIII")
_REQUEST = Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
_REPLY = Struct(">IIQ")  # magic, error, cookie
_U32 = Struct(">I")
_NBDMAGIC, _IHAVEOPT, _REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_REQUEST_MAGIC, _SIMPLE_REPLY = 0x25609513, 0x67446698
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_ACK, _SERVER, _INFO = 1, 2, 3
_UNSUPPORTED, _INVALID, _UNKNOWN = 0x80000001, 0x80000003, 0x80000006
_HAS_FLAGS, _READ_ONLY, _FLUSH, _FUA, _TRIM, _MULTI_CONN = 1, 2, 4, 8, 32, 256
_FUA_COMMAND = 1
_ERRORS = {errno.EROFS: 1, errno.EOPNOTSUPP: 95}  # NBD has numbers of its own; EIO if not here
_IO, _WRONG, _NO_SPACE = 5, 22, 28


class Option(IntEnum):
    """What a client asks for before it transmits."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7


class Command(IntEnum):
    """What it asks for then."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4


class _Broken(Exception):
    """The client does not keep to the protocol."""


class _Request(NamedTuple):
    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytes

    @property
    def weight(self) -> int:
        """Bytes of memory that it takes, or will take."""
        return self.length if self.command in {Command.READ, Command.WRITE} and self.length <= LARGEST else 0


class Server:
    """Exports a disk, to any number of clients at once.

    Args:
        disk: open; it stays the caller's.
        name: of the export. The empty name is the default of all clients, and is served in any case.
        read_only: refuse writes, even if the disk can be written.

    Attributes:
        failed: a future that ends with what became of the backend, when a client's request has found that out.
    """

    def __init__(self, disk: Disk, *, name: str = "", read_only: bool = False) -> None:
        self._disk = disk
        self._name = name.encode()
        self.read_only = read_only or disk.read_only
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._servers: list[asyncio.Server] = []
        self._clients: set[asyncio.Task[None]] = set()

    async def listen(self, listener: socket.socket) -> None:
        """Serve whoever connects to this socket, which is bound, from now on. It is closed with the server."""
        self._servers.append(await asyncio.start_server(self._accepted, sock=listener, limit=1 << 20))

    async def close(self) -> None:
        """Leave all clients, and what they have in flight. Can be repeated."""
        for server in self._servers:
            server.close()
        for client in self._clients:
            client.cancel()
        if self._clients:
            await asyncio.wait(self._clients)
        if self.failed.done() and not self.failed.cancelled():
            self.failed.exception()  # so that nobody complains that nobody looked
        self.failed.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _accepted(self, reader: StreamReader, writer: StreamWriter) -> None:
        if len(self._clients) >= _CLIENTS:
            writer.close()
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """One client, from its first byte to its last."""
        try:
            with contextlib.suppress(_Broken, asyncio.IncompleteReadError, OSError, TimeoutError):
                async with asyncio.timeout(_PATIENCE):
                    wanted = await _Handshake(reader, writer, self._name, self._describe()).agree()
                if wanted:
                    await self._transmit(reader, writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()  # for as long as the client takes its answers
        except asyncio.CancelledError:
            pass  # the server closes
        finally:
            writer.transport.abort()

    def _describe(self) -> _Description:
        disk = self._disk
        flags = _HAS_FLAGS | _FLUSH | _FUA | _MULTI_CONN  # a flush over one connection is for all
        if self.read_only:
            flags |= _READ_ONLY
        elif disk.features.discard:
            flags |= _TRIM
        return _Description(disk.size, flags, disk.sector_size, max(4096, disk.physical_sector_size))

    async def _transmit(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Requests, as they come; answers, as they are ready."""
        tasks: dict[asyncio.Task[None], int] = {}  # and how many bytes each carries
        try:
            while True:
                request = await _receive(reader)
                if request.command == Command.DISC:
                    break
                while len(tasks) >= _REQUESTS or (tasks and sum(tasks.values()) + request.weight > _BYTES):
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                task = asyncio.get_running_loop().create_task(self._answer(request, writer))
                tasks[task] = request.weight
                task.add_done_callback(tasks.pop)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            raise
        finally:
            if tasks:
                await asyncio.wait(list(tasks))

    async def _answer(self, request: _Request, writer: StreamWriter) -> None:
        error = 0
        data: bytes | bytearray = b""
        try:
            data = await self._carry_out(request)
        except ValueError:
            beyond = request.offset + request.length > self._disk.size
            error = _NO_SPACE if beyond and request.command == Command.WRITE else _WRONG
        except DeviceError as refused:
            error = _ERRORS.get(refused.errno or 0, _IO)
        except GntallocError as gone:
            error = _IO
            if not self.failed.done():
                self.failed.set_exception(gone)
        with contextlib.suppress(OSError):  # the client has left
            writer.write(_REPLY.pack(_SIMPLE_REPLY, error, request.cookie))
            if data:
                writer.write(data)
            await writer.drain()

    async def _carry_out(self, request: _Request) -> bytes | bytearray:
        disk, command, offset, length = self._disk, request.command, request.offset, request.length
        if command == Command.READ:
            if length > LARGEST:
                raise ValueError(f"{length} bytes at once")
            data = bytearray(length)
            await disk.readinto(offset, data)
            return data
        if command == Command.FLUSH:
            await disk.flush()
        elif command in {Command.WRITE, Command.TRIM}:
            if self.read_only:
                raise DeviceError(errno.EROFS, "this export is read-only")
            if command == Command.WRITE:
                await disk.write(offset, request.data)
            else:
                await disk.discard(offset, length)
            if request.flags & _FUA_COMMAND:
                await disk.flush()
        else:
            raise ValueError(f"there is no command {command}")
        return b""


class _Description(NamedTuple):
    """An export."""

    size: int
    flags: int
    sector: int
    preferred: int


class _Handshake:
    """What comes before the first request."""

    def __init__(self, reader: StreamReader, writer: StreamWriter, name: bytes, export: _Description) -> None:
        self._reader = reader
        self._writer = writer
        self._name = name
        self._export = export

    async def agree(self) -> bool:
        """Answer options until the client goes over to transmission. False: it does not want to."""
        self._writer.write(_GREETING.pack(_NBDMAGIC, _IHAVEOPT, _FIXED_NEWSTYLE | _NO_ZEROES))
        (flags,) = _U32.unpack(await self._reader.readexactly(_U32.size))
        if flags & ~(_FIXED_NEWSTYLE | _NO_ZEROES):
            raise _Broken(f"flags {flags:#x}")
        while True:
            magic, option, length = _OPTION.unpack(await self._reader.readexactly(_OPTION.size))
            if magic != _IHAVEOPT or length > _LONGEST_OPTION:
                raise _Broken(f"an option of {length} bytes, with the magic number {magic:#x}")
            data = await self._reader.readexactly(length)
            if option == Option.EXPORT_NAME:
                if data not in {b"", self._name}:
                    raise _Broken(f"no export {data!r}")  # there is no way to say so
                self._writer.write(_EXPORT.pack(self._export.size, self._export.flags))
                self._writer.write(b"" if flags & _NO_ZEROES else bytes(124))
                return True
            if option == Option.ABORT:
                self._reply(option, _ACK)
                return False
            if option in {Option.GO, Option.INFO}:
                if self._inform(option, data) and option == Option.GO:
                    return True
            elif option == Option.LIST:
                self._list(data)
            else:
                self._reply(option, _UNSUPPORTED)
            await self._writer.drain()

    def _list(self, data: bytes) -> None:
        if data:
            self._reply(Option.LIST, _INVALID)
            return
        self._reply(Option.LIST, _SERVER, _U32.pack(len(self._name)) + self._name)
        self._reply(Option.LIST, _ACK)

    def _inform(self, option: int, data: bytes) -> bool:
        """Say all there is to be said of an export, whatever was asked for. Whether there is such an export."""
        if len(data) < 6:
            self._reply(option, _INVALID)
            return False
        size = _U32.unpack_from(data)[0]
        asked = int.from_bytes(data[4 + size : 6 + size], "big")
        if len(data) != 6 + size + 2 * asked:
            self._reply(option, _INVALID)
            return False
        if data[4 : 4 + size] not in {b"", self._name}:
            self._reply(option, _UNKNOWN)
            return False
        export = self._export
        self._reply(option, _INFO, _INFO_EXPORT.pack(0, export.size, export.flags))
        self._reply(option, _INFO, _INFO_BLOCKS.pack(3, export.sector, export.preferred, LARGEST))
        self._reply(option, _ACK)
        return True

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._writer.write(_OPTION_REPLY.pack(_REPLY_MAGIC, option, kind, len(data)) + data)


async def _receive(reader: StreamReader) -> _Request:
    """The next request, with its data.

    Raises:
        _Broken: it is none, or has more data than may be.
        IncompleteReadError: the client has left.
    """
    magic, flags, command, cookie, offset, length = _REQUEST.unpack(await reader.readexactly(_REQUEST.size))
    if magic != _REQUEST_MAGIC:
        raise _Broken(f"a request with the magic number {magic:#x}")
    data = b""
    if command == Command.WRITE:
        if length > LARGEST:
            raise _Broken(f"a write of {length} bytes")
        data = await reader.readexactly(length)
    return _Request(command, flags, cookie, offset, length, data)
