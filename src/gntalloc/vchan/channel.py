"""Channel: one end of a vchan, in calls that wait. `gntalloc.aio` has the same calls for asyncio.

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

from typing import TYPE_CHECKING, Any, Self, TypeVar

from gntalloc.clock import Deadline
from gntalloc.errors import PeerBroke, PeerClosed, ViewsStillExported
from gntalloc.vchan import lending
from gntalloc.vchan.core import Core, bytes_of
from gntalloc.vchan.ring import HEADER
from gntalloc.vchan.waiting import Turn, queue_up, run, wait

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator
    from types import TracebackType

    from gntalloc.vchan.ticket import Ticket
    from gntalloc.vchan.waiting import Steps

__all__ = ["Channel", "Described", "core_of"]

Result = TypeVar("Result")


class Described:
    """What a channel tells of itself, and does at once, whichever face it has."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._end = core.end
        self.peer = core.end.peer

    @property
    def extended(self) -> bool:
        """Whether the peer is an end of this package, so that `finish` and the difference of close and death work."""
        return self._end.extended

    @property
    def closed(self) -> bool:
        """Whether `close` has succeeded."""
        return self._core.closed

    @property
    def connected(self) -> bool:
        """Whether there is a peer now."""
        return self._end.connected

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes that the two rings hold: the one that is read here, the one that is written."""
        return self._core.incoming.size, self._core.outgoing.size

    @property
    def ready(self) -> int:
        """How many bytes can be read without waiting. None, while something is peeked."""
        return self._core.ready

    @property
    def room(self) -> int:
        """How many bytes can be written without waiting. None, while something is reserved, and after `finish`."""
        return self._core.room

    @property
    def unread(self) -> int:
        """How many bytes that were written the peer has not read."""
        return self._core.unread

    @property
    def waiting(self) -> bool:
        """Whether this is a server's end, and nobody has come yet."""
        return self._end.waiting

    def commit(self, size: int | None = None) -> None:
        """Send what was filled in, or its first `size` bytes; of 0 bytes nothing is sent.

        Raises:
            ValueError: nothing was reserved, or less than `size`.
            Closed: this end is closed.
        """
        lending.commit(self._core, size)

    def release(self, size: int | None = None) -> None:
        """Give back the room of what was peeked, or of its first `size` bytes: then the rest is peeked again.

        Raises:
            ValueError: nothing was peeked, or less; of a message all is released.
            Closed: this end is closed.
        """
        lending.release(self._core, size)

    def detach(self) -> Ticket:
        """Give this end away: the ticket is for `gntalloc.adopt`, in whatever process of this domain it gets to.

        The channel is closed here, and the peer notices nothing. See docs/vchan.md.

        Raises:
            Busy: another thread is in a call; something is peeked or reserved; nobody has come yet.
            PeerBroke, Closed: it is of no more use.
        """
        return self._core.detach()

    def close(self) -> None:
        """Close this end: the peer reads what there is, and then the end. Whoever waits here gets Closed.

        Raises:
            ViewsStillExported: what was peeked or reserved is still looked at, by a slice or an array of it. The peer
                knows that this end is closed; drop the view, and close again.
        """
        self._core.close()

    def __repr__(self) -> str:
        return repr(self._core)


class Channel(Described):
    """One end of a vchan. Made by `Domain.listen` and `Domain.connect`.

    Attributes:
        peer: the domid at the other end.
    """

    def fileno(self) -> int:
        """Give a descriptor that is readable when a bell rings: when the peer has told something, or is gone."""
        return self._end.bells.fileno()

    # Bytes.

    def read(self, size: int | None = None, *, timeout: float | None = None) -> bytes:
        """Read some bytes: at least one, at most `size`, and no more than are there.

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
        core = self._core
        reading = core.reading
        if not reading.acquire(False):
            timeout = queue_up(reading, timeout)
        try:
            data = core.take(size) if core.incoming.ready else run(core.end, core.read(size), Deadline(timeout))
        finally:
            reading.release()
        core.has_read()
        return data

    def readinto(self, buffer: bytearray | memoryview | Any, *, timeout: float | None = None) -> int:
        """Read some bytes into a buffer of bytes: at least one, and no more than are there.

        Returns:
            How many; 0 as `read` gives none.

        Raises:
            TimedOut, PeerDied, PeerBroke, Busy, Closed: as `read`.
        """
        core = self._core
        done = self._in_turn(core.reading, core.read_into(bytes_of(buffer)), timeout)
        core.has_read()
        return done

    def write(self, data: bytes | bytearray | memoryview | Any, *, timeout: float | None = None) -> None:
        """Write all of it, in order, piece by piece as there is room.

        Raises:
            TimedOut: not all found room; `done` says how many bytes did.
            PeerGone: the peer closed, or died; `done` as above, though it may not have read them.
            PeerBroke: the peer lies about what it has read.
            Busy: something that was reserved is not committed.
            Closed: this end is closed, or finished.
        """
        view = bytes_of(data)
        core = self._core
        writing = core.writing
        if not writing.acquire(False):
            timeout = queue_up(writing, timeout)
        try:
            if not core.write_at_once(view):
                run(core.end, core.write(view), Deadline(timeout))
        finally:
            writing.release()
        core.has_written()

    # Messages.

    def send(self, message: bytes | bytearray | memoryview | Any, *, timeout: float | None = None) -> None:
        """Write a whole message: its length in four bytes, little-endian, and itself; all of it or nothing.

        Raises:
            TimedOut: there was no room for it. Nothing was written.
            PeerGone, PeerBroke, Busy, Closed: as `write`. Nothing was written.
            GntallocError: EMSGSIZE it is longer than the ring.
        """
        if type(message) is not bytes:
            message = bytes_of(message)
        length = len(message)
        core = self._core
        writing = core.writing
        if not writing.acquire(False):
            timeout = queue_up(writing, timeout)
        try:
            ring = core.outgoing
            if ring.room < length + HEADER:
                run(core.end, core.room_comes(length + HEADER), Deadline(timeout))
            ring.put_message(message, length)
        finally:
            writing.release()
        try:  # what `Core.has_written` does, written out: a message more or less is a call more or less here
            if core.flags[0] & core.after_writing != core.quiet:
                core.written()
        except ValueError:
            pass  # another thread closed this end, and that told the peer

    def recv(self, *, timeout: float | None = None) -> bytes:
        """Read a whole message that `send` wrote.

        Raises:
            PeerClosed: the peer has closed, or said `finish`, and all was read.
            TimedOut, PeerDied, Busy, Closed: as `read`.
            PeerBroke: as `read`; or the peer sends no messages, or closed in the middle of one.
        """
        core = self._core
        reading = core.reading
        if not reading.acquire(False):
            timeout = queue_up(reading, timeout)
        try:
            message = core.incoming.take_message()
            if message is None:
                message = self._receive(Deadline(timeout))
        except PeerBroke as broken:
            raise core.end.give_up(broken) from None
        finally:
            reading.release()
        try:  # what `Core.has_read` does, written out
            if core.flags[0] & core.after_reading != core.quiet_reading:
                core.was_read()
        except ValueError:
            pass  # as in `send`
        return message

    def _receive(self, deadline: Deadline) -> bytes:
        """Do as `Core.receive`, with no generator between this thread and its sleep: half of a wake-up is Python's."""
        core = self._core
        if core.end.waiting:
            return run(core.end, core.receive(), deadline)
        while True:
            if not wait(core.end, core.need_more(), deadline):
                raise core.no_more()
            message = core.incoming.take_message()
            if message is not None:
                return message

    def recv_into(self, buffer: bytearray | memoryview | Any, *, timeout: float | None = None) -> int:
        """Read a whole message into a buffer of bytes.

        Returns:
            How long it is.

        Raises:
            GntallocError: EMSGSIZE the buffer is too small. The message stays.
            PeerClosed, TimedOut, PeerDied, PeerBroke, Busy, Closed: as `recv`.
        """
        core = self._core
        length = self._in_turn(core.reading, core.receive_into(bytes_of(buffer)), timeout)
        core.has_read()
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

    def reserve(self, size: int | None = None, *, timeout: float | None = None, message: bool = False) -> memoryview:
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
        return self._in_turn(self._core.writing, lending.reserve(self._core, size, message=message), timeout)

    def peek(self, size: int | None = None, *, timeout: float | None = None, message: bool = False) -> memoryview:
        """Give the next bytes, where they lie, to be read only; `release` then gives their room back.

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
        return self._in_turn(self._core.reading, lending.peek(self._core, size, message=message), timeout)

    # The end.

    def finish(self, *, timeout: float | None = None) -> None:
        """Write no more: the peer reads what there is, and then its end of file; it can still write. Can be repeated.

        Raises:
            TimedOut: there is no client yet, who could be told; or another thread still writes.
            Busy: something that was reserved is not committed.
            NotKnownHere: the peer is a libxenvchan, which knows no such thing: `close` when it has read everything.
            Closed: this end is closed.
        """
        self._in_turn(self._core.writing, self._core.finish(), timeout)

    def drain(self, *, timeout: float | None = None) -> None:
        """Wait until the peer has read everything that was written.

        Raises:
            TimedOut: it has not.
            PeerGone: it will not.
            PeerBroke, Closed: as `write`.
        """
        self._in_turn(self._core.draining, self._core.drain(), timeout)  # meanwhile others may write

    def wait_connected(self, *, timeout: float | None = None) -> None:
        """Wait until there is a peer. A client's channel has one from the start.

        Raises:
            TimedOut: nobody came.
            PeerBroke: who came broke the protocol.
            Closed: this end is closed.
        """
        # In the reader's turn: `close` waits for it, so that the page stays until this is over.
        self._in_turn(self._core.reading, self._core.peer_comes(), timeout)

    def _in_turn(self, lock: threading.Lock, steps: Steps[Result], timeout: float | None) -> Result:
        with Turn(lock, timeout) as turn:
            return run(self._end, steps, turn.deadline)

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


def core_of(channel: Described) -> Core:
    """For another face of the channel: what it is made of."""
    return channel._core  # noqa: SLF001
