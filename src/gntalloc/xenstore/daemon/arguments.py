"""Read the strings and numbers in a request as C reads them: characters after a number are ignored."""

from __future__ import annotations

import errno
import re

from gntalloc.xenstore.daemon.limits import Refused

__all__ = ["count", "decimal", "integer", "number", "one", "strings"]

_DECIMAL = re.compile(rb"[ \t-\r]*([+-]?[0-9]+)")
_ANY_BASE = re.compile(r"[ \t-\r]*([+-]?)(0[xX][0-9a-fA-F]+|[0-9]+)")
_LONG = 1 << 63


def one(body: bytes) -> bytes:
    """Read the only string of a request, which ends in its only zero.

    Raises:
        Refused: EINVAL: it does not end so.
    """
    if body.find(0) != len(body) - 1 or not body:
        raise Refused(errno.EINVAL)
    return body[:-1]


def strings(body: bytes, least: int) -> list[bytes]:
    """Read the first strings of a request, each with its zero. Bytes after the last zero do not count.

    Raises:
        Refused: EINVAL: there are fewer.
    """
    parts = body.split(b"\0")
    if len(parts) <= least:
        raise Refused(errno.EINVAL)
    return parts[:-1]


def count(body: bytes) -> int:
    """Count the strings of a request."""
    return body.count(0)


def integer(text: bytes) -> int:
    """Read a number as atoi does: 0 if it is none."""
    found = _DECIMAL.match(text)
    if found is None:
        return 0
    value = max(-_LONG, min(_LONG - 1, int(found[1])))
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def decimal(text: bytes) -> int:
    """Read a domid, as atoi into an unsigned number does."""
    return integer(text) & 0xFFFFFFFF


def number(text: str) -> int:
    """Read a number as strtol with any base into an unsigned number does. Nothing may follow it.

    Raises:
        Refused: EINVAL: it is no number.
    """
    found = _ANY_BASE.fullmatch(text)
    if found is None:
        raise Refused(errno.EINVAL)
    digits = found[2]
    octal = digits[0] == "0" and len(digits) > 1 and digits[1] not in "xX"
    if octal and not set(digits) <= set("01234567"):
        raise Refused(errno.EINVAL)
    value = int(digits, 8) if octal else int(digits, 0)
    value = max(-_LONG, min(_LONG - 1, -value if found[1] == "-" else value))
    return value & 0xFFFFFFFF
