"""Who may do what with a node.

The first entry of a node names its owner, who may do everything; its letter holds for everybody who has no entry of
their own. The first entry of one's own counts.
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
    """What one domain may do. A void one is of a domain that is gone: it is shown, and gives nothing."""

    domid: int
    access: int
    void: bool = False


def parse(texts: list[bytes]) -> tuple[Entry, ...]:
    """Entries such as r3.

    Raises:
        Refused: EINVAL one is none.
    """
    return tuple(_parse(text.decode("latin-1")) for text in texts)


def _parse(text: str) -> Entry:
    access = _LETTERS.get(text[:1])
    if access is None:
        raise Refused(errno.EINVAL)
    return Entry(number(text[1:]), access)


def pack(entries: tuple[Entry, ...]) -> bytes:
    """Entries as an answer has them."""
    return b"".join(b"%c%d\0" % (ord(_LETTER_OF[entry.access]), _signed(entry.domid)) for entry in entries)


def _signed(domid: int) -> int:
    return domid - (1 << 32) if domid >> 31 else domid
