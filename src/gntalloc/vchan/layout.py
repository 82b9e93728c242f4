"""The shared page of a vchan: where what lies in its 4096 bytes, and which rings go together.

    0   left.cons    server    20  cli_live
    4   left.prod    client    21  srv_live
    8   right.cons   client    22  cli_notify
    12  right.prod   server    23  srv_notify
    16  left_order   u16       24  references of left's pages, then of right's
    18  right_order  u16

The client writes into *left*, the server into *right*. A ring of order 10 or 11 is in the page itself, at bytes 1024
and 2048; a larger one is in pages of its own. Indexes run freely over 32 bits.

Sources: xen/include/public/io/libxenvchan.h; the choice of sizes as the C library makes it.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from gntalloc.errors import PeerBroke

__all__ = [
    "CLI_LIVE",
    "CLI_NOTIFY",
    "CONNECTED",
    "GONE",
    "INDEXES",
    "LARGEST_ORDER",
    "LEFT_CONS",
    "LEFT_PROD",
    "NOTIFY_READ",
    "NOTIFY_WRITE",
    "NOT_YET",
    "ORDERS",
    "PAGE_SIZE",
    "REFERENCES",
    "RIGHT_CONS",
    "RIGHT_PROD",
    "SRV_LIVE",
    "SRV_NOTIFY",
    "Orders",
]

PAGE_SIZE = 4096
INDEXES = 16
"""Bytes of the four indexes. What follows are their places among them, in words of 32 bits."""
LEFT_CONS, LEFT_PROD, RIGHT_CONS, RIGHT_PROD = range(4)

ORDERS = Struct("=HH")
ORDERS_OFFSET = 16
CLI_LIVE, SRV_LIVE, CLI_NOTIFY, SRV_NOTIFY = 20, 21, 22, 23
REFERENCES = 24

GONE, CONNECTED, NOT_YET = 0, 1, 2
"""Values of the two live bytes; NOT_YET is of cli_live only."""

NOTIFY_WRITE, NOTIFY_READ = 1, 2
"""Bits of the two notify bytes: tell me when you have written, when you have read."""

SMALLEST_ORDER, LARGEST_ORDER = 10, 20
_FIRST_EXTERNAL = 12
_IN_PAGE = {10: 1024, 11: 2048}


class Orders(NamedTuple):
    """How large the rings are: 2 to the power of each."""

    left: int
    right: int

    @classmethod
    def choose(cls, read: int, write: int) -> Orders:
        """Choose what a server needs to read and to write at least so many bytes at once.

        Raises:
            ValueError: more than 1 MiB cannot be had.
        """
        most = 1 << LARGEST_ORDER
        if not (0 <= read <= most and 0 <= write <= most):
            raise ValueError(f"rings of {read} and {write} bytes: libxenvchan's are 0 to {most}")
        if read <= 1024 and write <= 2048:
            return cls(10, 11)
        if read <= 2048 and write <= 1024:
            return cls(11, 10)
        left, right = (max(_FIRST_EXTERNAL, (size - 1).bit_length()) for size in (read, write))
        if read <= 2048:
            return cls(11, right)
        if write <= 2048:
            return cls(left, 11)
        return cls(left, right)

    @classmethod
    def read(cls, page: memoryview) -> Orders:
        """Those that a server has put into its page, once seen to be possible.

        Raises:
            PeerBroke: they are not. That is not a vchan, or not any more.
        """
        orders = cls(*ORDERS.unpack_from(page, ORDERS_OFFSET))
        orders.check()
        return orders

    def write(self, page: memoryview) -> None:
        """Put them into the page."""
        ORDERS.pack_into(page, ORDERS_OFFSET, *self)

    def check(self) -> None:
        """See that both rings and the list of references have places that do not overlap.

        Raises:
            PeerBroke: they do.
        """
        for order in self:
            if not SMALLEST_ORDER <= order <= LARGEST_ORDER:
                raise PeerBroke(f"the server's page tells of a ring of order {order}; there are 10 to 20: no vchan")
        if self.left == self.right < _FIRST_EXTERNAL:
            raise PeerBroke(f"the server's page puts both rings, of order {self.left}, in one place")
        for order in self:
            at = _IN_PAGE.get(order, PAGE_SIZE)
            if self.end_of_references > at:  # the C library misses this one
                raise PeerBroke(
                    f"the server's page has a list of references that ends at byte {self.end_of_references}, in the "
                    f"ring of order {order} that begins at {at}"
                )

    @property
    def end_of_references(self) -> int:
        """The first byte after the list."""
        return REFERENCES + 4 * sum(map(pages_of, self))


def in_page(order: int) -> int | None:
    """At which byte of the page the ring begins; None: it has pages of its own."""
    return _IN_PAGE.get(order)


def pages_of(order: int) -> int:
    """How many pages of its own the ring has."""
    return 0 if order < _FIRST_EXTERNAL else 1 << (order - _FIRST_EXTERNAL)
