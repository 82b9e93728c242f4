"""The pages of one end of a channel, and how they are put away."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple

from gntalloc.vchan.layout import CLI_LIVE, INDEXES, in_page
from gntalloc.vchan.ring import Reader, Writer

if TYPE_CHECKING:
    from gntalloc.atomics import Atomics
    from gntalloc.guest.pages import MappedPages, SharedPages
    from gntalloc.vchan.end import Role
    from gntalloc.vchan.layout import Orders

__all__ = ["ChannelPages"]


class Ring(NamedTuple):
    """Where a ring lies."""

    pages: SharedPages | MappedPages
    base: int
    size: int
    mirrored: int  # bytes of it that lie there twice in a row; 0: it is in the page, once


class ChannelPages:
    """The page that both ends write, and those of the rings that are not in it.

    Args:
        header: the page.
        orders: of the rings.
        left: the pages of the left ring, if it has any of its own.
        right: those of the right one.
        directory: those that list the others, if there are any.

    Attributes:
        orders: of the rings, as the page says.
        memory: the page.
        raw: the page as the object behind `memory`: an index into it costs less, and it fails once it is unmapped.
        address: the page's, in this process.
        flags: the two live bytes and the two notify bytes, as one word.
    """

    def __init__(
        self,
        header: SharedPages | MappedPages,
        orders: Orders,
        left: SharedPages | MappedPages | None,
        right: SharedPages | MappedPages | None,
        directory: SharedPages | None = None,
    ) -> None:
        self.orders = orders
        self.memory = header.memory
        self.raw: Any = self.memory.obj
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._header = header
        self._directory = directory
        self._left = _ring(header, left, orders.left)
        self._right = _ring(header, right, orders.right)
        self._indexes = self.memory[:INDEXES].cast("I")
        self.flags = self.memory[CLI_LIVE : CLI_LIVE + 4].cast("I")

    def rings(self, role: Role, atomics: Atomics) -> tuple[Reader, Writer]:
        """The ring that this end reads, and the one it writes."""
        one, other = (self._left, self._right) if role.reads_left else (self._right, self._left)
        reader = Reader(
            one.pages.memory, one.size, self._indexes, *role.reads, atomics, base=one.base, mirrored=one.mirrored
        )
        writer = Writer(
            other.pages.memory,
            other.size,
            self._indexes,
            *role.writes,
            atomics,
            base=other.base,
            mirrored=other.mirrored,
        )
        return reader, writer

    def release(self) -> None:
        """Let go of what is seen of the page here, so that it can be unmapped."""
        self._indexes.release()
        self.flags.release()

    def close_rings(self) -> None:
        """Unmap the rings that have pages of their own. Can be repeated.

        Raises:
            ViewsStillExported: somebody still looks at one.
        """
        for ring in self._left, self._right:
            if ring.pages is not self._header:
                ring.pages.close()
        if self._directory is not None:
            self._directory.close()

    def close_page(self) -> None:
        """Unmap the page. The kernel, or the machine, then clears this end's live byte and rings. Can be repeated.

        Raises:
            ViewsStillExported: somebody still looks at a ring in it.
        """
        self.release()
        self._header.close()


def _ring(header: SharedPages | MappedPages, own: SharedPages | MappedPages | None, order: int) -> Ring:
    base = in_page(order)
    if base is not None:
        return Ring(header, base, 1 << order, 0)
    assert own is not None
    return Ring(own, 0, 1 << order, len(own.memory) // 2)
