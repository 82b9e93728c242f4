"""Episodes, by seed: operations of two processes on each side, on files, pages, maps and event channels.

Operands are names (f1, a3, m7), which the replayer resolves where they mean something, so an episode needs no answer
to be written down. What must not be done, or could not be compared, `World` refuses; then something else is tried.

An operation is a dictionary: `seat` (g… grants, p… is the peer), `do`, and what that needs. Indexes are in pages from
the start of an ALLOC (a…) or of a MAP_GRANT_REF (e…).
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from world import CLEAR_BYTE, PAGE, READ, WRITE, Episode, File, Operation, Unfit, World, side_of

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["KINDS", "generate"]

# How often what is tried: on the granting side, on the peer's, or on both.
_GRANTER = {"alloc": 14, "dealloc": 8, "limit": 2}
_PEER = {"attach": 16, "reserve": 4, "unreserve": 8, "copy": 8, "offset": 3}
_BOTH = {
    "open": 5, "close": 2, "mmap": 10, "munmap": 9, "peek": 10, "poke": 14, "notify": 6, "fork": 1, "kill": 1,
    "bind": 4, "connect": 9, "unbind": 1, "send": 5, "events": 5, "rearm": 4,
}  # fmt: skip
KINDS = frozenset({*_GRANTER, *_PEER, *_BOTH})

_SPOTS = (0, 7, PAGE - 8)  # where in a page things happen, so that they meet
_STAY, _STAY_ON_SIDE = 0.8, 0.6  # how often the next is of the same process, or side: far ones travel in batches
_MOST_SEATS = 8
_LIMITS = (0, 4, 8, 16, 64)


class _Writer:
    """One episode in the making."""

    def __init__(self, seed: int, *, pv: bool, kinds: frozenset[str]) -> None:
        self.random = Random(seed)
        self.world = World(pv=pv)
        self.episode: Episode = []
        self.seat = "g1"
        self._count = 0
        self._kinds = kinds

    def write(self, length: int) -> Episode:
        """`length` operations, and a last look at all there is."""
        for seat in self.world.seats:
            self.seat = seat
            for device in (self._grants(), "evtchn"):
                self._take({"seat": seat, **self._opening(device)})
        while len(self.episode) < length:
            if self.seat not in self.world.seats or not self._chance(_STAY):
                self.seat = self._another_seat()
            weights = {**(_GRANTER if side_of(self.seat) == "g" else _PEER), **_BOTH}
            kinds = [kind for kind in weights if kind in self._kinds]
            (kind,) = self.random.choices(kinds, [weights[kind] for kind in kinds])
            propose: Callable[[], list[dict[str, Any]]] = getattr(self, kind)
            try:
                for operation in propose():
                    self._take({"seat": self.seat, **operation})
            except (Unfit, IndexError):
                continue  # IndexError: there is nothing to choose from
        self._look()
        return self.episode

    def _another_seat(self) -> str:
        side = side_of(self.seat)
        if not self._chance(_STAY_ON_SIDE):
            side = "p" if side == "g" else "g"
        return self.random.choice([name for name in sorted(self.world.seats) if side_of(name) == side])

    def _take(self, operation: Operation) -> None:
        self.world.step(operation)
        self.episode.append(operation)

    def _look(self) -> None:
        for name, seat in self.world.seats.items():
            for map_, what in seat.maps.items():
                for page in sorted(what.pieces[name]):
                    self._take({"seat": name, "do": "peek", "map": map_, "at": page * PAGE})
            for file, what_file in seat.files.items():
                if what_file.device == "evtchn":
                    self._take({"seat": name, "do": "events", "file": file})

    # Choosing.

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def _chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def _file(self, *devices: str) -> str:
        files = self.world.seats[self.seat].files
        return self.random.choice([name for name, file in files.items() if file.device in devices])

    def _grants(self) -> str:
        """The device of this side."""
        return "gntalloc" if side_of(self.seat) == "g" else "gntdev"

    def _found(self, file: str, names: dict[str, Any], there: dict[int, Any], of: Callable[[Any], Any]) -> str:
        """A name whose index this file has; now and then any."""
        if not self._chance(0.05):
            listed = {id(of(each)) for each in there.values()}
            names = {name: each for name, each in names.items() if id(each) in listed} or names
        return self.random.choice(list(names))

    def _owned(self, file: str) -> str:
        """An ALLOC, or a MAP_GRANT_REF, of this file."""
        there: File = self.world.seats[self.seat].files[file]
        if there.device == "gntalloc":
            return self._found(file, self.world.allocs, there.pages, lambda page: page.alloc)
        return self._found(file, self.world.entries, there.entries, lambda entry: entry)

    def _place(self) -> tuple[str, int]:
        """A map of this process, and a place in it."""
        maps = self.world.seats[self.seat].maps
        name = self.random.choice(list(maps))
        page = self.random.choice(sorted(maps[name].pieces[self.seat]))
        return name, page * PAGE + self.random.choice(_SPOTS)

    # Proposals: operations without their seat.

    def open(self) -> list[Operation]:
        files = self.world.seats[self.seat].files
        device = self.random.choice([self._grants()] * 2 + ["evtchn"])
        if sum(file.device == device for file in files.values()) >= 3:
            return []
        return [self._opening(device, writable=device == "evtchn" or self._chance(0.9))]

    def _opening(self, device: str, *, writable: bool = True) -> Operation:
        return {"do": "open", "device": device, "writable": writable, "as": self._name("f")}

    def close(self) -> list[Operation]:
        return [{"do": "close", "file": self._file(self._grants(), "evtchn")}]

    def alloc(self) -> list[Operation]:
        count = self.random.choices((0, 1, 2, 3, 5, 9), (1, 10, 6, 5, 3, 1))[0]
        return [
            {
                "do": "alloc",
                "file": self._file("gntalloc"),
                "count": count,
                "writable": self._chance(0.75),
                "for_peer": self._chance(0.93),
                "as": self._name("a"),
            }
        ]

    def _span(self, of: str) -> tuple[int, int]:
        """A first page and a count: mostly all of it, or a part; now and then too much, or nothing."""
        pages = len(self.world.allocs[of].pages)
        if self._chance(0.6):
            return 0, pages
        first = self.random.randrange(pages + 1)
        return first, self.random.randrange(pages + 2)

    def dealloc(self) -> list[Operation]:
        file = self._file("gntalloc")
        of = self._owned(file)
        page, count = self._span(of)
        return [{"do": "dealloc", "file": file, "of": of, "page": page, "count": count}]

    def limit(self) -> list[Operation]:
        return [{"do": "limit", "pages": self.random.choice(_LIMITS)}]

    def mmap(self) -> list[Operation]:
        file = self._file(self._grants())
        of = self._owned(file)
        if side_of(self.seat) == "g":
            page, pages = self._span(of)
        else:
            page, pages = 0, len(self.world.entries[of].pages) + self._chance(0.05)
        prot = READ if self._chance(0.25) else READ | WRITE
        return [self._mapping(file, of, page, max(pages, 1), prot)]

    def _mapping(self, file: str, of: str, page: int, pages: int, prot: int) -> Operation:
        return {
            "do": "mmap", "file": file, "of": of, "page": page, "pages": pages, "prot": prot, "as": self._name("m")
        }  # fmt: skip

    def _refs(self) -> list[tuple[str, int]]:
        """Of one ALLOC, or of several in any order; mostly of such as can be mapped."""
        lately = dict(list(self.world.allocs.items())[-8:])
        if self._chance(0.85):
            lately = {name: a for name, a in lately.items() if a.for_peer and all(page.users for page in a.pages)}
        name = self.random.choice(list(lately))
        if self._chance(0.6):
            return [(name, page) for page in range(len(lately[name].pages))]
        every = [(name, page) for name, alloc in lately.items() for page in range(len(alloc.pages))]
        return self.random.choices(every, k=self.random.choice((1, 1, 2, 3)))

    def reserve(self) -> list[Operation]:
        refs = self._refs()
        if not refs:
            return []
        return [{"do": "reserve", "file": self._file("gntdev"), "refs": refs, "as": self._name("e")}]

    def attach(self) -> list[Operation]:
        """MAP_GRANT_REF and mmap, as everybody does it."""
        file, refs = self._file("gntdev"), self._refs()
        if not refs:
            return []
        writable = all(self.world.allocs[name].writable for name, _ in refs) and self._chance(0.8)
        entry = self._name("e")
        prot = READ | WRITE if writable or self._chance(0.05) else READ
        return [
            {"do": "reserve", "file": file, "refs": refs, "as": entry},
            self._mapping(file, entry, 0, len(refs), prot),
        ]

    def unreserve(self) -> list[Operation]:
        file = self._file("gntdev")
        of = self._owned(file)
        pages = len(self.world.entries[of].pages)
        count = self.random.choices((pages, 0, pages + 1), (10, 1, 1))[0]
        return [{"do": "unreserve", "file": file, "of": of, "count": count}]

    def copy(self) -> list[Operation]:
        """From a granted page, to one, or between two."""
        refs = self._refs()
        there = [(name, page, self.random.choice(_SPOTS)) for name, page in (refs[0], refs[-1])]
        source, dest = self.random.choice([(there[0], None), (None, there[0]), (there[0], there[1])])
        size = self.random.choice((0, 1, 8, 8, 9))  # the last is too long for the last spot
        data = self.random.randbytes(size).hex()
        return [{"do": "copy", "file": self._file("gntdev"), "source": source, "dest": dest, "data": data}]

    def offset(self) -> list[Operation]:
        name, at = self._place()
        return [{"do": "offset", "file": self._file("gntdev"), "map": name, "at": at}]

    def munmap(self) -> list[Operation]:
        maps = self.world.seats[self.seat].maps
        name = self.random.choice(list(maps))
        there = sorted(maps[name].pieces[self.seat])
        if self._chance(0.6) and there == list(range(there[0], there[-1] + 1)):
            first, pages = there[0], len(there)
        else:
            first, pages = self.random.choice(there), 1
        return [{"do": "munmap", "map": name, "page": first, "pages": pages}]

    def peek(self) -> list[Operation]:
        name, at = self._place()
        return [{"do": "peek", "map": name, "at": at}]

    def poke(self) -> list[Operation]:
        name, at = self._place()
        return [{"do": "poke", "map": name, "at": at, "data": self.random.randbytes(2).hex()}]

    def notify(self) -> list[Operation]:
        file = self._file(self._grants())
        of = self._owned(file)
        there = self.world.allocs[of].pages if side_of(self.seat) == "g" else self.world.entries[of].pages
        at = self.random.randrange(max(len(there) + self._chance(0.05), 1)) * PAGE + self.random.choice(_SPOTS)
        action = self.random.choices((CLEAR_BYTE, 2, 3, 0, 4), (8, 4, 8, 1, 1))[0]
        ports = [name for name, port in self.world.ports.items() if port.references and port.side == side_of(self.seat)]
        port = self.random.choice(ports) if ports and self._chance(0.95) else None
        return [{"do": "notify", "file": file, "of": of, "at": at, "action": action, "port": port}]

    def fork(self) -> list[Operation]:
        if len(self.world.seats) >= _MOST_SEATS:
            return []
        return [{"do": "fork", "as": self._name(side_of(self.seat))}]

    def kill(self) -> list[Operation]:
        """One that is not the last of its side."""
        if sum(side_of(name) == side_of(self.seat) for name in self.world.seats) == 1:
            return []
        return [{"do": "kill"}]

    def bind(self) -> list[Operation]:
        return [{"do": "bind", "file": self._file("evtchn"), "as": self._name("c")}]

    def connect(self) -> list[Operation]:
        ports = self.world.ports.items()
        to = [name for name, port in ports if port.references and port.side != side_of(self.seat)]
        free = [name for name in to if self.world.ports[name].peer is None]
        target = self.random.choice(free if free and self._chance(0.9) else to)
        return [{"do": "connect", "file": self._file("evtchn"), "to": target, "as": self._name("c")}]

    def _on_port(self, do: str) -> list[Operation]:
        file = self._file("evtchn")
        mine = list(self.world.seats[self.seat].files[file].ports)
        if self._chance(0.05):
            mine = [name for name, port in self.world.ports.items() if port.references]
        return [{"do": do, "file": file, "port": self.random.choice(mine)}]

    def unbind(self) -> list[Operation]:
        return self._on_port("unbind")

    def send(self) -> list[Operation]:
        return self._on_port("send")

    def rearm(self) -> list[Operation]:
        return self._on_port("rearm")

    def events(self) -> list[Operation]:
        return [{"do": "events", "file": self._file("evtchn")}]


def generate(seed: int, length: int = 100, *, pv: bool = True, kinds: frozenset[str] = KINDS) -> Episode:
    """The episode of this seed.

    Args:
        seed: any number.
        length: operations, besides the last look.
        pv: leave out what only a PVH guest's gntdev does like ours.
        kinds: of proposals, if not all.
    """
    return _Writer(seed, pv=pv, kinds=kinds).write(length)
