"""connect: wait for a server, and map its page.

The order of things is libxenvchan's: the nodes, the port, the page with its notification, the rings, the live byte, an
event. What it does not do: wait; say why not; look whether the page still belongs to a living server.
"""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING

from gntalloc.atomics import atomics
from gntalloc.clock import Deadline
from gntalloc.errors import DeviceError, PeerBroke, TimedOut
from gntalloc.vchan import extension, layout
from gntalloc.vchan.bells import Bells
from gntalloc.vchan.channel import Channel
from gntalloc.vchan.core import Core
from gntalloc.vchan.end import SPIN, End
from gntalloc.vchan.extension import DIRECT, LARGE, Confirmation, Offer
from gntalloc.vchan.layout import Orders, pages_of
from gntalloc.vchan.nodes import Address, Nodes, full_path
from gntalloc.vchan.pages import ChannelPages
from gntalloc.vchan.role import CLIENT

if TYPE_CHECKING:
    from gntalloc.guest.domain import BareDomain
    from gntalloc.vchan.nodes import Tree

__all__ = ["connect"]


class _NotNow(Exception):
    """This server cannot be connected to. Another may come, or it may be free later."""


def connect(
    domain: BareDomain,
    peer: int,
    path: str,
    *,
    timeout: float | None = None,
    extensions: bool | None = None,
    spin: float | None = None,
    store: Tree | None = None,
) -> Channel:
    """See `Domain.connect`."""
    domid = domain.domid
    if peer == domid:
        raise ValueError(f"a channel of domain {domid} with itself crashes real kernels; use another domain")
    deadline = Deadline(timeout)
    nodes = Nodes(lambda: store or domain.store, full_path(path, peer, domid, only_ours=extensions is True))
    look = SPIN if spin is None else spin
    reason: object = ""
    for address in nodes.attempts(deadline):
        try:
            return _try(domain, peer, address, extensions=extensions, spin=look)
        except _NotNow as why:
            reason = why
    raise TimedOut(f"no connection with domain {peer} at {nodes.path} within {timeout} s: {reason}")


def _try(domain: BareDomain, peer: int, address: Address, *, extensions: bool | None, spin: float) -> Channel:
    barriers = atomics()  # first: it may refuse
    with contextlib.ExitStack() as undo:
        try:
            port = undo.enter_context(domain.events.connect(peer, address.port))
            file = domain.devices.open("gntdev")
            undo.callback(file.close)
            header = undo.enter_context(domain.map(peer, address.reference, writable=True, file=file))
        except DeviceError as refusal:
            raise _NotNow(f"its server is gone, or has another client ({refusal})") from None
        bells = Bells(port)
        undo.callback(bells.close)
        header.notify_when_unmapped(clear=layout.CLI_LIVE, port=port.number)
        page = header.memory
        if page[layout.SRV_LIVE] == layout.GONE:
            raise _NotNow("its server has closed, and left its nodes")
        # What is in the page is read once: the server could change it.
        orders = Orders.read(page)
        count = sum(map(pages_of, orders))
        references = struct.unpack_from(f"={count}I", page, layout.REFERENCES)
        at = extension.place(orders)
        offer = None if extensions is False else Offer.read(page, at)
        if offer is None and extensions:
            raise PeerBroke("the server is a libxenvchan, and `extensions=True` asks for an end of this package")
        sizes = orders
        if offer is not None and offer.flags & LARGE:
            sizes = offer.orders
            with domain.map(peer, offer.directory) as directory:
                count = sum(map(pages_of, sizes))
                references = struct.unpack_from(f"={count}I", directory.memory, 0)
        try:
            split = pages_of(sizes.left)
            left = domain.map(peer, references[:split], writable=True, mirrored=True, file=file) if split else None
            if left is not None:
                undo.enter_context(left)
            right = domain.map(peer, references[split:], mirrored=True, file=file) if references[split:] else None
            if right is not None:
                undo.enter_context(right)
        except DeviceError as refusal:
            raise _NotNow(f"its server is gone, or went just now ({refusal})") from None
        pages = ChannelPages(header, orders, left, right, file=file)
        undo.callback(pages.release)
        end = End(CLIENT, peer, pages, bells, barriers, spin=spin)
        if offer is not None:
            name = bells.connect_direct(offer.name) if offer.flags & DIRECT and domain.on_machine else b""
            flags = offer.flags & LARGE | (DIRECT if name else 0)
            Confirmation(flags, name).write(page, at)
            end.joined(at)
            end.enlarge(1 << sizes.left, 1 << sizes.right)
        page[layout.SRV_NOTIFY] = layout.NOTIFY_WRITE
        barriers.fence()
        page[layout.CLI_LIVE] = layout.CONNECTED
        barriers.fence()
        port.notify()
        undo.pop_all()
        return Channel(Core(end, domain.address))
