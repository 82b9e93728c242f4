"""Channel: one end of a vchan, once its pages are mapped.

    channel.write(b"bytes")            channel.read()          any number of them, as a stream
    channel.send(b"a message")         channel.recv()          whole
    view = channel.reserve(65536)      view = channel.peek()   in place, in the shared pages
    channel.commit()                   channel.release()

Every call that may wait has a timeout in seconds; None waits for ever, 0 not at all. After a TimedOut nothing is lost
and the call can be repeated; where part of the work was done, the error's `done` says how much.

Threads: one may write while another reads, and several of either take turns. `ready`, `room`, `unread`, `commit`,
`release` and all that tells of the channel wait for nobody.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from typing import TYPE_CHECKING, Any, Self

from gntalloc.clock import Deadline
from gntalloc.errors import (
    Busy,
    GntallocError,
    NotKnownHere,
    PeerBroke,
    PeerClosed,
    PeerGone,
    TimedOut,
    ViewsStillExported,
)
from gntalloc.unclosed import warn_unclosed
from gntalloc.vchan.end import Asking, End
from gntalloc.vchan.extension import FINISHED
from gntalloc.vchan.layout import NOTIFY_READ, NOTIFY_WRITE
from gntalloc.vchan.lending import Lending
from gntalloc.vchan.ring import HEADER
from gntalloc.vchan.ticket import Ticket
from gntalloc.vchan.waiting import Turn, bytes_of, queue_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

__all__ = ["Channel"]

_channels: weakref.WeakSet[Channel] = weakref.WeakSet()
_PIECES = 4  # of a ring: how much is written, or read, before the peer sees it, so that both work at once
_SMALLEST_PIECE = 4096


class Channel(Lending):
    """One end of a vchan. Made by `Domain.listen` and `Domain.connect`.

    Attributes:
        peer: the domid at the other end.
    """

    def __init__(self, end: End, address: str) -> None:
        super().__init__(end, address)
        _channels.add(self)

    # What it is.

    @property
    def extended(self) -> bool:
        """Whether the peer is an end of this package, so that `finish` and the difference of close and death work."""
        return self._end.extended

    @property
    def closed(self) -> bool:
        """Whether `close` has succeeded."""
        return self._closed

    @property
    def connected(self) -> bool:
        """Whether there is a peer now."""
        return self._end.connected

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes that the two rings hold: the one that is read here, the one that is written."""
        return self._in.size, self._out.size

    @property
    def ready(self) -> int:
        """How many bytes can be read without waiting. None, while something is peeked."""
        there = self._look(self._in.unread)
        return 0 if self._end.waiting or self._peeked else there

    @property
    def room(self) -> int:
        """How many bytes can be written without waiting. None, while something is reserved, and after `finish`."""
        unread = self._look(self._out.unread)
        return 0 if self._reserved or self._end.finished else self._out.size - unread

    @property
    def unread(self) -> int:
        """How many bytes that were written the peer has not read."""
        return self._look(self._out.unread)

    @property
    def waiting(self) -> bool:
        """Whether this is a server's end, and nobody has come yet."""
        return self._end.waiting

    def fileno(self) -> int:
        """A descriptor that is readable when a call that would have waited is worth repeating. See `gntalloc.aio`."""
        return self._end.bells.fileno()

    def asking(self, bit: int) -> Asking:
        """For a face of another kind, which waits on `fileno` and calls again without waiting: the peer is asked."""
        return Asking(self._end, bit)

    def heard(self) -> None:
        """For such a face: what made `fileno` readable is taken, and other threads are told."""
        self._end.bells.hear_now()

    # Bytes.

    def read(self, size: int | None = None, timeout: float | None = None) -> bytes:
        """Some bytes: at least one, at most `size`, and no more than are there.

        Returns:
            The bytes; none at all when the peer has closed its end, or said `finish`, and all was read.

        Raises:
            TimedOut: none came.
            PeerDied: the peer ended without closing.
            PeerBroke: the peer lies about what is in the ring.
            Busy: something that was peeked is not released.
            Closed: this end is closed.
        """
        if size is not None and size < 0:
            raise ValueError(f"{size} bytes cannot be read")
        reading = self._reading
        if not reading.acquire(False):
            timeout = queue_up(reading, timeout)
        try:
            ring = self._in
            if not (ring.ready or self._await_bytes(1, Deadline(timeout))) or size == 0:
                return b""
            ready = ring.ready if size is not None and ring.ready >= size else self._end.look(ring.refresh)
            data = ring.take(ready if size is None else min(size, ready))
        finally:
            reading.release()
        self._has_read()
        return data

    def readinto(self, buffer: bytearray | memoryview | Any, timeout: float | None = None) -> int:
        """Some bytes into a buffer of bytes: at least one, and no more than are there.

        Returns:
            How many; 0 as `read` gives none.

        Raises:
            TimedOut, PeerDied, PeerBroke, Busy, Closed: as `read`.
        """
        view = bytes_of(buffer)
        size = len(view)
        reading = self._reading
        if not reading.acquire(False):
            timeout = queue_up(reading, timeout)
        try:
            ring = self._in
            if not (ring.ready or self._await_bytes(1, Deadline(timeout))) or not size:
                return 0
            piece = max(_SMALLEST_PIECE, ring.size // _PIECES)
            done = min(piece, ring.ready, size)
            ring.take_into(view[:done])
            while done < size and (ring.ready or self._end.look(ring.refresh)):
                self._tell(NOTIFY_READ)
                count = min(piece, ring.ready, size - done)
                ring.take_into(view[done : done + count])
                done += count
        finally:
            reading.release()
        self._has_read()
        return done

    def write(self, data: bytes | bytearray | memoryview | Any, timeout: float | None = None) -> None:
        """Write all of it, in order, piece by piece as there is room.

        Raises:
            TimedOut: not all found room; `done` says how many bytes did.
            PeerGone: the peer closed, or died; `done` as above, though it may not have read them.
            PeerBroke: the peer lies about what it has read.
            Busy: something that was reserved is not committed.
            Closed: this end is closed, or finished.
        """
        view = bytes_of(data)
        writing = self._writing
        if not writing.acquire(False):
            timeout = queue_up(writing, timeout)
        try:
            ring = self._out
            piece = max(_SMALLEST_PIECE, ring.size // _PIECES)
            # Room is never left once this end is closed, and its flags are gone.
            if 0 < len(view) <= min(ring.room, piece) and self._flags[0] & self._live == self._connected:
                ring.put(view)
            else:
                self._write_in_pieces(view, piece, Deadline(timeout))
        finally:
            writing.release()
        self._has_written()

    def _write_in_pieces(self, view: memoryview, piece: int, deadline: Deadline) -> None:
        ring, size = self._out, len(view)
        done = 0
        try:
            self._await_room(0, deadline)
            while done < size:
                if not ring.room:
                    self._await_room(1, deadline)
                count = min(piece, ring.room, size - done)
                ring.put(view[done : done + count])
                done += count
                self._tell(NOTIFY_WRITE)
        except (TimedOut, PeerGone) as error:
            error.done = done
            raise

    # Messages.

    def send(self, message: bytes | bytearray | memoryview | Any, timeout: float | None = None) -> None:
        """Write a whole message: its length in four bytes, little-endian, and itself; all of it or nothing.

        Raises:
            TimedOut: there was no room for it. Nothing was written.
            PeerGone, PeerBroke, Busy, Closed: as `write`. Nothing was written.
            GntallocError: EMSGSIZE it is longer than the ring.
        """
        if type(message) is not bytes:
            message = bytes_of(message)
        length = len(message)
        writing = self._writing
        if not writing.acquire(False):
            timeout = queue_up(writing, timeout)
        try:
            ring = self._out
            if ring.room < length + HEADER:
                self._await_room(length + HEADER, Deadline(timeout))
            ring.put_message(message, length)
        finally:
            writing.release()
        try:
            # Releasing the lock was a fence, if `ordered`; if not, nothing is ever `quiet`.
            if self._flags[0] & self._after_writing != self._quiet:
                self._written()
        except ValueError:
            pass  # another thread closed this end, and that told the peer

    def recv(self, timeout: float | None = None) -> bytes:
        """Read a whole message that `send` wrote.

        Raises:
            PeerClosed: the peer has closed, or said `finish`, and all was read.
            TimedOut, PeerDied, Busy, Closed: as `read`.
            PeerBroke: as `read`; or the peer sends no messages, or closed in the middle of one.
        """
        reading = self._reading
        if not reading.acquire(False):
            timeout = queue_up(reading, timeout)
        try:
            message = self._in.take_message()
            if message is None:
                deadline = Deadline(timeout)
                while message is None:
                    self._await_more(deadline)
                    message = self._in.take_message()
        except PeerBroke as broken:
            raise self._end.give_up(broken) from None
        finally:
            reading.release()
        self._has_read()
        return message

    def recv_into(self, buffer: bytearray | memoryview | Any, timeout: float | None = None) -> int:
        """Read a whole message into a buffer of bytes.

        Returns:
            How long it is.

        Raises:
            GntallocError: EMSGSIZE the buffer is too small. The message stays.
            PeerClosed, TimedOut, PeerDied, PeerBroke, Busy, Closed: as `recv`.
        """
        view = bytes_of(buffer)
        reading = self._reading
        if not reading.acquire(False):
            timeout = queue_up(reading, timeout)
        try:
            length = self._await_message(Deadline(timeout))
            if length > len(view):
                why = f"the message is {length} bytes long, and the buffer {len(view)}; take a larger one"
                raise GntallocError(errno.EMSGSIZE, why)
            self._in.copy_message(length, view)
        except PeerBroke as broken:
            raise self._end.give_up(broken) from None
        finally:
            reading.release()
        self._has_read()
        return length

    def __iter__(self) -> Iterator[bytes]:
        """Messages, until the peer closes or finishes."""
        while True:
            try:
                message = self.recv()
            except PeerClosed:
                return
            yield message

    # The end.

    def finish(self, timeout: float | None = None) -> None:
        """Write no more: the peer reads what there is, and then its end of file; it can still write. Can be repeated.

        Raises:
            TimedOut: there is no client yet, who could be told; or another thread still writes.
            Busy: something that was reserved is not committed.
            NotKnownHere: the peer is a libxenvchan, which knows no such thing: `close` when it has read everything.
            Closed: this end is closed.
        """
        with Turn(self._writing, timeout) as turn:
            self._end.check_open()
            if self._reserved is not None:
                raise Busy(f"{self!r} cannot be finished: what was reserved is to be committed first")
            self._end.await_peer(turn.deadline)
            if not self._end.extended:
                raise NotKnownHere(
                    "the peer is a libxenvchan, which knows no end of one direction; `drain` waits until it has read "
                    "everything, and then `close`"
                )
            self._out.room = 0
            self._end.say(FINISHED)

    def drain(self, timeout: float | None = None) -> None:
        """Wait until the peer has read everything that was written.

        Raises:
            TimedOut: it has not.
            PeerGone: it will not.
            PeerBroke, Closed: as `write`.
        """
        with Turn(self._draining, timeout) as turn:  # a lock of its own: meanwhile others may write
            self._end.check_open()
            self._end.await_peer(turn.deadline)
            ring = self._out

            def read() -> int:
                return ring.size - ring.unread()

            if not self._end.wait(
                NOTIFY_READ, read, ring.size, self._end.peer_is_gone, turn.deadline, "the peer to read everything"
            ):
                raise self._end.gone()

    def wait_connected(self, timeout: float | None = None) -> None:
        """Wait until there is a peer. A client's channel has one from the start.

        Raises:
            TimedOut: nobody came.
            PeerBroke: who came broke the protocol.
            Closed: this end is closed.
        """
        with Turn(self._reading, timeout) as turn:  # who closes waits for it, so that the page stays until this is over
            self._end.check_open()
            self._end.await_peer(turn.deadline)

    def close(self) -> None:
        """Close this end: the peer reads what there is, and then the end. Whoever waits here gets Closed.

        Raises:
            ViewsStillExported: what was peeked or reserved is still looked at, by a slice or an array of it. The peer
                knows that this end is closed; drop the view, and close again.
        """
        if self._closed:
            return
        self._end.closing = True
        self._end.bells.ring_own()
        with self._reading, self._writing, self._draining:
            self._in.ready = self._out.room = 0
            self._end.leave()
            for lent in self._peeked, self._reserved:
                if lent is not None:
                    with contextlib.suppress(BufferError):  # closing the pages will say it better
                        lent.view.release()
            self._end.pages.close_rings()
            self._end.pages.close_page()
            self._closed = True
            self._end.bells.close()

    def detach(self) -> Ticket:
        """Give this end away: the ticket is for `gntalloc.adopt`, in whatever process of this domain it gets to.

        The channel is closed here, and the peer notices nothing. See docs/vchan.md.

        Raises:
            Busy: another thread is in a call; something is peeked or reserved; nobody has come yet.
            PeerBroke, Closed: it is of no more use.
        """
        with contextlib.ExitStack() as held:
            for lock in self._reading, self._writing, self._draining:
                if not lock.acquire(blocking=False):
                    raise Busy(f"{self!r} cannot be detached: another thread is in a call of it")
                held.callback(lock.release)
            self._end.check_open()
            if self._end.waiting:
                raise Busy(f"{self!r} cannot be detached: nobody has come yet")
            if self._peeked is not None or self._reserved is not None:
                raise Busy(f"{self!r} cannot be detached: what was peeked or reserved is to be given back first")
            ticket = Ticket.of(self._end, self._address)
            self._end.give_away("was given away; adopt its ticket")
            self._closed = True
        return ticket

    def forget_in_child(self) -> None:
        """A child made by fork has a copy of this, which is not the channel: let go of it, and say why."""
        if not self._closed:
            self._make_locks()
            owner = self._end.owner
            self._end.give_away(f"is process {owner}'s, which forked this one; `detach` it there, and `adopt` it here")
            self._closed = True
            with contextlib.suppress(GntallocError):  # what is looked at stays mapped, until this process ends
                self._end.pages.close_rings()
                self._end.pages.close_page()
            self._end.bells.let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except ViewsStillExported as still:
            if error is None:
                raise
            error.add_note(str(still))  # the body's own exception is the one to tell

    def __del__(self, _warn: Callable[[object], bool] = warn_unclosed) -> None:
        if not getattr(self, "_closed", True) and _warn(self):
            with contextlib.suppress(Exception):
                self.close()

    def __repr__(self) -> str:
        state = "closed" if self._end.closing else "waiting" if self._end.waiting else "open"
        return f"<{state} Channel with domain {self.peer}>"


def _after_fork_in_child() -> None:
    for channel in list(_channels):
        channel.forget_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
