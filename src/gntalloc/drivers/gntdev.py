"""Serve /dev/xen/gntdev: map pages that other domains granted.

MAP_GRANT_REF only notes the references. They are checked and mapped at mmap, all of them together. An entry can be
mapped once, ever. The map holds the grants until its last piece is unmapped in every process.

Sources: Linux's gntdev.c as of 6.1, in a PVH guest; docs/differences.md for where and why this differs.
"""

from __future__ import annotations

import errno
from array import array
from struct import Struct
from typing import TYPE_CHECKING, cast

from gntalloc.abi.gntdev import (
    DEVICE,
    GET_OFFSET_FOR_VADDR,
    GRANT_COPY,
    MAP_GRANT_REF,
    SET_UNMAP_NOTIFY,
    UNMAP_GRANT_REF,
    GetOffsetForVaddr,
    GrantRef,
    MapGrantRef,
    UnmapGrantRef,
    UnmapNotify,
)
from gntalloc.abi.grants import STATUS_NAMES
from gntalloc.drivers.behaviour import OURS, Behaviour
from gntalloc.drivers.chardev import Caller, Extent, File, Frames, Piece, Plan, Record, Serve, join
from gntalloc.drivers.copy import Copier
from gntalloc.drivers.indexes import Indexes
from gntalloc.drivers.notify import PortReferences, Promise, check_action, clear_byte
from gntalloc.drivers.placing import see_placed
from gntalloc.errors import DeviceError
from gntalloc.hypervisor.domains import common
from gntalloc.hypervisor.grants import MapRefused
from gntalloc.maps import PAGE_SIZE
from gntalloc.steps import PAGES_A_STEP, Later, Steps, batches, finish, finish_steps

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gntalloc.drivers.grefs import Pages
    from gntalloc.hypervisor.domains import Handle, Hypervisor

__all__ = ["MAX_REFS", "GntdevDriver"]

MAX_REFS = 65536  # of one MAP_GRANT_REF
_AT_ONCE = 128  # so many pages are mapped, or let go, at once; more take several steps
_RUNS_A_STEP = 64  # of pages that follow each other
_SEALED_AT_ONCE = 16  # extents
_OUT_OF_THE_WAY = 1 << 20  # a page number beyond that of any page in its file
MAX_NOTED = 4 * MAX_REFS  # references of a domain, in entries not given up yet: as many as it could map at once


class Entry:
    """Keep one MAP_GRANT_REF: `refs` are (domid, reference), packed; `first` is the page number of its index."""

    __slots__ = ("count", "first", "handles", "mapped", "promise", "readonly", "record", "refs")

    def __init__(self, first: int, refs: bytes) -> None:
        self.first = first
        self.count = len(refs) // GrantRef.SIZE
        self.refs = refs
        self.mapped = False  # whether it ever was
        self.readonly = False  # whether it was mapped read-only
        self.record: Record | None = None  # its map, while that lives
        self.promise: Promise | None = None  # what to do when it goes
        self.handles: list[Handle[Pages]] = []


class FileState:
    """Keep the entries of an open file, by index."""

    __slots__ = ("entries",)

    def __init__(self) -> None:
        self.entries: Indexes[Entry] = Indexes()


class GntdevDriver:
    """Serve the device for one domain, which maps as `domid`. `later` begins what may take long, see `Later`."""

    name = DEVICE
    unknown_request = errno.ENOTTY

    def __init__(
        self,
        domid: int,
        hypervisor: Hypervisor[Pages],
        frames: Frames,
        ports: PortReferences,
        *,
        behaviour: Behaviour = OURS,
        later: Later = finish,
    ) -> None:
        self._domid = domid
        self._later = later
        self._hypervisor = hypervisor
        self._frames = frames
        self._ports = ports
        self._behaviour = behaviour
        self._copier = Copier(domid, hypervisor, frames)
        self._noted = 0
        self._requests = {
            MAP_GRANT_REF: self._map,
            UNMAP_GRANT_REF: self._unmap,
            GET_OFFSET_FOR_VADDR: self._get_offset,
            SET_UNMAP_NOTIFY: self._set_notify,
            GRANT_COPY: self._copy,
        }

    @property
    def requests(self) -> Mapping[int, Serve]:
        """Request number -> the function that serves it."""
        return self._requests

    def open(self) -> FileState:
        """Make the state of a new file: nothing is mapped."""
        return FileState()

    # MAP_GRANT_REF: a place for these references, to be mapped at the index that is answered.

    def _map(self, file: File, address: int, caller: Caller) -> int:
        head = caller.read(address, MapGrantRef.SIZE)
        asked = MapGrantRef.unpack_from(head)
        self._check_count(asked.count)
        refs = caller.read(address + MapGrantRef.REFS_OFFSET, asked.count * GrantRef.SIZE)
        entry = self.note(file, refs, by_offset=caller.by_offset)
        answer = asked._replace(index=entry.first * PAGE_SIZE).pack()
        try:
            caller.write(address, answer + head[len(answer) :])
        except DeviceError:
            self.forget(file, entry)
            raise
        return 0

    def _check_count(self, count: int) -> None:
        if not 0 < count <= MAX_REFS:
            raise DeviceError(errno.EINVAL, f"{count} references were given; 1 to {MAX_REFS} can be mapped at once")
        if self._noted + count > MAX_NOTED:
            what = f"{count} references were given, and this domain has more than {MAX_NOTED - count}"
            raise DeviceError(errno.ENOMEM, f"{what} of {MAX_NOTED} references noted already; unmap some")

    def note(self, file: File, refs: bytes, *, by_offset: bool = False) -> Entry:
        """Do all of MAP_GRANT_REF but reading the argument and writing the answer. `refs` are (domid, reference), u32.

        Raises:
            DeviceError: EINVAL: no references, or too many. ENOMEM: the domain has noted too many.
        """
        count = len(refs) // GrantRef.SIZE
        self._check_count(count)
        entries = _state(file).entries
        first = self._by_offset(refs, entries) if by_offset else entries.first_gap(count)
        entry = Entry(first, refs)
        entries.put(first, count, entry)
        self._noted += count
        return entry

    def forget(self, file: File, entry: Entry) -> None:
        """Take an entry off its file's list, if it is there. What is mapped lives on."""
        entries = _state(file).entries
        if entries.at(entry.first) is not entry:
            return
        entries.remove(entry.first)
        self._noted -= entry.count
        if entry.record is None:
            self._end(entry)

    def _by_offset(self, refs: bytes, entries: Indexes[Entry]) -> int:
        """Give the place of these pages in their file, if they are in order there; else one that disturbs no other.

        Nothing is promised: mmap decides what may be mapped.
        """
        try:
            found = [
                self._hypervisor.look(self._domid, domid, ref, writable=False)
                for domid, ref in _GRANT_REF.iter_unpack(refs[: _AT_ONCE * GrantRef.SIZE])
            ]
        except MapRefused:
            found = []
        pieces: list[Piece] = []
        for span, page in found:
            join(pieces, Piece(span.grant.memory, page, 1))
        if len(pieces) == 1:
            first = pieces[0].extent.first + pieces[0].page
            if entries.has_room(first, len(refs) // GrantRef.SIZE):
                return first
        return max(entries.end, _OUT_OF_THE_WAY)

    # mmap: here the hypervisor is asked, for each page, and all of them must be there.

    def mmap(self, file: File, offset: int, length: int, *, writable: bool, shared: bool) -> Plan | Steps[Plan]:
        """Map one entry, whole. Of many pages, give the steps to that.

        Raises:
            DeviceError: here, or in a step. EINVAL: it cannot be mapped so. EAGAIN: the granter has not mapped a
                read-only grant yet.
        """
        if writable and not shared:
            raise DeviceError(errno.EINVAL, "granted pages are shared: a private map cannot be writable")
        first, count = offset // PAGE_SIZE, length // PAGE_SIZE
        entry = _state(file).entries.at(first)
        if entry is None or entry.count != count:
            there = f"the one there has {entry.count} pages" if entry else "there is none"
            what = f"a map of {count} pages at index {offset:#x} needs a MAP_GRANT_REF of just that"
            raise DeviceError(errno.EINVAL, f"{what}, and {there}")
        if entry.mapped:
            raise DeviceError(errno.EINVAL, "each MAP_GRANT_REF can be mapped once; make another one")
        steps = self._map_in_steps(file, entry, length, writable=writable)
        return steps if count > _AT_ONCE else finish_steps(steps)

    def _map_in_steps(self, file: File, entry: Entry, length: int, *, writable: bool) -> Steps[Plan]:
        entry.readonly = not writable
        entry.mapped = True  # another call cannot map it meanwhile
        entry.record = Record(file, length, entry)  # and UNMAP_GRANT_REF leaves it to this map
        handles: list[Handle[Pages]] = []
        pieces: list[Piece] = []
        try:
            for domid, refs in _by_domain(entry.refs):
                at = 0
                while at < len(refs):
                    handle = self._map_some(domid, refs, at, writable=writable)
                    handles.append(handle)
                    join(pieces, Piece(handle.grant.memory, handle.page, handle.pages))
                    at += handle.pages
                    if len(handles) % _RUNS_A_STEP == 0:
                        yield
            if not writable:
                yield from self._seal(handles)
            if writable:
                self._open_window(entry.promise, handles)
        except BaseException as error:  # the program's end, too
            entry.mapped = isinstance(error, _Refused)  # even a map that the hypervisor refuses is the only one
            self._give_up(file, entry, handles)
            raise
        entry.handles = handles
        return Plan(entry.record, pieces, writable=writable, granters=False, locks=True)

    def _map_some(self, domid: int, refs: Sequence[int], at: int, *, writable: bool) -> Handle[Pages]:
        """Map the page of reference `refs[at]` of a domain, and those that follow it in one span."""
        try:
            return self._hypervisor.map(self._domid, domid, refs, at, writable=writable)
        except MapRefused as refusal:
            raise _Refused(errno.EINVAL, f"{refusal.why} ({STATUS_NAMES[refusal.status]})") from None

    def _give_up(self, file: File, entry: Entry, handles: list[Handle[Pages]]) -> None:
        """Undo a map that has failed on its way."""
        entry.record = None
        self._undo(handles)
        if _state(file).entries.at(entry.first) is not entry:  # taken off the list meanwhile
            self._end(entry)

    def _seal(self, handles: list[Handle[Pages]]) -> Steps[None]:
        """Seal read-only pages before their peer gets them: no process can make a writable map of them any more.

        The granter cannot either, so it must have its map first.
        """
        sealing: dict[Extent, None] = {}
        asked: set[Extent] = set()
        for number, (table, grant, page, count) in enumerate(handles, 1):
            extent = grant.memory
            if number % _RUNS_A_STEP == 0:
                yield
            if extent.sealed or not grant.readonly:
                continue
            if not all(extent.placed[page : page + count]) and extent not in asked:
                asked.add(extent)
                yield from see_placed(extent)
            missing = extent.placed.find(0, page, page + count)
            if missing >= 0:
                what = f"page {grant.refs[missing]} of domain {table.owner} is granted read-only"
                raise DeviceError(errno.EAGAIN, f"{what}, and its granter has not mapped it yet; try again")
            sealing[extent] = None
        for number, extent in enumerate(sealing):
            self._frames.seal(extent)
            if number % _SEALED_AT_ONCE == _SEALED_AT_ONCE - 1:
                yield

    # GET_OFFSET_FOR_VADDR: what is mapped there?

    def _get_offset(self, file: File, address: int, caller: Caller) -> int | Steps[int]:
        steps = self._find_offset(file, address, caller)
        return steps if len(file.records) > PAGES_A_STEP else finish_steps(steps)

    def _find_offset(self, file: File, address: int, caller: Caller) -> Steps[int]:
        head = caller.read(address, GetOffsetForVaddr.SIZE)
        asked = GetOffsetForVaddr.unpack_from(head)
        there: list[Record] = []
        for some in batches(list(file.records)):
            there += [record for record in some if record.is_at(asked.vaddr)]
            if len(file.records) > PAGES_A_STEP:
                yield
        if not there:
            raise DeviceError(errno.EINVAL, f"no pages of this file are mapped at {asked.vaddr:#x}")
        # A child made by fork has its parent's maps, where it has not made its own since.
        record = max(there, key=lambda record: (record.process == caller.process, record.turn))
        entry = cast("Entry", record.payload)
        answer = asked._replace(offset=entry.first * PAGE_SIZE, count=entry.count).pack()
        caller.write(address, answer)
        return 0

    # GRANT_COPY: without a map.

    def _copy(self, file: File, address: int, caller: Caller) -> int | Steps[int]:
        return self._copier.copy(address, caller)

    # SET_UNMAP_NOTIFY: one promise an entry, the last one made.

    def _set_notify(self, file: File, address: int, caller: Caller) -> int:
        asked = UnmapNotify.unpack_from(caller.read(address, UnmapNotify.SIZE))
        check_action(asked.action)
        promise = Promise(asked.action, asked.index, asked.event_channel_port, self._ports)
        try:
            entry = _entry_with(file, asked.index)
            if promise.byte is not None:
                promise.byte -= entry.first * PAGE_SIZE
                if entry.readonly:
                    why = "a byte of a read-only map cannot be cleared; send an event instead, or map it writable"
                    raise DeviceError(errno.EINVAL, why)
            self._open_window(promise, entry.handles)
        except DeviceError:
            promise.forget()
            raise
        if entry.promise is not None:
            entry.promise.forget()
        entry.promise = promise
        return 0

    def _open_window(self, promise: Promise | None, handles: list[Handle[Pages]]) -> None:
        """Make sure that the promise's byte can be cleared when the page goes."""
        if handles and promise is not None and promise.byte is not None:
            extent, _ = _page_of(handles, promise.byte // PAGE_SIZE)
            self._frames.open_window(extent)

    def _undo(self, handles: list[Handle[Pages]]) -> None:
        if sum([handle.pages for handle in handles]) > _AT_ONCE:
            self._later(self._undo_in_steps(handles))
        else:
            self._hypervisor.unmap(handles)

    def _undo_in_steps(self, handles: list[Handle[Pages]]) -> Steps[None]:
        for some in batches(_parts(handles)):
            self._hypervisor.unmap(some)
            yield

    def unmapped(self, record: Record) -> None:
        """Give the grants up, as the last piece of this mmap is gone."""
        entry = cast("Entry", record.payload)
        entry.record = None
        listed = _state(record.file).entries.at(entry.first) is entry
        if listed and record.ends:
            self.forget(record.file, entry)
        elif not listed:
            self._end(entry)
        elif self._behaviour.munmap_releases:
            self._let_go(entry)

    def _let_go(self, entry: Entry) -> None:
        """Clear the byte, then let the pages go."""
        promise = entry.promise
        if entry.handles and promise is not None and promise.byte is not None and not entry.readonly:
            page, byte = divmod(promise.byte, PAGE_SIZE)
            clear_byte(self._frames, *_page_of(entry.handles, page), byte)
        handles, entry.handles = entry.handles, []
        self._undo(handles)

    def _end(self, entry: Entry) -> None:
        """Let the pages go, then send the event: the entry is neither mapped nor on the file's list."""
        self._let_go(entry)
        if entry.promise is not None:
            entry.promise.send()

    # UNMAP_GRANT_REF: off the file's list. What is mapped lives on.

    def _unmap(self, file: File, address: int, caller: Caller) -> int:
        asked = UnmapGrantRef.unpack_from(caller.read(address, UnmapGrantRef.SIZE))
        first = asked.index // PAGE_SIZE
        entries = _state(file).entries
        entry = entries.at(first)
        if entry is None or asked.count not in {0, entry.count}:
            what = f"{asked.count} pages at index {asked.index:#x} were to be unmapped"
            raise DeviceError(errno.ENOENT, f"{what}, and there was no MAP_GRANT_REF of just that")
        self.forget(file, entry)
        return 0

    def release(self, file: File) -> None:
        """End every entry of the file. Nothing of it is mapped any more."""
        for entry in _state(file).entries:
            self._noted -= entry.count
            self._end(entry)
        _state(file).entries = Indexes()


_GRANT_REF = Struct("=II")


def _by_domain(refs: bytes) -> Iterator[tuple[int, array[int]]]:
    """Take packed (domid, reference) apart: give the references of each domain that follow each other."""
    pairs = array("I", refs)
    domids, numbers = pairs[::2], pairs[1::2]
    first, end = 0, len(domids)
    while first < end:
        count = 1
        if first + 1 < end and domids[first + 1] == domids[first]:
            count += common(domids, first + 1, domids, first, end - first - 1)  # each is the one before it
        yield domids[first], numbers[first : first + count]
        first += count


def _parts(handles: list[Handle[Pages]]) -> Iterator[Handle[Pages]]:
    """Give handles for what of these pages is alike now: some may have gone their own way since they were mapped."""
    for handle in handles:
        for span in handle.table.spans(handle.grant, handle.page, handle.pages):
            if span is not None:
                yield handle._replace(page=span.page, pages=span.count)


def _page_of(handles: list[Handle[Pages]], number: int) -> tuple[Extent, int]:
    """Find page `number` of a map: its extent, and its number there."""
    for _, grant, page, count in handles:
        if number < count:
            return grant.memory, page + number
        number -= count
    raise AssertionError(number)


class _Refused(DeviceError):
    """The hypervisor does not map one of the pages."""


def _entry_with(file: File, index: int) -> Entry:
    """Find the entry that the byte at `index` belongs to.

    Raises:
        DeviceError: ENOENT: there is none.
    """
    entry = _state(file).entries.around(index // PAGE_SIZE)
    if entry is None:
        raise DeviceError(errno.ENOENT, f"no MAP_GRANT_REF of this file is at index {index:#x}")
    return entry


def _state(file: File) -> FileState:
    return cast("FileState", file.state)
