"""Disk: the same disk as `BlockDevice`, for asyncio. `gntalloc.aio.disk` opens one.

The loop watches one descriptor, takes in what has landed, and tells the tasks whose it was. What talks with xenstore
(the handshakes, and what became of a backend that is gone) runs in a thread; the ring is left alone meanwhile.

All requests that the tasks put before the loop comes round are shown to the backend at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from typing import TYPE_CHECKING, Self

from gntalloc.async_only import AsyncOnly
from gntalloc.clock import Deadline
from gntalloc.errors import Closed, DeviceError, GntallocError
from gntalloc.frontend.blkif import SECTOR, Operation
from gntalloc.frontend.extents import Extent, parse
from gntalloc.frontend.session import PAGES, Described, Session
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.frontend.link import Link
    from gntalloc.frontend.requests import Flight
    from gntalloc.guest.domain import BareDomain

__all__ = ["Disk", "disk"]


class _Landing:
    """How many flights of a call have not landed yet, and who waits for them."""

    __slots__ = ("left", "waiter")

    def __init__(self) -> None:
        self.left = 0
        self.waiter: asyncio.Future[None] | None = None


class Disk(Described, AsyncOnly):
    """A disk whose waiting calls are coroutines. One event loop, any number of tasks.

    A call that is cancelled, also by asyncio.timeout, leaves its buffer alone from then on. A write may have been
    written in part; the pages that carried it are free again when the backend has answered.
    """

    def __init__(self, session: Session, *, patience: float = 0.0) -> None:
        super().__init__(session)
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._landings: dict[Flight, _Landing] = {}
        self._turn = asyncio.Lock()  # who waits for room is served in the order of coming
        self._changes: set[asyncio.Future[None]] = set()
        self._away = False  # a thread has the session: nobody else may touch it
        self._errand: asyncio.Task[None] | None = None  # what that thread is about
        self._showing = False
        self._closing = False
        self._listening: Link | None = None
        self._listen()

    async def read(self, offset: int, length: int) -> bytes:
        """Read bytes, from anywhere. See `readinto`."""
        data = bytearray(length)
        await self.readinto(offset, data)
        return bytes(data)

    async def readinto(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill a buffer. See `BlockDevice.readinto`."""
        view = memoryview(buffer).cast("B")
        before, after = self._session.around(offset, len(view))
        if before or after:
            whole = memoryview(bytearray(before + len(view) + after))
            await self._transfer(Operation.READ, offset - before, whole)
            view[:] = whole[before : before + len(view)]
        else:
            await self._transfer(Operation.READ, offset, view)
        return len(view)

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Write whole sectors. See `BlockDevice.write`."""
        view = memoryview(data).cast("B")
        self._session.check_range(offset, len(view), whole=True)
        self._session.check_writable()
        await self._transfer(Operation.WRITE, offset, view)
        return len(view)

    async def flush(self) -> None:
        """Wait until all that was written is safe. See `BlockDevice.flush`."""
        if self.features.flush and not self.read_only:
            await self._plain(Operation.FLUSH, 0, 0)

    async def discard(self, offset: int, length: int) -> None:
        """Tell the backend that whole sectors are not needed any more. See `BlockDevice.discard`."""
        self._session.check_range(offset, length, whole=True)
        self._session.check_discard()
        if length:
            await self._plain(Operation.DISCARD, offset // SECTOR, length)

    async def extents(self, offset: int, length: int) -> tuple[Extent, ...]:
        """Tell data from holes, from byte `offset` on. See `BlockDevice.extents`."""
        before = self._session.before_extents(offset, length)
        if not self.features.extents:
            return (Extent(length, hole=False),)
        page = bytearray(PAGE_SIZE)
        try:
            await self._transfer(Operation.EXTENTS, offset - before, memoryview(page))
        except DeviceError as refused:
            if refused.errno != errno.EOPNOTSUPP:  # as there
                raise
        return parse(page, before, length)

    async def reconnect(self, *, timeout: float = 10.0) -> None:  # noqa: ASYNC109  it bounds what a thread does
        """Begin anew with a backend that has returned. See `BlockDevice.reconnect`; calls that wait have failed."""
        if self._closing:
            raise Closed(f"{self!r} cannot be connected again; open another")
        await self._errand_is_done()
        self._run(lambda: self._session.reconnect(timeout=timeout))
        await self._errand_is_done()
        self._session.check_open()

    async def close(self, *, timeout: float = 10.0) -> None:  # noqa: ASYNC109  the same
        """Wait for what is in flight, tell the backend, and take the pages back. See `BlockDevice.close`."""
        if self._closing:
            return
        self._closing = True
        deadline = Deadline(timeout)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    while self._session.failed is None and self._session.flights.in_flight:
                        await self._change()
        finally:
            await self._errand_is_done()
            self._deafen()
            self._session.closed = True
            self._wake_all()
            await asyncio.to_thread(self._session.close, timeout=deadline.within(timeout))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # Requests.

    async def _transfer(self, operation: Operation, offset: int, view: memoryview) -> None:
        flights: list[Flight] = []
        landing = _Landing()
        at = 0
        try:
            while at < len(view):
                async with self._turn:
                    await self._room(min(self.largest, len(view) - at))
                    piece = view[at : at + self.largest]  # another backend may take less at once
                    if self._session.flights.has_room(len(piece)):
                        flights.append(self._put(self._session.put(operation, offset + at, piece), landing))
                        at += len(piece)
            await self._land(landing)
        except BaseException:
            self._abandon(flights)
            raise
        for flight in flights:
            self._session.judge(flight)

    async def _plain(self, operation: Operation, sector: int, length: int) -> None:
        landing = _Landing()
        async with self._turn:
            await self._room(0)
            flight = self._put(self._session.flights.plain(operation, sector, length), landing)
        try:
            await self._land(landing)
        except BaseException:
            self._abandon([flight])
            raise
        self._session.judge(flight)

    async def _room(self, length: int) -> None:
        """Until a request of so many bytes can be put, if nothing else happens first."""
        while True:
            self._check_open()
            if not self._away and self._session.flights.has_room(length):
                return
            await self._change()

    def _put(self, flight: Flight, landing: _Landing) -> Flight:
        self._landings[flight] = landing
        landing.left += 1
        if not self._showing:
            self._showing = True
            self._loop.call_soon(self._show)
        return flight

    def _show(self) -> None:
        self._showing = False
        if not self._away:  # it is done afterwards
            self._guarded(self._session.show)

    async def _land(self, landing: _Landing) -> None:
        while landing.left:
            if not self._away:
                self._session.check_open()
            landing.waiter = self._loop.create_future()
            await landing.waiter

    def _abandon(self, flights: list[Flight]) -> None:
        for flight in flights:
            flight.abandon()
            self._landings.pop(flight, None)

    def _check_open(self) -> None:
        if self._closing:
            raise Closed(f"{self!r} cannot be used, it was closed here; open another")
        if not self._away:
            self._session.check_open()

    # The descriptor.

    def _listen(self) -> None:
        """Watch the session's link. What has come already is taken in."""
        self._listening = self._session.link
        if self._listening is not None:
            self._loop.add_reader(self._listening.fileno(), self._heard)
            self._collect()

    def _deafen(self) -> None:
        if self._listening is not None:
            self._loop.remove_reader(self._listening.fileno())
            self._listening = None

    def _heard(self) -> None:
        link = self._listening
        if link is None:
            return
        look = self._guarded(link.heard)
        self._collect()
        if look and self._listening is not None:
            self._run(self._look)

    def _collect(self) -> None:
        """Take in all that has landed, and ask to be woken by the next."""
        session = self._session
        while session.failed is None:
            for flight in session.collect():
                landing = self._landings.pop(flight, None)
                if landing is not None:
                    landing.left -= 1
                    if not landing.left and landing.waiter is not None and not landing.waiter.done():
                        landing.waiter.set_result(None)
            if not session.ask():
                break
        _wake(self._changes)
        if session.failed is not None:
            self._lose()

    def _guarded(self, action: Callable[[], bool | None]) -> bool:
        """Do what needs the machine. If it is gone, so is the disk."""
        try:
            return bool(action())
        except GntallocError as gone:
            self._session.failed = self._session.failed or gone
            self._lose()
            return False

    # The backend's end, in a thread.

    def _lose(self) -> None:
        """Tell all waiters that the backend is gone; or, with patience, wait for another."""
        self._deafen()
        if self._patience and not self._closing and not self._away:
            self._run(lambda: self._session.reconnect(timeout=self._patience))
        elif not self._away:
            self._wake_all()

    def _look(self) -> None:
        """Ask what has become of the backend."""
        link = self._session.link
        verdict = None if link is None else link.verdict()
        if verdict is not None:
            self._session.collect()  # what it had answered before
            self._session.failed = verdict
        elif link is not None:
            self._session.refresh()

    def _run(self, work: Callable[[], None]) -> None:
        self._deafen()
        self._away = True
        self._errand = self._loop.create_task(self._finish(work))

    async def _finish(self, work: Callable[[], None]) -> None:
        try:
            await asyncio.to_thread(work)
        except GntallocError:
            pass  # `failed` says what is to be said
        except OSError as error:  # of the kernel: no descriptor left, say
            why = f"{self._session} is of no more use ({error.strerror}); close it, and open it again"
            self._session.failed = DeviceError(error.errno or errno.EIO, why)
        self._away = False
        self._errand = None
        session = self._session
        for flight in [flight for flight in self._landings if flight.done]:  # what the thread has collected
            self._landings.pop(flight).left -= 1
        if session.failed is None:
            self._listen()
            self._show()
        elif work == self._look:
            self._lose()
        if self._errand is None:
            self._wake_all()

    async def _errand_is_done(self) -> None:
        while self._errand is not None:
            await asyncio.wait([self._errand])

    # Who waits.

    async def _change(self) -> None:
        """Until something has landed, or is different otherwise."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._changes.add(waiter)
        try:
            await waiter
        finally:
            self._changes.discard(waiter)

    def _wake_all(self) -> None:
        _wake(self._changes)
        _wake({landing.waiter for landing in self._landings.values() if landing.waiter is not None})


async def disk(
    domain: BareDomain,
    number: int | None = None,
    *,
    pages: int = PAGES,
    timeout: float = 10.0,  # noqa: ASYNC109  as above
    patience: float = 0.0,
) -> Disk:
    """Open a disk. See `BlockDevice`, whose arguments and errors these are.

    If this is cancelled, what was begun is undone behind it, within `timeout` seconds.
    """
    lock = threading.Lock()
    made: list[Session] = []
    wanted = True

    def make() -> None:
        session = Session(domain, number, pages=pages, timeout=timeout)
        with lock:
            if wanted:
                made.append(session)
                return
        session.close(timeout=timeout)

    try:
        await asyncio.to_thread(make)
    except BaseException:
        with lock:
            wanted = False
        for session in made:
            threading.Thread(target=session.close, kwargs={"timeout": timeout}).start()
        raise
    return Disk(made[0], patience=patience)


def _wake(waiters: set[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
