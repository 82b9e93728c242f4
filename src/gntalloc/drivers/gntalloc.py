"""Serve /dev/xen/gntalloc: allocate pages, grant them to one other domain, map them, take them back.

From top to bottom this is the 2011 patch: open, ALLOC, DEALLOC, mmap and munmap, release; each with its failures, and
with what is then undone.

A page lives for as long as it has users. Its users are the file's list, from ALLOC to DEALLOC or close, and each mmap
that covers it. When the last user goes, so does the grant, and the page with it, unless the peer still maps it. Such a
page *lingers*: it cannot be taken away, it counts against the limit, and it is free when the peer lets go.

Sources: the 2011 driver and its review; Linux's gntalloc.c as of 6.1; docs/differences.md for where and why this
differs.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NamedTuple, cast

from gntalloc import clock
from gntalloc.abi.gntalloc import (
    ALLOC_GREF,
    DEALLOC_GREF,
    DEVICE,
    FLAG_WRITABLE,
    SET_UNMAP_NOTIFY,
    AllocGref,
    DeallocGref,
    UnmapNotify,
)
from gntalloc.drivers.behaviour import OURS, Behaviour
from gntalloc.drivers.chardev import Caller, Extent, File, Frames, Piece, Plan, Record, Serve
from gntalloc.drivers.grefs import Alloc, FileState, GrantInfo, Pages, Range
from gntalloc.drivers.notify import PortReferences, Promise, check_action
from gntalloc.drivers.pages import AT_ONCE, GrantedPages
from gntalloc.drivers.placing import note_placed
from gntalloc.drivers.refusals import asked_for, check_sense, not_there, why_not
from gntalloc.drivers.releases import is_held
from gntalloc.errors import DeviceError
from gntalloc.hypervisor.grants import GrantTable, TableFull
from gntalloc.maps import PAGE_SIZE
from gntalloc.steps import PAGES_A_STEP, Later, Steps, finish, finish_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gntalloc.drivers.pages import Descriptors
    from gntalloc.drivers.releases import ReleaseWaiter

__all__ = ["DEFAULT_LIMIT", "Allocated", "GntallocDriver"]

DEFAULT_LIMIT = 1024
_PERMITTED_AT_ONCE = 4096  # references


class Allocated(NamedTuple):
    """Name the pages that an ALLOC made: the index of the first, and their references, each u32."""

    first: int
    refs: bytes


class GntallocDriver:
    """Serve the device for one domain.

    Args:
        table: that domain's grant table.
        frames: the machine's memory.
        ports: the domain's event channels, for notifications.
        limit: the most pages that may be in use at once, all files together. It may be changed at any time. A limit
            below the pages in use frees nothing; ALLOC is refused until fewer are in use.
        behaviour: ours, or as Linux does.
        later: begins what may take long, see `Later`.
        descriptors: the domain's share of the machine's descriptors: each ALLOC takes one.
    """

    name = DEVICE
    unknown_request = errno.ENOTTY

    def __init__(
        self,
        table: GrantTable[Pages],
        frames: Frames,
        ports: PortReferences,
        *,
        limit: int = DEFAULT_LIMIT,
        behaviour: Behaviour = OURS,
        later: Later = finish,
        descriptors: Descriptors | None = None,
    ) -> None:
        self.limit = limit
        self._later = later
        self._table = table
        self._frames = frames
        self._ports = ports
        self._behaviour = behaviour
        self._pages = GrantedPages(table, frames, behaviour=behaviour, later=later, descriptors=descriptors)
        self._requests = {ALLOC_GREF: self._alloc, DEALLOC_GREF: self._dealloc, SET_UNMAP_NOTIFY: self._set_notify}

    @property
    def in_use(self) -> int:
        """The number of pages that count against the limit."""
        return self._pages.in_use

    @property
    def requests(self) -> Mapping[int, Serve]:
        """Request number -> the function that serves it."""
        return self._requests

    # Open.

    def open(self) -> FileState:
        """Make the state of a new file: nothing is granted, and the first index is 0."""
        return FileState()

    # ALLOC_GREF: pages, references, and the index under which mmap finds them.

    def _alloc(self, file: File, address: int, caller: Caller) -> int | Steps[int]:
        head = caller.read(address, AllocGref.SIZE)
        asked = AllocGref.unpack_from(head)
        made = self.allocate(file, asked)
        if not isinstance(made, Allocated):
            return self._answer_in_steps(file, address, caller, head, made)
        self._answer(file, address, caller, head, made)
        return 0

    def _answer_in_steps(
        self, file: File, address: int, caller: Caller, head: bytes, steps: Steps[Allocated]
    ) -> Steps[int]:
        self._answer(file, address, caller, head, (yield from steps))
        return 0

    def _answer(self, file: File, address: int, caller: Caller, head: bytes, made: Allocated) -> None:
        """Write the answer: Linux copies all 24 bytes out, the last eight as they came in, the references over them."""
        asked = AllocGref.unpack_from(head)
        packed = asked._replace(index=made.first).pack()
        try:
            caller.write(address, packed + head[len(packed) :])
            if made.refs:
                caller.write(address + AllocGref.REFS_OFFSET, made.refs)
        except DeviceError:
            # The program does not know the index, so it could not free them.
            if self._behaviour.undo_unwritable_reply:
                self.take_back(file, made.first, asked.count)
            raise

    def allocate(self, file: File, asked: AllocGref) -> Allocated | Steps[Allocated]:
        """Do all of ALLOC_GREF but reading the argument and writing the answer. Of many pages, give the steps to that.

        Raises:
            DeviceError: here, or in a step. ENOSPC: the limit or the grant table is exhausted. ENOMEM: no memory.
        """
        state = _state(file)
        if self._behaviour.strict:
            check_sense(asked, self._table.owner)
        self._check_limit(asked.count)
        if asked.count > AT_ONCE:
            return self._allocate_in_steps(file, asked)
        index = state.next_index
        end = index + asked.count * PAGE_SIZE
        if asked.count:
            try:
                self._make(file, index, asked)
            except DeviceError:
                if not self._behaviour.put_index_back:
                    state.next_index = end
                raise
        state.next_index = end
        self._pages.check_books()
        return Allocated(index, state.allocs[index].refs.tobytes() if asked.count else b"")

    def take_back(self, file: File, index: int, count: int) -> None:
        """Undo `allocate`, as the program does not know of it. Pages that it has given back are no error."""
        state = _state(file)
        self._pages.drop(list(state.ranges(index, count)))
        # A page whose reference a peer has guessed lingers, and keeps its index.
        is_last = state.next_index == index + count * PAGE_SIZE
        if self._behaviour.put_index_back and is_last and index not in state.allocs:
            state.next_index = index

    def _make(self, file: File, index: int, asked: AllocGref) -> None:
        """Make all of the pages and grants, or none."""
        self._pages.take_descriptor()
        try:
            extent = self._frames.allocate(
                asked.count,
                self._pages.look_again,
                writable=bool(asked.flags & FLAG_WRITABLE),
                first=index // PAGE_SIZE,
            )
        except DeviceError:
            self._pages.give_descriptor()
            raise
        span = self._span_of(file, index, extent, asked)
        try:
            self._table.permit(span, asked.count)
        except TableFull:
            self._pages.give_back(span.grant, 0, asked.count)
            raise self._no_references(asked.count) from None
        self._pages.count += asked.count
        self._pages.in_use += asked.count
        _state(file).add(span.grant)

    def _span_of(self, file: File, index: int, extent: Extent, asked: AllocGref) -> Pages:
        extent.party = self._table.owner, asked.domid
        readonly = not asked.flags & FLAG_WRITABLE
        return Pages(Alloc(file, _state(file), index, extent, asked.domid, readonly, clock.now()))

    def _allocate_in_steps(self, file: File, asked: AllocGref) -> Steps[Allocated]:
        """Allocate many pages. Nobody else can have their indexes, or their part of the limit, in between.

        The pages are there all at once, at the end. Until then a program that guesses their index, or a reference,
        finds nothing.
        """
        state, pages = _state(file), self._pages
        index = state.next_index
        pages.take_descriptor()
        end = state.next_index = index + asked.count * PAGE_SIZE
        pages.in_use += asked.count
        pages.coming += asked.count
        span: Pages | None = None
        try:
            extent = yield from self._frames.begin_allocate(
                asked.count,
                pages.look_again,
                writable=bool(asked.flags & FLAG_WRITABLE),
                first=index // PAGE_SIZE,
            )
            span = self._span_of(file, index, extent, asked)
            while len(span.grant.refs) < asked.count:
                self._reserve_some(span, asked.count)
                yield
        except BaseException:  # the program's end, too
            made = len(span.grant.refs) if span is not None else 0
            pages.coming -= asked.count - made
            pages.in_use -= asked.count - made
            if span is None:
                pages.give_descriptor()
            else:
                if made < asked.count:
                    pages.give_back(span.grant, made, asked.count - made)
                pages.give_up(span)
            if self._behaviour.put_index_back and state.next_index == end:
                state.next_index = index
            raise
        self._table.grant(span)
        state.add(span.grant)
        pages.check_books()
        return Allocated(index, span.grant.refs.tobytes())

    def _reserve_some(self, span: Pages, wanted: int) -> None:
        """Take references for the next pages of an ALLOC of `wanted` pages."""
        some = min(_PERMITTED_AT_ONCE, wanted - len(span.grant.refs))
        try:
            self._table.reserve(span, some)
        except TableFull:
            raise self._no_references(wanted) from None
        self._pages.count += some
        self._pages.coming -= some

    def _no_references(self, count: int) -> DeviceError:
        usage = self._table.usage()
        return DeviceError(
            errno.ENOSPC,
            f"{count} references were asked for, and the domain's grant table has {usage.live} of "
            f"{usage.capacity} in use (this is not the limit of pages, which has room)",
        )

    def _check_limit(self, count: int) -> None:
        if count > self.limit:
            raise DeviceError(
                errno.ENOSPC,
                f"{asked_for(count)}, and the domain's limit is {self.limit} at once; raise the limit",
            )
        if self._pages.in_use > self.limit - count:
            lingering = sum(span.count for spans in self._pages.lingering.values() for span in spans)
            held = f", {lingering} of them released here but still mapped by a peer" if lingering else ""
            raise DeviceError(
                errno.ENOSPC,
                f"{asked_for(count)}, and {self._pages.in_use} of the domain's limit of {self.limit} are in use{held};"
                " free some, or raise the limit",
            )

    # DEALLOC_GREF: off the file's list. What is mapped lives on.

    def _dealloc(self, file: File, address: int, caller: Caller) -> int | Steps[int]:
        asked = DeallocGref.unpack_from(caller.read(address, DeallocGref.SIZE))
        steps = self._dealloc_in_steps(file, asked)
        return steps if asked.count > AT_ONCE else finish_steps(steps)

    def _dealloc_in_steps(self, file: File, asked: DeallocGref) -> Steps[int]:
        ranges = yield from self._find(file, asked.index, asked.count)
        if isinstance(ranges, int):
            what = f"{asked.count} pages at index {asked.index:#x} were to be freed"
            raise DeviceError(errno.EINVAL, f"{what}, and {why_not(asked.index, asked.count, ranges)}")
        self._pages.drop(ranges)
        return 0

    def _find(self, file: File, index: int, count: int) -> Steps[list[Range] | int]:
        """Find the pages of exactly this range, over as many ALLOCs as it takes. Else: the first index not there."""
        if not count:
            return index
        at = index
        ranges: list[Range] = []
        for each in _state(file).ranges(index, count):
            if each.alloc.index + each.page * PAGE_SIZE != at:
                break
            ranges.append(each)
            at += each.pages * PAGE_SIZE
        number = 0
        for alloc, page, pages in ranges:
            for span in self._table.spans(alloc, page, pages):
                if span is None or not span.listed:
                    return alloc.index + page * PAGE_SIZE
                page = span.page + span.count  # noqa: PLW2901  the first one that was not looked at
                number += 1
                if number % PAGES_A_STEP == 0:
                    yield
        return ranges if ranges and at == index + count * PAGE_SIZE else at

    # SET_UNMAP_NOTIFY: one promise a page, the last one made.

    def _set_notify(self, file: File, address: int, caller: Caller) -> int:
        asked = UnmapNotify.unpack_from(caller.read(address, UnmapNotify.SIZE))
        byte = asked.index % PAGE_SIZE
        found = finish_steps(self._find(file, asked.index - byte, 1))
        if isinstance(found, int):
            why = f"this file has no page at index {asked.index - byte:#x}: never allocated here, or freed already"
            raise DeviceError(errno.ENOENT, why)
        check_action(asked.action)
        promise = Promise(asked.action, byte, asked.event_channel_port, self._ports)
        try:
            if promise.byte is not None:
                self._frames.open_window(found[0].alloc.memory)
        except DeviceError:
            promise.forget()
            raise
        (span,) = self._table.isolate(*found[0])
        assert span is not None
        if span.promise is not None:
            span.promise.forget()
        span.promise = promise
        return 0

    # mmap and munmap: a mapping uses its pages as the list does.

    def mmap(self, file: File, offset: int, length: int, *, writable: bool, shared: bool) -> Plan | Steps[Plan]:
        """Map pages of this file, over as many ALLOCs as it takes. The granter may always write.

        Raises:
            DeviceError: EINVAL: no shared map. ENOENT: not all of the pages are there. EPERM: the pages are sealed.
        """
        if not shared:
            mode = file.flags & os.O_ACCMODE
            what = "a file opened O_RDONLY" if mode == os.O_RDONLY else "a private map"
            raise DeviceError(errno.EINVAL, f"granted pages are shared: {what} cannot map them; use O_RDWR, MAP_SHARED")
        steps = self._map_in_steps(file, offset, length, writable=writable)
        return steps if length > AT_ONCE * PAGE_SIZE else finish_steps(steps)

    def _map_in_steps(self, file: File, offset: int, length: int, *, writable: bool) -> Steps[Plan]:
        count = length // PAGE_SIZE
        ranges = yield from self._find(file, offset, count)
        if isinstance(ranges, int):
            raise not_there(offset, count, ranges)
        sealed = any(alloc.memory.sealed for alloc, _, _ in ranges)
        if sealed and writable:
            raise DeviceError(
                errno.EPERM,
                "a read-only grant that its peer has mapped is sealed against new writable maps, the granter's too; "
                "map it before the peer does, and keep that map",
            )
        counted: list[Range] = []
        try:
            for alloc, page, pages in ranges:
                for span in self._table.isolate(alloc, page, pages):
                    if span is None or not span.listed:  # freed meanwhile
                        raise not_there(offset, count, alloc.index)
                    span.users += 1
                    counted.append(Range(alloc, span.page, span.count))
                    if len(counted) % PAGES_A_STEP == 0:
                        yield
        except BaseException:  # the program's end, too
            self._pages.let_go_of_map(counted, unlist=False)
            raise
        pieces = [Piece(alloc.memory, page, pages) for alloc, page, pages in ranges]
        readonly = any(alloc.readonly for alloc, _, _ in ranges)
        return Plan(
            Record(file, length, ranges), pieces, writable=not sealed, granters=True, locks=readonly and not sealed
        )

    def unmapped(self, record: Record) -> None:
        """Count one user less for each page, as the last piece of this mmap is gone."""
        if record.made:
            note_placed(record)
        self._pages.let_go_of_map(cast("list[Range]", record.payload), unlist=record.ends)

    # Release: the file goes, and with it all that is on its list.

    def release(self, file: File) -> None:
        """Free everything the file still lists, in the order it was allocated."""
        self._pages.drop([Range(alloc, 0, len(alloc.refs)) for alloc in _state(file).allocs.values()])

    # Questions: the pages that are there, and their holders.

    def holders(self, file: File, index: int, count: int) -> Steps[tuple[bool, tuple[int, ...]]]:
        """Say, in steps, whether a peer holds any of these pages, and list the domains that are known to map one."""
        held = False
        mapped_by: set[int] = set()
        number = 0
        for alloc, page, pages in list(_state(file).ranges(index, count)):
            for span in self._table.spans(alloc, page, pages):
                if span is not None:
                    mapped_by.update(span.mapped_by)
                    held = held or is_held(span)
                number += 1
                if number % PAGES_A_STEP == 0:
                    yield
        return held, tuple(sorted(mapped_by))

    def when_released(self, file: File, index: int, count: int, done: Callable[[], None]) -> ReleaseWaiter:
        """Call `done` once, when no peer holds any of these pages. If none does now, call it at once."""
        return self._pages.releases.wait(list(_state(file).ranges(index, count)), done)

    def grants(self) -> list[GrantInfo]:
        """List every granted page, also the released ones that linger."""
        return list(self.each_grant())

    def each_grant(self) -> Iterator[GrantInfo]:
        """List the pages that are granted now, one after the other, without those that are given back meanwhile."""
        for ref, span in self._table.each():
            alloc = span.grant
            yield GrantInfo(
                ref=ref,
                peer=alloc.domid,
                writable=not alloc.readonly,
                opener=alloc.file.opener,
                users=span.users,
                mapped_by=span.mapped_by,
                held=is_held(span),
                age=clock.now() - alloc.born,
            )


def _state(file: File) -> FileState:
    return cast("FileState", file.state)
