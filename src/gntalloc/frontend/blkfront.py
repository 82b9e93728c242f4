"""BlockDevice: a disk that a backend in another domain serves, as a Python object whose calls wait.

    with BlockDevice(gntalloc.current_domain()) as disk:
        disk.write(0, bytes(4096))
        disk.flush()
        disk.read(512, 100)

How threads wait is in `waiting`.
`gntalloc.frontend.aio` has the same for asyncio.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Self

from gntalloc.clock import Deadline
from gntalloc.errors import Closed, DeviceError, GntallocError
from gntalloc.frontend.blkif import SECTOR, Operation
from gntalloc.frontend.extents import Extent, parse
from gntalloc.frontend.session import PAGES, Described, Features, Session
from gntalloc.frontend.waiting import Waiting
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from gntalloc.frontend.requests import Flight
    from gntalloc.guest.domain import BareDomain

__all__ = ["BlockDevice", "Features"]


class BlockDevice(Described):
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
    """

    def __init__(
        self,
        domain: BareDomain,
        number: int | None = None,
        *,
        pages: int = PAGES,
        timeout: float = 10.0,
        patience: float = 0.0,
    ) -> None:
        super().__init__(Session(domain, number, pages=pages, timeout=timeout))
        self._waiting = Waiting(self._session, patience)

    @property
    def size(self) -> int:
        """Bytes. It follows the backend's, whose disk may grow."""
        self._catch_up()
        return self._session.offer.size

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
        self._catch_up(offset + len(view))
        before, after = self._session.around(offset, len(view))
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
        self._catch_up(offset + len(view))
        self._session.check_range(offset, len(view), whole=True)
        self._session.check_writable()
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
        self._catch_up(offset + length)
        self._session.check_range(offset, length, whole=True)
        self._session.check_discard()
        if length:
            self._plain(Operation.DISCARD, offset // SECTOR, length, timeout)

    def extents(self, offset: int, length: int, *, timeout: float | None = None) -> tuple[Extent, ...]:
        """Tell data from holes, which read as zeros, from byte `offset` on.

        Returns:
            At least one extent. Together they may be less than `length`: ask again from there. A backend that does not
            tell (`features.extents`) has data everywhere.

        Raises:
            ValueError: it goes beyond the end, or `length` is 0.
            DeviceError, PeerClosed, PeerDied, PeerBroke, TimedOut: as `readinto`.
        """
        self._catch_up(offset + length)
        before = self._session.before_extents(offset, length)
        if not self.features.extents:
            return (Extent(length, hole=False),)
        page = bytearray(PAGE_SIZE)
        try:
            self._transfer(Operation.EXTENTS, offset - before, memoryview(page), timeout)
        except DeviceError as refused:
            if refused.errno != errno.EOPNOTSUPP:  # another backend has taken over meanwhile, which cannot tell
                raise
        return parse(page, before, length)

    # Many requests in flight.

    def submit(
        self, operation: Operation, offset: int, buffer: bytearray | bytes | memoryview, *, more: bool = False
    ) -> Flight | None:
        """Begin one READ into, or WRITE of, a buffer of whole sectors, `largest` bytes at most; do not wait for it.

        The buffer of a READ is filled when the flight is `done`, which `complete` sees to.

        Args:
            operation: READ or WRITE.
            offset: bytes.
            buffer: contiguous.
            more: another call follows at once. The backend is told of all of them together, by the one without `more`
                or by a wait for any of them: to wake it for each costs more than most disks' answer.

        Returns:
            The flight; None: there is no room for it before another has landed.

        Raises:
            ValueError: not whole sectors, too many, or beyond the end.
            DeviceError: EROFS.
            PeerClosed, PeerDied, PeerBroke: as `readinto`.
        """
        view = memoryview(buffer).cast("B")
        session = self._session
        self._catch_up(offset + len(view))
        session.check_request(operation, offset, len(view))
        with self._waiting.changed:
            self._waiting.until_settled(Deadline(None))
            session.check_open()
            if not session.flights.has_room(len(view)):
                return None
            flight = session.put(operation, offset, view)
            if not more:
                session.show()
            return flight

    def complete(self, *flights: Flight, timeout: float | None = None) -> None:
        """Wait until flights have landed: all of them. To wait for many at a time saves being woken for each.

        Raises:
            DeviceError: EIO the backend could not do one of them.
            PeerClosed, PeerDied, PeerBroke, TimedOut: as `readinto`; what is in flight goes on after a TimedOut.
        """
        if not all(flight.done for flight in flights):
            with self._waiting.changed:
                self._waiting.until_landed(flights, Deadline(timeout), "a request")
        for flight in flights:
            self._session.judge(flight)

    # Coming and going.

    def reconnect(self, *, timeout: float = 10.0) -> None:
        """Begin anew with a backend that has returned. What was submitted and not answered is asked again.

        Raises:
            TimedOut: none was there.
            PeerClosed: it does not want it.
            Closed: this was closed.
        """
        deadline = Deadline(timeout)
        with self._waiting.changed:
            self._waiting.until_settled(deadline)
            if self._waiting.closing:
                raise Closed(f"{self!r} cannot be connected again; open another")
            with self._waiting.apart():
                self._session.reconnect(timeout=deadline.within(timeout))

    def close(self, *, timeout: float = 10.0) -> None:
        """Wait for what is in flight, tell the backend, and take the pages back. Can be repeated.

        What was not flushed is as safe as the backend sees fit. A backend that does not answer is left alone after
        `timeout` seconds: the pages go when it lets go.
        """
        deadline = Deadline(timeout)
        with self._waiting.changed:
            while self._waiting.closing and (self._waiting.away or not self._session.closed):
                self._waiting.changed.wait()  # for the thread that closes it
            if self._session.closed:
                return
            self._waiting.closing = True
            try:
                self._land(deadline)
            except BaseException:  # Ctrl-C, say: the next close begins anew
                self._waiting.closing = False
                self._waiting.changed.notify_all()
                raise
            self._session.closed = True
            with self._waiting.apart():
                self._session.close(timeout=deadline.within(timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _catch_up(self, end: int | None = None) -> None:
        """See whether the disk has grown, if a call ends beyond its end. Whoever has the lock does so instead."""
        if end is not None and end <= self._session.offer.size:
            return
        if self._waiting.changed.acquire(blocking=False):
            try:
                if not self._waiting.away:
                    self._session.catch_up()
            finally:
                self._waiting.changed.release()

    def _land(self, deadline: Deadline) -> None:
        """Wait for what is in flight, as far as the backend answers before the deadline. The lock is held."""
        session = self._session
        session.interrupt()
        while self._waiting.away:
            self._waiting.changed.wait()
        if session.failed is None:
            with contextlib.suppress(GntallocError):
                self._waiting.until(lambda: len(session.flights.in_flight), deadline, "the requests in flight")

    def _transfer(self, operation: Operation, offset: int, view: memoryview, timeout: float | None) -> None:
        """Read or write whole sectors, with as many requests at a time as there is room for."""
        deadline = Deadline(timeout)
        session = self._session
        flights: list[Flight] = []
        try:
            with self._waiting.changed:
                at = 0
                while at < len(view):
                    self._waiting.until_settled(deadline)
                    session.check_open()
                    piece = view[at : at + session.flights.most]
                    if not session.flights.has_room(len(piece)):
                        self._waiting.until_room(len(piece), deadline)
                        continue
                    flights.append(session.put(operation, offset + at, piece))
                    at += len(piece)
                self._waiting.until_landed(flights, deadline, "the backend")
        except BaseException:
            for flight in flights:
                flight.abandon()
            raise
        for flight in flights:
            session.judge(flight)

    def _plain(self, operation: Operation, sector: int, length: int, timeout: float | None) -> None:
        deadline = Deadline(timeout)
        session = self._session
        with self._waiting.changed:
            self._waiting.until_room(0, deadline)
            session.check_open()
            flight = session.flights.plain(operation, sector, length)
            try:
                self._waiting.until_landed((flight,), deadline, "the backend")
            except BaseException:
                flight.abandon()
                raise
        session.judge(flight)
