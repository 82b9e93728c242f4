"""Share pages between domains, the way Xen does: on real Xen, or on any Linux without it.

    import gntalloc

    with gntalloc.Machine() as machine:
        alice, bob = machine.domain(1), machine.domain(2)
        with alice.share(bob, writable=True) as shared, bob.map(shared.grant) as mapped:
            mapped.memory[:5] = b"hello"
            assert shared.memory[:5] == b"hello"

Processes of one uid are not isolated from each other: they can read each other's memory through /proc.
"""

from typing import TYPE_CHECKING, Any

from gntalloc.domain import Domain, adopt, current_domain
from gntalloc.embed import Machine
from gntalloc.errors import (
    BadGrantText,
    Busy,
    Closed,
    DeviceError,
    EventsLost,
    GntallocError,
    MachineGone,
    NoMachine,
    NotKnownHere,
    PeerBroke,
    PeerClosed,
    PeerDied,
    PeerGone,
    PeerQuotaReached,
    TimedOut,
    ViewsStillExported,
)
from gntalloc.guest.grant import Grant
from gntalloc.guest.pages import MappedPages, SharedPages
from gntalloc.maps import PAGE_SIZE

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gntalloc.frontend.blkfront import BlockDevice
    from gntalloc.guest.events import Port
    from gntalloc.vchan.channel import Channel
    from gntalloc.vchan.server import Listener
    from gntalloc.xenstore.errors import StoreError

__all__ = [
    "PAGE_SIZE",
    "BadGrantText",
    "BlockDevice",
    "Busy",
    "Channel",
    "Closed",
    "DeviceError",
    "Domain",
    "EventsLost",
    "GntallocError",
    "Grant",
    "Listener",
    "Machine",
    "MachineGone",
    "MappedPages",
    "NoMachine",
    "NotKnownHere",
    "PeerBroke",
    "PeerClosed",
    "PeerDied",
    "PeerGone",
    "PeerQuotaReached",
    "Port",
    "SharedPages",
    "StoreError",
    "TimedOut",
    "ViewsStillExported",
    "adopt",
    "current_domain",
]

# Most programs need none of these by name, and each of them imports more than all the others together.
_LATE = {
    "BlockDevice": "gntalloc.frontend.blkfront",
    "Channel": "gntalloc.vchan.channel",
    "Listener": "gntalloc.vchan.server",
    "Port": "gntalloc.guest.events",
    "StoreError": "gntalloc.xenstore.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = globals()[name] = getattr(importlib.import_module(_LATE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
