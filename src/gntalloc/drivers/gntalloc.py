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
from struct import pack
from typing import TYPE_CHECKING, cast

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
from gntalloc.abi.grants import DOMID_FIRST_RESERVED
from gntalloc.drivers.behaviour import OURS, Behaviour
from gntalloc.drivers.chardev import Caller, Extent, File, Frame, Frames, Plan, Record, Serve, pieces_of
from gntalloc.drivers.grefs import FileState, GrantInfo, Gref
from gntalloc.drivers.notify import PortReferences, Promise, check_action, clear_byte
from gntalloc.drivers.releases import Releases
from gntalloc.errors import BooksWrong, DeviceError
from gntalloc.hypervisor.grants import GrantTable, TableFull
from gntalloc.maps import PAGE_SIZE
from gntalloc.steps import Later, Steps, batches, finish, finish_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from gntalloc.drivers.releases import ReleaseWaiter

__all__ = ["DEFAULT_LIMIT", "GntallocDriver"]

DEFAULT_LIMIT = 1024
_AT_ONCE = 256  # so many pages are made, mapped or freed in one step; more take several
_NONE: dict[int, Gref] = {}


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
    """

    name = DEVICE
    unknown_request = errno.ENOTTY

    def __init__(
        self,
        table: GrantTable[Frame],
        frames: Frames,
        ports: PortReferences,
        *,
        limit: int = DEFAULT_LIMIT,
        behaviour: Behaviour = OURS,
        later: Later = finish,
    ) -> None:
        self.limit = limit
        self.in_use = 0
        self._later = later
        self._coming = 0  # counted as in use, and not made yet
        self._table = table
        self._frames = frames
        self._ports = ports
        self._behaviour = behaviour
        self._grefs: dict[Gref, None] = {}  # all there are, listed, only mapped, or lingering
        self._lingering: dict[Extent, dict[int, Gref]] = {}  # by reference
        self._hidden: dict[Extent, dict[int, Gref]] = {}  # of these, those that no domain maps: their peer hides
        self._releases = Releases(self._is_held, later)
        table.on_idle = self._peer_let_go
        self._requests = {ALLOC_GREF: self._alloc, DEALLOC_GREF: self._dealloc, SET_UNMAP_NOTIFY: self._set_notify}

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
        state = _state(file)
        head = caller.read(address, AllocGref.SIZE)
        asked = AllocGref.unpack_from(head)
        if self._behaviour.strict:
            _check_sense(asked, self._table.owner)
        self._check_limit(asked.count)
        if asked.count > _AT_ONCE:
            return self._alloc_in_steps(file, address, caller, head)
        index = state.next_index
        try:
            grefs = self._make(file, index, asked)
        except DeviceError:
            if not self._behaviour.put_index_back:
                state.next_index += asked.count * PAGE_SIZE
            raise
        self.in_use += asked.count
        state.next_index += asked.count * PAGE_SIZE
        state.grefs.update(zip(range(index, state.next_index, PAGE_SIZE), grefs, strict=True))
        self._grefs.update(dict.fromkeys(grefs))
        try:
            _answer_alloc(address, caller, head, index, grefs)
        except DeviceError:
            # The program does not know the index, so it could not free them.
            if self._behaviour.undo_unwritable_reply:
                self._drop(grefs)
                # A page whose reference a peer has guessed lingers, and keeps its index.
                if self._behaviour.put_index_back and not any(gref in self._grefs for gref in grefs):
                    state.next_index = index
            raise
        self._check_books()
        return 0

    def _alloc_in_steps(self, file: File, address: int, caller: Caller, head: bytes) -> Steps[int]:
        """Allocate many pages. Nobody else can have their indexes, or their part of the limit, in between."""
        state, asked = _state(file), AllocGref.unpack_from(head)
        index, readonly, made = state.next_index, not asked.flags & FLAG_WRITABLE, list[Gref]()
        end = state.next_index = index + asked.count * PAGE_SIZE
        self.in_use += asked.count
        self._coming += asked.count
        extent: Extent | None = None
        try:
            extent = yield from self._frames.begin_allocate(
                asked.count, self.look_again, writable=not readonly, first=index // PAGE_SIZE
            )
            for pages in batches(range(asked.count)):
                made += self._grant(file, index, extent, pages, asked)
                self._coming -= len(pages)
                yield
            _answer_alloc(address, caller, head, index, made)
        except BaseException as error:  # the program's end, too
            unmade = asked.count - len(made)
            self._coming -= unmade
            self.in_use -= unmade
            if extent is not None and unmade:
                self._frames.give_back(extent, len(made), unmade)
            if unmade or self._behaviour.undo_unwritable_reply or not isinstance(error, DeviceError):
                self._later(self._drop_in_steps(made))
            left = any(gref in self._grefs for gref in made)
            if self._behaviour.put_index_back and state.next_index == end and not left:
                state.next_index = index
            raise
        self._check_books()
        return 0

    def _grant(self, file: File, index: int, extent: Extent, pages: list[int], asked: AllocGref) -> list[Gref]:
        """Grant these pages of an extent whose first page has this index."""
        frames, readonly = [Frame(extent, page) for page in pages], not asked.flags & FLAG_WRITABLE
        try:
            refs = self._table.permit(asked.domid, frames, readonly=readonly)
        except TableFull:
            raise self._no_references(asked.count) from None
        now, state = clock.now(), _state(file)
        grefs = [
            Gref(file, state, index + frame.page * PAGE_SIZE, frame, asked.domid, readonly, ref, now)
            for frame, ref in zip(frames, refs, strict=True)
        ]
        for gref in grefs:
            state.grefs[gref.index] = gref
            self._grefs[gref] = None
        return grefs

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
                f"{_asked_for(count)}, and the domain's limit is {self.limit} at once; raise the limit",
            )
        if self.in_use > self.limit - count:
            lingering = sum(map(len, self._lingering.values()))
            held = f", {lingering} of them released here but still mapped by a peer" if lingering else ""
            raise DeviceError(
                errno.ENOSPC,
                f"{_asked_for(count)}, and {self.in_use} of the domain's limit of {self.limit} are in use{held}; "
                f"free some, or raise the limit",
            )

    def _make(self, file: File, index: int, asked: AllocGref) -> list[Gref]:
        """Make all of the pages and grants, or none."""
        if not asked.count:
            return []
        readonly = not asked.flags & FLAG_WRITABLE
        extent = self._frames.allocate(asked.count, self.look_again, writable=not readonly, first=index // PAGE_SIZE)
        frames = [Frame(extent, page) for page in range(asked.count)]
        try:
            refs = self._table.permit(asked.domid, frames, readonly=readonly)
        except TableFull:
            self._frames.give_back(extent, 0, asked.count)
            raise self._no_references(asked.count) from None
        now, state = clock.now(), _state(file)
        indexes = range(index, index + asked.count * PAGE_SIZE, PAGE_SIZE)
        return [
            Gref(file, state, at, frame, asked.domid, readonly, ref, now)
            for at, frame, ref in zip(indexes, frames, refs, strict=True)
        ]

    # DEALLOC_GREF: off the file's list. What is mapped lives on.

    def _dealloc(self, file: File, address: int, caller: Caller) -> int:
        asked = DeallocGref.unpack_from(caller.read(address, DeallocGref.SIZE))
        grefs = self._find(file, asked.index, asked.count)
        if grefs is None:
            what = f"{asked.count} pages at index {asked.index:#x} were to be freed"
            raise DeviceError(errno.EINVAL, f"{what}, and {self._what_is_there(file, asked.index, asked.count)}")
        self._drop_all(grefs)
        return 0

    def _find(self, file: File, index: int, count: int) -> list[Gref] | None:
        """Find the pages of exactly this range, over as many ALLOCs as it takes. None: one is not there."""
        listed = _state(file).grefs
        if not 0 < count <= len(listed):
            return None
        grefs = list(map(listed.get, range(index, index + count * PAGE_SIZE, PAGE_SIZE)))
        return None if None in grefs else cast("list[Gref]", grefs)

    def _what_is_there(self, file: File, index: int, count: int) -> str:
        if not count:
            return "no pages is never a range"
        if index % PAGE_SIZE:
            return f"an index is a multiple of {PAGE_SIZE}"
        listed = _state(file).grefs
        missing = next(at for at in range(index, index + count * PAGE_SIZE, PAGE_SIZE) if at not in listed)
        return f"this file has no page at index {missing:#x}: never allocated here, or freed already"

    def _drop_all(self, grefs: list[Gref]) -> None:
        """Take pages off their file's list; many of them in steps, before anything else of this domain is done."""
        if len(grefs) > _AT_ONCE:
            self._later(self._drop_in_steps(grefs))
        else:
            self._drop(grefs)

    def _drop_in_steps(self, grefs: list[Gref]) -> Steps[None]:
        for some in batches(grefs):
            self._drop([gref for gref in some if gref.state.grefs.get(gref.index) is gref])
            yield

    def _drop(self, grefs: Iterable[Gref]) -> None:
        dropped = list(grefs)
        for gref in dropped:
            del gref.state.grefs[gref.index]
            if gref.users > 1:  # mapped
                gref.state.released[gref.index] = gref
        self._let_go(dropped)
        self._check_books()

    # SET_UNMAP_NOTIFY: one promise a page, the last one made.

    def _set_notify(self, file: File, address: int, caller: Caller) -> int:
        asked = UnmapNotify.unpack_from(caller.read(address, UnmapNotify.SIZE))
        byte = asked.index % PAGE_SIZE
        gref = _state(file).grefs.get(asked.index - byte)
        if gref is None:
            why = f"this file has no page at index {asked.index - byte:#x}: never allocated here, or freed already"
            raise DeviceError(errno.ENOENT, why)
        check_action(asked.action)
        promise = Promise(asked.action, byte, asked.event_channel_port, self._ports)
        try:
            if promise.byte is not None:
                self._frames.open_window(gref.frame.extent)
        except DeviceError:
            promise.forget()
            raise
        if gref.promise is not None:
            gref.promise.forget()
        gref.promise = promise
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
        count = length // PAGE_SIZE
        grefs = self._find(file, offset, count)
        if grefs is None:
            what = f"{count} pages at index {offset:#x} were to be mapped"
            raise DeviceError(errno.ENOENT, f"{what}, and {self._what_is_there(file, offset, count)}")
        pieces = pieces_of([gref.frame for gref in grefs])
        sealed = any(piece.extent.sealed for piece in pieces)
        if sealed and writable:
            raise DeviceError(
                errno.EPERM,
                "a read-only grant that its peer has mapped is sealed against new writable maps, the granter's too; "
                "map it before the peer does, and keep that map",
            )
        record = Record(file, length, grefs)
        confirm = False
        for gref in grefs:
            gref.users += 1
            confirm = confirm or gref.readonly
        confirm = confirm and not sealed
        return Plan(record, pieces, writable=not sealed, granters=True, confirm=confirm)

    def placed(self, record: Record) -> None:
        """Note that the granter has its map of these pages. Now a peer may map them read-only, which seals them."""
        for gref in cast("list[Gref]", record.payload):
            gref.frame.extent.placed[gref.frame.page] = 1

    def unmapped(self, record: Record) -> None:
        """Count one user less for each page, as the last piece of this mmap is gone."""
        grefs = cast("list[Gref]", record.payload)
        if len(grefs) > _AT_ONCE:
            self._later(self._let_go_in_steps(grefs))
        else:
            self._let_go(grefs)
            self._check_books()

    def _let_go_in_steps(self, grefs: list[Gref]) -> Steps[None]:
        for some in batches(grefs):
            self._let_go(some)
            self._check_books()
            yield

    # Release: the file goes, and with it all that is on its list.

    def release(self, file: File) -> None:
        """Free everything the file still lists, in the order it was allocated."""
        self._drop_all(list(_state(file).grefs.values()))

    # The end of a page.

    def _let_go(self, grefs: Iterable[Gref]) -> None:
        """Count one user less for each page. With its last user a grant ends, now or when the peer lets go."""
        last: list[Gref] = []
        for gref in grefs:
            gref.users -= 1
            if gref.users:
                if gref.users < 0:
                    raise BooksWrong(f"page {gref.ref} of domain {self._table.owner} has {gref.users} users")
                continue
            if gref.promise is not None:
                self._keep_promise(gref, gref.promise)
            last.append(gref)
        if not self._behaviour.count_held_pages:
            self.in_use -= len(last)
        for gref in self._end(last):
            self._lingering.setdefault(gref.frame.extent, {})[gref.ref] = gref
            gref.state.released[gref.index] = gref
            self._note_if_hidden(gref)

    def _keep_promise(self, gref: Gref, promise: Promise) -> None:
        """Clear the byte, then send the event, before the grant ends: a peer that is woken finds the page there."""
        if promise.byte is not None:
            clear_byte(self._frames, gref.frame, promise.byte)
        promise.send()

    def _end(self, grefs: Collection[Gref]) -> list[Gref]:
        """End these grants, where table and kernel agree that nobody else has the page. Return those that stay."""
        # If the locks are hidden, none names the holder. But the kernel says that the memory is open: its peer hides.
        hidden = {extent for extent in {gref.frame.extent for gref in grefs} if self._is_hidden(extent)}
        busy = [gref for gref in grefs if gref.frame.extent in hidden] if hidden else []
        others = [gref for gref in grefs if gref.frame.extent not in hidden] if hidden else grefs
        kept = set(self._table.end([gref.ref for gref in busy], busy=True))
        kept.update(self._table.end([gref.ref for gref in others]))
        self._give_back([gref for gref in grefs if gref.ref not in kept] if kept else grefs)
        return [gref for gref in grefs if gref.ref in kept] if kept else []

    def _is_hidden(self, extent: Extent) -> bool:
        return extent.lent and not extent.loans and self._frames.held(extent)

    def _give_back(self, ended: Collection[Gref]) -> None:
        """Free pages whose grants have ended, neighbours together: each emptying is a system call."""
        for extent, page, pages in pieces_of([gref.frame for gref in ended]):
            self._frames.give_back(extent, page, pages)
        for gref in ended:
            del self._grefs[gref]
            gref.state.released.pop(gref.index, None)
        if self._behaviour.count_held_pages:
            self.in_use -= len(ended)

    def _check_books(self) -> None:
        """Check that each page has one reference and counts once. Stop the machine otherwise: an ALLOC could do harm.

        This check is cheap enough for each change. `gntalloc.testing.recount` counts everything.
        """
        pages, references = len(self._grefs), self._table.live
        in_use = self.in_use - self._coming
        counted = in_use if self._behaviour.count_held_pages else pages  # Linux's has less, so it tells nothing
        if not pages == references == counted:
            owner = self._table.owner
            raise BooksWrong(f"domain {owner} has {pages} pages, {references} references, and {in_use} in use")

    def _note_if_hidden(self, gref: Gref) -> None:
        """Note a page that lingers though no domain maps it: the kernel says that a process has it all the same."""
        if not self._table.is_mapped(gref.ref):
            self._hidden.setdefault(gref.frame.extent, {})[gref.ref] = gref

    def _peer_let_go(self, entries: list[tuple[int, Frame]]) -> None:
        """Free the pages that linger no longer, and wake waiters, as no domain maps these pages any more."""
        by_extent: dict[Extent, list[Gref]] = {}
        for ref, frame in entries:
            gref = self._lingering.get(frame.extent, _NONE).get(ref)
            free = by_extent.setdefault(frame.extent, [])
            if gref is not None:
                free.append(gref)
        for extent, grefs in by_extent.items():
            self._end_lingering(extent, grefs)
            self._releases.look(extent)

    def _end_lingering(self, extent: Extent, grefs: list[Gref]) -> None:
        if not grefs:
            return
        stay = {gref.ref for gref in self._end(grefs)}
        lingering = self._lingering[extent]
        for gref in grefs:
            if gref.ref in stay:
                self._note_if_hidden(gref)
            else:
                del lingering[gref.ref]
        if not lingering:
            del self._lingering[extent]
        self._check_books()

    def look_again(self, extent: Extent) -> None:
        """Free the pages that can be freed, and wake their waiters, as the holders of this extent have changed."""
        if extent in self._hidden and not self._is_hidden(extent):
            self._later(self._look_in_steps(extent))
        else:
            self._releases.look(extent)

    def _look_in_steps(self, extent: Extent) -> Steps[None]:
        hidden = self._hidden.pop(extent, _NONE)
        for grefs in batches(hidden.values()):
            self._end_lingering(extent, grefs)
            yield
        self._releases.look(extent)

    # Questions: the pages that are there, and their holders.

    def holders(self, file: File, index: int, count: int) -> tuple[bool, tuple[int, ...]]:
        """Say whether a peer holds any of these pages, and list the domains that are known to map one."""
        return finish_steps(self.begin_to_find_holders(file, index, count))

    def begin_to_find_holders(self, file: File, index: int, count: int) -> Steps[tuple[bool, tuple[int, ...]]]:
        """Give the steps to the answer of `holders`."""
        held = False
        mapped_by: set[int] = set()
        for number, grefs in enumerate(batches(self._span(file, index, count))):
            if number:
                yield
            for gref in grefs:
                mapped_by.update(self._table.mapped_by(gref.ref))
                held = held or not gref.users
        return held or bool(mapped_by), tuple(sorted(mapped_by))

    def _is_held(self, gref: Gref) -> bool:
        """Say whether a peer holds this page."""
        return gref in self._grefs and (not gref.users or self._table.is_mapped(gref.ref))

    def _span(self, file: File, index: int, count: int) -> list[Gref]:
        """Find the pages of this range that are not free, listed or not."""
        state = _state(file)
        span = range(index, index + count * PAGE_SIZE, PAGE_SIZE)
        if count > len(state.grefs) + len(state.released):  # a program may ask for any count
            return [gref for gref in (*state.grefs.values(), *state.released.values()) if gref.index in span]
        return [gref for at in span if (gref := state.grefs.get(at) or state.released.get(at)) is not None]

    def when_released(self, file: File, index: int, count: int, done: Callable[[], None]) -> ReleaseWaiter:
        """Call `done` once, when no peer holds any of these pages. If none does now, call it at once."""
        return self._releases.wait(self._span(file, index, count), done)

    def grants(self) -> list[GrantInfo]:
        """List every granted page, also the released ones that linger."""
        now = clock.now()
        return [
            GrantInfo(
                ref=gref.ref,
                peer=gref.domid,
                writable=not gref.readonly,
                opener=gref.file.opener,
                users=gref.users,
                mapped_by=self._table.mapped_by(gref.ref),
                held=not gref.users or bool(self._table.mapped_by(gref.ref)),
                age=now - gref.born,
            )
            for gref in self._grefs
        ]


def _check_sense(asked: AllocGref, owner: int) -> None:
    """Refuse an ALLOC that Linux lets pass and that no program can have meant.

    Raises:
        DeviceError: EINVAL: it is such a one.
    """
    if not asked.count:
        raise DeviceError(errno.EINVAL, "no pages were asked for; this machine is strict, so ask for one at least")
    if asked.flags & ~FLAG_WRITABLE:
        what = f"flags {asked.flags:#x} have more than writable ({FLAG_WRITABLE})"
        raise DeviceError(errno.EINVAL, f"{what}, and this machine is strict; leave the others 0")
    if asked.domid == owner or asked.domid >= DOMID_FIRST_RESERVED:
        what = "one's own" if asked.domid == owner else "no domain's"
        raise DeviceError(
            errno.EINVAL,
            f"domid {asked.domid} is {what} number, and this machine is strict; grant to another domain, from 0 to "
            f"{DOMID_FIRST_RESERVED - 1}",
        )


def _state(file: File) -> FileState:
    return cast("FileState", file.state)


def _answer_alloc(address: int, caller: Caller, head: bytes, index: int, grefs: list[Gref]) -> None:
    """Write the answer: Linux copies all 24 bytes out, the last eight as they came in, then the references over them.

    Raises:
        DeviceError: EFAULT: the caller's memory cannot be written.
    """
    answer = AllocGref.unpack_from(head)._replace(index=index).pack()
    caller.write(address, answer + head[len(answer) :])
    if grefs:
        refs = pack(f"={len(grefs)}I", *[gref.ref for gref in grefs])
        caller.write(address + AllocGref.REFS_OFFSET, refs)


def _asked_for(count: int) -> str:
    return "1 page was asked for" if count == 1 else f"{count} pages were asked for"
