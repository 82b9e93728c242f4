"""Backend: serves a file as a disk to a frontend in another domain.

    device = Device("vbd", 51712, frontend=1, backend=0)
    attach(domain.store, device, ...)                  # as a toolstack does
    with Backend(domain, device, "disk.img") as backend:
        backend.serve()                                # until stop(), or the device is detached

A frontend is not believed. What it asks that cannot be (pages that are not there, sectors beyond the end, too many
segments) gets an error response; when it breaks the ring itself, it is let go of, and told why in xenstore.

Sources: Xen's public io/blkif.h for nodes and requests; Linux's xen-blkback for the order of things.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Self

from gntalloc import waits
from gntalloc.atomics import atomics
from gntalloc.errors import DeviceError, EventsLost, GntallocError, PeerBroke
from gntalloc.frontend.blkif import (
    ENTRY,
    ERROR,
    INFO_READ_ONLY,
    NO_SPACE,
    NOT_SUPPORTED,
    OKAY,
    PROTOCOL,
    SECTOR,
    SECTORS_OF_A_PAGE,
    SEGMENTS_OF_A_PAGE,
    TELLS_FULL,
    Malformed,
    Operation,
    Request,
    Response,
    Segment,
    parse_segments,
)
from gntalloc.frontend.extents import DISCARD_ZEROES, NODE, pack
from gntalloc.frontend.grantio import Access, Copied, Kept, Mapped
from gntalloc.frontend.image import Full, Image
from gntalloc.frontend.ring import Back
from gntalloc.frontend.xenbus import BACK, End, State, StepRefused

if TYPE_CHECKING:
    from gntalloc.frontend.nodes import Device
    from gntalloc.guest.domain import BareDomain

__all__ = ["WAYS", "Backend"]

WAYS = ("map", "copy")
"""How a backend gets at a frontend's pages; see `gntalloc.frontend.grantio`."""
_INDIRECT = 256  # segments of one request, as xen-blkback
_LOOK_AGAIN = 1000  # milliseconds until the image's size is looked at, when nothing else happens


class Backend:
    """A disk made of a file. One thread serves it, any may stop it.

    Args:
        domain: the one that this program is in, where the backend's folder is.
        device: which, as it was attached.
        path: the file, or a block device.
        form: "auto" refuses an image of another format, "raw" takes it for what it is not.
        pad: serve a file that ends within a sector as if zeros followed.
        read_only: whether it is served so; the node `mode` of the toolstack, if it is "r", does too.
        way: "map" the frontend's pages (for good, if it offers feature-persistent), or "copy" them.
        sector_size: bytes, 512 to 4096.
        indirect: segments of an indirect request; 0 offers none.

    Raises:
        DeviceError, Busy, OSError: the file cannot be served; see `gntalloc.frontend.image`.

    Attributes:
        requests: how many were answered.
        refused: how many of them with an error.
    """

    def __init__(
        self,
        domain: BareDomain,
        device: Device,
        path: str | os.PathLike[str],
        *,
        form: str = "auto",
        pad: bool = False,
        read_only: bool = False,
        way: str = "map",
        sector_size: int = SECTOR,
        indirect: int = _INDIRECT,
    ) -> None:
        if way not in WAYS:
            raise ValueError(f"{way!r} is no way to a page; they are {', '.join(WAYS)}")
        if sector_size not in {512, 1024, 2048, 4096} or not 0 <= indirect <= 8 * SEGMENTS_OF_A_PAGE:
            raise ValueError(f"sectors of {sector_size} bytes (512 to 4096), {indirect} segments (0 to 4096)")
        self._domain = domain
        self._device = device
        self._way = way
        self._indirect = indirect
        self.sector_size = sector_size
        self._end = End(domain.store, BACK, device.back, device.front)
        self.read_only = read_only or domain.store.read_text(f"{device.back}/mode") == "r"
        self._image = Image(path, read_only=self.read_only, unit=sector_size, pad=pad, form=form)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._tells_full = False
        self._link: contextlib.ExitStack | None = None
        self._ring: Back | None = None
        self._closed = False
        self.requests = 0
        self.refused = 0

    @property
    def size(self) -> int:
        """Bytes served. It follows the image's."""
        return self._image.size

    def serve(self) -> None:
        """Serve whoever comes, until `stop` or until the device is detached.

        Raises:
            MachineGone: there is nobody to ask any more.
        """
        store, end = self._domain.store, self._end
        with store.watch(f"{end.other}/state") as watch, store.watch(f"{end.folder}/online") as detached:
            try:
                if end.state not in {State.INITIALISING, State.CLOSED}:
                    end.go(State.CLOSED)  # what a backend that was killed has left
                while True:
                    watch.drain()  # before looking: what comes after that is news
                    detached.drain()
                    if end.state == State.UNKNOWN:
                        break
                    self._follow(end.peer)
                    if self._work_until(watch.fileno(), detached.fileno()):
                        break
            except DeviceError as error:
                if error.errno != errno.ENODEV:
                    raise  # else it was detached meanwhile
            finally:
                self._leave()

    def stop(self) -> None:
        """Let `serve` come to its end, which closes the connection in order."""
        os.eventfd_write(self._stop, 1)

    def close(self) -> None:
        """Close the file. Not while it is being served. Can be repeated."""
        if self._closed:
            return
        self._closed = True
        self._disconnect()
        self._image.close()
        os.close(self._stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{'closed ' if self._closed else ''}Backend {self._device.number} for domain {self._device.frontend}>"

    # Coming and going.

    def _follow(self, frontend: State) -> None:
        """Do what the frontend's state asks for. Steps may have been missed: only where it is now counts."""
        end = self._end
        if frontend == State.INITIALISING:
            if self._link is not None or end.state in {State.INIT_WAIT, State.CONNECTED, State.CLOSING}:
                if end.state == State.INIT_WAIT and self._link is None:
                    return
                self._part()
            offers = {
                "feature-max-indirect-segments": self._indirect,
                "max-ring-page-order": 0,
                "multi-queue-max-queues": 1,
            }
            end.go(State.INIT_WAIT, offers)
        elif frontend in {State.INITIALISED, State.CONNECTED}:
            if end.state == State.INIT_WAIT:
                self._try_to_connect()
        elif frontend == State.CLOSING:
            if end.state in {State.INIT_WAIT, State.CONNECTED}:
                end.go(State.CLOSING)  # first: who lets go of a ring before it says so has died
            self._disconnect()
        elif frontend in {State.CLOSED, State.UNKNOWN}:
            self._part()

    def _try_to_connect(self) -> None:
        try:
            self._connect()
        except (GntallocError, ValueError) as why:
            self._give_up(str(why))

    def _give_up(self, why: str) -> None:
        self._end.complain(why, self._device.frontend)
        self._end.go(State.CLOSING)
        self._disconnect()

    def _connect(self) -> None:
        end, domain, frontend = self._end, self._domain, self._device.frontend
        protocol = end.read("protocol")
        if protocol != PROTOCOL:
            raise ValueError(f"the frontend speaks {protocol!r}; write {PROTOCOL} into its node `protocol`")
        ref = end.number("ring-ref", -1, 0xFFFF_FFFF)
        number = end.number("event-channel", -1, 0xFFFF_FFFF)
        if ref < 0 or number < 0:
            raise ValueError("the frontend's ring-ref or event-channel is missing, or no number")
        self._tells_full = end.number(TELLS_FULL) == 1
        persistent = self._way == "map" and end.number("feature-persistent") == 1
        with contextlib.ExitStack() as link:
            port = link.enter_context(domain.events.connect(frontend, number))
            pages = link.enter_context(domain.map(frontend, ref, writable=True, timeout=0))
            pages.notify_when_unmapped(port=port.number)  # so that the frontend hears when we are killed
            ring = Back(pages.memory, ENTRY, atomics())
            link.callback(ring.release)
            ways: dict[str, type[Mapped | Copied | Kept]] = {"map": Kept if persistent else Mapped, "copy": Copied}
            access: Access = ways[self._way](domain, frontend)
            link.callback(access.close)
            self._ring, self._port, self._access = ring, port, access
            self._link = link.pop_all()
        self._masked = False
        self._image.look()
        sparse = self._image.sparse
        info = INFO_READ_ONLY if self.read_only else 0
        nodes = {
            "feature-flush-cache": 1,
            "feature-barrier": 0,
            "feature-persistent": int(self._way == "map"),
            "feature-discard": int(sparse and not self.read_only),
            DISCARD_ZEROES: int(sparse),
            NODE: int(sparse),
            "discard-granularity": self.sector_size,
            "discard-alignment": 0,
            "sectors": self.size // SECTOR,
            "info": info,
            "sector-size": self.sector_size,
            "physical-sector-size": max(self.sector_size, 4096),
        }
        end.forget_complaint()
        end.go(State.CONNECTED, nodes)

    def _disconnect(self) -> None:
        link, self._link, self._ring = self._link, None, None
        if link is not None:
            link.close()

    def _part(self) -> None:
        """Disconnect, and be closed."""
        if self._end.state == State.CONNECTED:
            self._end.go(State.CLOSING)
        self._disconnect()
        if self._end.state not in {State.UNKNOWN, State.CLOSED}:
            self._end.go(State.CLOSED)

    def _leave(self) -> None:
        with contextlib.suppress(GntallocError):
            self._part()
        self._disconnect()  # also if xenstore did not answer

    def _tell_size(self) -> None:
        """Tell the frontend when the image has grown: as Linux's backend, by the sectors and our state once more."""
        if self._image.look():
            with contextlib.suppress(StepRefused):  # somebody else has moved our state: it is told when we connect
                self._end.go(State.CONNECTED, {"sectors": self.size // SECTOR})

    # Serving.

    def _work_until(self, *watches: int) -> bool:
        """Answer requests until the frontend's state may have changed. True: this backend is to stop."""
        poll = waits.poll()
        for number in (*watches, self._stop):
            poll.register(number, waits.POLLIN)
        if self._ring is not None:
            poll.register(self._port.fileno(), waits.POLLIN)
        while True:
            more = False
            if self._ring is not None:
                try:
                    more = self._serve_ring(self._ring)
                except PeerBroke as broken:
                    self._give_up(str(broken))
                    return False
                self._tell_size()
                if not more and self._masked:
                    self._port.rearm()
                    self._masked = False
            idle = _LOOK_AGAIN if self._ring is not None else None
            ready = {number for number, _ in poll.poll(0 if more else idle)}
            if self._ring is not None and self._port.fileno() in ready:
                try:
                    self._masked = self._port.take()
                except EventsLost:
                    pass  # the ring is looked at anyway
            if self._stop in ready:
                return True
            if ready.intersection(watches):
                return False

    def _serve_ring(self, ring: Back) -> bool:
        """Answer what is there, a ringful at most. Whether there may be more."""
        for _ in range(ring.ready()):
            ring.put(self._answer(ring.take(ENTRY)).pack())
            if ring.show():
                self._port.notify_soon()
        return bool(ring.ask())

    def _answer(self, raw: bytes) -> Response:
        """Carry out one request; whatever it says, there is a response."""
        operation, id_ = Request.id_of(raw)
        try:
            request = Request.parse(raw, self._indirect)
            operation = request.operation
            status = self._carry_out(request)
        except Full:
            status = NO_SPACE if self._tells_full else ERROR
        except (Malformed, OSError):  # a GntallocError is one
            status = ERROR
        self.requests += 1
        self.refused += status != OKAY
        return Response(id_, operation, status)

    def _carry_out(self, request: Request) -> int:
        image = self._image
        if request.operation in {Operation.READ, Operation.WRITE}:
            return self._move(request)
        if request.operation == Operation.FLUSH and not request.segments:
            image.flush()
            return OKAY
        if request.operation == Operation.DISCARD and image.sparse:
            self._check(request.sector, request.sectors, writing=True)
            try:
                image.discard(request.sector * SECTOR, request.sectors * SECTOR)
            except OSError as error:
                return NOT_SUPPORTED if error.errno == errno.EOPNOTSUPP else ERROR
            return OKAY
        if request.operation == Operation.EXTENTS and image.sparse:
            return self._tell_extents(request)
        return NOT_SUPPORTED

    def _tell_extents(self, request: Request) -> int:
        self._check(request.sector, self.sector_size // SECTOR, writing=False)
        if [segment[1:] for segment in request.segments] != [(0, SECTORS_OF_A_PAGE - 1)]:
            raise Malformed("extents go into one whole page")
        told = pack(self._image.extents(request.sector * SECTOR))
        with self._access.borrow(request.segments, writable=True) as (page,):
            page[:] = told
        return OKAY

    def _move(self, request: Request) -> int:
        writing = request.operation == Operation.WRITE
        segments = self._segments(request)
        if not segments or any(not s.first <= s.last < SECTORS_OF_A_PAGE for s in segments):
            raise Malformed("no segments, or one that is not within its page")
        length = sum(segment.length for segment in segments)
        self._check(request.sector, length // SECTOR, writing=writing)
        offset = request.sector * SECTOR
        with self._access.borrow(segments, writable=not writing) as views:
            if writing:
                self._image.write(views, offset)
            else:
                self._image.read(views, offset)
        return OKAY

    def _segments(self, request: Request) -> tuple[Segment, ...]:
        if not request.pages:
            return request.segments
        whole = [Segment(ref, 0, SECTORS_OF_A_PAGE - 1) for ref in request.pages]
        with self._access.borrow(whole, writable=False) as views:
            raw = b"".join(views)  # a copy: the frontend could change them while they are checked
        return parse_segments(raw, request.indirect)

    def _check(self, sector: int, count: int, *, writing: bool) -> None:
        unit = self.sector_size // SECTOR
        if (sector + count) * SECTOR > self.size or sector % unit or count % unit or not count:
            raise Malformed("not whole sectors, or beyond the end")
        if writing and self.read_only:
            raise DeviceError(errno.EROFS, "the disk is read-only")
