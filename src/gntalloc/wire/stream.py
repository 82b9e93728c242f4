"""Frame messages on a stream socket: each is a header of 12 bytes and a payload.

    length u32    of the payload, at most MAX_PAYLOAD
    kind u16      its kind; a reply has the bit REPLY set
    descriptors u16   the number of descriptors that belong to it, in order (SCM_RIGHTS)
    id u32        a reply has its request's

A reply's payload begins with error i32 (an errno or 0), length of the reason u32, result i64, and the reason.

A program may send a request before the reply to the one before has come. Replies keep the order of requests. The kinds
and their fields are in `messages`.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

__all__ = [
    "HEADER",
    "MAX_DESCRIPTORS",
    "MAX_PAYLOAD",
    "REPLY",
    "REPLY_HEAD",
    "REPLY_SIZE",
    "Decoder",
    "Garbage",
    "Message",
    "Reply",
    "decode_reply",
    "encode",
    "encode_reply",
]

MAX_PAYLOAD = 1 << 21  # the answer to an mmap of 65536 scattered pages is two thirds of this
MAX_DESCRIPTORS = 253  # SCM_MAX_FD, the most of one sendmsg; a message with more is sent in parts

REPLY = 0x8000

HEADER = Struct("=IHHI")
_REPLY = Struct("=iIq")
REPLY_HEAD = Struct(HEADER.format + _REPLY.format.lstrip("="))
"""The header of a reply, and what its payload begins with."""
REPLY_SIZE = _REPLY.size


class Garbage(ValueError):
    """The bytes that came are no message. There is no way to go on with their sender."""


class Message(NamedTuple):
    """Hold one whole message, without its descriptors."""

    kind: int
    id: int
    descriptors: int
    payload: bytes


class Reply(NamedTuple):
    """Hold an answer: `error` is an errno or 0, `why` its reason."""

    error: int
    why: str
    result: int
    body: bytes


class Decoder:
    """Take bytes as they come, and give whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def in_the_middle(self) -> bool:
        """Whether a part of a message has come without the rest."""
        return bool(self._buffer)

    @property
    def missing(self) -> int:
        """The bytes of a message that has come in part which have not come yet, as far as is known."""
        return _end_of_message(self._buffer, 0) - len(self._buffer) if self._buffer else 0

    def feed(self, data: bytes) -> list[Message]:
        """Add the bytes that came, and give every message that is whole now.

        Raises:
            Garbage: the length is beyond MAX_PAYLOAD.
        """
        buffer = self._buffer
        if buffer:
            buffer += data
            if len(buffer) < _end_of_message(buffer, 0):
                return []  # no copy before the message is whole, however small its pieces are
            data = bytes(buffer)
            buffer.clear()
        messages: list[Message] = []
        start, size = 0, len(data)
        while start < size:
            end = _end_of_message(data, start)
            if end > size:
                buffer += data[start:]
                break
            _, kind, descriptors, number = HEADER.unpack_from(data, start)
            messages.append(Message(kind, number, descriptors, data[start + HEADER.size : end]))
            start = end
        return messages


def _end_of_message(data: bytes | bytearray, start: int) -> int:
    """Find the end of the message that begins at `start`, or of its header if that is not whole."""
    if len(data) - start < HEADER.size:
        return start + HEADER.size
    length: int = HEADER.unpack_from(data, start)[0]
    if length > MAX_PAYLOAD:
        raise Garbage(f"a message of {length} bytes was announced, and {MAX_PAYLOAD} is the most")
    return start + HEADER.size + length


def encode(kind: int, number: int, payload: bytes = b"", descriptors: int = 0) -> bytes:
    """Make one message, ready to send."""
    return HEADER.pack(len(payload), kind, descriptors, number) + payload


def encode_reply(
    kind: int,
    number: int,
    *,
    error: int = 0,
    why: str = "",
    result: int = 0,
    body: bytes = b"",
    descriptors: int = 0,
) -> bytes:
    """Make the answer to request `number`."""
    reason = why.encode(errors="replace") if why else b""
    payload = _REPLY.pack(error, len(reason), result) + reason + body
    return HEADER.pack(len(payload), kind | REPLY, descriptors, number) + payload


def decode_reply(payload: bytes) -> Reply:
    """Take a reply's payload apart.

    Raises:
        Garbage: it is shorter than it says.
    """
    if len(payload) < _REPLY.size:
        raise Garbage("a reply without its head")
    error, length, result = _REPLY.unpack_from(payload)
    end = _REPLY.size + length
    if len(payload) < end:
        raise Garbage("a reply without its reason")
    why = payload[_REPLY.size : end].decode(errors="replace") if length else ""
    return Reply(error, why, result, payload[end:])
