"""Share pages between domains, the way Xen does: on real Xen, or on any Linux without it.

    import gntalloc

    with gntalloc.Machine() as machine:
        alice, bob = machine.domain(1), machine.domain(2)
        with alice.share(bob, writable=True) as shared, bob.map(shared.grant) as mapped:
            mapped.memory[:5] = b"hello"
            assert shared.memory[:5] == b"hello"

Processes of one uid are not isolated from each other: they can read each other's memory through /proc.

Each name is imported when it is used for the first time. So `import gntalloc` itself costs next to nothing, and the
machine's process and each command have only what they need.
"""

TYPE_CHECKING = False  # typing's own would import typing

if TYPE_CHECKING:
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
    from gntalloc.frontend.blkfront import BlockDevice
    from gntalloc.guest.events import Port
    from gntalloc.guest.grant import Grant
    from gntalloc.guest.pages import MappedPages, SharedPages
    from gntalloc.maps import PAGE_SIZE
    from gntalloc.vchan.channel import Channel
    from gntalloc.vchan.server import Listener
    from gntalloc.xenstore.errors import StoreError

__version__ = "0.1.0"

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

_ELSEWHERE = {
    "BlockDevice": "frontend.blkfront",
    "Channel": "vchan.channel",
    "Domain": "domain",
    "Grant": "guest.grant",
    "Listener": "vchan.server",
    "Machine": "embed",
    "MappedPages": "guest.pages",
    "PAGE_SIZE": "maps",
    "Port": "guest.events",
    "SharedPages": "guest.pages",
    "StoreError": "xenstore.errors",
    "adopt": "domain",
    "current_domain": "domain",
}
"""Where a name is from. All others are errors."""

_MODULES = frozenset({"domain", "embed", "errors", "guest", "maps"})  # for `import gntalloc` and `gntalloc.errors.Busy`

if not TYPE_CHECKING:  # for a type checker a name that is not above is an error

    def __getattr__(name: str) -> object:
        if name not in __all__ and name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        module = importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'errors')}")
        value = globals()[name] = getattr(module, name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
