"""Wait for a disk's backend, in threads.

One thread sleeps for all that wait; the others are told by it. The lock is never held while the backend is waited for,
not in a handshake either: then one thread has the session, and the others wait, each as long as it was told, or close.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from typing import TYPE_CHECKING

from gntalloc.clock import Deadline, now
from gntalloc.errors import Closed, DeviceError, GntallocError, TimedOut
from gntalloc.looking import Look

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gntalloc.frontend.requests import Flight
    from gntalloc.frontend.session import Session

__all__ = ["Waiting"]

_LOOK = 50e-6  # seconds to look before sleeping


class Waiting:
    """Let the threads that use a session wait for its backend. All calls are made with the lock of `changed` held.

    Args:
        session: the disk's.
        patience: seconds to wait for the backend's return when it has gone. 0: it is not waited for.

    Attributes:
        changed: told of all that a thread may wait for.
        away: whether one thread has the session for itself: no other one touches it meanwhile.
        closing: whether the disk is being closed, or is closed.
    """

    def __init__(self, session: Session, patience: float) -> None:
        self.changed = threading.Condition(threading.Lock())
        self.away = False
        self.closing = False
        self._session = session
        self._patience = patience
        self._asleep = False
        self._look = Look(_LOOK)
        self._others = 0  # threads that wait for the one that sleeps

    def until_landed(self, flights: Sequence[Flight], deadline: Deadline, what: str) -> None:
        """Wait until all of these flights have landed."""
        waiting = list(flights)

        def missing() -> int:
            waiting[:] = [flight for flight in waiting if not flight.done]
            return len(waiting)

        self.until(missing, deadline, what)

    def until_room(self, length: int, deadline: Deadline) -> None:
        """Wait for room for a request of `length` bytes, and for more, so that the backend always has work."""
        flights = self._session.flights

        def missing() -> int:
            return 0 if flights.has_room(length) else max(1, len(flights.in_flight) // 2)

        self.until(missing, deadline, "room in the ring")

    def until(self, missing: Callable[[], int], deadline: Deadline, what: str) -> None:
        """Show what was put, and take in responses until nothing is missing; one thread sleeps, the others wait for it.

        Args:
            missing: at least so many responses are needed yet.
            deadline: for all of it.
            what: is waited for.
        """
        self.until_settled(deadline)
        self._session.show()
        slept = False
        while True:
            self.until_settled(deadline)
            if not (count := self._collect(missing, deadline, slept=slept)):
                return
            self._session.check_open()
            left = deadline.remaining
            if left == 0:
                raise TimedOut(f"{self._session} has waited in vain for {what}; wait again")
            if not self._asleep:
                slept = self._sleep(left, 1 if self._others else count)
            elif not self._session.ask():  # it may sleep until there are more than this thread needs
                self._others += 1
                try:
                    self.changed.wait(left)
                finally:
                    self._others -= 1

    def _collect(self, missing: Callable[[], int], deadline: Deadline, *, slept: bool) -> int:
        """Take in what is there, and look for a while whether that is all. Return how much is missing."""
        session = self._session
        until = None
        while True:
            if session.failed is None and (session.collect() or session.failed):
                self.changed.notify_all()
            if not (count := missing()):
                if until is not None:
                    self._look.paid()
                elif slept:
                    self._look.woken()
                return 0
            if until is None:
                until = self._look.until(deadline)
            if session.failed is not None or now() >= until:
                return count

    def _sleep(self, left: float | None, more: int) -> bool:
        """Sleep until `more` responses are there, or something else has happened. False: something was there already.

        Others may have the lock meanwhile.
        """
        link = self._session.link
        assert link is not None
        if self._session.ask(more):
            return False
        self._asleep = True
        self.changed.release()
        try:
            look = link.sleep(timeout=left)
        finally:
            self.changed.acquire()
            self._asleep = False
            self.changed.notify_all()
        if look and not self.away:
            if (failed := link.verdict()) is not None:
                self._lose(failed)
            else:
                self._session.refresh()
        return True

    def _lose(self, failed: GntallocError) -> None:
        """Tell all waiters that the backend is gone; or, with patience, wait for another."""
        session = self._session
        session.collect()  # what it had answered before
        session.failed = failed
        if self._patience and not self.closing:
            self.away = True
            threading.Thread(target=self._await_return, name="gntalloc disk: patience", daemon=True).start()
        self.changed.notify_all()

    def until_settled(self, deadline: Deadline) -> None:
        """Wait until no thread has the session for itself.

        Raises:
            TimedOut: one had it until the deadline.
            Closed: this is being closed.
        """
        while self.away:
            left = deadline.remaining
            if left == 0:
                raise TimedOut(f"{self._session} has waited in vain for the backend to return; wait again")
            if not self.closing:
                self.changed.wait(left)
            if self.closing:  # which the handshake was given up for
                raise Closed(f"{self._session} cannot be used, it was closed here; open another")

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Have the session for this thread alone, and the lock released: for what waits for the backend."""
        self.away = True
        self._wake_the_sleeper()
        self.changed.release()
        try:
            yield
        finally:
            self.changed.acquire()
            self.away = False
            self.changed.notify_all()

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
            with self.changed:
                self.away = False
                self.changed.notify_all()

    def _wake_the_sleeper(self) -> None:
        while self._asleep and self._session.link is not None:
            self._session.link.wake()
            self.changed.wait()
