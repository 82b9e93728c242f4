"""What two ends of this package agree on, and no end of libxenvchan ever sees.

It lies in the shared page, at the first multiple of 64 after the list of references: bytes that libxenvchan clears and
never looks at. The server offers before it tells anybody of the page; the client takes what it wants of the offer and
confirms before it sets cli_live. A client that does not know any of this leaves the confirmation empty, and a server
that does not leaves the offer empty: then the wire is libxenvchan's, and nothing else.

    0   offer         8 bytes, "gntalloc"       32  confirmation  8 bytes, "gntalloc"
    8   version       u16, 1                    40  flags         u16, those of the offer that are taken
    10  flags         u16                       42  wake name     16 bytes
    12  left, right   u8 each, orders           60  srv_state     u8
    14  directory     u16, pages                61  cli_state     u8
    16  wake name     16 bytes                  64  references of the directory's pages, u32 each

DIRECT     a wake-up from end to end, over a pair of sockets, instead of through the machine; the names are theirs
LARGE      rings of these orders, beyond the 1 MiB that the list of references has room for. A directory, in pages of
           its own, lists the references of all pages: left's, then right's. libxenvchan's rings are their first MiB
states     FINISHED: no more bytes will come from this end. GOODBYE: this end closes, and does not die
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from gntalloc.errors import PeerBroke
from gntalloc.vchan.layout import PAGE_SIZE, Orders, pages_of

__all__ = ["CLI_STATE", "DIRECT", "FINISHED", "GOODBYE", "LARGE", "LARGEST", "SRV_STATE", "Confirmation", "Offer"]

_MAGIC = b"gntalloc"
_VERSION = 1
_OFFER = Struct("=8sHHBBH16s")
_CONFIRMATION = Struct("=8sH16s")
_CONFIRMATION_AT = 32
_DIRECTORY_AT = 64
_ALIGNMENT = 64

SRV_STATE, CLI_STATE = 60, 61
FINISHED, GOODBYE = 1, 2
DIRECT, LARGE = 1, 2

LARGEST = 24
"""The largest order of a ring between two of our own ends: 16 MiB."""
REFERENCES_A_PAGE = PAGE_SIZE // 4


def place(orders: Orders) -> int:
    """At which byte of the page it begins."""
    return -(-orders.end_of_references // _ALIGNMENT) * _ALIGNMENT


class Offer(NamedTuple):
    """What a server has to offer. `directory` are the references of the directory's pages."""

    flags: int
    orders: Orders
    name: bytes
    directory: tuple[int, ...]

    def write(self, page: memoryview, at: int) -> None:
        """Put it into the page, at `place`."""
        count = len(self.directory)
        _OFFER.pack_into(page, at, _MAGIC, _VERSION, self.flags, *self.orders, count, self.name)
        Struct(f"={count}I").pack_into(page, at + _DIRECTORY_AT, *self.directory)

    @classmethod
    def read(cls, page: memoryview, at: int) -> Offer | None:
        """Read what the server offers. None: it is not an end of this package, or an older one.

        Raises:
            PeerBroke: an offer that cannot be.
        """
        magic, version, flags, left, right, count, name = _OFFER.unpack_from(page, at)
        if magic != _MAGIC or version != _VERSION:
            return None
        orders = Orders(left, right)
        if not flags & LARGE:
            return cls(flags, orders, name.rstrip(b"\0"), ())
        listed = sum(map(pages_of, orders))
        if not (max(orders) <= LARGEST and min(orders) >= 10 and 0 < listed <= count * REFERENCES_A_PAGE):
            raise PeerBroke(f"the server offers rings of orders {left} and {right}, listed in {count} pages: no vchan")
        end = at + _DIRECTORY_AT + 4 * count
        if end > PAGE_SIZE or count > -(-listed // REFERENCES_A_PAGE):
            raise PeerBroke(f"the server lists references in {count} pages, and needs fewer: no vchan")
        directory = Struct(f"={count}I").unpack_from(page, at + _DIRECTORY_AT)
        return cls(flags, orders, name.rstrip(b"\0"), directory)


class Confirmation(NamedTuple):
    """What a client takes of the offer."""

    flags: int
    name: bytes

    def write(self, page: memoryview, at: int) -> None:
        """Put it into the page. It counts once cli_live is set."""
        _CONFIRMATION.pack_into(page, at + _CONFIRMATION_AT, _MAGIC, self.flags, self.name)

    @classmethod
    def read(cls, page: memoryview, at: int, offered: int) -> Confirmation | None:
        """Read what the client takes. None: it is not an end of this package.

        Raises:
            PeerBroke: it takes what was not offered.
        """
        magic, flags, name = _CONFIRMATION.unpack_from(page, at + _CONFIRMATION_AT)
        if magic != _MAGIC:
            return None
        if flags & ~offered:
            raise PeerBroke(f"the client takes {flags:#x} of an offer of {offered:#x}: that cannot be")
        return cls(flags, name.rstrip(b"\0"))
