"""Offers: a listener's core, which makes a page for each client, one after another. Nobody waits for a client here.

The order of things is libxenvchan's: the port, the page with its notification, the page's contents, the rings, the
nodes. Once a client has come the nodes go, so that nobody finds a page that is taken; then there is another offer.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from typing import TYPE_CHECKING, Any

from gntalloc.atomics import atomics
from gntalloc.errors import Closed, GntallocError, MachineGone, PeerBroke
from gntalloc.guest.peers import count_of
from gntalloc.maps import PAGE_SIZE
from gntalloc.vchan import extension, layout
from gntalloc.vchan.bells import Bells
from gntalloc.vchan.channel import Channel
from gntalloc.vchan.core import Core
from gntalloc.vchan.end import SPIN, End
from gntalloc.vchan.extension import DIRECT, LARGE, Confirmation, Offer
from gntalloc.vchan.layout import Orders, pages_of
from gntalloc.vchan.nodes import Address, Nodes, full_path
from gntalloc.vchan.pages import ChannelPages
from gntalloc.vchan.role import SERVER

if TYPE_CHECKING:
    from gntalloc.guest.devices import DeviceFile
    from gntalloc.guest.domain import BareDomain
    from gntalloc.guest.pages import SharedPages
    from gntalloc.vchan.nodes import Tree

__all__ = ["SIZE", "Offers"]

SIZE = 65536
"""Bytes of each ring, if not told otherwise."""
_MOST = 512  # pages that a peer may have, if not told otherwise: half of a domain's usual limit


class Offers:
    """What is offered to the clients of one domain at one path. `server.Listener` and `aio.Listener` wait for them.

    Attributes:
        path: where the nodes are, in full.
    """

    def __init__(
        self,
        domain: BareDomain,
        peer: int,
        path: str,
        *,
        size: int | tuple[int, int] = SIZE,
        extensions: bool | None = None,
        spin: float | None = None,
        most_per_peer: int | None = None,
        store: Tree | None = None,
    ) -> None:
        domid = domain.domid
        if peer == domid:
            raise ValueError(f"a channel of domain {domid} with itself crashes real kernels; use another domain")
        self.peer = peer
        self.path = full_path(path, domid, peer, only_ours=extensions is True)
        self.closed = False
        self._domain = domain
        self._extensions = extensions
        self._spin = SPIN if spin is None else spin
        self._sizes = _sizes(size, extensions)
        self._pages = _pages_of_a_channel(*self._sizes)
        # Two channels are always possible: the one that is served, and the next.
        self._most = max(_MOST, 2 * self._pages) if most_per_peer is None else most_per_peer
        self._nodes = Nodes(lambda: store or domain.store, self.path)
        self._making = threading.Lock()  # held while the next offer is made, or taken
        self._offer: Channel | None = None
        self._owner = os.getpid()
        self.offer()

    def offer(self) -> Channel:
        """See `Listener.offer`."""
        self.check_owner()
        with self._making:
            return self._next()

    def take(self) -> None:
        """Take the offer from the list: its client has come, and the next one gets another."""
        with self._making:
            self._offer = None

    def go_on_after(self, error: GntallocError, offer: Channel) -> None:
        """Nobody has come to an offer, who could be accepted: see whether to wait with the next, or raise."""
        if isinstance(error, PeerBroke):  # or a libxenvchan where none is wanted: it is no client
            offer.close()
        elif isinstance(error, Closed):
            self.check_open()  # else the offer was closed by its user
        elif not (isinstance(error, MachineGone) and self._domain.devices.is_back()):
            raise error

    def stop(self) -> None:
        """Make no offer any more."""
        self.closed = True

    def close(self) -> None:
        """See `Listener.close`."""
        self.stop()
        if os.getpid() != self._owner:
            return
        with self._making:  # so that no offer is made after this
            offer, self._offer = self._offer, None
        if offer is not None and offer.waiting:
            self._withdraw()
            offer.close()

    def __repr__(self) -> str:
        return f"<{'closed ' if self.closed else ''}Listener for domain {self.peer} at {self.path}>"

    def check_open(self) -> None:
        """Raise Closed, if this is."""
        if self.closed:
            raise Closed(f"nobody can be accepted at {self.path}: this listener was closed") from None

    def _next(self) -> Channel:
        self.check_open()
        if self._offer is not None and not self._offer.closed and self._port.lost:
            self._offer.close()
        if self._offer is None or self._offer.closed:
            self._offer, address = self._make()
            try:
                self._nodes.publish(self._domain.domid, self.peer, address)
            except BaseException:
                self._offer.close()
                raise
        return self._offer

    def check_owner(self) -> None:
        """Before any lock: one may be held by a thread that a child made by fork does not have."""
        if os.getpid() != self._owner:
            raise Closed(
                f"nobody can be accepted at {self.path}: this listener is process {self._owner}'s, which forked this "
                "one; accept there, `detach` the channel, and `adopt` it here"
            )

    def _withdraw(self) -> None:
        if os.getpid() == self._owner:
            with contextlib.suppress(GntallocError):  # of a store that is gone, or a path that somebody removed
                self._nodes.withdraw()

    def _make(self) -> tuple[Channel, Address]:
        """Make a channel that waits, and what its client needs to know."""
        barriers = atomics()  # first: it may refuse
        domain, peer = self._domain, self.peer
        orders, large = self._sizes
        domain.see_to_quota(peer, self._pages, self._most)
        with contextlib.ExitStack() as undo:
            port = self._port = undo.enter_context(domain.events.bind(peer))
            bells = Bells(port)
            undo.callback(bells.close)
            file = domain.devices.open("gntalloc")
            undo.callback(file.close)
            header = undo.enter_context(self._share(file, pages=1))
            header.notify_when_unmapped(clear=layout.SRV_LIVE, port=port.number)
            page = header.memory
            orders.write(page)
            page[layout.CLI_LIVE], page[layout.SRV_LIVE] = layout.NOT_YET, layout.CONNECTED
            page[layout.CLI_NOTIFY] = layout.NOTIFY_WRITE
            left, right = rings = [
                undo.enter_context(self._share(file, pages=count, mirrored=True)) if count else None
                for count in map(pages_of, large)
            ]
            at = layout.REFERENCES
            for order, ring in zip(orders, rings, strict=True):
                if ring is not None:
                    listed = ring.refs[: pages_of(order)]
                    struct.pack_into(f"={len(listed)}I", page, at, *listed)
                    at += 4 * len(listed)
            directory = self._directory(rings, file) if large != orders else None
            if directory is not None:
                undo.enter_context(directory)
            pages = ChannelPages(header, orders, left, right, directory, file=file)
            undo.callback(pages.release)
            offer = self._extend(pages, large, bells, directory)
            end = End(SERVER, peer, pages, bells, barriers, spin=self._spin)
            end.wait_with(lambda end: self._join(end, offer))
            undo.pop_all()
        return Channel(Core(end, domain.address)), Address(header.refs[0], port.number)

    def _share(self, file: DeviceFile, **how: Any) -> SharedPages:
        return self._domain.share(self.peer, writable=True, file=file, most_per_peer=self._most, **how)

    def _directory(self, rings: list[SharedPages | None], file: DeviceFile) -> SharedPages:
        refs = [ref for ring in rings if ring is not None for ref in ring.refs]
        directory = self._share(file, size=4 * len(refs))
        struct.pack_into(f"={len(refs)}I", directory.memory, 0, *refs)
        return directory

    def _extend(self, pages: ChannelPages, large: Orders, bells: Bells, directory: SharedPages | None) -> Offer | None:
        if self._extensions is False:
            return None
        name = bells.offer_direct() if self._domain.on_machine else b""
        flags = (DIRECT if name else 0) | (LARGE if directory is not None else 0)
        offer = Offer(flags, large, name, directory.refs if directory is not None else ())
        offer.write(pages.memory, extension.place(pages.orders))
        return offer

    def _join(self, end: End, offer: Offer | None) -> None:
        """Join the client that has come: see what it is, and what it takes of the offer."""
        self._withdraw()
        at = extension.place(end.pages.orders)
        confirmed: Confirmation | None = None if offer is None else Confirmation.read(end.pages.memory, at, offer.flags)
        end.bells.accept_direct(confirmed.name if confirmed is not None else b"")
        if offer is None or confirmed is None:
            if self._extensions:
                raise PeerBroke("a libxenvchan has connected, and `extensions=True` asks for an end of this package")
            return
        if confirmed.flags & LARGE:
            end.enlarge(1 << offer.orders.left, 1 << offer.orders.right)
        end.joined(at)


def _sizes(size: int | tuple[int, int], extensions: bool | None) -> tuple[Orders, Orders]:
    """Choose the rings as libxenvchan shall see them, and as two ends of this package use them."""
    read, write = size if isinstance(size, tuple) else (size, size)
    most, more = 1 << layout.LARGEST_ORDER, 1 << extension.LARGEST
    for each in read, write:
        count_of(each, "the size of a ring in bytes", most=more)
    if extensions is False and max(read, write) > most:
        raise ValueError(f"rings of {read} and {write} bytes: libxenvchan's are 0 to {most}")
    orders = Orders.choose(min(read, most), min(write, most))
    large = Orders(
        *(
            max(order, (each - 1).bit_length()) if each > most else order
            for order, each in zip(orders, (read, write), strict=True)
        )
    )
    return orders, large


def _pages_of_a_channel(orders: Orders, large: Orders) -> int:
    """Count the pages that both ends share: the header, the rings, and their directory if libxenvchan knows none."""
    rings = sum(map(pages_of, large))
    return 1 + rings + (-(-4 * rings // PAGE_SIZE) if large != orders else 0)
