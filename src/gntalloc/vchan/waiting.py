"""How a thread waits for what a channel's steps need, one after another, within a deadline.

A *step* is a generator. It does what can be done now, and where it cannot go on it yields a `Need`: so many bytes, so
much room, a peer. Whatever drives it waits for that in its own way (`run` here, a loop in `aio`), and sends back
whether it is there; or throws the error that ended the wait, so that the step can say how far it got.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias, TypeVar

from gntalloc.clock import Deadline, now
from gntalloc.errors import PeerBroke, TimedOut

if TYPE_CHECKING:
    import threading

    from gntalloc.looking import Look
    from gntalloc.vchan.end import End

__all__ = ["Need", "Steps", "Turn", "queue_up", "run", "wait"]

Result = TypeVar("Result")

_LOOKS = 16  # between two looks at the clock


class Need(NamedTuple):
    """Say what a step waits for: so many of something, or that there will never be."""

    bit: int
    """Of the page: what the peer is asked to tell. 0: it tells without being asked."""
    refresh: Callable[[], int]
    """Looks at the page, and says how many there are. If the peer lies there, that is the end."""
    wanted: int
    """How many are wanted."""
    over: Callable[[], bool]
    """Says whether the number will not change any more."""
    what: str
    """Is waited for, for the TimedOut."""


Steps: TypeAlias = Generator[Need, bool, Result]


def run(end: End, steps: Steps[Result], deadline: Deadline) -> Result:
    """Drive steps to their end, and wait in this thread for what they need.

    Raises:
        TimedOut: it did not come in time.
        PeerBroke, Closed: as `End.check_open`; and what the steps raise.
    """
    try:
        need = next(steps)
        while True:
            try:
                met = wait(end, need, deadline)
            except BaseException as error:
                need = steps.throw(error)
            else:
                need = steps.send(met)
    except StopIteration as done:
        result: Result = done.value
        return result


def wait(end: End, need: Need, deadline: Deadline) -> bool:
    """Wait until a need is met. False: it never will be.

    Written out in one piece, as what it calls most is: of a wake-up's time this is half.
    """
    bit, refresh, count, over, what = need
    bells = end.bells
    look = end.looks.get(bit)
    try:
        if refresh() >= count or (look is not None and _look_a_while(end, need, look, deadline)):
            return True
        if bit:
            end.ask(bit)
        try:
            while True:
                seen = bells.news
                if refresh() >= count:
                    return True
                if over():
                    return refresh() >= count
                if end.closing or end.broken:
                    end.check_open()
                left = deadline.remaining
                if left == 0:
                    raise TimedOut(f"{end} has waited in vain for {what}; wait again")
                bells.sleep(seen, left)
                if refresh() >= count:
                    if look is not None:
                        look.woken()
                    return True
                if bit:
                    end.ask_again()
        finally:
            if bit:
                end.ask_no_more(bit)
    except PeerBroke as broken:
        raise end.give_up(broken) from None


def _look_a_while(end: End, need: Need, look: Look, deadline: Deadline) -> bool:
    """Look for as long as the end spins, unless that does harm. True: there were enough before that had passed."""
    _, refresh, count, over, _ = need
    until = look.until(deadline)
    while now() < until:
        for _ in range(_LOOKS):
            if refresh() >= count:
                look.paid()
                return True
        if over() or end.closing:
            break
    return False


class Turn:
    """A lock that is waited for no longer than a timeout, and how much of that is left."""

    __slots__ = ("_lock", "deadline")

    def __init__(self, lock: threading.Lock, timeout: float | None) -> None:
        self.deadline = Deadline(timeout)
        self._lock = lock
        if not lock.acquire(blocking=False):
            queue_up(lock, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def queue_up(lock: threading.Lock, timeout: float | None) -> float | None:
    """Wait for a lock that another thread has. How much of the timeout is left.

    Raises:
        TimedOut: it kept it.
    """
    deadline = Deadline(timeout)
    if not deadline.acquire(lock):
        raise TimedOut(f"another thread has used this direction of the channel for {timeout} s; wait longer")
    return deadline.remaining
