"""Core: a channel as every face of it has it: what it is, what can be done at once, and the steps of what may wait.

Nobody waits here. The faces do: `channel` in a thread, `aio` in an event loop; both drive the same steps (see
`waiting`). A face lets one caller at a time into each direction. The locks here are those of threads; what gives back
room that was lent, and what ends the channel, takes them by itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from gntalloc.errors import Busy, Closed, GntallocError, NotKnownHere, PeerBroke, PeerGone, TimedOut
from gntalloc.unclosed import warn_unclosed
from gntalloc.vchan.extension import FINISHED
from gntalloc.vchan.layout import CONNECTED, NOTIFY_READ, NOTIFY_WRITE
from gntalloc.vchan.ring import HEADER
from gntalloc.vchan.role import flag_word
from gntalloc.vchan.ticket import Ticket
from gntalloc.vchan.waiting import Need

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.vchan.end import End
    from gntalloc.vchan.waiting import Steps

__all__ = ["Core", "Lent", "bytes_of"]

_new: Any = tuple.__new__  # of a NamedTuple: in half the time
_PIECES = 4  # of a ring: how much is written, or read, before the peer sees it, so that both work at once
_SMALLEST_PIECE = 4096

_cores: weakref.WeakSet[Core] = weakref.WeakSet()


class Lent(NamedTuple):
    """What is in the user's hands."""

    view: memoryview
    size: int
    head: int  # bytes before it that belong to it: a message's length
    known: int  # what the ring knew to be ready, or room, before
    copy: bytearray | None  # what was lent instead, because the ring's end parts the place


class Core:
    """One end of a channel, with a lock for each direction, and one for those who wait until the peer has read all.

    Args:
        end: with its pages and bells.
        address: of the domain that it is in.

    Attributes:
        incoming: the ring that is read here.
        outgoing: the ring that is written.
        closed: it was closed, or given away.
        peeked: what the reader has in its hands.
        reserved: what the writer has.
    """

    def __init__(self, end: End, address: str) -> None:
        self.end = end
        self.incoming, self.outgoing = end.reader, end.writer
        self.closed = False
        self.peeked: Lent | None = None
        self.reserved: Lent | None = None
        self._address = address
        self._make_locks()
        # What to look at after a message: one load of the four bytes from cli_live on, and what is nothing to do.
        role, ordered = end.role, end.atomics.ordered
        self.flags = end.pages.flags
        self.after_writing = flag_word(role.peer_live, 0xFF) | flag_word(role.asked, NOTIFY_WRITE)
        self.after_reading = flag_word(role.asked, NOTIFY_READ)
        self._live, self._connected = flag_word(role.peer_live, 0xFF), flag_word(role.peer_live, CONNECTED)
        self.quiet = self._connected if ordered else -1
        self.quiet_reading = 0 if ordered else -1
        _cores.add(self)

    def _make_locks(self) -> None:
        self.reading = threading.Lock()
        self.writing = threading.Lock()
        self.draining = threading.Lock()

    def __repr__(self) -> str:
        state = "closed" if self.end.closing else "waiting" if self.end.waiting else "open"
        return f"<{state} Channel with domain {self.end.peer}>"

    # What can be asked at any time, beside whatever other threads do.

    @property
    def ready(self) -> int:
        """How many bytes can be read at once. None, while something is peeked."""
        there = self._look(self.incoming.unread)
        return 0 if self.end.waiting or self.peeked else there

    @property
    def room(self) -> int:
        """How many bytes can be written at once. None, while something is reserved, and after `finish`."""
        unread = self._look(self.outgoing.unread)
        return 0 if self.reserved or self.end.finished else self.outgoing.size - unread

    @property
    def unread(self) -> int:
        """How many bytes that were written the peer has not read."""
        return self._look(self.outgoing.unread)

    def _look(self, count: Callable[[], int]) -> int:
        self.end.check_open()
        try:
            return self.end.look(count)
        except ValueError:  # another thread has closed this end meanwhile
            self.end.check_open()
            raise

    # Steps that others are made of.

    def peer_comes(self) -> Steps[None]:
        """Until there is a peer, and both ends know what the other is."""
        self.end.check_open()
        if self.end.waiting:
            yield Need(0, self.end.has_come, 1, _never, "somebody to come to the other end")
            self.end.join()

    def bytes_come(self, count: int) -> Steps[bool]:
        """Until so many can be read. False: there will not be."""
        self._check_readable()
        ring = self.incoming
        if ring.ready >= count:
            return True
        if count > ring.size:
            raise _too_long(count, ring.size)
        yield from self.peer_comes()
        if (yield Need(NOTIFY_WRITE, ring.refresh, count, self.end.no_more_comes, "bytes to read")):
            return True
        if not self.end.orderly():
            raise self.end.gone()
        return False

    def more_comes(self) -> Steps[None]:
        """Until there is more of a message that is not all there."""
        self._check_readable()
        if self.end.waiting:
            yield from self.peer_comes()
        if not (yield self.need_more()):
            raise self.no_more()

    def need_more(self) -> Need:
        """Say what a message that is not all there needs, once there is a peer."""
        self._check_readable()
        ring = self.incoming
        need: Need = _new(Need, (NOTIFY_WRITE, ring.refresh, ring.ready + 1, self.end.no_more_comes, "a message"))
        return need

    def no_more(self) -> GntallocError:
        """Give the error to raise when a message will never be all there."""
        if self.incoming.ready and self.end.orderly():
            return PeerBroke("the peer closed in the middle of a message")
        return self.end.gone()

    def message_comes(self) -> Steps[int]:
        """Until there is a whole message. How long it is."""
        try:
            while (length := self.incoming.message_length()) is None:
                yield from self.more_comes()
        except PeerBroke as broken:
            raise self.end.give_up(broken) from None
        return length

    def room_comes(self, count: int) -> Steps[None]:
        """Until so many bytes can be written."""
        end, ring = self.end, self.outgoing
        end.check_open()
        if self.reserved is not None:
            raise Busy(f"{self!r} cannot be written: what was reserved is to be committed first")
        if end.finished:
            raise Closed(f"{self!r} cannot be written: `finish` was called")
        if count > ring.size and not end.waiting:
            raise _too_long(count, ring.size)
        if end.peer_is_gone():
            raise end.gone()
        if ring.room >= count:
            return
        yield from self.peer_comes()
        if count > ring.size:
            raise _too_long(count, ring.size)
        if not (yield Need(NOTIFY_READ, ring.refresh, count, end.peer_is_gone, "room to write")):
            raise end.gone()

    def _check_readable(self) -> None:
        self.end.check_open()
        if self.peeked is not None:
            raise Busy(f"{self!r} cannot be read: what was peeked is to be released first")

    # Steps of the calls. After those that read, `has_read` follows, and after those that write, `has_written`, with
    # the direction's lock released.

    def read(self, size: int | None) -> Steps[bytes]:
        """Take some bytes; none, if no more come."""
        if not (yield from self.bytes_come(1)):
            return b""
        return self.take(size)

    def take(self, size: int | None) -> bytes:
        """Take some of the bytes that are ready: all that are there, and `size` at most."""
        ring = self.incoming
        if size == 0:
            return b""
        ready = ring.ready if size is not None and ring.ready >= size else self.end.look(ring.refresh)
        return ring.take(ready if size is None else min(size, ready))

    def read_into(self, view: memoryview) -> Steps[int]:
        """Take some bytes into a buffer, and let the peer see the room piece by piece. How many; 0: no more come."""
        ring, size = self.incoming, len(view)
        if not (yield from self.bytes_come(1)) or not size:
            return 0
        piece = max(_SMALLEST_PIECE, ring.size // _PIECES)
        done = min(piece, ring.ready, size)
        ring.take_into(view[:done])
        while done < size and (ring.ready or self.end.look(ring.refresh)):
            self.tell(NOTIFY_READ)
            count = min(piece, ring.ready, size - done)
            ring.take_into(view[done : done + count])
            done += count
        return done

    def write(self, view: memoryview) -> Steps[None]:
        """Write all of it, piece by piece. TimedOut and PeerGone say how much was `done`."""
        ring, size = self.outgoing, len(view)
        piece = max(_SMALLEST_PIECE, ring.size // _PIECES)
        done = 0
        try:
            yield from self.room_comes(0)
            while done < size:
                if not ring.room:
                    yield from self.room_comes(1)
                count = min(piece, ring.room, size - done)
                ring.put(view[done : done + count])
                done += count
                self.tell(NOTIFY_WRITE)
        except (TimedOut, PeerGone) as error:
            error.done = done
            raise

    def write_at_once(self, view: memoryview) -> bool:
        """Write all of it, if it is known to fit, and is no more than a piece. False: nothing was written."""
        ring = self.outgoing
        # Room is never left once this end is closed, and its flags are gone.
        if (
            0 < len(view) <= ring.room
            and len(view) <= max(_SMALLEST_PIECE, ring.size // _PIECES)
            and self.flags[0] & self._live == self._connected
        ):
            ring.put(view)
            return True
        return False

    def send(self, message: bytes | memoryview) -> Steps[None]:
        """Write a message, whole."""
        length = len(message)
        if self.outgoing.room < length + HEADER:
            yield from self.room_comes(length + HEADER)
        self.outgoing.put_message(message, length)

    def receive(self) -> Steps[bytes]:
        """Take a message, whole."""
        try:
            while (message := self.incoming.take_message()) is None:
                yield from self.more_comes()
        except PeerBroke as broken:
            raise self.end.give_up(broken) from None
        return message

    def receive_into(self, view: memoryview) -> Steps[int]:
        """Take a message into a buffer. How long it is. EMSGSIZE: the buffer is too small, and the message stays."""
        length = yield from self.message_comes()
        if length > len(view):
            why = f"the message is {length} bytes long, and the buffer {len(view)}; take a larger one"
            raise GntallocError(errno.EMSGSIZE, why)
        self.incoming.copy_message(length, view)
        return length

    def finish(self) -> Steps[None]:
        """Write no more."""
        self.end.check_open()
        if self.reserved is not None:
            raise Busy(f"{self!r} cannot be finished: what was reserved is to be committed first")
        yield from self.peer_comes()
        if not self.end.extended:
            raise NotKnownHere(
                "the peer is a libxenvchan, which knows no end of one direction; `drain` waits until it has read "
                "everything, and then `close`"
            )
        self.outgoing.room = 0
        self.end.say(FINISHED)

    def drain(self) -> Steps[None]:
        """Until the peer has read everything."""
        end, ring = self.end, self.outgoing
        yield from self.peer_comes()

        def read() -> int:
            return ring.size - ring.unread()

        if not (yield Need(NOTIFY_READ, read, ring.size, end.peer_is_gone, "the peer to read everything")):
            raise end.gone()

    # Telling the peer.

    def tell(self, bit: int) -> None:
        """Ring if the peer asked for it, after an index was moved. The lock is held."""
        self.end.atomics.fence()
        self.end.tell(bit)

    def has_read(self) -> None:
        """After something was read and the lock released, which is a fence if `ordered`."""
        try:
            if self.flags[0] & self.after_reading != self.quiet_reading:
                self.was_read()
        except ValueError:
            pass  # another thread closed this end, and that told the peer

    def has_written(self) -> None:
        """After something was written and the lock released, which is a fence if `ordered`; if not, never `quiet`."""
        try:
            if self.flags[0] & self.after_writing != self.quiet:
                self.written()
        except ValueError:
            pass  # as in `has_read`

    def was_read(self) -> None:
        """Tell the peer that bytes were read: it has asked."""
        if not self.end.atomics.ordered:
            self.end.atomics.fence()
        self.end.tell(NOTIFY_READ)

    def written(self) -> None:
        """Tell the peer that bytes were written: it has asked, or is not there yet."""
        if not self.end.atomics.ordered:
            self.end.atomics.fence()
        self.end.tell(NOTIFY_WRITE)
        if self.end.peer_is_gone():
            with self.writing:
                self.outgoing.room = 0  # so that the next one finds out

    # The end.

    def close(self) -> None:
        """See `Channel.close`."""
        if self.closed:
            return
        self.end.closing = True
        self.end.bells.ring_own()
        with self.reading, self.writing, self.draining:
            self.incoming.ready = self.outgoing.room = 0
            self.end.leave()
            for lent in self.peeked, self.reserved:
                if lent is not None:
                    with contextlib.suppress(BufferError):  # closing the pages will say it better
                        lent.view.release()
            self.end.pages.close_rings()
            self.end.pages.close_page()
            self.closed = True
            self.end.bells.close()

    def detach(self) -> Ticket:
        """See `Channel.detach`."""
        with contextlib.ExitStack() as held:
            for lock in self.reading, self.writing, self.draining:
                if not lock.acquire(blocking=False):
                    raise Busy(f"{self!r} cannot be detached: another thread is in a call of it")
                held.callback(lock.release)
            self.end.check_open()
            if self.end.waiting:
                raise Busy(f"{self!r} cannot be detached: nobody has come yet")
            if self.peeked is not None or self.reserved is not None:
                raise Busy(f"{self!r} cannot be detached: what was peeked or reserved is to be given back first")
            ticket = Ticket.of(self.end, self._address)
            self.end.give_away("was given away; adopt its ticket")
            self.closed = True
        return ticket

    def forget_in_child(self) -> None:
        """Close the copy that a child made by fork has, and say why: it is not the channel."""
        if not self.closed:
            self._make_locks()
            owner = self.end.owner
            self.end.give_away(f"is process {owner}'s, which forked this one; `detach` it there, and `adopt` it here")
            self.closed = True
            with contextlib.suppress(GntallocError):  # what is looked at stays mapped, until this process ends
                self.end.pages.close_rings()
                self.end.pages.close_page()
            self.end.bells.let_go()

    def __del__(self, _warn: Callable[[object], bool] = warn_unclosed) -> None:
        if not getattr(self, "closed", True) and _warn(self):
            with contextlib.suppress(Exception):
                self.close()


def bytes_of(data: Any) -> memoryview:
    """Anything with a buffer, as plain bytes."""
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _never() -> bool:
    return False


def _too_long(count: int, size: int) -> GntallocError:
    return GntallocError(
        errno.EMSGSIZE,
        f"{count} bytes do not fit a ring of {size} at once; listen with a larger `size`, or use read and write",
    )


def _after_fork_in_child() -> None:
    for core in list(_cores):
        core.forget_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
