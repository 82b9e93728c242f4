"""adopt: go on with a channel that another process has detached.

A child made by fork has the pages mapped already. Any other process maps them anew, by the device file that has them.
The order is the one in which the peer always has a promise: the new map has its notification before the old one loses
it. Port and bells are the same.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from gntalloc.atomics import atomics
from gntalloc.errors import DeviceError, PeerGone
from gntalloc.guest.grant import Grant
from gntalloc.guest.pages import SharedPages
from gntalloc.maps import PAGE_SIZE, PROT_READ, PROT_WRITE
from gntalloc.vchan import layout
from gntalloc.vchan.bells import Bells
from gntalloc.vchan.channel import Channel
from gntalloc.vchan.core import Core
from gntalloc.vchan.end import End
from gntalloc.vchan.layout import Orders
from gntalloc.vchan.pages import ChannelPages, break_promise
from gntalloc.vchan.role import CLIENT, SERVER
from gntalloc.waits import Socket

if TYPE_CHECKING:
    from gntalloc.guest.devices import DeviceFile
    from gntalloc.guest.domain import BareDomain
    from gntalloc.guest.pages import MappedPages
    from gntalloc.vchan.pages import Area
    from gntalloc.vchan.ticket import Ticket

__all__ = ["adopt"]


def adopt(domain: BareDomain, ticket: Ticket) -> Channel:
    """See `Domain.adopt`."""
    barriers = atomics()  # first: it may refuse
    ticket.claim()
    tells, held = ticket.tells, ticket.held
    try:
        with contextlib.ExitStack() as undo:
            port = undo.enter_context(domain.events.reopen(os.dup(held.port), tells.port, tells.peer))
            bells = Bells(port)
            undo.callback(bells.close)
            if held.direct >= 0:
                bells.use(Socket(fileno=os.dup(held.direct)))
            pages = ticket.pages or _map_anew(domain, ticket, undo)
            end = End(SERVER if tells.server else CLIENT, tells.peer, pages, bells, barriers, spin=tells.spin)
            end.resume(tells.progress)
            port.rearm()  # it may have had its event in the other process
            if ticket.pages is None and not tells.server:  # of a peer's page each map has a promise of its own
                pages.promise(clear=layout.CLI_LIVE, port=port.number)
                break_promise(pages.file, tells.areas.header)
            undo.pop_all()
    except BaseException:
        ticket.give_claim_back()
        raise
    ticket.pages = None  # they are the channel's now
    ticket.close()
    return Channel(Core(end, domain.address))


def _map_anew(domain: BareDomain, ticket: Ticket, undo: contextlib.ExitStack) -> ChannelPages:
    tells = ticket.tells
    file = domain.devices.reopen("gntalloc" if tells.server else "gntdev", os.dup(ticket.held.file))
    undo.callback(file.close)

    def mapped(area: Area | None) -> Any:
        if area is None:
            return None
        pages = _map(domain, file, area, server=tells.server)
        undo.callback(pages.let_go)
        return pages

    try:
        header, left, right, directory = map(mapped, tells.areas)
    except DeviceError as refusal:
        raise PeerGone(f"the channel with domain {tells.peer} cannot be adopted, it has ended: {refusal}") from None
    orders = Orders(*(size.bit_length() - 1 for size in tells.sizes))
    pages = ChannelPages(header, orders, left, right, directory, file=file)
    undo.callback(pages.release)
    return pages


def _map(domain: BareDomain, file: DeviceFile, area: Area, *, server: bool) -> SharedPages | MappedPages:
    grant = Grant(area.granter, area.refs, area.writable)
    if not server:
        return domain.map(grant, mirrored=area.mirrored, file=file)
    times = 2 if area.mirrored else 1
    mapping = file.mmap(area.at, len(area.refs) * PAGE_SIZE, prot=PROT_READ | PROT_WRITE, times=times)
    mapping.name = "grant", grant
    return SharedPages(file, area.at, grant, mapping, kept=True)
