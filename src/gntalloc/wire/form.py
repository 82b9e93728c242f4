"""Turn a message's fields into bytes: numbers of fixed size first, then at most one field of any length."""

from __future__ import annotations

from struct import Struct
from typing import Any, NamedTuple

from gntalloc.wire.memory import decode_regions, encode_regions
from gntalloc.wire.stream import HEADER, REPLY, REPLY_HEAD, REPLY_SIZE, Garbage

__all__ = ["BYTES", "DOMIDS", "PIECES", "REFERENCES", "REGIONS", "TEXT", "Form", "Piece", "Tail"]

_WORD = Struct("=I")
_PIECE = Struct("=IQQ")


class Piece(NamedTuple):
    """Name a part of a map: `length` bytes, from `offset` on, of the memory file behind one of the descriptors."""

    descriptor: int
    offset: int
    length: int


class Tail(NamedTuple):
    """Describe the last field of a message: its name in the docs, and how to encode and decode it."""

    name: str
    encode: Any
    decode: Any


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _encode_pieces(pieces: tuple[Piece, ...]) -> bytes:
    return b"".join([_PIECE.pack(*piece) for piece in pieces])


def _decode_pieces(data: bytes) -> tuple[Piece, ...]:
    if len(data) % _PIECE.size:
        raise Garbage(f"pieces in {len(data)} bytes; each has {_PIECE.size}")
    return tuple([Piece(*each) for each in _PIECE.iter_unpack(data)])


def _encode_domids(domids: tuple[int, ...]) -> bytes:
    return b"".join([_WORD.pack(domid) for domid in domids])


def _decode_domids(data: bytes) -> tuple[int, ...]:
    if len(data) % _WORD.size:
        raise Garbage(f"domids in {len(data)} bytes; each has {_WORD.size}")
    return tuple([domid for (domid,) in _WORD.iter_unpack(data)])


def _references(data: bytes) -> bytes:
    if len(data) % _WORD.size:
        raise Garbage(f"references in {len(data)} bytes; each has {_WORD.size}")
    return data


BYTES = Tail("bytes", bytes, bytes)
TEXT = Tail("text", str.encode, _text)
REGIONS = Tail("regions", encode_regions, decode_regions)
PIECES = Tail("pieces", _encode_pieces, _decode_pieces)
DOMIDS = Tail("domids u32", _encode_domids, _decode_domids)
REFERENCES = Tail("references u32", bytes, _references)


class Form:
    """Describe the layout of one kind of message.

    Args:
        head: the format of the fields of fixed size, as struct has it.
        tail: the last field, if it may have any length.
        kind: the number of a request; an answer has its request's.
        descriptors: the descriptors that come along with it, in words.
    """

    def __init__(self, head: str = "=", tail: Tail | None = None, *, kind: int = 0, descriptors: str = "") -> None:
        self.head = Struct(head)
        self.tail = tail
        self.kind = kind
        self.descriptors = descriptors
        self._request = Struct(HEADER.format + head.lstrip("="))
        self._reply = Struct(REPLY_HEAD.format + head.lstrip("="))

    def encode(self, fields: tuple[Any, ...]) -> bytes:
        """Make a payload of a message's fields."""
        if self.tail is None:
            return self.head.pack(*fields)
        data: bytes = self.head.pack(*fields[:-1]) + self.tail.encode(fields[-1])
        return data

    def frame(self, fields: tuple[Any, ...], number: int, descriptors: int = 0) -> bytes:
        """Make a whole request of a message's fields."""
        size = self.head.size
        if self.tail is None:
            return self._request.pack(size, self.kind, descriptors, number, *fields)
        end: bytes = self.tail.encode(fields[-1])
        return self._request.pack(size + len(end), self.kind, descriptors, number, *fields[:-1]) + end

    def frame_reply(self, fields: tuple[Any, ...], kind: int, number: int, result: int, descriptors: int) -> bytes:
        """Make a whole reply to a request of this kind and number, with these fields for its own part."""
        size, kind = REPLY_SIZE + self.head.size, kind | REPLY
        if self.tail is None:
            return self._reply.pack(size, kind, descriptors, number, 0, 0, result, *fields)
        end: bytes = self.tail.encode(fields[-1])
        return self._reply.pack(size + len(end), kind, descriptors, number, 0, 0, result, *fields[:-1]) + end

    def decode(self, payload: bytes) -> tuple[Any, ...]:
        """Take a payload apart.

        Raises:
            Garbage: it is too short, or its last field is not whole.
        """
        size = self.head.size
        if len(payload) < size:
            raise Garbage(f"{len(payload)} bytes where {size} or more are due")
        fields = self.head.unpack_from(payload)
        return fields if self.tail is None else (*fields, self.tail.decode(payload[size:]))
