"""blkfront's core: requests in flight, the pages that carry their data, responses. Pure: nobody waits or is woken here.

All data goes through a fixed set of pages, last used first, so that a backend that keeps pages mapped has few to map.
A request takes as many of them as its data needs, and one more for each 512 segments that it names indirectly.

What a backend says is believed as far as it can be: the id of a response must be that of a request in flight, and no
request is answered twice.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from gntalloc.errors import PeerBroke
from gntalloc.frontend.blkif import (
    ERROR,
    RESPONSE,
    SECTOR,
    SEGMENT,
    SEGMENTS,
    SEGMENTS_OF_A_PAGE,
    Operation,
    Request,
    Response,
    Segment,
    pack_direct,
    pack_indirect,
    pack_segments,
)
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gntalloc.frontend.ring import Front

__all__ = ["Flight", "Flights"]

_LAST = PAGE_SIZE // SECTOR - 1


class Flight:
    """One request, from when it was put into the ring on.

    Attributes:
        operation: what was asked.
        sector: where it begins, in units of 512 bytes.
        length: bytes.
        done: the backend has answered.
        status: its answer: 0, or a negative number of blkif's.
        abandoned: nobody waits for it any more.
    """

    __slots__ = ("abandoned", "buffer", "done", "length", "operation", "pages", "raw", "sector", "segments", "status")

    def __init__(self, operation: Operation, sector: int, length: int, buffer: memoryview | None) -> None:
        self.operation = operation
        self.sector = sector
        self.length = length
        self.buffer = buffer  # where a READ's data goes
        self.pages: list[int] = []
        self.segments = 0
        self.raw = b""
        self.status = 0
        self.done = False
        self.abandoned = False

    def abandon(self) -> None:
        """Do not touch the buffer any more, and do not ask again after a reconnection."""
        self.abandoned = True
        self.buffer = None


class Flights:
    """All requests of one ring.

    Args:
        ring: this end of it.
        memory: the pages for data.
        refs: their references.
        handle: the device's number, which every request names.
        segments: the most that one request may have.
    """

    def __init__(self, ring: Front, memory: memoryview, refs: Sequence[int], handle: int, segments: int) -> None:
        self._memory = memory
        self._refs = refs
        self._handle = handle & 0xFFFF
        self._free = list(range(len(refs) - 1, -1, -1))
        self._scattered = False  # a request has got pages that are not neighbours
        self._whole = pack_segments([Segment(ref, 0, _LAST) for ref in refs])
        self._ids = itertools.count(1)
        self.in_flight: dict[int, Flight] = {}
        self._use(ring, segments)

    def _use(self, ring: Front, segments: int) -> None:
        self.ring = ring
        spare = 1 if segments > SEGMENTS else 0  # the largest needs one page more for its segments
        self._segments = max(1, min(segments, SEGMENTS_OF_A_PAGE, len(self._refs) - spare))

    @property
    def most(self) -> int:
        """Bytes of the largest request."""
        return self._segments * PAGE_SIZE

    def has_room(self, length: int) -> bool:
        """Whether a request of so many bytes can be put now."""
        pages = -(-length // PAGE_SIZE)
        return self.ring.room > 0 and pages + (pages > SEGMENTS) <= len(self._free)

    def read(self, sector: int, buffer: memoryview, operation: Operation = Operation.READ) -> Flight:
        """Ask for as many bytes as the buffer has room for; they are there when the flight is done."""
        return self._put_data(Flight(operation, sector, len(buffer), buffer))

    def write(self, sector: int, data: memoryview) -> Flight:
        """Write bytes; they were copied when this returns."""
        flight = self._put_data(Flight(Operation.WRITE, sector, len(data), None))
        for there, here, size in _pieces(flight.pages, len(data)):  # it is not shown yet
            self._memory[there : there + size] = data[here : here + size]
        return flight

    def plain(self, operation: Operation, sector: int = 0, length: int = 0) -> Flight:
        """FLUSH, or DISCARD of so many bytes."""
        flight = Flight(operation, sector, length, None)
        id_ = next(self._ids)
        request = Request(operation, id_, sector, handle=self._handle, sectors=length // SECTOR)
        self._put(flight, id_, request.pack())
        return flight

    def collect(self) -> list[Flight]:
        """Take the responses that are there. Which flights they were for.

        Raises:
            PeerBroke: a response to nothing; or see `Front.ready`.
        """
        finished = []
        while ready := self.ring.ready():
            for _ in range(ready):
                response = Response.parse(self.ring.take(RESPONSE))
                flight = self.in_flight.pop(response.id, None)
                if flight is None:
                    raise PeerBroke(f"the backend has answered request {response.id}, which is not in flight")
                self._land(flight, response.status)
                finished.append(flight)
        return finished

    def restart(self, ring: Front, segments: int) -> list[Flight]:
        """Put all that is in flight into another ring, of another backend. Those that it cannot take have failed."""
        old, self.in_flight = self.in_flight, {}
        self._use(ring, segments)
        failed = []
        for id_, flight in old.items():
            if flight.abandoned or flight.segments > max(segments, SEGMENTS):
                self._land(flight, ERROR)
                failed.append(flight)
            else:
                self.ring.put(flight.raw)
                self.in_flight[id_] = flight
        return failed

    def _put_data(self, flight: Flight) -> Flight:
        id_ = next(self._ids)
        count = -(-flight.length // PAGE_SIZE)
        pages = flight.pages = self._take(count)
        if _neighbours(pages):
            segments = self._whole[pages[0] * SEGMENT : (pages[0] + count) * SEGMENT]
        else:
            self._scattered = True
            segments = b"".join([self._whole[page * SEGMENT : (page + 1) * SEGMENT] for page in pages])
        if rest := flight.length % PAGE_SIZE:
            last = Segment(self._refs[pages[-1]], 0, rest // SECTOR - 1)
            segments = segments[:-SEGMENT] + pack_segments((last,))
        flight.segments = count
        if count <= SEGMENTS:
            raw = pack_direct(flight.operation, id_, flight.sector, self._handle, segments)
        else:
            page = self._free.pop()
            self._memory[page * PAGE_SIZE : page * PAGE_SIZE + len(segments)] = segments
            raw = pack_indirect(flight.operation, id_, flight.sector, self._handle, count, (self._refs[page],))
            pages.append(page)
        self._put(flight, id_, raw)
        return flight

    def _take(self, count: int) -> list[int]:
        """Pages, the last used first; neighbours if it can be, for what is copied in one piece is copied faster."""
        free = self._free
        if self._scattered and not self.in_flight:
            free.sort(reverse=True)
            self._scattered = False
        pages = free[: -count - 1 : -1]
        del free[-count:]
        return pages

    def _put(self, flight: Flight, id_: int, raw: bytes) -> None:
        flight.raw = raw
        self.ring.put(raw)
        self.in_flight[id_] = flight

    def _land(self, flight: Flight, status: int) -> None:
        buffer = flight.buffer
        if buffer is not None and status == 0:
            for there, here, size in _pieces(flight.pages, flight.length):
                buffer[here : here + size] = self._memory[there : there + size]
        flight.buffer = None
        self._free.extend(reversed(flight.pages))
        flight.pages = []
        flight.status = status
        flight.done = True


def _neighbours(pages: list[int]) -> bool:
    if len(pages) == 1:  # the most frequent, and as fast as can be
        return True
    first = pages[0]
    return pages[-1] - first == len(pages) - 1 and pages == list(range(first, first + len(pages)))


def _pieces(pages: list[int], length: int) -> list[tuple[int, int, int]]:
    """So many bytes in those pages: where each piece lies among all pages, where in the data, and its size."""
    used = pages[: -(-length // PAGE_SIZE)]  # the last may hold segments
    if _neighbours(used):
        return [(used[0] * PAGE_SIZE, 0, length)]
    return [
        (page * PAGE_SIZE, at, min(PAGE_SIZE, length - at))
        for page, at in zip(used, range(0, length, PAGE_SIZE), strict=True)
    ]
