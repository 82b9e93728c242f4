"""Episodes that once differed, shrunk: every judge is asked them before anything random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from world import Episode

__all__ = ["FOUND"]


def _open(seat: str, device: str, name: str) -> dict[str, Any]:
    return {"seat": seat, "do": "open", "device": device, "writable": True, "as": name}


FOUND: dict[str, Episode] = {
    # The machine noticed the munmap before it was told of the map: the peer was refused for ever, as if (G13) the
    # granter had never mapped its pages.
    "read-only pages, mapped and unmapped at once": [
        _open("g1", "gntalloc", "f1"),
        _open("p1", "gntdev", "f2"),
        {"seat": "g1", "do": "alloc", "file": "f1", "count": 3, "writable": False, "for_peer": True, "as": "a1"},
        {"seat": "g1", "do": "mmap", "file": "f1", "of": "a1", "page": 0, "pages": 3, "prot": 1, "as": "m1"},
        {"seat": "g1", "do": "munmap", "map": "m1", "page": 0, "pages": 3},
        {"seat": "p1", "do": "reserve", "file": "f2", "refs": [("a1", 0), ("a1", 1), ("a1", 2)], "as": "e1"},
        {"seat": "p1", "do": "mmap", "file": "f2", "of": "e1", "page": 0, "pages": 3, "prot": 1, "as": "m2"},
        {"seat": "p1", "do": "peek", "map": "m2", "at": 8192},
    ],
    # The second event was on its way when the first was read: see `Player._settle`.
    "a port written back unread": [
        _open("g1", "evtchn", "f1"),
        _open("p1", "evtchn", "f2"),
        {"seat": "p1", "do": "bind", "file": "f2", "as": "c1"},
        {"seat": "g1", "do": "connect", "file": "f1", "to": "c1", "as": "c2"},
        {"seat": "p1", "do": "send", "file": "f2", "port": "c1"},
        {"seat": "p1", "do": "kill"},
        {"seat": "g1", "do": "rearm", "file": "f1", "port": "c2"},
        {"seat": "g1", "do": "events", "file": "f1"},
    ],
    # The granter looked at its page before the machine had heard of the munmap: see `Player._settle`.
    "a byte cleared with the last map of a closed file": [
        _open("g1", "gntalloc", "f1"),
        _open("p1", "gntdev", "f2"),
        {"seat": "g1", "do": "alloc", "file": "f1", "count": 1, "writable": True, "for_peer": True, "as": "a1"},
        {"seat": "g1", "do": "mmap", "file": "f1", "of": "a1", "page": 0, "pages": 1, "prot": 3, "as": "m1"},
        {"seat": "g1", "do": "poke", "map": "m1", "at": 0, "data": "e613"},
        {"seat": "p1", "do": "reserve", "file": "f2", "refs": [("a1", 0), ("a1", 0)], "as": "e1"},
        {"seat": "p1", "do": "mmap", "file": "f2", "of": "e1", "page": 0, "pages": 2, "prot": 3, "as": "m2"},
        {"seat": "p1", "do": "notify", "file": "f2", "of": "e1", "at": 4096, "action": 1, "port": None},
        {"seat": "p1", "do": "unreserve", "file": "f2", "of": "e1", "count": 2},
        {"seat": "p1", "do": "close", "file": "f2"},
        {"seat": "p1", "do": "munmap", "map": "m2", "page": 0, "pages": 2},
        {"seat": "g1", "do": "peek", "map": "m1", "at": 0},
    ],
}
