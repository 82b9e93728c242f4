"""What the drivers shall do, in few words: in the default behaviour, and as far as programs can see it.

It imports nothing of gntalloc. It counts nothing: what is in use is found by looking at what there is. It undoes
nothing: a call is judged first, and then it happens, all of it, or does not.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

CAPACITY = 504  # references of a grant table of one frame
NO_DESCRIPTORS = 1  # an ALLOC needs so many
BYTE, EVENT = 1, 2


class Refused(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(errno.errorcode[code])
        self.code = code


def refuse(code: int) -> NoReturn:
    raise Refused(code)


class Fault(NamedTuple):
    """What is taken away: the copy of that number is a fault; only so many descriptors are left."""

    copy: int = 0
    descriptors: int = 1000

    def at_copy(self, number: int) -> None:
        if self.copy == number:
            refuse(errno.EFAULT)

    def for_descriptors(self, needed: int) -> None:
        if self.descriptors < needed:
            refuse(errno.ENOMEM)


@dataclass(eq=False)
class File:
    domid: int
    device: str
    next_index: int = 0
    closed: bool = False
    released: bool = False


@dataclass(eq=False)
class Promise:
    """Of SET_UNMAP_NOTIFY: to clear the first byte of a page, to send an event."""

    clear: bool
    send: bool
    domid: int


@dataclass(eq=False)
class Alloc:
    pages: int
    sealed: bool = False


@dataclass(eq=False)
class Page:
    file: File
    alloc: Alloc
    index: int
    peer: int
    writable: bool  # for the peer
    ref: int = 0
    listed: bool = True
    placed: bool = False
    first_byte: int = 0
    promise: Promise | None = None


@dataclass(eq=False)
class Entry:
    """Of MAP_GRANT_REF."""

    file: File
    first: int
    refs: list[tuple[int, int]]
    listed: bool = True
    burned: bool = False
    readonly: bool = False
    promise: Promise | None = None
    promised_page: int = 0


@dataclass(eq=False)
class Map:
    """One mmap: where in it pages are still mapped, and whether a child has it too."""

    file: File
    pages: list[Page]
    writable: bool
    entry: Entry | None
    left: set[int]
    inherited: bool

    @property
    def lives(self) -> bool:
        return bool(self.left) or self.inherited


@dataclass
class Model:
    limits: dict[int, int]
    files: list[File] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)
    bound: set[int] = field(default_factory=set)  # domains whose end of the channel is open
    gone: set[int] = field(default_factory=set)  # domains whose end is no more
    heard: set[int] = field(default_factory=set)  # domains that had an event

    # What there is.

    def users(self, page: Page) -> int:
        return page.listed + sum(page in each.pages for each in self.maps if each.entry is None)

    def mapped_by(self, page: Page) -> tuple[int, ...]:
        return tuple(sorted({each.file.domid for each in self.maps if each.entry and page in each.pages}))

    def in_use(self, domid: int) -> int:
        return sum(page.file.domid == domid for page in self.pages)

    def allocs(self) -> set[Alloc]:
        return {page.alloc for page in self.pages}

    def ports(self, domid: int) -> int:
        return int(domid in self.bound or self._promised(domid))

    def _promised(self, domid: int) -> bool:
        return any(promise.send and promise.domid == domid for promise in self._promises())

    def _promises(self) -> list[Promise]:
        promises = [page.promise for page in self.pages] + [entry.promise for entry in self.entries]
        return [promise for promise in promises if promise]

    # gntalloc.

    def alloc(self, file: File, peer: int, count: int, writable: bool, fault: Fault) -> list[Page]:
        fault.at_copy(1)
        if self.in_use(file.domid) + count > self.limits[file.domid]:
            refuse(errno.ENOSPC)
        if count:
            fault.for_descriptors(NO_DESCRIPTORS)
        if self.in_use(file.domid) + count > CAPACITY:
            refuse(errno.ENOSPC)
        fault.at_copy(2)
        if count:
            fault.at_copy(3)
        alloc = Alloc(count)
        made = [Page(file, alloc, file.next_index + number, peer, writable) for number in range(count)]
        file.next_index += count
        self.pages += made
        return made

    def _range(self, file: File, first: int, count: int, otherwise: int) -> list[Page]:
        listed = {page.index: page for page in self.pages if page.file is file and page.listed}
        wanted = range(first, first + count)
        if not count or not set(wanted) <= set(listed):
            refuse(otherwise)
        return [listed[index] for index in wanted]

    def dealloc(self, file: File, first: int, count: int, fault: Fault) -> None:
        fault.at_copy(1)
        for page in self._range(file, first, count, errno.EINVAL):
            page.listed = False

    def mmap(self, file: File, first: int, count: int, writable: bool, fault: Fault, inherited: bool) -> Map:
        pages = self._range(file, first, count, errno.ENOENT)
        sealed = any(page.alloc.sealed for page in pages)
        if sealed and writable:
            refuse(errno.EPERM)
        fault.for_descriptors(len({page.alloc for page in pages}))
        for page in pages:
            page.placed |= not sealed
        return self._mapped(Map(file, pages, writable, None, set(range(count)), inherited))

    def notify_page(self, file: File, index: int, action: int, fault: Fault) -> None:
        fault.at_copy(1)
        (page,) = self._range(file, index, 1, errno.ENOENT)
        page.promise = self._promise(file, action)

    def _promise(self, file: File, action: int) -> Promise:
        if action > BYTE | EVENT or (action & EVENT and not self.ports(file.domid)):
            refuse(errno.EINVAL)
        return Promise(bool(action & BYTE), bool(action & EVENT), file.domid)

    # gntdev.

    def map_refs(self, file: File, refs: list[tuple[int, int]], fault: Fault) -> Entry:
        fault.at_copy(1)
        fault.at_copy(2)
        fault.at_copy(3)
        there = {entry.first: len(entry.refs) for entry in self._listed(file)}
        # The first place after which there is more room than it takes: a gap that would just fit is none.
        gaps = {0, *(first + count for first, count in there.items())} - set(there)
        first = min(gap for gap in gaps if all(gap + len(refs) < other for other in there if other > gap))
        entry = Entry(file, first, refs)
        self.entries.append(entry)
        return entry

    def _listed(self, file: File) -> list[Entry]:
        return [entry for entry in self.entries if entry.file is file and entry.listed]

    def mmap_entry(self, file: File, first: int, count: int, writable: bool, fault: Fault, inherited: bool) -> Map:
        there = [each for each in self._listed(file) if each.first == first and len(each.refs) == count]
        if not there or there[0].burned:
            refuse(errno.EINVAL)
        (entry,) = there
        entry.readonly = not writable
        pages = [self._granted(ref, file.domid, writable) for ref in entry.refs]
        found = [page for page in pages if page]
        if len(found) < len(pages):
            entry.burned = True
            refuse(errno.EINVAL)
        if not writable:
            if not all(page.writable or page.placed or page.alloc.sealed for page in found):
                refuse(errno.EAGAIN)
            for page in found:
                page.alloc.sealed |= not page.writable
        entry.burned = True
        map_ = Map(file, found, writable, entry, set(range(count)), inherited)
        if fault.descriptors < len({page.alloc for page in found}):
            self._let_go(map_)  # for the peer it came, and went
            refuse(errno.ENOMEM)
        return self._mapped(map_)

    def _granted(self, granted: tuple[int, int], mapper: int, writable: bool) -> Page | None:
        for page in self.pages:
            if (page.file.domid, page.ref) == granted and page.peer == mapper and self.users(page):
                return page if page.writable or not writable else None
        return None

    def unmap_refs(self, file: File, first: int, count: int, fault: Fault) -> None:
        fault.at_copy(1)
        there = [each for each in self._listed(file) if each.first == first and count in {0, len(each.refs)}]
        if not there:
            refuse(errno.ENOENT)
        there[0].listed = False

    def notify_entry(self, file: File, index: int, action: int, fault: Fault) -> None:
        fault.at_copy(1)
        promise = self._promise(file, action)
        there = [each for each in self._listed(file) if each.first <= index < each.first + len(each.refs)]
        if not there:
            refuse(errno.ENOENT)
        if promise.clear and there[0].readonly:
            refuse(errno.EINVAL)
        there[0].promise = promise
        there[0].promised_page = index - there[0].first

    # Maps and ends.

    def _mapped(self, map_: Map) -> Map:
        self.maps.append(map_)
        return map_

    def _let_go(self, map_: Map) -> None:
        entry = map_.entry
        if entry and entry.promise and entry.promise.clear and not entry.readonly:
            map_.pages[entry.promised_page].first_byte = 0

    def write(self, map_: Map, position: int, value: int) -> None:
        map_.pages[position].first_byte = value

    def settle(self) -> None:
        """What follows from what happened, until nothing more does."""
        before: object = None
        while before != (before := self._size()):
            self._settle()

    def _size(self) -> tuple[int, ...]:
        released = sum(file.released for file in self.files)
        return len(self.maps), len(self.pages), len(self.entries), len(self._promises()), released

    def _settle(self) -> None:
        for map_ in [each for each in self.maps if not each.lives]:
            self._let_go(map_)
            self.maps.remove(map_)
        for file in self.files:
            if file.closed and not file.released and not any(each.file is file for each in self.maps):
                file.released = True
                for page in self.pages:
                    page.listed &= page.file is not file
                for entry in self.entries:
                    entry.listed &= entry.file is not file
        for page in [each for each in self.pages if not self.users(each)]:
            if page.promise:
                page.first_byte *= not page.promise.clear
                self._send(page.promise)
                page.promise = None
            if not self.mapped_by(page):
                self.pages.remove(page)
        mapped = [each.entry for each in self.maps]
        for entry in [each for each in self.entries if not each.listed and each not in mapped]:
            self.entries.remove(entry)
            if entry.promise:
                self._send(entry.promise)
        self.gone |= {domid for domid in (1, 2) if not self.ports(domid)}

    def _send(self, promise: Promise) -> None:
        other = 3 - promise.domid
        if promise.send and other in self.bound and not self.gone:
            self.heard.add(other)
