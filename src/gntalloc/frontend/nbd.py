"""NBD: a disk as a network block device, for clients such as qemu-img, nbdcopy, or a kernel's nbd.

    async with await aio.disk(domain) as disk, NbdServer(disk) as server:
        await server.listen(listener)          # a bound socket; several are fine
        await server.failed                    # for ever, or until the disk's backend has gone

The handshake is `gntalloc.frontend.handshake`'s. Then READ, WRITE, FLUSH, TRIM, WRITE_ZEROES, BLOCK_STATUS, DISC, and
FUA; with structured replies for those who ask for them. No TLS: this is for a Unix socket, or a port of this computer.

A client is not believed. What it asks that cannot be gets an error; what breaks the protocol ends its connection. It
has so many bytes and requests in flight at most, and then it is not read from before an answer has gone. If it takes no
answers it is dropped (see `nbdpace`).

Source: the NBD project's doc/proto.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from typing import TYPE_CHECKING, NamedTuple, Self

from gntalloc.errors import DeviceError, GntallocError
from gntalloc.frontend.handshake import ALLOCATION, Agreed, Broken, Description, agree
from gntalloc.frontend.nbdif import (
    BLOCK_STATUS_HEAD,
    CHUNK,
    DONE,
    ERROR_HEAD,
    EXTENT,
    HOLE_HEAD,
    LARGEST,
    OFFSET,
    READS_AS_ZEROS,
    REPLY,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_MAGIC,
    STRUCTURED_MAGIC,
    Chunk,
    Command,
    Error,
    Flag,
    Transmission,
    error_of,
)
from gntalloc.frontend.nbdpace import Pace, Pool
from gntalloc.unasked import refuse

if TYPE_CHECKING:
    import socket
    from asyncio import StreamReader, StreamWriter

    from gntalloc.frontend.aio import Disk

__all__ = ["LARGEST", "NbdServer"]

_BYTES, _REQUESTS = LARGEST, 128  # of one connection, in flight
_CLIENTS = 64
_PATIENCE = 30.0  # seconds for a handshake
_ZEROS = 1 << 20  # bytes that are written at a time where the backend cannot make zeros itself
_LONGEST_TEXT = 1024  # of an error


class _Request(NamedTuple):
    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytes | bytearray

    @property
    def weight(self) -> int:
        """Bytes of memory that it takes, or will take."""
        return self.length if self.command in {Command.READ, Command.WRITE} and self.length <= LARGEST else 0


class _Refused(Exception):
    """The answer is this error, and for whoever can be told, why."""

    def __init__(self, error: Error, why: str) -> None:
        super().__init__(error, why)
        self.error = error
        self.why = why


class NbdServer:
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
        self._pool = Pool()

    async def listen(self, listener: socket.socket) -> None:
        """Serve whoever connects to this socket, which is bound, from now on. It is closed with the server.

        Clients cannot send descriptors, as far as the kernel can refuse them: see unasked.py.
        """
        refuse(listener)
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
        pace = Pace(reader, writer, self._pool)
        self._pool.clients.add(pace)
        try:
            with contextlib.suppress(Broken, asyncio.IncompleteReadError, OSError, TimeoutError):
                async with asyncio.timeout(_PATIENCE):
                    agreed = await agree(reader, writer, self._describe())
                if agreed is not None:
                    await self._transmit(reader, pace, agreed)
            await pace.finish()
        except asyncio.CancelledError:
            pass  # the server closes
        finally:
            self._pool.clients.discard(pace)
            writer.transport.abort()

    def _describe(self) -> Description:
        """Describe the export as it is now: a disk that has grown is larger for the next client."""
        disk = self._disk
        flags = Transmission.HAS_FLAGS | Transmission.FLUSH | Transmission.FUA
        flags |= Transmission.MULTI_CONN  # a flush over one connection is for all
        if self.read_only:
            flags |= Transmission.READ_ONLY
        else:
            flags |= Transmission.WRITE_ZEROES | Transmission.FAST_ZERO
            flags |= Transmission.TRIM if disk.features.discard else 0
        return Description(self._name, disk.size, flags, disk.sector_size, max(4096, disk.physical_sector_size))

    async def _transmit(self, reader: StreamReader, pace: Pace, agreed: Agreed) -> None:
        """Serve requests as they come, and send answers as they are ready."""
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                request = await _receive(reader)
                if request.command == Command.DISC:
                    break
                while len(tasks) >= _REQUESTS or (tasks and pace.used + request.weight > _BYTES):
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                await pace.take(request.weight)
                try:
                    if request.command == Command.WRITE:
                        request = request._replace(data=await pace.receive(request.length))
                except BaseException:
                    pace.give_back(request.weight)
                    raise
                task = asyncio.get_running_loop().create_task(self._answer(request, pace, agreed))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            raise
        finally:
            if tasks:
                await asyncio.wait(list(tasks))

    async def _answer(self, request: _Request, pace: Pace, agreed: Agreed) -> None:
        try:
            try:
                parts = _reply(request, await self._carry_out(request, agreed), agreed)
            except _Refused as refused:
                parts = _refusal(request, refused, agreed)
            with contextlib.suppress(OSError):  # the client has left
                await pace.send(parts)
        finally:
            pace.give_back(request.weight)

    async def _carry_out(self, request: _Request, agreed: Agreed) -> bytes | bytearray:
        """Do what was asked. What a reply has for it: data, or the extents of BLOCK_STATUS.

        Raises:
            _Refused: it cannot be done.
        """
        try:
            if request.command == Command.BLOCK_STATUS:
                return await self._block_status(request, agreed)
            if request.command == Command.READ:
                return await self._read(request)
            if request.command == Command.FLUSH:
                await self._disk.flush()
            else:
                await self._change(request)
        except ValueError as wrong:
            beyond = request.offset + request.length > self._disk.size
            full = beyond and request.command in {Command.WRITE, Command.WRITE_ZEROES}
            raise _Refused(Error.NO_SPACE if full else Error.INVALID, str(wrong)) from None
        except DeviceError as refused:
            raise _Refused(error_of(refused.errno), str(refused)) from None
        except GntallocError as gone:
            if not self.failed.done():
                self.failed.set_exception(gone)
            raise _Refused(Error.IO, str(gone)) from None
        return b""

    async def _read(self, request: _Request) -> bytearray:
        if request.length > LARGEST:
            raise ValueError(f"{request.length} bytes at once; ask for {LARGEST} at most")
        data = bytearray(request.length)
        await self._disk.readinto(request.offset, data)
        return data

    async def _block_status(self, request: _Request, agreed: Agreed) -> bytes:
        if not agreed.allocation:
            raise ValueError("BLOCK_STATUS needs SET_META_CONTEXT with base:allocation before")
        extents = await self._disk.extents(request.offset, request.length)
        if request.flags & Flag.REQ_ONE:
            extents = extents[:1]
        return b"".join(EXTENT.pack(length, READS_AS_ZEROS if hole else 0) for length, hole in extents)

    async def _change(self, request: _Request) -> None:
        disk, command = self._disk, request.command
        if command not in {Command.WRITE, Command.TRIM, Command.WRITE_ZEROES}:
            raise ValueError(f"there is no command {command}")
        if self.read_only:
            raise DeviceError(errno.EROFS, "this export is read-only")
        if command == Command.WRITE:
            await disk.write(request.offset, request.data)
        elif command == Command.TRIM:
            await disk.discard(request.offset, request.length)
        else:
            await self._write_zeroes(request)
        if request.flags & Flag.FUA:
            await disk.flush()

    async def _write_zeroes(self, request: _Request) -> None:
        """By a hole, where the backend says that one reads as zeros and the client does not mind; or by writing."""
        disk, flags = self._disk, request.flags
        offset, end = request.offset, request.offset + request.length
        if end > disk.size or offset % disk.sector_size or end % disk.sector_size:
            raise ValueError(f"{request.length} bytes at {offset} are no whole sectors of a disk of {disk.size}")
        features = disk.features
        if features.discard and features.discard_zeroes and not flags & Flag.NO_HOLE:
            try:
                await disk.discard(offset, request.length)
            except DeviceError as refused:
                if refused.errno != errno.EOPNOTSUPP:  # not with the file system that the image is in
                    raise
            else:
                return
        if flags & Flag.FAST_ZERO:
            raise DeviceError(errno.EOPNOTSUPP, "zeros would be written here, which is not fast")
        zeros = bytes(min(_ZEROS, request.length))
        for at in range(offset, end, _ZEROS):
            await disk.write(at, memoryview(zeros)[: end - at])


def _reply(request: _Request, data: bytes | bytearray, agreed: Agreed) -> list[bytes | bytearray]:
    """Build the reply to a request, as it goes to the client."""
    if not agreed.structured or request.command not in {Command.READ, Command.BLOCK_STATUS}:
        return [REPLY.pack(SIMPLE_MAGIC, 0, request.cookie), data]
    if request.command == Command.BLOCK_STATUS:
        return _chunk(request, Chunk.BLOCK_STATUS, BLOCK_STATUS_HEAD.pack(ALLOCATION), data)
    if not data:
        return _chunk(request, Chunk.NONE)
    if _is_zero(data):
        return _chunk(request, Chunk.OFFSET_HOLE, HOLE_HEAD.pack(request.offset, len(data)))
    return _chunk(request, Chunk.OFFSET_DATA, OFFSET.pack(request.offset), data)


def _refusal(request: _Request, refused: _Refused, agreed: Agreed) -> list[bytes | bytearray]:
    if not agreed.structured:
        return [REPLY.pack(SIMPLE_MAGIC, refused.error, request.cookie)]
    why = refused.why.encode()[:_LONGEST_TEXT]
    return _chunk(request, Chunk.ERROR, ERROR_HEAD.pack(refused.error, len(why)), why)


def _chunk(request: _Request, kind: Chunk, head: bytes = b"", data: bytes | bytearray = b"") -> list[bytes | bytearray]:
    """Build a reply of one chunk."""
    length = len(head) + len(data)
    return [CHUNK.pack(STRUCTURED_MAGIC, DONE, kind, request.cookie, length), head, data]


def _is_zero(data: bytes | bytearray) -> bool:
    return not data[0] and not data[-1] and data == bytes(len(data))


async def _receive(reader: StreamReader) -> _Request:
    """Receive the next request, without its data.

    Raises:
        Broken: it is none, or has more data than may be.
        IncompleteReadError: the client has left.
    """
    magic, flags, command, cookie, offset, length = REQUEST.unpack(await reader.readexactly(REQUEST.size))
    if magic != REQUEST_MAGIC:
        raise Broken(f"a request with the magic number {magic:#x}")
    if command == Command.WRITE and length > LARGEST:
        raise Broken(f"a write of {length} bytes")
    return _Request(command, flags, cookie, offset, length, b"")
