"""Channel: one end of a vchan, once its pages are mapped.

    channel.write(b"bytes")            channel.read()          any number of them, as a stream
    channel.send(b"a message")         channel.recv()          whole
    view = channel.reserve(65536)      view = channel.peek()   in place, in the shared pages
    channel.commit()                   channel.release()

Every call that may wait has a timeout in seconds; None waits for ever, 0 not at all. After a TimedOut nothing is lost
and the call can be repeated; where part of the work was done, the error's `done` says how much.

Threads: one may write while another reads, and several of either take turns.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from gntalloc.errors import (
    Busy,
    Closed,
    GntallocError,
    NotKnownHere,
    PeerBroke,
    PeerClosed,
    PeerGone,
    TimedOut,
    ViewsStillExported,
)
from gntalloc.vchan.end import Asking, flag_word
from gntalloc.vchan.extension import FINISHED
from gntalloc.vchan.layout import CONNECTED, NOTIFY_READ, NOTIFY_WRITE
from gntalloc.vchan.ring import HEADER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from gntalloc.vchan.end import End

__all__ = ["Channel"]

_PIECES = 4  # of a ring: how much is written, or read, before the peer sees it, so that both work at once
_SMALLEST_PIECE = 4096


class Channel:
    """One end of a vchan. Made by `Domain.listen` and `Domain.connect`.

    Attributes:
        peer: the domid at the other end.
    """

    def __init__(self, end: End) -> None:
        self.peer = end.peer
        self._end = end
        self._in, self._out = end.reader, end.writer
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._peeked: _Lent | None = None
        self._reserved: _Lent | None = None
        self._closed = False
        # What to look at after a message: one load of the four bytes from cli_live on, and what is nothing to do.
        role, ordered = end.role, end.atomics.ordered
        self._flags = end.pages.flags
        self._after_writing = flag_word(role.peer_live, 0xFF) | flag_word(role.asked, NOTIFY_WRITE)
        self._after_reading = flag_word(role.asked, NOTIFY_READ)
        self._live, self._connected = flag_word(role.peer_live, 0xFF), flag_word(role.peer_live, CONNECTED)
        self._quiet = self._connected if ordered else -1
        self._quiet_reading = 0 if ordered else -1

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
        """How many bytes can be read without waiting."""
        with self._reading:
            self._end.check_open()
            return 0 if self._end.waiting or self._peeked else self._end.look(self._in.refresh)

    @property
    def room(self) -> int:
        """How many bytes can be written without waiting."""
        with self._writing:
            self._end.check_open()
            return self._out.room if self._end.waiting or self._reserved else self._end.look(self._out.refresh)

    @property
    def unread(self) -> int:
        """How many bytes that were written the peer has not read."""
        with self._writing:
            self._end.check_open()
            return self._end.look(self._out.unread)

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
            _queue_up(reading, timeout)
        try:
            ring = self._in
            if not (ring.ready or self._await_bytes(1, _deadline(timeout))) or size == 0:
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
        view = _bytes_of(buffer)
        size = len(view)
        reading = self._reading
        if not reading.acquire(False):
            _queue_up(reading, timeout)
        try:
            ring = self._in
            if not (ring.ready or self._await_bytes(1, _deadline(timeout))) or not size:
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
        view = _bytes_of(data)
        writing = self._writing
        if not writing.acquire(False):
            _queue_up(writing, timeout)
        try:
            ring = self._out
            piece = max(_SMALLEST_PIECE, ring.size // _PIECES)
            # Room is never left once this end is closed, and its flags are gone.
            if 0 < len(view) <= min(ring.room, piece) and self._flags[0] & self._live == self._connected:
                ring.put(view)
            else:
                self._write_in_pieces(view, piece, _deadline(timeout))
        finally:
            writing.release()
        self._has_written()

    def _write_in_pieces(self, view: memoryview, piece: int, deadline: float | None) -> None:
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
            message = _bytes_of(message)
        length = len(message)
        writing = self._writing
        if not writing.acquire(False):
            _queue_up(writing, timeout)
        try:
            ring = self._out
            if ring.room < length + HEADER:
                self._await_room(length + HEADER, _deadline(timeout))
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
            _queue_up(reading, timeout)
        try:
            message = self._in.take_message()
            if message is None:
                self._await_message(_deadline(timeout))
                message = self._in.take_message()
                assert message is not None
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
        view = _bytes_of(buffer)
        reading = self._reading
        if not reading.acquire(False):
            _queue_up(reading, timeout)
        try:
            length = self._in.message_length()
            if length is None:
                length = self._await_message(_deadline(timeout))
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

    # In place.

    def reserve(self, size: int | None = None, timeout: float | None = None, *, message: bool = False) -> memoryview:
        """Room for `size` bytes to be filled in where they will lie; `commit` then sends them.

        The peer sees nothing until then. Until then nothing else can be written. (Where the ring's end would part the
        bytes, other memory is lent, and `commit` copies it.)

        Args:
            size: no more than the ring holds; if not given, all the room that lies in one piece.
            timeout: seconds to wait for the room.
            message: what is committed is a message, as `send` sends.

        Raises:
            TimedOut, PeerGone, PeerBroke, Busy, Closed, GntallocError: as `send`.
        """
        head = HEADER if message else 0
        if size is not None and size < 1:
            raise ValueError(f"{size} bytes cannot be reserved")
        with _Turn(self._writing, timeout) as turn:
            ring = self._out
            self._await_room((size or 1) + head, turn.deadline)
            if size is None:
                if not self._end.waiting:
                    self._end.look(ring.refresh)
                size = max(1, ring.in_one_piece(head))
            view = ring.view(size, head)
            copy = None
            if view is None:
                copy = bytearray(size)
                view = memoryview(copy)
            self._reserved = _Lent(view, size, head, ring.room, copy)
            ring.room = 0  # none for anybody else while this is out
        return view

    def commit(self, size: int | None = None) -> None:
        """Send what was filled in, or its first `size` bytes; of 0 bytes nothing is sent.

        Raises:
            ValueError: nothing was reserved, or less than `size`.
            Closed: this end is closed.
        """
        with self._writing:
            self._end.check_open()
            lent = self._reserved
            if lent is None:
                raise ValueError("nothing was reserved that could be committed")
            count = lent.size if size is None else size
            if not 0 <= count <= lent.size:
                raise ValueError(f"{count} bytes cannot be committed of {lent.size} that were reserved")
            self._reserved = None
            ring = self._out
            ring.room = lent.known
            if not count:
                return
            if lent.copy is not None:
                ring.fill(memoryview(lent.copy)[:count], lent.head)
            if lent.head:
                ring.fill_length(count)
            ring.advance(count + lent.head)
            self._tell(NOTIFY_WRITE)

    def peek(self, size: int | None = None, timeout: float | None = None, *, message: bool = False) -> memoryview:
        """The next bytes, where they lie, to be read only; `release` then gives their room back.

        A peer that does not keep to the protocol can change them while they are looked at.

        Args:
            size: so many bytes, all of them or up to the end; if not given, what is there and lies in one piece.
            timeout: seconds to wait for them.
            message: the next message, as `recv` gives. (Where the ring's end parts it, or `size` bytes, a copy.)

        Returns:
            The view; it is empty as `read` gives nothing.

        Raises:
            TimedOut, PeerDied, PeerBroke, Busy, Closed: as `read`; with `message` as `recv`.
        """
        with _Turn(self._reading, timeout) as turn:
            ring = self._in
            if message:
                length, head = self._await_message(turn.deadline), HEADER
            else:
                if not self._await_bytes(1 if size is None else size, turn.deadline) and not ring.ready:
                    return memoryview(b"")
                self._end.look(ring.refresh)
                length, head = ring.in_one_piece() if size is None else min(size, ring.ready), 0
            view = ring.view(length, head)
            if view is None:
                view = memoryview(ring.look(length, head))
            self._peeked = _Lent(view, length, head, ring.ready, None)
            ring.ready = 0  # nothing is there for anybody else while this is out
        return view

    def release(self, size: int | None = None) -> None:
        """Give back the room of what was peeked, or of its first `size` bytes: then the rest is peeked again.

        Raises:
            ValueError: nothing was peeked, or less; of a message all is released.
            Closed: this end is closed.
        """
        with self._reading:
            self._end.check_open()
            lent = self._peeked
            if lent is None:
                raise ValueError("nothing was peeked that could be released")
            count = lent.size if size is None else size
            if not 0 <= count <= lent.size or (lent.head and count != lent.size):
                why = f"{count} bytes cannot be released of {lent.size} that were peeked; a message goes whole"
                raise ValueError(why)
            self._peeked = None
            self._in.ready = lent.known
            self._in.advance(count + lent.head)
            self._tell(NOTIFY_READ)

    # The end.

    def finish(self, timeout: float | None = None) -> None:
        """Write no more: the peer reads what there is, and then its end of file; it can still write. Can be repeated.

        Raises:
            TimedOut: there is no client yet, who could be told.
            NotKnownHere: the peer is a libxenvchan, which knows no such thing: `close` when it has read everything.
            Closed: this end is closed.
        """
        with self._writing:
            self._end.check_open()
            self._end.await_peer(_deadline(timeout))
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
        with _Turn(self._writing, timeout) as turn:
            self._end.check_open()
            self._end.await_peer(turn.deadline)
            ring = self._out

            def empty() -> bool:
                return self._end.look(ring.unread) == 0

            if not self._end.wait(
                NOTIFY_READ, empty, self._end.peer_is_gone, turn.deadline, "the peer to read everything"
            ):
                raise self._end.gone()

    def wait_connected(self, timeout: float | None = None) -> None:
        """Wait until there is a peer. A client's channel has one from the start.

        Raises:
            TimedOut: nobody came.
            PeerBroke: who came broke the protocol.
            Closed: this end is closed.
        """
        with _Turn(
            self._reading, timeout
        ) as turn:  # who closes waits for it, so that the page stays until this is over
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
        with self._reading, self._writing:
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

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and warnings is not None:  # None: the interpreter is ending
            warnings.warn(f"{self!r} was never closed; use it in a `with`", ResourceWarning, source=self, stacklevel=2)
            with contextlib.suppress(Exception):
                self.close()

    def __repr__(self) -> str:
        state = "closed" if self._end.closing else "waiting" if self._end.waiting else "open"
        return f"<{state} Channel with domain {self.peer}>"

    # Waiting, with the lock of the direction held.

    def _await_bytes(self, count: int, deadline: float | None) -> bool:
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
        if self._end.wait(
            NOTIFY_WRITE,
            lambda: self._end.look(ring.refresh) >= count,
            self._end.no_more_comes,
            deadline,
            "bytes to read",
        ):
            return True
        if not self._end.orderly():
            raise self._end.gone()
        return False

    def _await_message(self, deadline: float | None) -> int:
        """Until there is a whole message. How long it is."""
        self._end.check_open()
        if self._peeked is not None:
            raise Busy(f"{self!r} cannot be read: what was peeked is to be released first")
        ring = self._in
        known = 0

        def more() -> bool:
            return self._end.look(ring.refresh) > known

        while True:
            try:
                length = ring.message_length()
            except PeerBroke as broken:
                raise self._end.give_up(broken) from None
            if length is not None:
                return length
            self._end.await_peer(deadline)
            known = ring.ready
            if not self._end.wait(NOTIFY_WRITE, more, self._end.no_more_comes, deadline, "a message"):
                if ring.ready and self._end.orderly():
                    raise self._end.give_up(PeerBroke("the peer closed in the middle of a message"))
                raise self._end.gone()

    def _await_room(self, count: int, deadline: float | None) -> None:
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
        if not self._end.wait(
            NOTIFY_READ,
            lambda: self._end.look(ring.refresh) >= count,
            self._end.peer_is_gone,
            deadline,
            "room to write",
        ):
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


class _Lent(NamedTuple):
    """What is in the user's hands."""

    view: memoryview
    size: int
    head: int  # bytes before it that belong to it: a message's length
    known: int  # what the ring knew to be ready, or room, before
    copy: bytearray | None  # what was lent instead, because the ring's end parts the place


class _Turn:
    """A lock that is waited for no longer than a timeout, and how much of that is left."""

    __slots__ = ("_lock", "deadline")

    def __init__(self, lock: threading.Lock, timeout: float | None) -> None:
        self.deadline = _deadline(timeout)
        self._lock = lock
        if not lock.acquire(blocking=False):
            _queue_up(lock, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _queue_up(lock: threading.Lock, timeout: float | None) -> None:
    if not lock.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
        raise TimedOut(f"another thread has used this direction of the channel for {timeout} s; wait longer")


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _bytes_of(data: Any) -> memoryview:
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _too_long(count: int, size: int) -> GntallocError:
    return GntallocError(
        errno.EMSGSIZE,
        f"{count} bytes do not fit a ring of {size} at once; listen with a larger `size`, or use read and write",
    )
