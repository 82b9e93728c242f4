"""Tell the time by one clock, and keep deadlines in one idiom.

    deadline = Deadline(timeout)                # seconds from now; None: never
    while not there():
        if deadline.expired:
            raise TimedOut(...)
        poll.poll(deadline.milliseconds)

Tools that stop the time of a test (freezegun, time-machine) put their own functions in the place of `time.monotonic`
and the like, in every module. A wait that asks them never ends. The clock here is asked by its number, which such tools
leave alone.
"""

from __future__ import annotations

from functools import partial
from time import CLOCK_MONOTONIC, CLOCK_THREAD_CPUTIME_ID, clock_gettime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

__all__ = ["Deadline", "now", "processor_time"]

now: Callable[[], float] = partial(clock_gettime, CLOCK_MONOTONIC)
"""Seconds since some moment. The machine and its programs, on one computer, agree on it."""

processor_time: Callable[[], float] = partial(clock_gettime, CLOCK_THREAD_CPUTIME_ID)
"""Seconds that a processor has worked for this thread. Time in which others had the processor does not count."""


class Deadline:
    """End a wait `timeout` seconds from now. None: it may last for ever."""

    __slots__ = ("_at",)

    def __init__(self, timeout: float | None) -> None:
        self._at = None if timeout is None else now() + timeout

    @property
    def remaining(self) -> float | None:
        """The seconds that are left: 0 once the deadline has passed, and never less. None: no end."""
        return None if self._at is None else max(0.0, self._at - now())

    @property
    def milliseconds(self) -> float | None:
        """The milliseconds that are left, as poll(2) wants them."""
        return None if self._at is None else max(0.0, self._at - now()) * 1000

    @property
    def expired(self) -> bool:
        """Whether it has passed."""
        return self._at is not None and now() >= self._at

    def within(self, most: float) -> float:
        """Give the seconds that are left, or `most` if that is less."""
        return most if self._at is None else max(0.0, min(most, self._at - now()))

    def acquire(self, lock: threading.Lock) -> bool:
        """Wait for a lock, until the deadline. False: it was not free in time."""
        return lock.acquire(timeout=-1 if self._at is None else max(0.0, self._at - now()))
