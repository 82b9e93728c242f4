"""Make a domain's nodes in xenstore: those that xl makes for a guest without devices, with the same permissions.

Source: xenstore-ls -fp under Xen 4.17, beside a running guest. Nodes of things that are not here (processors, console,
the guest's image) are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gntalloc.xenstore.daemon.permissions import READ, Entry
from gntalloc.xenstore.daemon.tree import home

if TYPE_CHECKING:
    from gntalloc.xenstore.daemon.server import Daemon

__all__ = ["furnish", "strip"]

# The guest's own.
_WRITABLE = (
    "control/shutdown",
    "control/feature-poweroff",
    "control/feature-reboot",
    "control/feature-suspend",
    "control/sysrq",
    "device/suspend/event-channel",
    "data",
    "drivers",
    "feature",
    "attr",
    "error",
)


def furnish(store: Daemon, domid: int) -> None:
    """Make the nodes of a new domain, and introduce it."""
    store.create(domid)
    base = home(domid)
    if domid == 0:
        for path, value in {"": "", "/domid": "0", "/name": "Domain-0"}.items():
            _set(store, base + path, value, (Entry(0, 0),))
        return
    readable = {
        "": "",
        "/name": f"domain-{domid}",
        "/device": "",
        "/control": "",
        "/control/platform-feature-multiprocessor-suspend": "1",
        "/control/platform-feature-xs_reset_watches": "1",
        "/domid": str(domid),
    }
    for path, value in readable.items():
        _set(store, base + path, value, (Entry(0, 0), Entry(domid, READ)))
    for path in _WRITABLE:
        _set(store, f"{base}/{path}", "", (Entry(domid, 0),))
    store.introduce(domid)


def strip(store: Daemon, domid: int) -> None:
    """Remove the nodes of a domain that ends, and the domain."""
    view = store.own_view()
    if view.find(home(domid)) is not None:
        view.remove(home(domid))  # as xl does, before the domain itself goes
    store.destroy(domid)


def _set(store: Daemon, path: str, value: str, entries: tuple[Entry, ...]) -> None:
    view = store.own_view()
    if view.find(path) is None:
        view.make(path, value.encode())
    node = view.find(path)
    assert node is not None
    view.tell(path, view.put(path, view.change_owner(node, entries)))
