"""In place: room in the shared pages to be filled in, and bytes to be looked at where they lie."""

from __future__ import annotations

from gntalloc.vchan.layout import NOTIFY_READ, NOTIFY_WRITE
from gntalloc.vchan.ring import HEADER
from gntalloc.vchan.waiting import Lent, Turn, Waiting

__all__ = ["Lending"]


class Lending(Waiting):
    """The calls that copy nothing. One view of each direction may be out at a time."""

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
        with Turn(self._writing, timeout) as turn:
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
            self._reserved = Lent(view, size, head, ring.room, copy)
            ring.room = 0  # none for anybody else while this is out
        return view

    def commit(self, size: int | None = None) -> None:
        """Send what was filled in, or its first `size` bytes; of 0 bytes nothing is sent.

        Raises:
            ValueError: nothing was reserved, or less than `size`.
            Closed: this end is closed.
        """
        self._end.check_open()
        lent = self._reserved
        if lent is None:
            raise ValueError("nothing was reserved that could be committed")
        with self._writing:  # nobody waits in there, as long as something is reserved
            self._end.check_open()
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
        with Turn(self._reading, timeout) as turn:
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
            self._peeked = Lent(view, length, head, ring.ready, None)
            ring.ready = 0  # nothing is there for anybody else while this is out
        return view

    def release(self, size: int | None = None) -> None:
        """Give back the room of what was peeked, or of its first `size` bytes: then the rest is peeked again.

        Raises:
            ValueError: nothing was peeked, or less; of a message all is released.
            Closed: this end is closed.
        """
        self._end.check_open()
        lent = self._peeked
        if lent is None:
            raise ValueError("nothing was peeked that could be released")
        with self._reading:  # nobody waits in there, as long as something is peeked
            self._end.check_open()
            count = lent.size if size is None else size
            if not 0 <= count <= lent.size or (lent.head and count != lent.size):
                why = f"{count} bytes cannot be released of {lent.size} that were peeked; a message goes whole"
                raise ValueError(why)
            self._peeked = None
            self._in.ready = lent.known
            self._in.advance(count + lent.head)
            self._tell(NOTIFY_READ)
