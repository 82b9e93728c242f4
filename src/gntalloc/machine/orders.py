"""Define the orders of the machine's owner: listing, limits, making and ending domains, faults."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from gntalloc.errors import GntallocError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from gntalloc.machine.faults import Faults
    from gntalloc.machine.lifetime import Visits
    from gntalloc.machine.machine import Machine
    from gntalloc.machine.store import StoreFront

__all__ = ["orders_of"]


def orders_of(
    machine: Machine,
    store: StoreFront,
    visits: Visits,
    faults: Faults,
    *,
    create: Callable[..., str],
    destroy: Callable[[int], object],
) -> Mapping[str, Callable[..., Any]]:
    """Give each order's function by its name. It is called with the connection that gave the order, and its arguments.

    What it answers goes as JSON. An iterator in it stands for a list, whose rows are made one after the other.

    Args:
        machine: the domains.
        store: the connections to xenstore.
        visits: the visits of runs.
        faults: the faults for tests.
        create: makes a domain, and gives the path of its socket.
        destroy: begins to end one, and gives a `Pending`.
    """

    def create_domain(_owner: Hashable, *, domid: int, uid: int, limit: int | None = None) -> str:
        if limit is not None:
            _check_limit(limit)
        return create(domid, uid=uid, limit=limit)

    def set_limit(_owner: Hashable, *, domid: int, limit: int) -> None:
        _check_limit(limit)
        machine.guest(domid).gntalloc.limit = limit

    return {
        "create": create_domain,
        "enter": lambda owner, *, domid: visits.enter(owner, domid),
        "destroy": lambda _owner, *, domid: destroy(domid),
        "get_limit": lambda _owner, *, domid: machine.guest(domid).gntalloc.limit,
        "set_limit": set_limit,
        "grants": lambda _owner: machine.each_grant(),
        "files": lambda _owner: machine.each_file(),
        "store_connections": lambda _owner: store.connections(),
        "disturb": lambda owner, *, domid, **how: faults.disturb(owner, domid, **how),
        "calm": faults.calm,
        "statistics": lambda _owner: {**machine.totals(), "domains": machine.each_domain()},
    }


def _check_limit(limit: int) -> None:
    if limit < 0:
        raise GntallocError(errno.EINVAL, f"a limit of {limit} pages cannot be; it is 0 or more")
