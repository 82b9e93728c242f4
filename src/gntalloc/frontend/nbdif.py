"""nbdif: the numbers and structs of the NBD protocol. Pure.

Source: the NBD project's doc/proto.md.
"""

from __future__ import annotations

import errno
from enum import IntEnum, IntFlag
from struct import Struct

__all__ = [
    "BLOCK_STATUS_HEAD", "CHUNK", "DONE", "ERROR_HEAD", "EXPORT", "EXTENT", "FIXED_NEWSTYLE", "GREETING", "HOLE_HEAD",
    "IHAVEOPT", "INFO_BLOCKS", "INFO_EXPORT", "LARGEST", "NBDMAGIC", "NO_ZEROES", "OFFSET", "OPTION", "OPTION_REPLY",
    "OPTION_REPLY_MAGIC", "READS_AS_ZEROS", "REPLY", "REQUEST", "REQUEST_MAGIC", "SIMPLE_MAGIC", "STRUCTURED_MAGIC",
    "U32", "Chunk", "Command", "Error", "Flag", "Option", "OptionReply", "Transmission", "error_of",
]  # fmt: skip

LARGEST = 32 << 20
"""Bytes of one request's data; what a client may count on that was told nothing."""

GREETING = Struct(">QQH")
OPTION = Struct(">QII")  # magic, option, length
OPTION_REPLY = Struct(">QIII")  # magic, option, type, length
EXPORT = Struct(">QH")  # size, flags
INFO_EXPORT, INFO_BLOCKS = Struct(">HQH"), Struct(">HIII")
REQUEST = Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
REPLY = Struct(">IIQ")  # magic, error, cookie
CHUNK = Struct(">IHHQI")  # magic, flags, type, cookie, length
OFFSET, HOLE_HEAD, ERROR_HEAD = Struct(">Q"), Struct(">QI"), Struct(">IH")
BLOCK_STATUS_HEAD, EXTENT = Struct(">I"), Struct(">II")
U32 = Struct(">I")

NBDMAGIC, IHAVEOPT, OPTION_REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
REQUEST_MAGIC, SIMPLE_MAGIC, STRUCTURED_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
DONE = 1
"""A chunk's flag: it is its reply's last."""
READS_AS_ZEROS = 3
"""An extent's flags in base:allocation: a hole, and zeros."""


class Option(IntEnum):
    """What a client asks for before it transmits."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class OptionReply(IntEnum):
    """What it is answered."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    UNSUPPORTED = 0x80000001
    INVALID = 0x80000003
    UNKNOWN = 0x80000006


class Transmission(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    FLUSH = 4
    FUA = 8
    TRIM = 32
    WRITE_ZEROES = 64
    DF = 128
    MULTI_CONN = 256
    FAST_ZERO = 2048


class Command(IntEnum):
    """What a client asks for when it transmits."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class Flag(IntFlag):
    """How it is to be done."""

    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16


class Chunk(IntEnum):
    """What a part of a structured reply is."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 0x8001


class Error(IntEnum):
    """NBD's own numbers of errors."""

    PERM = 1
    IO = 5
    INVALID = 22
    NO_SPACE = 28
    NOT_SUPPORTED = 95


_ERRORS = {
    errno.EROFS: Error.PERM,
    errno.EINVAL: Error.INVALID,
    errno.ENOSPC: Error.NO_SPACE,
    errno.EOPNOTSUPP: Error.NOT_SUPPORTED,
}


def error_of(number: int | None) -> Error:
    """NBD's number for an errno; IO for one that it does not have."""
    return _ERRORS.get(number or 0, Error.IO)
