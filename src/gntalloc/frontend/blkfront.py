"""BlockDevice: a disk that a backend in another domain serves, as a Python object.

    with BlockDevice(gntalloc.current_domain()) as disk:
        disk.write(0, bytes(4096))
        disk.flush()
        disk.read(512, 100)

The handshake is xen-blkfront's: recover what a predecessor left, wait for the backend, publish a ring and a port, wait
until it is connected. One thread sleeps for all that wait; the others are told by it.

Sources: Xen's public io/blkif.h for the nodes; see `gntalloc.frontend.xenbus` for the states.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from typing import TYPE_CHECKING, NamedTuple, Self

from gntalloc.errors import (
    Closed,
    DeviceError,
    GntallocError,
    PeerBroke,
    PeerDied,
    TimedOut,
)
from gntalloc.frontend.blkif import ENTRY, INFO_READ_ONLY, NOT_SUPPORTED, PROTOCOL, SECTOR, SEGMENTS, Operation
from gntalloc.frontend.link import Link, part, recover
from gntalloc.frontend.nodes import Device, devices
from gntalloc.frontend.requests import Flight, Flights
from gntalloc.frontend.xenbus import FRONT, End, State
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.guest.domain import Domain

__all__ = ["BlockDevice", "Features"]

PAGES = 352
"""For data, if not told otherwise: 32 requests of 11 pages."""
_MOST_SEGMENTS = 32  # of an indirect request: 128 KiB, as xen-blkfront
_LOOK = 50e-6  # seconds to look before sleeping


class Features(NamedTuple):
    """What a backend offers."""

    persistent: bool
    flush: bool
    discard: bool
    discard_granularity: int
    discard_alignment: int
    indirect_segments: int


class BlockDevice:
    """A disk. Any object from any thread.

    Args:
        domain: the one that this program is in, whose disk it is.
        number: which; if not given, the only one.
        pages: that carry data. They count against the domain's limit, and so does one for the ring.
        timeout: seconds for the handshake.
        patience: seconds to wait for the backend's return when it has gone: calls that wait meanwhile go on as if
            nothing had happened. 0: they raise.

    Raises:
        DeviceError: ENODEV there is no such disk; ENOSPC there are not enough pages.
        TimedOut: no backend served it; the text says where it got to, and what the backend complains of.
        PeerClosed: the backend does not want it.

    Attributes:
        number: of the device, such as 51712.
        size: bytes.
        sector_size: bytes; offsets and lengths of writes are multiples of it.
        physical_sector_size: bytes.
        read_only: it cannot be written.
        features: what the backend offers.
    """

    size: int
    sector_size: int
    physical_sector_size: int
    read_only: bool
    features: Features

    def __init__(
        self,
        domain: Domain,
        number: int | None = None,
        *,
        pages: int = PAGES,
        timeout: float = 10.0,
        patience: float = 0.0,
    ) -> None:
        if pages < 1:
            raise ValueError(f"{pages} pages carry no data; give 1 at least, or {PAGES} for all that a ring can hold")
        self._closed = True  # until it is open
        device = _choose(domain, number)
        self.number = device.number
        self._device = device
        self._domain = domain
        self._patience = patience
        self._changed = threading.Condition(threading.Lock())
        self._asleep = False
        self._closing = False
        self._failed: GntallocError | None = None
        self._end = End(domain.store, FRONT, device.front, domain.store.read_text(f"{device.front}/backend"))
        self._link: Link | None = None
        self._pool = domain.share(device.backend, pages=pages, writable=True)
        try:
            link = self._connect(timeout)
        except BaseException:
            self._pool.close()
            raise
        self._flights = Flights(link.ring, self._pool.memory, self._pool.refs, self.number, self._segments())
        self._closed = False

    # Reading and writing.

    def read(self, offset: int, length: int, *, timeout: float | None = None) -> bytes:
        """Read bytes, from anywhere. See `readinto`."""
        data = bytearray(length)
        self.readinto(offset, data, timeout=timeout)
        return bytes(data)

    def readinto(self, offset: int, buffer: bytearray | memoryview, *, timeout: float | None = None) -> int:
        """Fill a buffer with what stands from byte `offset` on. Neither needs to be a multiple of a sector.

        Args:
            offset: bytes.
            buffer: contiguous and writable.
            timeout: seconds; None waits for ever.

        Returns:
            How many bytes: as many as the buffer has.

        Raises:
            ValueError: it goes beyond the end.
            DeviceError: EIO the backend could not.
            PeerClosed, PeerDied: the backend has gone. See `reconnect`.
            PeerBroke: it did what it may not.
            TimedOut: the deadline passed first; the buffer may be filled in part.
        """
        view = memoryview(buffer).cast("B")
        self._check_range(offset, len(view))
        before, after = offset % self.sector_size, -(offset + len(view)) % self.sector_size
        if not len(view):
            return 0
        if before or after:
            whole = memoryview(bytearray(before + len(view) + after))
            self._transfer(Operation.READ, offset - before, whole, timeout)
            view[:] = whole[before : before + len(view)]
        else:
            self._transfer(Operation.READ, offset, view, timeout)
        return len(view)

    def write(self, offset: int, data: bytes | bytearray | memoryview, *, timeout: float | None = None) -> int:
        """Write whole sectors. They are in the backend's hands when this returns, and safe after `flush`.

        Raises:
            ValueError: not whole sectors, or beyond the end.
            DeviceError: EROFS the disk is read-only; EIO the backend could not.
            PeerClosed, PeerDied, PeerBroke, TimedOut: as `readinto`; some of it may have been written.
        """
        view = memoryview(data).cast("B")
        self._check_range(offset, len(view), whole=True)
        self._check_writable()
        if len(view):
            self._transfer(Operation.WRITE, offset, view, timeout)
        return len(view)

    def flush(self, *, timeout: float | None = None) -> None:
        """Wait until all that was written is safe. Where a backend has no cache there is nothing to do.

        Raises:
            DeviceError: EIO the backend could not.
            PeerClosed, PeerDied, PeerBroke, TimedOut: as `readinto`.
        """
        if self.features.flush and not self.read_only:
            self._plain(Operation.FLUSH, 0, 0, timeout)

    def discard(self, offset: int, length: int, *, timeout: float | None = None) -> None:
        """Tell the backend that whole sectors are not needed any more; what is read there afterwards is its choice.

        Raises:
            DeviceError: EOPNOTSUPP it is not offered; EROFS.
            ValueError: not whole sectors, or beyond the end.
            PeerClosed, PeerDied, PeerBroke, TimedOut: as `readinto`.
        """
        self._check_range(offset, length, whole=True)
        self._check_writable()
        if not self.features.discard:
            raise DeviceError(errno.EOPNOTSUPP, f"{self!r} cannot discard: its backend does not offer it; write zeros")
        if length:
            self._plain(Operation.DISCARD, offset // SECTOR, length, timeout)

    # Many requests in flight.

    @property
    def largest(self) -> int:
        """Bytes that one request carries at most."""
        return self._flights.most

    def submit(self, operation: Operation, offset: int, buffer: bytearray | bytes | memoryview) -> Flight | None:
        """Begin one READ into, or WRITE of, a buffer of whole sectors, `largest` bytes at most; do not wait for it.

        The buffer of a READ is filled when the flight is `done`, which `complete` sees to.

        Returns:
            The flight; None: there is no room for it before another has landed.

        Raises:
            ValueError: not whole sectors, too many, or beyond the end.
            DeviceError: EROFS.
            PeerClosed, PeerDied, PeerBroke: as `readinto`.
        """
        view = memoryview(buffer).cast("B")
        self._check_range(offset, len(view), whole=True)
        if not 0 < len(view) <= self.largest:
            raise ValueError(f"one request carries 1 to {self.largest} bytes, not {len(view)}; submit several")
        if operation == Operation.WRITE:
            self._check_writable()
        with self._changed:
            self._check_open()
            if not self._flights.has_room(len(view)):
                return None
            flight = self._put(operation, offset, view)
            self._show()
            return flight

    def complete(self, flight: Flight, *, timeout: float | None = None) -> None:
        """Wait until a flight has landed.

        Raises:
            DeviceError: EIO the backend could not do it.
            PeerClosed, PeerDied, PeerBroke, TimedOut: as `readinto`; the flight goes on after a TimedOut.
        """
        with self._changed:
            self._until(lambda: flight.done, _after(timeout), "a request")
        self._judge(flight)

    # Coming and going.

    def reconnect(self, timeout: float = 10.0) -> None:
        """Begin anew with a backend that has returned. What was submitted and not answered is asked again.

        Raises:
            TimedOut: none was there.
            PeerClosed: it does not want it.
            Closed: this was closed.
        """
        with self._changed:
            if self._closed:
                raise Closed(f"{self!r} cannot be connected again; open another")
            self._wake_the_sleeper()
            self._reconnect(timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Wait for what is in flight, tell the backend, and take the pages back. Can be repeated.

        What was not flushed is as safe as the backend sees fit. A backend that does not answer is left alone after
        `timeout` seconds: the pages go when it lets go.
        """
        with self._changed:
            if self._closed:
                return
            self._closing = True
            with contextlib.suppress(GntallocError):
                if self._failed is None:
                    self._until(lambda: not self._flights.in_flight, _after(timeout), "the requests in flight")
            self._closed = True
            self._wake_the_sleeper()
            with contextlib.suppress(GntallocError):
                gone = self._failed is not None or self._link is None or self._link.verdict() is not None
                part(self._end, timeout, alone=gone)
            self._disconnect()
            self._pool.close()
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{'closed ' if self._closed else ''}BlockDevice {self.number} of domain {self._device.backend}>"

    # What follows runs with the lock held.

    def _transfer(self, operation: Operation, offset: int, view: memoryview, timeout: float | None) -> None:
        """Read or write whole sectors, with as many requests at a time as there is room for."""
        deadline = _after(timeout)
        flights: list[Flight] = []
        try:
            with self._changed:
                at = 0
                while at < len(view):
                    self._check_open()
                    piece = view[at : at + self._flights.most]
                    if not self._flights.has_room(len(piece)):
                        self._show()
                        size = len(piece)
                        self._until(lambda size=size: self._flights.has_room(size), deadline, "room in the ring")  # type: ignore[misc]
                        continue
                    flights.append(self._put(operation, offset + at, piece))
                    at += len(piece)
                self._show()
                self._until(lambda: all(flight.done for flight in flights), deadline, "the backend")
        except BaseException:
            for flight in flights:
                flight.abandon()
            raise
        for flight in flights:
            self._judge(flight)

    def _plain(self, operation: Operation, sector: int, length: int, timeout: float | None) -> None:
        deadline = _after(timeout)
        with self._changed:
            self._until(lambda: self._flights.has_room(0), deadline, "room in the ring")
            self._check_open()
            flight = self._flights.plain(operation, sector, length)
            self._show()
            try:
                self._until(lambda: flight.done, deadline, "the backend")
            except BaseException:
                flight.abandon()
                raise
        self._judge(flight)

    def _put(self, operation: Operation, offset: int, view: memoryview) -> Flight:
        put = self._flights.read if operation == Operation.READ else self._flights.write
        return put(offset // SECTOR, view)

    def _show(self) -> None:
        if self._flights.ring.show() and self._link is not None:
            self._link.notify()

    def _until(self, enough: Callable[[], bool], deadline: float | None, what: str) -> None:
        """Wait until there is enough, taking in responses; one thread sleeps, the others wait for it."""
        while True:
            if self._collect(enough):
                return
            self._check_open()
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimedOut(f"{self!r} has waited in vain for {what}; wait again")
            if self._asleep:
                self._changed.wait(left)
            else:
                self._sleep(left)

    def _collect(self, enough: Callable[[], bool]) -> bool:
        """Take in what is there, and look for a while whether there is enough."""
        until = 0.0
        while True:
            if self._failed is None:
                try:
                    if self._flights.collect():
                        self._changed.notify_all()
                except PeerBroke as broken:
                    self._failed = broken
                    self._changed.notify_all()
            if enough():
                return True
            now = time.monotonic()
            until = until or now + _LOOK
            if self._failed is not None or now >= until:
                return False

    def _sleep(self, left: float | None) -> None:
        """Until something may have happened. Others may have the lock meanwhile."""
        link = self._link
        assert link is not None
        try:
            if link.ring.ask():
                return
        except PeerBroke as broken:
            self._failed = broken
            return
        self._asleep = True
        self._changed.release()
        try:
            look = link.sleep(left)
        finally:
            self._changed.acquire()
            self._asleep = False
            self._changed.notify_all()
        if look and (failed := link.verdict()) is not None:
            self._lose(failed)

    def _lose(self, failed: GntallocError) -> None:
        """The backend is gone. Everybody is told; or, with patience, another is waited for."""
        with contextlib.suppress(PeerBroke):
            self._flights.collect()  # what it had answered before
        self._failed = failed
        if self._patience and not self._closing:
            with contextlib.suppress(GntallocError):  # then it has failed for good
                self._reconnect(self._patience)
        self._changed.notify_all()

    def _wake_the_sleeper(self) -> None:
        while self._asleep and self._link is not None:
            self._link.wake()
            self._changed.wait()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"{self!r} cannot be used; open another")
        if self._failed is not None:
            raise self._failed

    def _judge(self, flight: Flight) -> None:
        if not flight.status:
            return
        what = f"{flight.operation.name} of {flight.length} bytes at {flight.sector * SECTOR}"
        if flight.status == NOT_SUPPORTED:
            raise DeviceError(errno.EOPNOTSUPP, f"{self!r}: the backend does not support {what}")
        raise DeviceError(errno.EIO, f"{self!r}: the backend failed at {what} (status {flight.status}); see its log")

    def _check_range(self, offset: int, length: int, *, whole: bool = False) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} are not all on {self!r}, which has {self.size}")
        if whole and (offset % self.sector_size or length % self.sector_size):
            raise ValueError(f"{length} bytes at {offset} are no whole sectors of {self.sector_size}; read them first")

    def _check_writable(self) -> None:
        if self.read_only:
            raise DeviceError(errno.EROFS, f"{self!r} is read-only; its toolstack decides that, with mode=w")

    # The handshake.

    def _connect(self, timeout: float) -> Link:
        """From wherever both ends are to state 4. The link that was is gone already."""
        deadline = time.monotonic() + timeout
        recover(self._end, deadline)
        nodes = {"protocol": PROTOCOL, "feature-persistent": "1"}
        link = Link(self._domain, self._device, self._end, ENTRY, nodes, deadline)
        try:
            self._read_features()
            self._end.go(State.CONNECTED)
        except BaseException:
            link.give_up()
            link.close()
            raise
        self._link = link
        return link

    def _read_features(self) -> None:
        end = self._end
        sectors, size = end.number("sectors", most=1 << 54), end.number("sector-size", SECTOR, 1 << 16)
        physical = end.number("physical-sector-size", size, 1 << 30)
        if size < SECTOR or size & (size - 1) or size > PAGE_SIZE:
            raise PeerBroke(f"{end.other} says that a sector has {size} bytes; that is 512 to {PAGE_SIZE}")
        self.size, self.sector_size = sectors * SECTOR // size * size, size
        self.physical_sector_size = max(physical, size)
        self.read_only = bool(end.number("info", most=0xFFFF_FFFF) & INFO_READ_ONLY) or end.read("mode") == "r"
        self.features = Features(
            persistent=end.number("feature-persistent") == 1,
            flush=end.number("feature-flush-cache") == 1,
            discard=end.number("feature-discard") == 1,
            discard_granularity=end.number("discard-granularity", size),
            discard_alignment=end.number("discard-alignment"),
            indirect_segments=end.number("feature-max-indirect-segments", most=0xFFFF),
        )

    def _segments(self) -> int:
        return max(SEGMENTS, min(self.features.indirect_segments, _MOST_SEGMENTS))

    def _disconnect(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _reconnect(self, timeout: float) -> None:
        self._disconnect()
        self._failed = self._failed or PeerDied(f"{self!r} has no backend; call reconnect when there is one")
        link = self._connect(timeout)
        self._failed = None
        self._flights.restart(link.ring, self._segments())
        self._show()
        self._changed.notify_all()


def _choose(domain: Domain, number: int | None) -> Device:
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


def _after(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout
