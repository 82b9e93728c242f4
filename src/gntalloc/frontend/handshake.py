"""Handshake: what an NBD client and a server say before the first request.

The fixed newstyle: EXPORT_NAME, GO, INFO, LIST, ABORT; STRUCTURED_REPLY, and after it LIST_META_CONTEXT and
SET_META_CONTEXT with one context, base:allocation.

A client is not believed: an option that is too long ends the connection, and one that is not what it says is INVALID.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gntalloc.frontend.nbdif import (
    EXPORT,
    FIXED_NEWSTYLE,
    GREETING,
    IHAVEOPT,
    INFO_BLOCKS,
    INFO_EXPORT,
    LARGEST,
    NBDMAGIC,
    NO_ZEROES,
    OPTION,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    U32,
    Option,
    OptionReply,
    Transmission,
)

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

__all__ = ["ALLOCATION", "Agreed", "Broken", "Description", "agree"]

ALLOCATION = 1
"""The number of base:allocation."""
_CONTEXT = b"base:allocation"
_LONGEST_OPTION = 8192
_INFO_EXPORT, _INFO_BLOCKS = 0, 3


class Broken(Exception):
    """The client does not keep to the protocol."""


class Description(NamedTuple):
    """An export: bytes, what it can do, and the sizes of blocks."""

    name: bytes
    size: int
    flags: Transmission
    sector: int
    preferred: int


class Agreed(NamedTuple):
    """What a client has asked for: structured replies, and block status."""

    structured: bool
    allocation: bool


async def agree(reader: StreamReader, writer: StreamWriter, export: Description) -> Agreed | None:
    """Answer options until the client goes over to transmission. None: it does not want to.

    Raises:
        Broken: it does not keep to the protocol.
        IncompleteReadError: it has left.
    """
    return await _Handshake(reader, writer, export).agree()


class _Handshake:
    def __init__(self, reader: StreamReader, writer: StreamWriter, export: Description) -> None:
        self._reader = reader
        self._writer = writer
        self._export = export
        self._structured = False
        self._allocation_of: bytes | None = None  # the name of the export that block status was asked for
        self._answers = {
            Option.LIST: self._list,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._list_contexts,
            Option.SET_META_CONTEXT: self._set_contexts,
            Option.INFO: self._inform,
        }

    async def agree(self) -> Agreed | None:
        self._writer.write(GREETING.pack(NBDMAGIC, IHAVEOPT, FIXED_NEWSTYLE | NO_ZEROES))
        (flags,) = U32.unpack(await self._reader.readexactly(U32.size))
        if flags & ~(FIXED_NEWSTYLE | NO_ZEROES):
            raise Broken(f"flags {flags:#x}")
        while True:
            magic, option, length = OPTION.unpack(await self._reader.readexactly(OPTION.size))
            if magic != IHAVEOPT or length > _LONGEST_OPTION:
                raise Broken(f"an option of {length} bytes, with the magic number {magic:#x}")
            data = await self._reader.readexactly(length)
            if option == Option.EXPORT_NAME:
                return self._by_name(data, zeroes=not flags & NO_ZEROES)
            if option == Option.ABORT:
                self._reply(option, OptionReply.ACK)
                return None
            if option == Option.GO:
                if (name := self._inform(option, data)) is not None:
                    return Agreed(self._structured, self._allocation_of == name)
            elif (answer := self._answers.get(option)) is not None:
                answer(option, data)
            else:
                self._reply(option, OptionReply.UNSUPPORTED)
            await self._writer.drain()

    def _by_name(self, name: bytes, *, zeroes: bool) -> Agreed:
        if name not in {b"", self._export.name}:
            raise Broken(f"no export {name!r}")  # there is no way to say so
        self._writer.write(EXPORT.pack(self._export.size, self._flags()))
        self._writer.write(bytes(124) if zeroes else b"")
        return Agreed(self._structured, self._allocation_of == name)

    def _flags(self) -> int:
        return self._export.flags | (Transmission.DF if self._structured else 0)

    def _list(self, option: int, data: bytes) -> None:
        if data:
            self._reply(option, OptionReply.INVALID)
            return
        name = self._export.name
        self._reply(option, OptionReply.SERVER, U32.pack(len(name)) + name)
        self._reply(option, OptionReply.ACK)

    def _structured_reply(self, option: int, data: bytes) -> None:
        self._structured = self._structured or not data
        self._reply(option, OptionReply.INVALID if data else OptionReply.ACK)

    def _list_contexts(self, option: int, data: bytes) -> None:
        self._contexts(option, data, wanted={_CONTEXT, b"base:"}, all_if_none=True)

    def _set_contexts(self, option: int, data: bytes) -> None:
        self._allocation_of = None
        self._allocation_of = self._contexts(option, data, wanted={_CONTEXT}, all_if_none=False)

    def _contexts(self, option: int, data: bytes, *, wanted: set[bytes], all_if_none: bool) -> bytes | None:
        """Answer queries for contexts. The export's name, if there is one that was asked for."""
        parsed = _parse_queries(data)
        if parsed is None or not self._structured:
            self._reply(option, OptionReply.INVALID)
            return None
        name, queries = parsed
        if name not in {b"", self._export.name}:
            self._reply(option, OptionReply.UNKNOWN)
            return None
        found = bool(wanted.intersection(queries)) or (all_if_none and not queries)
        if found:
            self._reply(option, OptionReply.META_CONTEXT, U32.pack(ALLOCATION) + _CONTEXT)
        self._reply(option, OptionReply.ACK)
        return name if found else None

    def _inform(self, option: int, data: bytes) -> bytes | None:
        """Say all there is to be said of an export, whatever was asked for. Its name, if there is such an export."""
        name, rest = _take(data)
        if name is None or len(rest) < 2 or len(rest) != 2 + 2 * int.from_bytes(rest[:2], "big"):
            self._reply(option, OptionReply.INVALID)
            return None
        if name not in {b"", self._export.name}:
            self._reply(option, OptionReply.UNKNOWN)
            return None
        export = self._export
        self._reply(option, OptionReply.INFO, INFO_EXPORT.pack(_INFO_EXPORT, export.size, self._flags()))
        blocks = INFO_BLOCKS.pack(_INFO_BLOCKS, export.sector, export.preferred, LARGEST)
        self._reply(option, OptionReply.INFO, blocks)
        self._reply(option, OptionReply.ACK)
        return name

    def _reply(self, option: int, kind: OptionReply, data: bytes = b"") -> None:
        self._writer.write(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data)


def _take(data: bytes) -> tuple[bytes | None, bytes]:
    """Take a text with its length in front: the text, and what follows it. None: it is not all there."""
    if len(data) < U32.size:
        return None, b""
    end = U32.size + U32.unpack_from(data)[0]
    return (data[U32.size : end], data[end:]) if end <= len(data) else (None, b"")


def _parse_queries(data: bytes) -> tuple[bytes, list[bytes]] | None:
    """Parse an export's name and its queries. None: they are malformed."""
    name, rest = _take(data)
    if name is None or len(rest) < U32.size:
        return None
    (count,) = U32.unpack_from(rest)
    rest = rest[U32.size :]
    queries: list[bytes] = []
    while rest:
        query, rest = _take(rest)
        if query is None:
            return None
        queries.append(query)
    return (name, queries) if len(queries) == count else None
