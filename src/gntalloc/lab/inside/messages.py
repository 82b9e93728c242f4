"""Encode messages between the lab's host and the agents in its domains, for the two ways they travel.

Between the host and dom0 there is a clean byte stream (a virtio serial port). There a message is two lengths, a head in
JSON and a body of bytes. Between dom0 and a guest there is only the guest's console, to which the guest's kernel writes
as well. There a message is one line of text, with a mark in front and a checksum inside. Every other line is the
kernel's.

On an emulated processor every import costs: a dataclass here would make each domain a second slower to boot.
"""

from __future__ import annotations

import binascii
import json
import struct
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = ["CHUNK", "LineDecoder", "Message", "Nonsense", "StreamDecoder", "to_line", "to_stream"]

# Bodies longer than this are sent in pieces, so that one big file does not hold up another program's output.
CHUNK = 64 * 1024

# No head, no body and no line of a console is longer.
_LONGEST = 4 * 1024 * 1024

_LENGTHS = struct.Struct(">II")
_MARK = b"\x02lab:"


class Nonsense(ValueError):
    """What came is no message. There is no way to go on with its sender."""


class Message:
    """Hold a head of names and values, and a body of bytes."""

    def __init__(self, head: dict[str, Any], body: bytes = b"") -> None:
        self.head = head
        self.body = body


def to_stream(message: Message) -> bytes:
    """Encode a message for a clean byte stream."""
    head = json.dumps(message.head).encode()
    return _LENGTHS.pack(len(head), len(message.body)) + head + message.body


def _from_stream(data: bytes) -> tuple[Message, bytes] | None:
    if len(data) < _LENGTHS.size:
        return None
    head, body = _LENGTHS.unpack_from(data)
    if max(head, body) > _LONGEST:
        raise Nonsense(f"a head of {head} bytes and a body of {body} were announced; {_LONGEST} is the most")
    middle = _LENGTHS.size + head
    end = middle + body
    if len(data) < end:
        return None
    try:
        values = json.loads(data[_LENGTHS.size : middle])
    except (ValueError, RecursionError) as error:
        raise Nonsense(f"a head that is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise Nonsense(f"a head without names: {str(values)[:40]}")
    return Message(values, data[middle:end]), data[end:]


class StreamDecoder:
    """Take the bytes of a clean stream as they come, and give the messages in them."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that are complete now.

        Raises:
            Nonsense: what came is none.
        """
        self._rest += data
        while found := _from_stream(self._rest):
            message, self._rest = found
            yield message


def to_line(message: Message) -> bytes:
    """Encode a message for a console. Zlib's own checksum tells a line that a kernel message ran into."""
    # The message has a line of its own, even if the kernel has left part of a line before it.
    return b"\n" + _MARK + binascii.b2a_base64(zlib.compress(to_stream(message), 1))


class LineDecoder:
    """Take the bytes of a console as they come, and give messages, and as bytes the lines that are none."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Message | bytes]:
        """Yield the messages and other lines that are complete now."""
        self._rest += data
        if b"\n" not in data:
            if len(self._rest) > _LONGEST:  # no message of ours
                line, self._rest = bytes(self._rest), bytearray()
                yield line + b"\n"
            return
        complete, _, rest = self._rest.rpartition(b"\n")
        self._rest = bytearray(rest)
        for line in bytes(complete).split(b"\n"):
            noise, mark, text = line.partition(_MARK)
            message = _from_text(text) if mark else None
            if message is None:
                noise = line
            if noise.strip():
                yield noise.strip(b"\r") + b"\n"
            if message is not None:
                yield message


def _from_text(text: bytes) -> Message | None:
    try:
        inflating = zlib.decompressobj()
        data = inflating.decompress(binascii.a2b_base64(text), _LENGTHS.size + 2 * _LONGEST)
        found = _from_stream(data) if inflating.eof else None
    except (binascii.Error, zlib.error, ValueError):
        return None
    return found[0] if found else None
