"""Turn xenstore messages into bytes and back. Sans-I/O: nothing here reads, writes or waits.

A message is a header of four 32-bit numbers in the machine's byte order (type, request id, transaction id,
length) and a body of at most 4096 bytes. Strings in a body end in NUL; the value of a WRITE and of READ's
answer does not.

Source: Xen's public io/xs_wire.h and docs/misc/xenstore.txt.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from gntalloc.errors import PeerBroke

__all__ = [
    "ERROR_CODES",
    "HEADER",
    "PAYLOAD_MAX",
    "WHY",
    "Decoder",
    "Message",
    "Type",
    "encode",
    "error_code",
    "error_name",
    "join",
    "split",
    "type_name",
]

HEADER = Struct("=IIII")
PAYLOAD_MAX = 4096


class Type(IntEnum):
    """Name the type of a message. An answer has the type of its request, or is an ERROR."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    # 20 was RESTRICT, and is not given again.
    RESET_WATCHES = 21
    DIRECTORY_PART = 22
    GET_FEATURE = 23
    SET_FEATURE = 24
    GET_QUOTA = 25
    SET_QUOTA = 26


WHY = 0x676E7401
"""A request of this package alone: why was the last request of this connection refused? Other daemons answer ENOSYS.

The body is one zero. The answer is text without a zero, such as "transactions 10: domain 1 has 11 open", or the error
ENOENT if there is nothing more to say. An ERROR itself stays as stock clients know it: the errno's name, nothing more.
"""

ERROR_CODES: dict[str, int] = {
    name: getattr(errno, name)
    for name in (
        *("EINVAL", "EACCES", "EEXIST", "EISDIR", "ENOENT", "ENOMEM", "ENOSPC", "EIO"),
        *("ENOTEMPTY", "ENOSYS", "EROFS", "EBUSY", "EAGAIN", "EISCONN", "E2BIG", "EPERM"),
    )
}
"""The names that an ERROR body may carry -> errno."""


class Message(NamedTuple):
    """Hold one message, either way. `type` is a Type, or a number that we do not know."""

    type: int
    req_id: int
    tx_id: int
    body: bytes


def encode(message: Message) -> bytes:
    """Make the bytes of a message.

    Raises:
        ValueError: the body is longer than PAYLOAD_MAX. The daemon would drop the connection.
    """
    if len(message.body) > PAYLOAD_MAX:
        raise ValueError(f"{len(message.body)} bytes do not fit a xenstore message of at most {PAYLOAD_MAX}")
    return HEADER.pack(message.type, message.req_id, message.tx_id, len(message.body)) + message.body


class Decoder:
    """Turn bytes, in pieces of any size, into messages.

    After an error every call fails: the beginning of the next message is not known any more.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Add bytes, and return the messages that they complete.

        Raises:
            PeerBroke: a header announces more than a message can hold.
        """
        self.add(data)
        messages: list[Message] = []
        while length := self.first:
            if length < 0 and messages:
                break  # the messages before it are good; the next call finds it at the front
            messages.append(self.take())
        return messages

    def add(self, data: bytes) -> None:
        """Add bytes, and look at none of them."""
        self._buffer += data

    @property
    def first(self) -> int:
        """The bytes of the first message. 0: it is not complete. Less than 0: what comes next is no message."""
        buffer = self._buffer
        if len(buffer) < HEADER.size:
            return 0
        length: int = HEADER.unpack_from(buffer)[3]
        if length > PAYLOAD_MAX:
            return -1
        end = HEADER.size + length
        return end if len(buffer) >= end else 0

    def take(self) -> Message:
        """Take the first message, which must be complete.

        Raises:
            PeerBroke: it announces more than a message can hold.
        """
        kind, req_id, tx_id, length = HEADER.unpack_from(self._buffer)
        if length > PAYLOAD_MAX:
            raise PeerBroke(f"a xenstore message ({type_name(kind)}) announces {length} bytes, over {PAYLOAD_MAX}")
        end = HEADER.size + length
        message = Message(kind, req_id, tx_id, bytes(self._buffer[HEADER.size : end]))
        del self._buffer[:end]
        return message

    @property
    def pending(self) -> int:
        """The number of bytes of a message that is not complete yet."""
        return len(self._buffer)


def type_name(kind: int) -> str:
    """Name a message type for an error's text."""
    if kind == WHY:
        return "WHY"
    try:
        return Type(kind).name
    except ValueError:
        return f"type {kind}"


def join(*strings: str | bytes) -> bytes:
    """Make a body of strings: each is followed by a NUL."""
    return b"".join((string.encode() if isinstance(string, str) else string) + b"\0" for string in strings)


def split(body: bytes) -> list[str]:
    """Split a body into its strings, each of which must end in NUL.

    Raises:
        PeerBroke: the last one does not, or one is not text.
    """
    if body and body[-1]:
        raise PeerBroke(f"a xenstore string does not end in NUL: {body[-40:]!r}")
    try:
        return body.decode().split("\0")[:-1]
    except UnicodeDecodeError as error:
        raise PeerBroke(f"a xenstore string is not text: {body[:40]!r}") from error


def error_name(code: int) -> str:
    """Give the name to send for an errno: EIO for one that has no name in the protocol."""
    name = errno.errorcode.get(code, "")
    return name if name in ERROR_CODES else "EIO"


def error_code(body: bytes) -> int:
    """Give the errno that the body of an ERROR names: EIO for a name that the protocol does not have."""
    return ERROR_CODES.get(body.rstrip(b"\0").decode("ascii", "replace"), errno.EIO)
