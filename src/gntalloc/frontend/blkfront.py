"""BlockDevice: a disk that a backend in another domain serves, as a Python object whose calls wait.

    with BlockDevice(gntalloc.current_domain()) as disk:
        disk.write(0, bytes(4096))
        disk.flush()
        disk.read(512, 100)

One thread sleeps for all that wait; the others are told by it. The lock is never held while the backend is waited for,
not in a handshake either: then one thread has the session, and the others wait, each as long as it was told, or close.
`gntalloc.frontend.aio` has the same for asyncio.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from typing import TYPE_CHECKING, Self

from gntalloc.clock import Deadline, now
from gntalloc.errors import Closed, DeviceError, GntallocError, TimedOut
from gntalloc.frontend.blkif import SECTOR, Operation
from gntalloc.frontend.extents import Extent, parse
from gntalloc.frontend.session import PAGES, Described, Features, Session
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gntalloc.frontend.requests import Flight
    from gntalloc.guest.domain import BareDomain

__all__ = ["BlockDevice", "Features"]

_LOOK = 50e-6  # seconds to look before sleeping


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
        self._patience = patience
        self._changed = threading.Condition(threading.Lock())
        self._asleep = False
        self._others = 0  # threads that wait for the one that sleeps
        self._closing = False
        self._away = False  # a thread waits for the backend's handshake: nobody else touches the session meanwhile
        super().__init__(Session(domain, number, pages=pages, timeout=timeout))

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
        with self._changed:
            self._until_settled(Deadline(None))
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
            with self._changed:
                self._until_landed(flights, Deadline(timeout), "a request")
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
        with self._changed:
            self._until_settled(deadline)
            if self._closing:
                raise Closed(f"{self!r} cannot be connected again; open another")
            with self._apart():
                self._session.reconnect(timeout=deadline.within(timeout))

    def close(self, *, timeout: float = 10.0) -> None:
        """Wait for what is in flight, tell the backend, and take the pages back. Can be repeated.

        What was not flushed is as safe as the backend sees fit. A backend that does not answer is left alone after
        `timeout` seconds: the pages go when it lets go.
        """
        deadline = Deadline(timeout)
        with self._changed:
            if self._closing:
                while not self._session.closed or self._away:
                    self._changed.wait()  # for the thread that closes it
                return
            self._closing = True
            self._session.interrupt()
            while self._away:
                self._changed.wait()
            with contextlib.suppress(GntallocError):
                if self._session.failed is None:
                    self._until(lambda: len(self._session.flights.in_flight), deadline, "the requests in flight")
            self._session.closed = True
            with self._apart():
                self._session.close(timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _catch_up(self, end: int | None = None) -> None:
        """See whether the disk has grown, if a call ends beyond its end. Whoever has the lock does so instead."""
        if end is not None and end <= self._session.offer.size:
            return
        if self._changed.acquire(blocking=False):
            try:
                if not self._away:
                    self._session.catch_up()
            finally:
                self._changed.release()

    # What follows runs with the lock held.

    def _transfer(self, operation: Operation, offset: int, view: memoryview, timeout: float | None) -> None:
        """Read or write whole sectors, with as many requests at a time as there is room for."""
        deadline = Deadline(timeout)
        session = self._session
        flights: list[Flight] = []
        try:
            with self._changed:
                at = 0
                while at < len(view):
                    self._until_settled(deadline)
                    session.check_open()
                    piece = view[at : at + session.flights.most]
                    if not session.flights.has_room(len(piece)):
                        self._until_room(len(piece), deadline)
                        continue
                    flights.append(session.put(operation, offset + at, piece))
                    at += len(piece)
                self._until_landed(flights, deadline, "the backend")
        except BaseException:
            for flight in flights:
                flight.abandon()
            raise
        for flight in flights:
            session.judge(flight)

    def _plain(self, operation: Operation, sector: int, length: int, timeout: float | None) -> None:
        deadline = Deadline(timeout)
        session = self._session
        with self._changed:
            self._until_room(0, deadline)
            session.check_open()
            flight = session.flights.plain(operation, sector, length)
            try:
                self._until_landed((flight,), deadline, "the backend")
            except BaseException:
                flight.abandon()
                raise
        session.judge(flight)

    def _until_landed(self, flights: Sequence[Flight], deadline: Deadline, what: str) -> None:
        waiting = list(flights)

        def missing() -> int:
            waiting[:] = [flight for flight in waiting if not flight.done]
            return len(waiting)

        self._until(missing, deadline, what)

    def _until_room(self, length: int, deadline: Deadline) -> None:
        """For a request of so many bytes, and by then for more, so that the backend always has something to do."""
        flights = self._session.flights

        def missing() -> int:
            return 0 if flights.has_room(length) else max(1, len(flights.in_flight) // 2)

        self._until(missing, deadline, "room in the ring")

    def _until(self, missing: Callable[[], int], deadline: Deadline, what: str) -> None:
        """Show what was put, and take in responses until nothing is missing; one thread sleeps, the others wait for it.

        Args:
            missing: at least so many responses are needed yet.
            deadline: for all of it.
            what: is waited for.
        """
        self._until_settled(deadline)
        self._session.show()
        while True:
            self._until_settled(deadline)
            if not (count := self._collect(missing)):
                return
            self._session.check_open()
            left = deadline.remaining
            if left == 0:
                raise TimedOut(f"{self!r} has waited in vain for {what}; wait again")
            if not self._asleep:
                self._sleep(left, 1 if self._others else count)
            elif not self._session.ask():  # it may sleep until there are more than this thread needs
                self._others += 1
                try:
                    self._changed.wait(left)
                finally:
                    self._others -= 1

    def _collect(self, missing: Callable[[], int]) -> int:
        """Take in what is there, and look for a while whether that is all. How much is missing."""
        session = self._session
        until = 0.0
        while True:
            if session.failed is None and (session.collect() or session.failed):
                self._changed.notify_all()
            if not (count := missing()):
                return 0
            until = until or now() + _LOOK
            if session.failed is not None or now() >= until:
                return count

    def _sleep(self, left: float | None, more: int) -> None:
        """Until `more` responses are there, or something else has happened. Others may have the lock meanwhile."""
        link = self._session.link
        assert link is not None
        if self._session.ask(more):
            return
        self._asleep = True
        self._changed.release()
        try:
            look = link.sleep(timeout=left)
        finally:
            self._changed.acquire()
            self._asleep = False
            self._changed.notify_all()
        if not look or self._away:
            return
        if (failed := link.verdict()) is not None:
            self._lose(failed)
        else:
            self._session.refresh()

    def _lose(self, failed: GntallocError) -> None:
        """Tell all waiters that the backend is gone; or, with patience, wait for another."""
        session = self._session
        session.collect()  # what it had answered before
        session.failed = failed
        if self._patience and not self._closing:
            self._away = True
            threading.Thread(target=self._await_return, name="gntalloc disk: patience", daemon=True).start()
        self._changed.notify_all()

    def _until_settled(self, deadline: Deadline) -> None:
        """Wait until no thread has the session for itself.

        Raises:
            TimedOut: one had it until the deadline.
            Closed: this is being closed.
        """
        while self._away:
            left = deadline.remaining
            if left == 0:
                raise TimedOut(f"{self!r} has waited in vain for the backend to return; wait again")
            if not self._closing:
                self._changed.wait(left)
            if self._closing:  # which the handshake was given up for
                raise Closed(f"{self._session} cannot be used, it was closed here; open another")

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Have the session for this thread alone, and the lock released: for what waits for the backend."""
        self._away = True
        self._wake_the_sleeper()
        self._changed.release()
        try:
            yield
        finally:
            self._changed.acquire()
            self._away = False
            self._changed.notify_all()

    def _await_return(self) -> None:
        """Wait for another backend, in a thread of its own, so that each call keeps its own deadline."""
        session = self._session
        try:
            session.reconnect(timeout=self._patience)
        except GntallocError:
            pass  # `failed` says what is to be said
        except OSError as error:  # of the kernel: no descriptor left, say
            why = f"{session} is of no more use ({error.strerror}); close it, and open it again"
            session.failed = DeviceError(error.errno or errno.EIO, why)
        finally:
            with self._changed:
                self._away = False
                self._changed.notify_all()

    def _wake_the_sleeper(self) -> None:
        while self._asleep and self._session.link is not None:
            self._session.link.wake()
            self._changed.wait()
