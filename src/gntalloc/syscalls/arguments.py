"""Choose the memory that goes along with an ioctl.

A driver reads and writes its caller's memory while it works, and the machine must not wait for the memory of any
program. So the supervisor copies the memory that a request may need before it asks, with the rights that the program
has there. Afterwards it writes back the bytes that the driver wrote. Memory that is missing or not writable is not
sent, and the driver finds that out in its own order.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.abi import evtchn, gntalloc, gntdev, privcmd
from gntalloc.maps import PAGE_SIZE
from gntalloc.wire.memory import MAX_REGIONS, Region
from gntalloc.wire.stream import MAX_PAYLOAD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc.syscalls.memory import Memory

__all__ = ["regions_of"]

_COUNT_AT_4 = Struct("=4xI")
_COUNT_AT_0 = Struct("=I")
_MOST = MAX_PAYLOAD // 2  # bytes of memory with one request, so that the message has room for the rest


class _Shape(NamedTuple):
    """Describe an argument: its first `size` bytes tell `whole` its length, and the first `written` are written."""

    size: int
    whole: Callable[[bytes], int] | None = None
    written: Callable[[bytes], int] | None = None


def _alloc(head: bytes) -> int:
    count: int = _COUNT_AT_4.unpack_from(head)[0]
    return max(gntalloc.AllocGref.SIZE, gntalloc.AllocGref.REFS_OFFSET + 4 * count)


def _map(head: bytes) -> int:
    count: int = _COUNT_AT_0.unpack_from(head)[0]
    return max(gntdev.MapGrantRef.SIZE, gntdev.MapGrantRef.REFS_OFFSET + gntdev.GrantRef.SIZE * count)


def _all_of_it(head: bytes) -> int:
    return len(head)


_SHAPES: dict[tuple[str, int], _Shape] = {
    (gntalloc.DEVICE, gntalloc.ALLOC_GREF): _Shape(gntalloc.AllocGref.SIZE, _alloc, _alloc),
    (gntalloc.DEVICE, gntalloc.DEALLOC_GREF): _Shape(gntalloc.DeallocGref.SIZE),
    (gntalloc.DEVICE, gntalloc.SET_UNMAP_NOTIFY): _Shape(gntalloc.UnmapNotify.SIZE),
    (gntdev.DEVICE, gntdev.MAP_GRANT_REF): _Shape(gntdev.MapGrantRef.SIZE, _map, _all_of_it),
    (gntdev.DEVICE, gntdev.UNMAP_GRANT_REF): _Shape(gntdev.UnmapGrantRef.SIZE),
    (gntdev.DEVICE, gntdev.GET_OFFSET_FOR_VADDR): _Shape(gntdev.GetOffsetForVaddr.SIZE, None, _all_of_it),
    (gntdev.DEVICE, gntdev.SET_UNMAP_NOTIFY): _Shape(gntdev.UnmapNotify.SIZE),
    **{(evtchn.DEVICE, request): _Shape(request >> 16 & 0x3FFF) for request in evtchn.IOCTLS},
}


def regions_of(name: str, request: int, address: int, memory: Memory, thread: int) -> list[Region]:
    """Copy the memory that goes with this request to the device `name`."""
    shape = _SHAPES.get((name, request))
    if shape is not None:
        return _argument(shape, address, memory, thread)
    if (name, request) == (gntdev.DEVICE, gntdev.GRANT_COPY):
        return _regions(_copy_ranges(address, memory, thread), memory, thread)
    if (name, request) == (privcmd.DEVICE, privcmd.HYPERCALL):
        return _regions(_hypercall_ranges(address, memory, thread), memory, thread)
    return []


def _argument(shape: _Shape, address: int, memory: Memory, thread: int) -> list[Region]:
    data = memory.read(thread, address, shape.size)
    if len(data) == shape.size and shape.whole is not None:
        whole = min(shape.whole(data), _MOST)
        if whole > len(data):
            data += memory.read(thread, address + len(data), whole - len(data))
    if not data:
        return []
    if shape.written is None or len(data) < shape.size:
        return [_region(address, data, writable=False)]
    wanted = min(shape.written(data[: shape.size]), len(data))
    written = memory.writable(thread, address, wanted)
    regions = [_region(address, data[:written], writable=True)] if written else []
    if written < len(data):
        regions.append(_region(address + written, data[written:], writable=False))
    return regions


def _region(address: int, data: bytes, *, writable: bool) -> Region:
    return Region(address, bytearray(data), writable=writable)


class _Range(NamedTuple):
    """Name a range of bytes that a request names somewhere in its argument."""

    start: int
    end: int
    written: bool


def _copy_ranges(address: int, memory: Memory, thread: int) -> Iterator[_Range]:
    """Give the ranges of a GRANT_COPY: the argument, its segments, and the local side of each."""
    head = memory.read(thread, address, gntdev.GrantCopy.SIZE)
    yield _Range(address, address + len(head), written=False)
    if len(head) < gntdev.GrantCopy.SIZE:
        return
    asked = gntdev.GrantCopy.unpack_from(head)
    size = gntdev.GrantCopySegment.SIZE
    table = memory.read(thread, asked.segments, min(asked.count * size, _MOST))
    yield _Range(asked.segments, asked.segments + len(table), written=True)
    for at in range(0, len(table) - size + 1, size):
        segment = gntdev.GrantCopySegment.unpack_from(table, at)
        if not segment.flags & gntdev.COPY_SOURCE_GREF:
            yield _Range(segment.source, segment.source + segment.len, written=False)
        if not segment.flags & gntdev.COPY_DEST_GREF:
            yield _Range(segment.dest, segment.dest + segment.len, written=True)


def _hypercall_ranges(address: int, memory: Memory, thread: int) -> Iterator[_Range]:
    """Give the ranges of a hypercall: the argument, and the struct that it points to if the call is answered."""
    head = memory.read(thread, address, privcmd.Hypercall.SIZE)
    yield _Range(address, address + len(head), written=False)
    if len(head) == privcmd.Hypercall.SIZE:
        call = privcmd.Hypercall.unpack_from(head)
        if call.op == privcmd.DOMCTL:
            yield _Range(call.arg0, call.arg0 + privcmd.DOMCTL_SIZE, written=True)
        elif call.op == privcmd.EVENT_CHANNEL_OP:
            yield _Range(call.arg1, call.arg1 + privcmd.EvtchnStatus.SIZE, written=True)


def _regions(ranges: Iterator[_Range], memory: Memory, thread: int) -> list[Region]:
    """Make disjoint regions, page by page, of ranges that may overlap."""
    pieces: dict[int, list[int]] = {}  # page -> first byte, end, whether any of it is written
    for start, end, written in ranges:
        at = start
        while at < min(end, 1 << 64):
            page, begin = at - at % PAGE_SIZE, at
            at = min(end, page + PAGE_SIZE)
            known = pieces.setdefault(page, [begin, at, False])
            known[:] = min(known[0], begin), max(known[1], at), known[2] or written
    regions: list[Region] = []
    room = _MOST
    for begin, end, wanted in _together(sorted(map(tuple, pieces.values()))):
        if room < end - begin or len(regions) >= MAX_REGIONS:
            break
        data = memory.read(thread, begin, end - begin)
        if len(data) == end - begin and (not wanted or memory.writable(thread, begin, end - begin) == end - begin):
            room -= len(data)
            regions.append(_region(begin, data, writable=wanted))
            continue
        for at in range(begin - begin % PAGE_SIZE, end, PAGE_SIZE):  # not all of it is there: page by page
            start = max(at, begin)
            data = memory.read(thread, start, min(at + PAGE_SIZE, end) - start)
            if data and len(regions) < MAX_REGIONS:
                room -= len(data)
                writable = bool(wanted and memory.writable(thread, start, 1))
                regions.append(_region(start, data, writable=writable))
    return regions


def _together(pieces: list[tuple[int, ...]]) -> Iterator[_Range]:
    """Join pieces of neighbouring pages where they touch and are used alike."""
    run: _Range | None = None
    for begin, end, written in pieces:
        if run is not None and run.end == begin and run.written == bool(written) and end - run.start <= _MOST:
            run = run._replace(end=end)
            continue
        if run is not None:
            yield run
        run = _Range(begin, end, bool(written))
    if run is not None:
        yield run
