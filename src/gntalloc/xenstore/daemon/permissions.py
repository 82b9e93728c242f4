"""Decide what a domain may do with a node.

The first entry of a node names its owner, which may do everything. The letter of that entry holds for every domain that
has no entry of its own. Of several entries of a domain the first counts.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from gntalloc.xenstore.daemon.arguments import number
from gntalloc.xenstore.daemon.limits import Refused

__all__ = ["ALL", "OWNER", "READ", "WRITE", "Entry", "pack", "parse"]

READ, WRITE, OWNER = 1, 2, 4
ALL = READ | WRITE | OWNER

_LETTERS = {"n": 0, "r": READ, "w": WRITE, "b": READ | WRITE}
_LETTER_OF = {access: letter for letter, access in _LETTERS.items()}


class Entry(NamedTuple):
    """Say what one domain may do. A void entry names a domain that is gone: it is shown, and gives nothing."""

    domid: int
    access: int
    void: bool = False


def parse(texts: list[bytes]) -> tuple[Entry, ...]:
    """Read entries such as r3.

    Raises:
        Refused: EINVAL: one is no entry.
    """
    return tuple(_parse(text.decode("latin-1")) for text in texts)


def _parse(text: str) -> Entry:
    access = _LETTERS.get(text[:1])
    if access is None:
        raise Refused(errno.EINVAL)
    return Entry(number(text[1:]), access)


def pack(entries: tuple[Entry, ...]) -> bytes:
    """Write entries as an answer has them."""
    return b"".join(b"%c%d\0" % (ord(_LETTER_OF[entry.access]), _signed(entry.domid)) for entry in entries)


def _signed(domid: int) -> int:
    return domid - (1 << 32) if domid >> 31 else domid
