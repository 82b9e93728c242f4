"""The pages of one end of a channel, and how they are put away."""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple

from gntalloc.abi.gntalloc import SET_UNMAP_NOTIFY, UnmapNotify
from gntalloc.errors import DeviceError, MachineGone
from gntalloc.guest.pages import MappedPages
from gntalloc.vchan.layout import CLI_LIVE, INDEXES, in_page
from gntalloc.vchan.ring import Reader, Writer

if TYPE_CHECKING:
    from gntalloc.atomics import Atomics
    from gntalloc.guest.devices import DeviceFile
    from gntalloc.guest.pages import SharedPages
    from gntalloc.vchan.layout import Orders
    from gntalloc.vchan.role import Role

__all__ = ["Area", "Areas", "ChannelPages", "break_promise"]


class RingPlace(NamedTuple):
    """Where a ring lies."""

    pages: SharedPages | MappedPages
    base: int
    size: int
    mirrored: int  # bytes of it that lie there twice in a row; 0: it is in the page, once


class Area(NamedTuple):
    """Pages by what their device file knows them by, and their granter."""

    at: int
    granter: int
    refs: tuple[int, ...]
    writable: bool
    mirrored: bool


class Areas(NamedTuple):
    """Those of a channel. A ring that is in the page has none."""

    header: Area
    left: Area | None
    right: Area | None
    directory: Area | None


class ChannelPages:
    """The page that both ends write, and those of the rings that are not in it.

    Args:
        header: the page.
        orders: of the rings.
        left: the pages of the left ring, if it has any of its own.
        right: those of the right one.
        directory: those that list the others, if there are any.
        file: the device file that has all of them and nothing else, so whoever is given it has the channel's pages.

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
        directory: SharedPages | MappedPages | None = None,
        *,
        file: DeviceFile,
    ) -> None:
        self.orders = orders
        self.memory = header.memory
        self.raw: Any = self.memory.obj
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.file = file
        self._header = header
        self._directory = directory
        self._left = _ring(header, left, orders.left)
        self._right = _ring(header, right, orders.right)
        self._indexes = self.memory[:INDEXES].cast("I")
        self.flags = self.memory[CLI_LIVE : CLI_LIVE + 4].cast("I")

    def rings(self, role: Role, atomics: Atomics) -> tuple[Reader, Writer]:
        """Give the ring that this end reads, and the one it writes."""
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
                ring.pages.let_go()
        if self._directory is not None:
            self._directory.let_go()

    def close_page(self) -> None:
        """Unmap the page, and close the file. Can be repeated.

        If no other process has them, the kernel, or the machine, then clears this end's live byte and rings.

        Raises:
            ViewsStillExported: somebody still looks at a ring in it.
        """
        self.release()
        self._header.let_go()
        self.file.close()

    def promise(self, *, clear: int, port: int) -> None:
        """When this end's last map of the page goes, a byte of it is cleared, and the peer is woken."""
        self._header.notify_when_unmapped(clear=clear, port=port)

    def break_promise(self) -> None:
        """Clear the promise to tell the peer when its page is unmapped here. A page of our own has none."""
        if isinstance(self._header, MappedPages):
            break_promise(self.file, _area(self._header))

    def areas(self) -> Areas:
        """Where everything is, so that another process can map it."""
        left, right = (
            None if ring.pages is self._header else _area(ring.pages, ring.mirrored)
            for ring in (self._left, self._right)
        )
        directory = None if self._directory is None else _area(self._directory)
        return Areas(_area(self._header), left, right, directory)


def break_promise(file: DeviceFile, page: Area) -> None:
    """Let nobody be told when a map of the page goes."""
    with contextlib.suppress(DeviceError, MachineGone):  # it is not there any more
        file.ioctl(SET_UNMAP_NOTIFY, UnmapNotify(page.at, 0, 0).pack())


def _area(pages: SharedPages | MappedPages, mirrored: int = 0) -> Area:
    return Area(pages.index, *pages.grant, bool(mirrored))


def _ring(header: SharedPages | MappedPages, own: SharedPages | MappedPages | None, order: int) -> RingPlace:
    base = in_page(order)
    if base is not None:
        return RingPlace(header, base, 1 << order, 0)
    assert own is not None
    return RingPlace(own, 0, 1 << order, len(own.memory) // 2)
