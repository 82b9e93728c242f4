"""What the calls of a channel have in common: its state, one turn after the other, and waiting for the peer.

Everything here that waits is called with the lock of its direction held.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from gntalloc.clock import Deadline
from gntalloc.errors import Busy, Closed, GntallocError, PeerBroke, TimedOut
from gntalloc.vchan.end import flag_word
from gntalloc.vchan.layout import CONNECTED, NOTIFY_READ, NOTIFY_WRITE

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.vchan.end import End

__all__ = ["Lent", "Turn", "Waiting", "bytes_of", "queue_up"]


class Lent(NamedTuple):
    """What is in the user's hands."""

    view: memoryview
    size: int
    head: int  # bytes before it that belong to it: a message's length
    known: int  # what the ring knew to be ready, or room, before
    copy: bytearray | None  # what was lent instead, because the ring's end parts the place


class Waiting:
    """One end, with a lock for each direction, and one for those who wait until the peer has read everything.

    Args:
        end: with its pages and bells.
        address: of the domain that it is in.
    """

    def __init__(self, end: End, address: str) -> None:
        self.peer = end.peer
        self._end = end
        self._address = address
        self._in, self._out = end.reader, end.writer
        self._make_locks()
        self._peeked: Lent | None = None
        self._reserved: Lent | None = None
        self._closed = False
        # What to look at after a message: one load of the four bytes from cli_live on, and what is nothing to do.
        role, ordered = end.role, end.atomics.ordered
        self._flags = end.pages.flags
        self._after_writing = flag_word(role.peer_live, 0xFF) | flag_word(role.asked, NOTIFY_WRITE)
        self._after_reading = flag_word(role.asked, NOTIFY_READ)
        self._live, self._connected = flag_word(role.peer_live, 0xFF), flag_word(role.peer_live, CONNECTED)
        self._quiet = self._connected if ordered else -1
        self._quiet_reading = 0 if ordered else -1

    def _make_locks(self) -> None:
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._draining = threading.Lock()

    def _look(self, count: Callable[[], int]) -> int:
        """Ask a ring for a number, beside whatever other threads do with it."""
        self._end.check_open()
        try:
            return self._end.look(count)
        except ValueError:  # another thread has closed this end meanwhile
            self._end.check_open()
            raise

    def _await_bytes(self, count: int, deadline: Deadline) -> bool:
        """Until so many can be read. False: there will not be."""
        self._end.check_open()
        if self._peeked is not None:
            raise Busy(f"{self!r} cannot be read: what was peeked is to be released first")
        ring = self._in
        if ring.ready >= count:
            return True
        if count > ring.size:
            raise _too_long(count, ring.size)
        self._end.await_peer(deadline)
        if self._end.wait(NOTIFY_WRITE, ring.refresh, count, self._end.no_more_comes, deadline, "bytes to read"):
            return True
        if not self._end.orderly():
            raise self._end.gone()
        return False

    def _await_message(self, deadline: Deadline) -> int:
        """Until there is a whole message. How long it is."""
        try:
            while (length := self._in.message_length()) is None:
                self._await_more(deadline)
        except PeerBroke as broken:
            raise self._end.give_up(broken) from None
        return length

    def _await_more(self, deadline: Deadline) -> None:
        """Until there is more of a message that is not all there."""
        end, ring = self._end, self._in
        end.check_open()
        if self._peeked is not None:
            raise Busy(f"{self!r} cannot be read: what was peeked is to be released first")
        if end.waiting:
            end.await_peer(deadline)
        if not end.wait(NOTIFY_WRITE, ring.refresh, ring.ready + 1, end.no_more_comes, deadline, "a message"):
            if ring.ready and end.orderly():
                raise end.give_up(PeerBroke("the peer closed in the middle of a message"))
            raise end.gone()

    def _await_room(self, count: int, deadline: Deadline) -> None:
        """Until so many bytes can be written."""
        self._end.check_open()
        if self._reserved is not None:
            raise Busy(f"{self!r} cannot be written: what was reserved is to be committed first")
        if self._end.finished:
            raise Closed(f"{self!r} cannot be written: `finish` was called")
        ring = self._out
        if count > ring.size and not self._end.waiting:
            raise _too_long(count, ring.size)
        if self._end.peer_is_gone():
            raise self._end.gone()
        if ring.room >= count:
            return
        self._end.await_peer(deadline)
        if count > ring.size:
            raise _too_long(count, ring.size)
        if not self._end.wait(NOTIFY_READ, ring.refresh, count, self._end.peer_is_gone, deadline, "room to write"):
            raise self._end.gone()

    def _tell(self, bit: int) -> None:
        """An index was moved, with the lock still held."""
        self._end.atomics.fence()
        self._end.tell(bit)

    def _has_read(self) -> None:
        """After a message was read and the lock released, which is a fence if `ordered`."""
        try:
            if self._flags[0] & self._after_reading != self._quiet_reading:
                if not self._end.atomics.ordered:
                    self._end.atomics.fence()
                self._end.tell(NOTIFY_READ)
        except ValueError:
            pass  # another thread closed this end, and that told the peer

    def _has_written(self) -> None:
        """After bytes were written and the lock released, which is a fence if `ordered`."""
        try:
            if self._flags[0] & self._after_writing != self._quiet:
                self._written()
        except ValueError:
            pass  # as in `_has_read`

    def _written(self) -> None:
        """A message was written, and something is to be done: the peer has asked, or is not there."""
        if not self._end.atomics.ordered:
            self._end.atomics.fence()
        self._end.tell(NOTIFY_WRITE)
        if self._end.peer_is_gone():
            with self._writing:
                self._out.room = 0  # so that the next one finds out


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


def bytes_of(data: Any) -> memoryview:
    """Anything with a buffer, as plain bytes."""
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _too_long(count: int, size: int) -> GntallocError:
    return GntallocError(
        errno.EMSGSIZE,
        f"{count} bytes do not fit a ring of {size} at once; listen with a larger `size`, or use read and write",
    )
