"""GRANT_COPY: copy between a program's memory and pages that others granted, without mapping them.

A segment is one copy of at most a page, with a granted page on one side or both. Where its local side crosses a page
boundary it becomes two operations. Operations are carried out sixteen at a time: when something is wrong with a segment
(an errno for the whole call) those before it in the same sixteen have not been carried out, though their status says
that all is well. What the hypervisor refuses is no error of the call; the segment's status says it.

Sources: Linux's gntdev.c as of 6.1 (order of checks, batches), Xen's common/grant_table.c (statuses).
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.abi.gntdev import COPY_DEST_GREF, COPY_SOURCE_GREF, ForeignPage, GrantCopy, GrantCopySegment
from gntalloc.abi.grants import DOMID_SELF, GENERAL_ERROR, OKAY
from gntalloc.errors import DeviceError
from gntalloc.hypervisor.grants import MapRefused
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc.drivers.chardev import Caller, Frame, Frames
    from gntalloc.hypervisor.domains import Handle, Hypervisor

__all__ = ["MAX_SEGMENTS", "Copier"]

MAX_SEGMENTS = 4096  # of one call, so that it does not keep everybody else waiting; Linux has no such limit
BATCH = 16
_STATUS = Struct("=h")

Side = int | ForeignPage
"""An address in the caller's memory, or a place in a granted page."""


class Operation(NamedTuple):
    """One copy, within one page on either side. `status` is where the segment's status lies."""

    source: Side
    dest: Side
    length: int
    status: int


class Copier:
    """What domain `domid` copies, by grants that others gave it."""

    def __init__(self, domid: int, hypervisor: Hypervisor[Frame], frames: Frames) -> None:
        self._domid = domid
        self._hypervisor = hypervisor
        self._frames = frames

    def copy(self, address: int, caller: Caller) -> None:
        """Serve one GRANT_COPY.

        Raises:
            DeviceError: EINVAL a segment that cannot be, or too many; EFAULT.
        """
        asked = GrantCopy.unpack_from(caller.read(address, GrantCopy.SIZE))
        if asked.count > MAX_SEGMENTS:
            why = f"{asked.count} segments were given, and {MAX_SEGMENTS} are the most of one call; make several"
            raise DeviceError(errno.EINVAL, why)
        batch: list[Operation] = []
        for number in range(asked.count):
            for operation in self._operations(asked.segments + number * GrantCopySegment.SIZE, caller):
                if len(batch) == BATCH:
                    self._carry_out(batch, caller)
                    batch = []
                for side in (operation.source, operation.dest):
                    if isinstance(side, int):
                        caller.read(side, 1)  # is it there at all?
                batch.append(operation)
        self._carry_out(batch, caller)

    def _operations(self, address: int, caller: Caller) -> Iterator[Operation]:
        """The copies of the segment at `address`."""
        segment = GrantCopySegment.unpack_from(caller.read(address, GrantCopySegment.SIZE))
        if not segment.flags & (COPY_SOURCE_GREF | COPY_DEST_GREF):
            raise DeviceError(errno.EINVAL, "a segment copies between two local buffers; use memcpy for that")
        source = _side(segment.source, segment.len, granted=bool(segment.flags & COPY_SOURCE_GREF))
        dest = _side(segment.dest, segment.len, granted=bool(segment.flags & COPY_DEST_GREF))
        status = address + GrantCopySegment.STATUS_OFFSET
        caller.write(status, _STATUS.pack(OKAY))
        done = 0
        while done < segment.len:
            from_, to = _advance(source, done), _advance(dest, done)
            length = min(segment.len - done, _room(from_), _room(to))
            yield Operation(from_, to, length, status)
            done += length

    def _carry_out(self, batch: list[Operation], caller: Caller) -> None:
        """A segment's status is that of its first operation that failed."""
        for operation in batch:
            try:
                self._copy_one(operation, caller)
            except MapRefused as refusal:
                if _STATUS.unpack(caller.read(operation.status, _STATUS.size))[0] == OKAY:
                    caller.write(operation.status, _STATUS.pack(refusal.status))

    def _copy_one(self, operation: Operation, caller: Caller) -> None:
        source, dest, length, _ = operation
        handles: list[Handle[Frame]] = []
        try:
            there = self._page(source, handles, writable=False)
            here = self._page(dest, handles, writable=True)
            data = caller.read(source, length) if isinstance(source, int) else bytes(there[:length])
            if isinstance(dest, int):
                caller.write(dest, data)
            else:
                here[:length] = data
        finally:
            for handle in handles:
                self._hypervisor.unmap(handle)

    def _page(self, side: Side, handles: list[Handle[Frame]], *, writable: bool) -> memoryview:
        """The memory of a granted page from its offset on; what was mapped for it joins `handles`."""
        if isinstance(side, int):
            return memoryview(b"")
        granter = self._domid if side.domid == DOMID_SELF else side.domid
        handle = self._hypervisor.map(self._domid, granter, side.ref, writable=writable)
        handles.append(handle)
        try:
            self._frames.open_window(handle.frame.extent)
        except DeviceError as error:  # its granter may have seen to that: no reason to fail other segments
            raise MapRefused(GENERAL_ERROR, str(error)) from error
        return self._frames.page(*handle.frame)[side.offset :]


def _side(word: int, length: int, *, granted: bool) -> Side:
    if not granted:
        return word
    place = ForeignPage.from_word(word)
    if place.offset + length > PAGE_SIZE:
        raise DeviceError(errno.EINVAL, f"{length} bytes at {place.offset} of a granted page go beyond its end")
    return place


def _advance(side: Side, done: int) -> Side:
    return side + done if isinstance(side, int) else side._replace(offset=side.offset + done)


def _room(side: Side) -> int:
    """Bytes until the end of the page; a granted page's end was looked at already."""
    return PAGE_SIZE - side % PAGE_SIZE if isinstance(side, int) else PAGE_SIZE
