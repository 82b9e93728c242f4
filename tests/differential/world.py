"""What an episode may do next: what is safe on a real kernel, and whose answer can be compared.

A small model of both sides. It knows names, indexes and who uses what; nothing of bytes and little of errnos. An
operation is taken by `World.step`, or refused as `Unfit` with one of the rules below, before anything has changed. So
the generator throws operations at it, and the shrinker knows which operations still make an episode without the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["PAGE", "RULES", "Episode", "Operation", "Unfit", "World", "side_of"]

Operation = dict[str, Any]
Episode = list[Operation]

PAGE = 4096
READ, WRITE = 1, 2
CLEAR_BYTE, SEND_EVENT = 1, 2

# A rule: why such an operation is never done.
RULES = {
    "gone": "what it names is not there (any more), or not in this process",
    "spanning": "an mmap over several ALLOCs of one file, while another file has allocated, makes the real driver free "
    "a stranger's pages",
    "stale": "whether a reference that was ended is in use again depends on when a timer freed others",
    "lingering": "a page that was ended while its peer held it is freed by a timer: until then maps of it succeed",
    "read-only early": "G13: ours waits for the granter's map before a peer may map read-only pages",
    "read-only again": "G14: ours refuses the granter a writable map of read-only pages that a peer has mapped",
    "torn": "a map of several references, some of them bad, keeps the good ones in the kernel and gives them back here",
    "fork": "gntdev maps are not inherited in a PV guest",
    "read-only clear": "a byte to be cleared in an entry that is then mapped read-only: the real driver stores into it",
    "piecemeal clear": "in a PV guest the byte goes with its page's munmap, in a PVH guest with the whole entry",
    "another's map": "the real driver tells the index of any file's map, ours of the file that is asked",
    "reader's ports": "a port's number may be another's by now",
}


class Unfit(Exception):
    """This operation must not be done here. The text is one of `RULES`."""

    def __init__(self, rule: str) -> None:
        assert rule in RULES
        super().__init__(rule)


@dataclass(eq=False, slots=True)
class Port:
    """An event channel's end: referred to by the file that bound it and by promises."""

    side: str
    file: File | None
    references: int = 1
    peer: Port | None = None
    unheard: bool = False  # it has an event, and its side has done nothing since


class Promise(NamedTuple):
    """What SET_UNMAP_NOTIFY asked for."""

    clear: bool
    port: Port | None


@dataclass(eq=False, slots=True)
class Alloc:
    """One ALLOC_GREF."""

    index: int  # in pages
    pages: list[Page]
    writable: bool
    for_peer: bool
    sealed: bool = False  # a peer has mapped it read-only


@dataclass(eq=False, slots=True)
class Page:
    """A granted page."""

    alloc: Alloc
    users: int = 1
    holders: int = 0  # gntdev entries that may hold it
    placed: bool = False  # its granter has mapped it
    lingers: bool = False
    ended_at: int = -1  # how many ALLOCs there had been
    promise: Promise | None = None


@dataclass(eq=False, slots=True)
class Entry:
    """One MAP_GRANT_REF."""

    index: int  # in pages
    pages: list[Page]
    mapped: bool = False  # ever, or tried to
    holds: bool = False
    readonly: bool = False
    map: Map | None = None
    promise: Promise | None = None


@dataclass(eq=False, slots=True)
class Map:
    """One mmap: a record of the driver's, and the pages of it that each process still has."""

    file: File
    what: list[Page] | Entry
    pieces: dict[str, set[int]]


@dataclass(eq=False, slots=True)
class File:
    """An open device file, whichever device."""

    device: str
    side: str
    writable: bool
    openers: set[str]
    maps: set[Map] = field(default_factory=set)
    next_index: int = 0
    pages: dict[int, Page] = field(default_factory=dict)  # gntalloc's, by index
    entries: dict[int, Entry] = field(default_factory=dict)  # gntdev's, by index
    ports: dict[str, Port] = field(default_factory=dict)  # evtchn's, by name
    lost_ports: bool = False  # so that a number that it still has to read may be another port's by now
    vague: bool = False  # how many events a port of it had depends on whether a guest was awake between them


@dataclass(slots=True)
class Seat:
    """A process: the names it knows."""

    files: dict[str, File] = field(default_factory=dict)
    maps: dict[str, Map] = field(default_factory=dict)


def side_of(seat: str) -> str:
    """`g`, where pages are granted, or `p`, the peer's."""
    return seat[0]


class World:
    """Both sides. `pv` says that the peer's kernel is a PV guest's."""

    def __init__(self, *, pv: bool, limit: int = 1024) -> None:
        self.pv = pv
        self.limit = limit
        self.in_use = 0
        self.allocated = 0  # ALLOCs so far
        self.seats: dict[str, Seat] = {name: Seat() for name in ("g1", "g2", "p1", "p2")}
        self.allocs: dict[str, Alloc] = {}
        self.entries: dict[str, Entry] = {}
        self.ports: dict[str, Port] = {}
        self._allocators: set[File] = set()

    def step(self, operation: Operation) -> None:
        """Do it.

        Raises:
            Unfit: it must not be done here.
        """
        seat = self.seats.get(operation["seat"])
        if seat is None:
            raise Unfit("gone")
        for port in self.ports.values():
            port.unheard &= port.side != side_of(operation["seat"])
        getattr(self, "_" + operation["do"])(seat, operation)

    # Processes and files.

    def _fork(self, seat: Seat, operation: Operation) -> None:
        if self.pv and any(map_.file.device == "gntdev" for map_ in seat.maps.values()):
            raise Unfit("fork")
        child = self.seats[operation["as"]] = Seat(dict(seat.files), dict(seat.maps))
        for file in child.files.values():
            file.openers.add(operation["as"])
        for map_ in child.maps.values():
            map_.pieces[operation["as"]] = set(map_.pieces[operation["seat"]])

    def _kill(self, seat: Seat, operation: Operation) -> None:
        for map_ in seat.maps.values():
            users = {*map_.file.openers, *(name for other in map_.file.maps for name in other.pieces)}
            if self._to_clear(map_) and users != {operation["seat"]}:
                raise Unfit("piecemeal clear")
        for map_ in list(seat.maps.values()):
            self._take_piece(map_, operation["seat"], None)
        for file in seat.files.values():
            self._close_file(file, operation["seat"])
        del self.seats[operation["seat"]]

    def _open(self, seat: Seat, operation: Operation) -> None:
        side = side_of(operation["seat"])
        file = File(operation["device"], side, operation["writable"], {operation["seat"]})
        seat.files[operation["as"]] = file

    def _close(self, seat: Seat, operation: Operation) -> None:
        self._close_file(_file(seat, operation), operation["seat"])
        del seat.files[operation["file"]]

    def _close_file(self, file: File, seat: str) -> None:
        file.openers.discard(seat)
        self._release_if_last(file)

    def _release_if_last(self, file: File) -> None:
        if file.openers or file.maps:
            return
        for page in file.pages.values():
            self._let_go(page)
        for entry in file.entries.values():
            self._end_entry(entry)
        for name in list(file.ports):
            self._detach(file, name)
        file.pages.clear()
        file.entries.clear()

    # The granter's pages.

    def _limit(self, seat: Seat, operation: Operation) -> None:
        self.limit = operation["pages"]

    def _alloc(self, seat: Seat, operation: Operation) -> None:
        file, count = _file(seat, operation), operation["count"]
        if file.device != "gntalloc" or self.in_use > self.limit - count:
            return
        alloc = Alloc(file.next_index, [], operation["writable"], operation["for_peer"])
        alloc.pages = [Page(alloc) for _ in range(count)]
        self.allocs[operation["as"]] = alloc
        file.pages.update(enumerate(alloc.pages, alloc.index))
        file.next_index += count
        self.in_use += count
        if count:
            self.allocated += 1
            self._allocators.add(file)

    def _dealloc(self, seat: Seat, operation: Operation) -> None:
        file = _file(seat, operation)
        alloc = self._named(self.allocs, operation["of"])
        index, count = alloc.index + operation["page"], operation["count"]
        if _range(file, index, count):
            for at in range(index, index + count):
                self._let_go(file.pages.pop(at))

    def _let_go(self, page: Page) -> None:
        page.users -= 1
        if page.users:
            return
        self._keep(page.promise)
        self.in_use -= 1
        page.lingers = page.holders > 0
        page.ended_at = self.allocated

    # Maps.

    def _mmap(self, seat: Seat, operation: Operation) -> None:
        file = _file(seat, operation)
        (self._mmap_grant if file.device == "gntdev" else self._mmap_own)(seat, file, operation)

    def _mmap_own(self, seat: Seat, file: File, operation: Operation) -> None:
        alloc = self._named(self.allocs, operation["of"])
        pages = _range(file, alloc.index + operation["page"], operation["pages"])
        if not pages or not file.writable:
            return
        if len({page.alloc for page in pages}) > 1 and len(self._allocators) > 1:
            raise Unfit("spanning")
        if operation["prot"] & WRITE and any(page.alloc.sealed for page in pages):
            raise Unfit("read-only again")
        for page in pages:
            page.users += 1
            page.placed = True
        self._put_map(seat, operation, file, pages, len(pages))

    def _mmap_grant(self, seat: Seat, file: File, operation: Operation) -> None:
        asked = self._named(self.entries, operation["of"])
        entry = file.entries.get(asked.index + operation["page"])
        writable = bool(operation["prot"] & WRITE)
        if entry is None or len(entry.pages) != operation["pages"] or entry.mapped:
            return
        if writable and not file.writable:
            return
        good = [self._can_map(page, writable=writable) for page in entry.pages]
        if not writable:
            if entry.promise is not None and entry.promise.clear:
                raise Unfit("read-only clear")
            if any(not page.alloc.writable and not page.placed for page in entry.pages):
                raise Unfit("read-only early")
        if any(good) and not all(good):
            raise Unfit("torn")
        entry.mapped = True
        entry.readonly = not writable
        if not all(good):
            return
        entry.holds = True
        for page in entry.pages:
            page.holders += 1
            page.alloc.sealed |= not writable and not page.alloc.writable
        entry.map = self._put_map(seat, operation, file, entry, len(entry.pages))

    def _can_map(self, page: Page, *, writable: bool) -> bool:
        if not page.users:
            if page.lingers:
                raise Unfit("lingering")
            if page.ended_at != self.allocated:
                raise Unfit("stale")
            return False
        return page.alloc.for_peer and (page.alloc.writable or not writable)

    def _put_map(self, seat: Seat, operation: Operation, file: File, what: list[Page] | Entry, pages: int) -> Map:
        map_ = Map(file, what, {operation["seat"]: set(range(pages))})
        file.maps.add(map_)
        seat.maps[operation["as"]] = map_
        return map_

    def _munmap(self, seat: Seat, operation: Operation) -> None:
        map_ = self._named(seat.maps, operation["map"])
        pages = set(range(operation["page"], operation["page"] + operation["pages"]))
        there = map_.pieces[operation["seat"]]
        if not pages or not pages <= there:
            raise Unfit("gone")
        if self._to_clear(map_) and (map_.what in map_.file.entries.values() or pages != there):
            raise Unfit("piecemeal clear")
        self._take_piece(map_, operation["seat"], pages)
        if pages == there:
            del seat.maps[operation["map"]]

    def _to_clear(self, map_: Map) -> bool:
        """Whether it is not the same when a byte of it is cleared in a PV guest as elsewhere."""
        promise = map_.what.promise if isinstance(map_.what, Entry) else None
        return self.pv and promise is not None and promise.clear

    def _take_piece(self, map_: Map, seat: str, pages: set[int] | None) -> None:
        """One process has these pages, or all of them, no longer."""
        map_.pieces[seat] = map_.pieces[seat] - pages if pages is not None else set()
        if not map_.pieces[seat]:
            del map_.pieces[seat]
        if map_.pieces:
            return
        map_.file.maps.discard(map_)
        if isinstance(map_.what, Entry):
            map_.what.map = None
            if map_.what not in map_.file.entries.values():
                self._end_entry(map_.what)
        else:
            for page in map_.what:
                self._let_go(page)
        self._release_if_last(map_.file)

    def _peek(self, seat: Seat, operation: Operation) -> None:
        map_ = self._named(seat.maps, operation["map"])
        if operation["at"] // PAGE not in map_.pieces[operation["seat"]]:
            raise Unfit("gone")

    _poke = _peek

    # The peer's entries, and what it copies without any.

    def _reserve(self, seat: Seat, operation: Operation) -> None:
        file = _file(seat, operation)
        pages = [self._named(self.allocs, name).pages[page] for name, page in operation["refs"]]
        first = 0
        for index, entry in sorted(file.entries.items()):
            if first + len(pages) < index:
                break
            first = index + len(entry.pages)
        file.entries[first] = self.entries[operation["as"]] = Entry(first, pages)

    def _unreserve(self, seat: Seat, operation: Operation) -> None:
        file = _file(seat, operation)
        index = self._named(self.entries, operation["of"]).index
        entry = file.entries.get(index)
        if entry is None or operation["count"] not in {0, len(entry.pages)}:
            return
        del file.entries[index]
        if entry.map is None:
            self._end_entry(entry)

    def _end_entry(self, entry: Entry) -> None:
        self._keep(entry.promise)
        if entry.holds:
            for page in entry.pages:
                page.holders -= 1

    def _copy(self, seat: Seat, operation: Operation) -> None:
        _file(seat, operation)
        for place in (operation["source"], operation["dest"]):
            if place is not None:
                name, page, _ = place
                self._can_map(self._named(self.allocs, name).pages[page], writable=False)

    def _offset(self, seat: Seat, operation: Operation) -> None:
        self._peek(seat, operation)
        if _file(seat, operation) is not seat.maps[operation["map"]].file:
            raise Unfit("another's map")

    # SET_UNMAP_NOTIFY, of both.

    def _notify(self, seat: Seat, operation: Operation) -> None:
        file, action = _file(seat, operation), operation["action"]
        port = None
        if operation["port"] is not None:
            port = self._named(self.ports, operation["port"])
            if not port.references or port.side != file.side:
                raise Unfit("reader's ports")
        # A port that is not there is never referred to.
        known = not action & SEND_EVENT or port is not None
        promise = Promise(bool(action & CLEAR_BYTE), port if action & SEND_EVENT else None)
        owner: Page | Entry | None
        if file.device == "gntdev":
            index = self._named(self.entries, operation["of"]).index + operation["at"] // PAGE
            owner = next((e for at, e in file.entries.items() if at <= index < at + len(e.pages)), None)
            if owner is not None and promise.clear:
                if owner.readonly:
                    return
                if self.pv and owner.mapped and (owner.map is None or len(owner.map.pieces) != 1):
                    raise Unfit("piecemeal clear")
                if self.pv and owner.map and any(len(p) < len(owner.pages) for p in owner.map.pieces.values()):
                    raise Unfit("piecemeal clear")
        else:
            owner = file.pages.get(self._named(self.allocs, operation["of"]).index + operation["at"] // PAGE)
        if owner is None or action & ~3 or not known:
            return
        if promise.port is not None:
            promise.port.references += 1
        if owner.promise is not None:
            self._drop(owner.promise.port)
        owner.promise = promise

    def _keep(self, promise: Promise | None) -> None:
        if promise is not None and promise.port is not None:
            self._event(promise.port)
            self._drop(promise.port)

    # Event channels.

    def _bind(self, seat: Seat, operation: Operation) -> None:
        file = _file(seat, operation)
        self.ports[operation["as"]] = file.ports[operation["as"]] = Port(file.side, file)

    def _connect(self, seat: Seat, operation: Operation) -> None:
        file = _file(seat, operation)
        there = self._named(self.ports, operation["to"])
        if not there.references or there.side == file.side:
            raise Unfit("reader's ports")
        if there.peer is not None:
            return
        port = self.ports[operation["as"]] = file.ports[operation["as"]] = Port(file.side, file)
        port.peer, there.peer = there, port

    def _unbind(self, seat: Seat, operation: Operation) -> None:
        file = self._with_port(seat, operation)
        if operation["port"] in file.ports:
            self._detach(file, operation["port"])
            file.lost_ports = True

    def _send(self, seat: Seat, operation: Operation) -> None:
        file = self._with_port(seat, operation)
        if operation["port"] in file.ports:
            self._event(file.ports[operation["port"]])

    def _event(self, port: Port) -> None:
        """Two before the other side is awake are one; else, while the port is masked, the second waits its turn."""
        there = port.peer
        if there is not None:
            if there.unheard and there.file is not None:
                there.file.vague = True
            there.unheard = True

    def _rearm(self, seat: Seat, operation: Operation) -> None:
        self._with_port(seat, operation)

    def _events(self, seat: Seat, operation: Operation) -> None:
        _file(seat, operation)

    def _with_port(self, seat: Seat, operation: Operation) -> File:
        file = _file(seat, operation)
        port = self._named(self.ports, operation["port"])
        if not port.references or port.side != file.side:
            raise Unfit("reader's ports")
        return file

    def _detach(self, file: File, name: str) -> None:
        port = file.ports.pop(name)
        port.file = None
        self._drop(port)

    def _drop(self, port: Port | None) -> None:
        if port is None:
            return
        port.references -= 1
        if not port.references and port.peer is not None:
            port.peer.peer = None
            port.peer = None

    @staticmethod
    def _named(names: dict[str, Any], name: str) -> Any:
        if name not in names:
            raise Unfit("gone")
        return names[name]


def _file(seat: Seat, operation: Operation) -> File:
    if operation["file"] not in seat.files:
        raise Unfit("gone")
    return seat.files[operation["file"]]


def _range(file: File, index: int, count: int) -> list[Page]:
    """The listed pages of exactly this range, or none."""
    pages = [file.pages[at] for at in range(index, index + count) if at in file.pages]
    return pages if count and len(pages) == count else []
