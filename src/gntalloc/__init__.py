"""Share pages between domains, the way Xen does: on real Xen, or on any Linux without it.

    import gntalloc

    with gntalloc.Machine() as machine:
        alice, bob = machine.domain(1), machine.domain(2)
        with alice.share(bob, writable=True) as shared, bob.map(shared.grant) as mapped:
            mapped.memory[:5] = b"hello"
            assert shared.memory[:5] == b"hello"

Processes of one uid are not isolated from each other: they can read each other's memory through /proc.
"""

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
    TimedOut,
    ViewsStillExported,
)
from gntalloc.guest.grant import Grant
from gntalloc.guest.pages import MappedPages, SharedPages
from gntalloc.maps import PAGE_SIZE

__version__ = "0.1.0"

__all__ = [
    "PAGE_SIZE",
    "BadGrantText",
    "Busy",
    "Closed",
    "DeviceError",
    "Domain",
    "EventsLost",
    "GntallocError",
    "Grant",
    "Machine",
    "MachineGone",
    "MappedPages",
    "NoMachine",
    "NotKnownHere",
    "PeerBroke",
    "PeerClosed",
    "PeerDied",
    "PeerGone",
    "SharedPages",
    "TimedOut",
    "ViewsStillExported",
    "adopt",
    "current_domain",
]
