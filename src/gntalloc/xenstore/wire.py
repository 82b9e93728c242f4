"""xenstore messages as bytes. Sans-I/O: nothing here reads, writes or waits.

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
    """What a message is. An answer has the type of its request, or is an ERROR."""

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
"""A request of our own: why was the last request of this connection refused? Every other daemon answers ENOSYS.

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
    """One message, either way. `type` is a Type, or a number that we do not know."""

    type: int
    req_id: int
    tx_id: int
    body: bytes


def encode(message: Message) -> bytes:
    """The bytes of a message.

    Raises:
        ValueError: the body is longer than PAYLOAD_MAX. The daemon would drop the connection.
    """
    if len(message.body) > PAYLOAD_MAX:
        raise ValueError(f"{len(message.body)} bytes do not fit a xenstore message of at most {PAYLOAD_MAX}")
    return HEADER.pack(message.type, message.req_id, message.tx_id, len(message.body)) + message.body


class Decoder:
    """Turns bytes, in whatever pieces they come, into messages.

    After an error it stays in it: where the next message would begin is not known any more.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes.

        Raises:
            PeerBroke: a header announces more than a message can hold.
        """
        buffer = self._buffer
        buffer += data
        messages: list[Message] = []
        start = 0
        while len(buffer) - start >= HEADER.size:
            kind, req_id, tx_id, length = HEADER.unpack_from(buffer, start)
            if length > PAYLOAD_MAX:
                if messages:
                    break  # what came before it is good; the next call finds it at the front
                raise PeerBroke(f"a xenstore message ({type_name(kind)}) announces {length} bytes, over {PAYLOAD_MAX}")
            end = start + HEADER.size + length
            if end > len(buffer):
                break
            messages.append(Message(kind, req_id, tx_id, bytes(buffer[start + HEADER.size : end])))
            start = end
        del buffer[:start]
        return messages

    @property
    def pending(self) -> int:
        """Bytes of a message that is not complete yet."""
        return len(self._buffer)


def type_name(kind: int) -> str:
    """What to call a message type in an error."""
    if kind == WHY:
        return "WHY"
    try:
        return Type(kind).name
    except ValueError:
        return f"type {kind}"


def join(*strings: str | bytes) -> bytes:
    """Strings as a body: each followed by a NUL."""
    return b"".join((string.encode() if isinstance(string, str) else string) + b"\0" for string in strings)


def split(body: bytes) -> list[str]:
    """The strings of a body, each of which must end in NUL.

    Raises:
        PeerBroke: the last one does not, or something is not text.
    """
    if body and body[-1]:
        raise PeerBroke(f"a xenstore string does not end in NUL: {body[-40:]!r}")
    try:
        return body.decode().split("\0")[:-1]
    except UnicodeDecodeError as error:
        raise PeerBroke(f"a xenstore string is not text: {body[:40]!r}") from error


def error_name(code: int) -> str:
    """The name to send for an errno; EIO for one that the protocol has no name for."""
    name = errno.errorcode.get(code, "")
    return name if name in ERROR_CODES else "EIO"


def error_code(body: bytes) -> int:
    """The errno that the body of an ERROR names; EIO for a name that the protocol does not have."""
    return ERROR_CODES.get(body.rstrip(b"\0").decode("ascii", "replace"), errno.EIO)
