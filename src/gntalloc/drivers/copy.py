"""Serve GRANT_COPY: copy between a program's memory and pages that others granted, without mapping them.

A segment is one copy of at most a page, with a granted page on one side or both. Where its local side crosses a page
boundary it becomes two operations. Operations are carried out sixteen at a time. An impossible segment fails the whole
call with an errno. Then the operations before it in the same sixteen have not been carried out, though their status
says that all is well. A refusal by the hypervisor is no error of the call: the segment's status tells it.

If no segment is wrong, no program can see these sixteens, and a call of few segments is copied at once. A longer one
is done in steps, a sixteen each, as Xen continues a long hypercall: other programs are served in between.

Sources: Linux's gntdev.c as of 6.1 (order of checks, batches), Xen's common/grant_table.c (statuses).
"""

from __future__ import annotations

import errno
import logging
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.abi.gntdev import COPY_DEST_GREF, COPY_SOURCE_GREF, ForeignPage, GrantCopy, GrantCopySegment
from gntalloc.abi.grants import DOMID_SELF, GENERAL_ERROR, OKAY
from gntalloc.errors import DeviceError
from gntalloc.hypervisor.grants import MapRefused
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gntalloc.drivers.chardev import Caller, Frames
    from gntalloc.drivers.grefs import Pages
    from gntalloc.hypervisor.domains import Hypervisor
    from gntalloc.steps import Steps

__all__ = ["MAX_SEGMENTS", "Copier"]

log = logging.getLogger("gntalloc.machine")

MAX_SEGMENTS = 4096  # of one call; Linux has no such limit
BATCH = 16
_AT_ONCE = 128  # segments at most: 512 KiB
_STATUS = Struct("=h")
_OKAY = _STATUS.pack(OKAY)
_SEGMENT = GrantCopySegment.LAYOUT
_WORD, _PLACE = Struct("=Q"), ForeignPage.LAYOUT

Place = tuple[int, int, int]
"""A place in a granted page: reference, offset, and the granter's domid."""

Side = int | Place
"""An address in the caller's memory, or a place in a granted page."""


class Operation(NamedTuple):
    """Name one copy, within one page on either side. `status` is the address of the segment's status."""

    source: Side
    dest: Side
    length: int
    status: int


class Copier:
    """Copy for domain `domid`, by grants that others gave it."""

    def __init__(self, domid: int, hypervisor: Hypervisor[Pages], frames: Frames) -> None:
        self._domid = domid
        self._hypervisor = hypervisor
        self._frames = frames

    def copy(self, address: int, caller: Caller) -> int | Steps[int]:
        """Serve one GRANT_COPY, or give the steps to that. The result is 0.

        Raises:
            DeviceError: here, or in a step. EINVAL: a segment is impossible, or there are too many. EFAULT: the memory
                is not the caller's.
        """
        asked = GrantCopy.unpack_from(caller.read(address, GrantCopy.SIZE))
        if asked.count > MAX_SEGMENTS:
            why = f"{asked.count} segments were given, and {MAX_SEGMENTS} are the most of one call; make several"
            raise DeviceError(errno.EINVAL, why)
        if self._copy_at_once(asked, caller):
            return 0
        return self._copy_in_steps(asked, caller)

    def _copy_in_steps(self, asked: GrantCopy, caller: Caller) -> Steps[int]:
        batch: list[Operation] = []
        for at, segment in _segments(asked, caller):
            for operation in _operations(at, segment, caller):
                if len(batch) == BATCH:
                    self._carry_out(batch, caller)
                    batch = []
                    yield
                source, dest, _, _ = operation
                if isinstance(source, int):
                    caller.read(source, 1)  # is it there at all?
                if isinstance(dest, int):
                    caller.read(dest, 1)
                batch.append(operation)
        self._carry_out(batch, caller)
        return 0

    def _copy_at_once(self, asked: GrantCopy, caller: Caller) -> bool:
        """Copy in few and large steps, if all segments go one way and none is wrong, as backends ask.

        False: the call is another. Then all is done step by step, so that faults come in their order.
        """
        size = GrantCopySegment.SIZE
        if not 0 < asked.count <= _AT_ONCE:
            return False
        try:
            table = bytearray(caller.read(asked.segments, asked.count * size))
            pages, runs, to_them = self._plan(table)
            data = [caller.read(start, end - start) for start, end in runs] if to_them else []
            caller.write(asked.segments, bytes(table))  # its statuses say OKAY
            if to_them:
                _spread(b"".join(data), pages)
                return True
            gathered, at = b"".join(pages), 0
            for start, end in runs:
                caller.write(start, gathered[at : at + end - start])
                at += end - start
        except (DeviceError, MapRefused, _Unusual):
            return False
        return True

    def _plan(self, table: bytearray) -> tuple[list[memoryview], list[tuple[int, int]], bool]:
        """Give the granted side of each segment, the local sides (those that touch as one), and the direction."""
        pages: list[memoryview] = []
        runs: list[tuple[int, int]] = []
        way = _SEGMENT.unpack_from(table)[3]
        if way not in {COPY_SOURCE_GREF, COPY_DEST_GREF}:
            raise _Unusual
        to_them = way == COPY_DEST_GREF
        begin = end = -1
        for number, (source, dest, length, flags, _) in enumerate(_SEGMENT.iter_unpack(table)):
            if flags != way:
                raise _Unusual
            local, word = (source, dest) if to_them else (dest, source)
            place = _place(word, length)
            if self._may_be_local(place):
                raise _Unusual
            pages.append(self._page(place, writable=to_them)[:length])
            if local != end:
                if begin >= 0:
                    runs.append((begin, end))
                begin = local
            end = local + length
            _STATUS.pack_into(table, number * GrantCopySegment.SIZE + GrantCopySegment.STATUS_OFFSET, OKAY)
        runs.append((begin, end))
        return pages, runs, to_them

    def _may_be_local(self, place: Place) -> bool:
        """Say whether a program of this domain may map the page: then a copy may see the result of an earlier one."""
        ref, _, granter = place
        return granter in {DOMID_SELF, self._domid} or self._hypervisor.maps(self._domid, granter, ref)

    def _carry_out(self, batch: list[Operation], caller: Caller) -> None:
        """Carry out a batch. A segment's status is that of its first operation that failed."""
        for operation in batch:
            try:
                self._copy_one(operation, caller)
            except MapRefused as refusal:
                log.debug("domain %d, a segment of GRANT_COPY: %s", self._domid, refusal.why)
                if _STATUS.unpack(caller.read(operation.status, _STATUS.size))[0] == OKAY:
                    caller.write(operation.status, _STATUS.pack(refusal.status))

    def _copy_one(self, operation: Operation, caller: Caller) -> None:
        source, dest, length, _ = operation
        there = None if isinstance(source, int) else self._page(source, writable=False)
        here = None if isinstance(dest, int) else self._page(dest, writable=True)
        if there is None:
            data: bytes | memoryview = caller.read(source, length)  # type: ignore[arg-type]  # not both can be None
        else:
            data = there[:length]
        if here is None:
            caller.write(dest, bytes(data))  # type: ignore[arg-type]
        else:
            here[:length] = data

    def _page(self, place: Place, *, writable: bool) -> memoryview:
        """Give the memory of a granted page from its offset on. It is used at once, so nothing is mapped for it."""
        ref, offset, domid = place
        granter = self._domid if domid == DOMID_SELF else domid
        span, page = self._hypervisor.look(self._domid, granter, ref, writable=writable)
        try:
            self._frames.open_window(span.grant.memory)
        except DeviceError as error:  # the granter may have caused this: other segments need not fail
            raise MapRefused(GENERAL_ERROR, str(error)) from error
        return self._frames.page(span.grant.memory, page)[offset:]


class _Unusual(Exception):
    """The call is not one that a backend makes."""


def _spread(data: bytes, pages: list[memoryview]) -> None:
    at = 0
    for page in pages:
        page[:] = data[at : at + len(page)]
        at += len(page)


def _segments(asked: GrantCopy, caller: Caller) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Read the segments with their addresses, a batch at a time, or one by one if a batch is not all there."""
    size = GrantCopySegment.SIZE
    for first in range(0, asked.count, BATCH):
        count = min(BATCH, asked.count - first)
        address = asked.segments + first * size
        try:
            table = caller.read(address, count * size)
        except DeviceError:
            for at in range(address, address + count * size, size):
                yield at, _SEGMENT.unpack(caller.read(at, size))
        else:
            for number, segment in enumerate(_SEGMENT.iter_unpack(table)):
                yield address + number * size, segment


def _operations(address: int, segment: tuple[int, ...], caller: Caller) -> Sequence[Operation]:
    """Split the segment at `address` into its copies."""
    from_, to, length, flags, _ = segment
    if not flags & (COPY_SOURCE_GREF | COPY_DEST_GREF):
        raise DeviceError(errno.EINVAL, "a segment copies between two local buffers; use memcpy for that")
    source: Side = _place(from_, length) if flags & COPY_SOURCE_GREF else from_
    dest: Side = _place(to, length) if flags & COPY_DEST_GREF else to
    status = address + GrantCopySegment.STATUS_OFFSET
    caller.write(status, _OKAY)
    if not length:
        return ()
    if length <= _room(source) and length <= _room(dest):
        return (Operation(source, dest, length, status),)
    operations = []
    while length:
        size = min(length, _room(source), _room(dest))
        operations.append(Operation(source, dest, size, status))
        source, dest, length = _advance(source, size), _advance(dest, size), length - size
    return operations


def _place(word: int, length: int) -> Place:
    ref, offset, domid = _PLACE.unpack(_WORD.pack(word))
    if offset + length > PAGE_SIZE:
        raise DeviceError(errno.EINVAL, f"{length} bytes at {offset} of a granted page go beyond its end")
    return ref, offset, domid


def _advance(side: Side, done: int) -> Side:
    return side + done if isinstance(side, int) else (side[0], side[1] + done, side[2])


def _room(side: Side) -> int:
    """Count the bytes until the end of the page. A granted page's end was checked already."""
    return PAGE_SIZE - side % PAGE_SIZE if isinstance(side, int) else PAGE_SIZE
