"""Session: a disk and its backend, from the handshake on. Both faces are made of it: the blocking one, and asyncio's.

Nobody waits here but for a handshake, and nothing here is for two threads at once: that is what the faces are for.

The handshake is xen-blkfront's: recover what a predecessor left, wait for the backend, publish a ring and a port, wait
until it is connected. Sources: Xen's public io/blkif.h for the nodes; see `gntalloc.frontend.xenbus` for the states.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.clock import Deadline
from gntalloc.errors import Closed, DeviceError, GntallocError, PeerBroke, PeerDied
from gntalloc.frontend.blkif import (
    ENTRY,
    INFO_READ_ONLY,
    NO_SPACE,
    NOT_SUPPORTED,
    PROTOCOL,
    SECTOR,
    SEGMENTS,
    TELLS_FULL,
    Operation,
)
from gntalloc.frontend.extents import DISCARD_ZEROES, NODE
from gntalloc.frontend.link import Link, part, recover
from gntalloc.frontend.nodes import Device, devices
from gntalloc.frontend.requests import Flight, Flights
from gntalloc.frontend.xenbus import FRONT, End, State, StepRefused
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from gntalloc.guest.domain import BareDomain

__all__ = ["PAGES", "Described", "Features", "Offer", "Session"]

PAGES = 352
"""For data, if not told otherwise: 32 requests of 11 pages."""
_MOST_SECTORS = 1 << 54
_MOST_SEGMENTS = 32  # of an indirect request: 128 KiB, as xen-blkfront


class Features(NamedTuple):
    """What a backend offers."""

    persistent: bool
    flush: bool
    discard: bool
    discard_granularity: int
    discard_alignment: int
    indirect_segments: int
    extents: bool
    discard_zeroes: bool


class Offer(NamedTuple):
    """What a backend says of its disk. See `Described`."""

    size: int
    sector_size: int
    physical_sector_size: int
    read_only: bool
    features: Features


class Session:
    """One frontend's use of a disk.

    Args:
        domain: the one that this program is in, whose disk it is.
        number: which; if not given, the only one.
        pages: that carry data.
        timeout: seconds for the handshake.

    Raises:
        DeviceError: ENODEV there is no such disk; ENOSPC there are not enough pages; EBUSY another program has begun
            to use it meanwhile.
        TimedOut: no backend served it; the text says where it got to, and what the backend complains of.
        PeerClosed: the backend does not want it.

    Attributes:
        number: of the device.
        offer: what the backend says.
        link: the ring and the port; None while there are none.
        flights: what is in flight.
        failed: how the backend has gone; None: as far as is known it has not.
        closed: by its user.
    """

    offer: Offer

    def __init__(self, domain: BareDomain, number: int | None, *, pages: int, timeout: float) -> None:
        if pages < 1:
            raise ValueError(f"{pages} pages carry no data; give 1 at least, or {PAGES} for all that a ring can hold")
        self._domain = domain
        self._device = _choose(domain, number)
        self.number = self._device.number
        self.link: Link | None = None
        self.failed: GntallocError | None = None
        self.closed = False
        front = self._device.front
        self._end = End(domain.store, FRONT, front, domain.store.read_text(f"{front}/backend"))
        self._pool = domain.share(self._device.backend, pages=pages, writable=True)
        try:
            link = self._connect(timeout=timeout)
        except BaseException:
            self._pool.close()
            raise
        self.flights = Flights(link.ring, self._pool.memory, self._pool.refs, self.number, self._segments())

    def __str__(self) -> str:
        return f"disk {self.number} of domain {self._device.backend}"

    # Requests.

    def put(self, operation: Operation, offset: int, view: memoryview) -> Flight:
        """Put a READ or WRITE of whole sectors, or EXTENTS, for which there is room. `show` shows it."""
        if operation == Operation.WRITE:
            return self.flights.write(offset // SECTOR, view)
        return self.flights.read(offset // SECTOR, view, operation)

    def show(self) -> None:
        """Let the backend see what was put."""
        if self.link is not None and self.flights.ring.show():
            self.link.notify()

    def collect(self) -> list[Flight]:
        """Which flights have landed. When the backend lies, `failed` says so."""
        if self.failed is not None:
            return []
        try:
            return self.flights.collect()
        except PeerBroke as broken:
            self.failed = broken
            return []

    def ask(self, more: int = 1) -> int:
        """Before sleeping until `more` responses are there: how many are by now; 1 if there is no use in sleeping."""
        try:
            return self.flights.ring.ask(more)
        except PeerBroke as broken:
            self.failed = broken
            return 1

    # Checks.

    def check_open(self) -> None:
        """Raise Closed, or what became of the backend."""
        if self.closed:
            raise Closed(f"{self} cannot be used, it was closed here; open another")
        if self.failed is not None:
            raise self.failed

    def check_range(self, offset: int, length: int, *, whole: bool = False) -> None:
        """ValueError: beyond the end; or, if they must be, no whole sectors."""
        size, unit = self.offer.size, self.offer.sector_size
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError(f"{length} bytes at {offset} are not all on {self}, which has {size}")
        if whole and (offset % unit or length % unit):
            raise ValueError(f"{length} bytes at {offset} are no whole sectors of {unit}; read them first")

    def check_writable(self) -> None:
        """DeviceError: EROFS."""
        if self.offer.read_only:
            raise DeviceError(errno.EROFS, f"{self} is read-only; its toolstack decides that, with mode=w")

    def check_discard(self) -> None:
        """DeviceError: EROFS, EOPNOTSUPP."""
        self.check_writable()
        if not self.offer.features.discard:
            raise DeviceError(errno.EOPNOTSUPP, f"{self} cannot discard: its backend does not offer it; write zeros")

    def check_request(self, operation: Operation, offset: int, length: int) -> None:
        """For one request: ValueError, EROFS."""
        self.check_range(offset, length, whole=True)
        if not 0 < length <= self.flights.most:
            raise ValueError(f"one request carries 1 to {self.flights.most} bytes, not {length}; submit several")
        if operation == Operation.WRITE:
            self.check_writable()

    def catch_up(self) -> None:
        """See whether the backend has said that its disk has grown. It waits for xenstore."""
        if self.link is not None and self.failed is None and self.link.has_news():
            self.refresh()

    def refresh(self) -> None:
        """Read the disk's size again. What else a backend offers holds for as long as we are connected."""
        with contextlib.suppress(GntallocError):  # the backend is gone: who asks it something is told
            sectors, unit = self._end.number("sectors", -1, _MOST_SECTORS), self.offer.sector_size
            if sectors >= 0:
                self.offer = self.offer._replace(size=sectors * SECTOR // unit * unit)

    def around(self, offset: int, length: int) -> tuple[int, int]:
        """How many bytes before and after must be read too, so that they are whole sectors. ValueError as above."""
        self.check_range(offset, length)
        return offset % self.offer.sector_size, -(offset + length) % self.offer.sector_size

    def before_extents(self, offset: int, length: int) -> int:
        """How many bytes before a range its first sector begins. ValueError as above, or there is none."""
        self.check_range(offset, length)
        if not length:
            raise ValueError(f"an extent has at least one byte; ask for some from {offset} on")
        return offset % self.offer.sector_size

    def judge(self, flight: Flight) -> None:
        """DeviceError: EIO the backend could not do it; EOPNOTSUPP it does not know how."""
        if not flight.status:
            return
        what = f"{flight.operation.name} of {flight.length} bytes at {flight.sector * SECTOR}"
        if flight.status == NOT_SUPPORTED:
            raise DeviceError(errno.EOPNOTSUPP, f"{self}: the backend does not support {what}")
        if flight.status == NO_SPACE:
            raise DeviceError(errno.ENOSPC, f"{self}: there is no room left at the backend for {what}; make some there")
        raise DeviceError(errno.EIO, f"{self}: the backend failed at {what} (status {flight.status}); see its log")

    # Coming and going.

    def reconnect(self, *, timeout: float) -> None:
        """Begin anew with a backend that has returned. What is in flight is asked again.

        Raises:
            TimedOut, PeerClosed: as in the beginning; then `failed` stays.
        """
        self._disconnect()
        self.failed = self.failed or PeerDied(f"{self} has no backend; call reconnect when there is one")
        link = self._connect(timeout=timeout)
        self.failed = None
        self.flights.restart(link.ring, self._segments())
        self.show()

    def interrupt(self) -> None:
        """Let a thread that is in `reconnect` come back, with Closed: this will be closed."""
        self._end.given_up = True

    def close(self, *, timeout: float) -> None:
        """Tell the backend, and take the pages back. A backend that does not answer is left alone after `timeout`."""
        self.closed = True
        self._end.given_up = False
        with contextlib.suppress(GntallocError, StepRefused):  # the state may be another's by now
            gone = self.failed is not None or self.link is None or self.link.verdict() is not None
            part(self._end, timeout=timeout, alone=gone)
        self._disconnect()
        self._pool.close()

    def _disconnect(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            link.close()

    def _connect(self, *, timeout: float) -> Link:
        """From wherever both ends are to state 4. The link that was is gone already."""
        deadline = Deadline(timeout)
        nodes = {"protocol": PROTOCOL, "feature-persistent": "1", TELLS_FULL: "1"}
        with contextlib.ExitStack() as undo:
            try:
                recover(self._end, deadline)
                link = Link(self._domain, self._device, self._end, ENTRY, nodes, deadline)
                undo.callback(link.close)
                undo.callback(link.give_up)
                self.offer = self._read_offer()
                self._end.go(State.CONNECTED)
            except StepRefused as moved:
                raise DeviceError(errno.EBUSY, f"{self} is being used by another program too: {moved}") from None
            undo.pop_all()
        self.link = link
        return link

    def _read_offer(self) -> Offer:
        end = self._end
        sectors, size = end.number("sectors", most=_MOST_SECTORS), end.number("sector-size", SECTOR, 1 << 16)
        physical = end.number("physical-sector-size", size, 1 << 30)
        if size < SECTOR or size & (size - 1) or size > PAGE_SIZE:
            raise PeerBroke(f"{end.other} says that a sector has {size} bytes; that is 512 to {PAGE_SIZE}")
        features = Features(
            persistent=end.number("feature-persistent") == 1,
            flush=end.number("feature-flush-cache") == 1,
            discard=end.number("feature-discard") == 1,
            discard_granularity=end.number("discard-granularity", size),
            discard_alignment=end.number("discard-alignment"),
            indirect_segments=end.number("feature-max-indirect-segments", most=0xFFFF),
            extents=end.number(NODE) == 1,
            discard_zeroes=end.number(DISCARD_ZEROES) == 1,
        )
        read_only = bool(end.number("info", most=0xFFFF_FFFF) & INFO_READ_ONLY) or end.read("mode") == "r"
        return Offer(sectors * SECTOR // size * size, size, max(physical, size), read_only, features)

    def _segments(self) -> int:
        return max(SEGMENTS, min(self.offer.features.indirect_segments, _MOST_SEGMENTS))


class Described:
    """What a disk says of itself, whichever face it has."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def number(self) -> int:
        """Of the device, such as 51712."""
        return self._session.number

    @property
    def size(self) -> int:
        """Bytes. It follows the backend's, whose disk may grow."""
        return self._session.offer.size

    @property
    def sector_size(self) -> int:
        """Bytes; offsets and lengths of writes are multiples of it."""
        return self._session.offer.sector_size

    @property
    def physical_sector_size(self) -> int:
        """Bytes."""
        return self._session.offer.physical_sector_size

    @property
    def read_only(self) -> bool:
        """It cannot be written."""
        return self._session.offer.read_only

    @property
    def features(self) -> Features:
        """What the backend offers."""
        return self._session.offer.features

    @property
    def largest(self) -> int:
        """Bytes that one request carries at most."""
        return self._session.flights.most

    def __repr__(self) -> str:
        return f"<{'closed ' if self._session.closed else ''}{type(self).__name__}: {self._session}>"


def _choose(domain: BareDomain, number: int | None) -> Device:
    found = devices(domain.store, domain.domid, "vbd")
    chosen = [device for device in found if number is None or device.number == number]
    if len(chosen) == 1:
        return chosen[0]
    which = ", ".join(str(device.number) for device in found) or "none"
    raise DeviceError(
        errno.ENODEV,
        f"domain {domain.domid} has no disk {number}; it has: {which}"
        if number is not None
        else f"domain {domain.domid} must have one disk for this, or be told which; it has: {which}",
    )
