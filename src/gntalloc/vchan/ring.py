"""One direction of a channel: bytes in a ring, and two indexes that say which. Pure: no peer is told anything here.

The writer's index and the reader's run freely over 32 bits; their difference is what is in the ring, and a byte's place
is its index modulo the size. Each end moves its own index, and keeps it in private: what lies in the shared memory is
for the other's eyes, and is never read back. What the other's index says is believed as far as it can be true:

    0 <= what is in the ring <= its size,  and an index never goes back

Anything else is `PeerBroke`, at once and for good. (The C library answers such a peer with "nothing there" for ever.)

A *message* is its length, four bytes little-endian, and then itself; never more than the ring holds.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any

from gntalloc.errors import PeerBroke

if TYPE_CHECKING:
    from gntalloc.atomics import Atomics

__all__ = ["HEADER", "Reader", "Writer"]

_WORD = 0xFFFF_FFFF
HEADER = 4
"""Bytes of a message's length."""
_LENGTH = Struct("<I")
_SMALL = 512  # up to this a message and its length are joined first: one copy more, one call less


class _HalfRing:
    """What both ends have in common.

    Args:
        memory: where the ring lies, from byte `base` on. All of an object: it is asked for slices directly, which
            for an mmap gives bytes without a view in between.
        size: a power of two.
        indexes: the four words of the page.
        mine: which of them this end moves.
        theirs: which the peer moves.
        mirrored: a ring of so many bytes is in `memory` twice in a row, so that no piece of it ever wraps.
    """

    __slots__ = (
        "_atomics", "_base", "_end", "_indexes", "_mask", "_mine", "_mirrored", "_raw", "_theirs",
        "index", "memory", "size",
    )  # fmt: skip

    def __init__(
        self,
        memory: memoryview,
        size: int,
        indexes: memoryview,
        mine: int,
        theirs: int,
        atomics: Atomics,
        *,
        base: int = 0,
        mirrored: int = 0,
    ) -> None:
        self.memory = memory
        self.size = size
        self._raw: Any = memory.obj
        self._base = base
        self._mirrored = mirrored
        self._mask = size - 1
        self._end = self._end_of(size)
        self._indexes = indexes
        self._mine = mine
        self._theirs = theirs
        self._atomics = atomics
        self.index: int = indexes[mine]

    def enlarge(self, size: int) -> None:
        """Have `size` bytes, as both ends have agreed before any index has passed the old size.

        Until then a byte's place is the same in both, so another thread may be writing meanwhile.
        """
        self._end, self._mask, self.size = self._end_of(size), size - 1, size

    def _end_of(self, size: int) -> int:
        """Up to where bytes lie in a row."""
        return self._base + (2 * size if size == self._mirrored else size)

    def _ahead(self) -> int:
        """How far the peer's index is ahead of ours. For any thread: ours is another's to move, even meanwhile."""
        while True:
            mine = self.index
            theirs = self._indexes[self._theirs]
            if self.index == mine:
                return (theirs - mine) & _WORD

    def _broken(self, known: str) -> PeerBroke:
        theirs = self._indexes[self._theirs]
        return PeerBroke(
            f"the peer's index is {theirs:#x} while ours is {self.index:#x} in a ring of {self.size} bytes, {known}: "
            "that cannot be; the channel is of no more use"
        )


class Writer(_HalfRing):
    """The end that puts bytes in. `room`: so many are known to fit."""

    __slots__ = ("room",)

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.room = 0
        self.refresh()

    def refresh(self) -> int:
        """Look at the reader's index. How much room there is.

        Raises:
            PeerBroke: it cannot be.
        """
        room = self.size - ((self.index - self._indexes[self._theirs]) & _WORD)
        if room < self.room:  # negative: beyond what was written; less than known: it went back
            raise self._broken(f"where {self.room} bytes were free")
        self.room = room
        return room

    def unread(self) -> int:
        """How many bytes the reader has not read yet. Any thread may ask.

        Raises:
            PeerBroke: as `refresh`.
        """
        unread = -self._ahead() & _WORD
        if unread > self.size:
            raise self._broken(f"where {self.room} bytes were free")
        return unread

    def resume(self, index: int) -> None:
        """Go on where another process was; what it knew is to be looked for anew."""
        self.index, self.room = index, 0

    def put(self, data: memoryview) -> None:
        """Write bytes that fit. They are seen at once."""
        self._copy(self.index, data)
        self.advance(len(data))

    def put_message(self, message: bytes | bytearray | memoryview, length: int) -> None:
        """Write a message that fits, its length first. It is seen at once, and whole."""
        whole = length + HEADER
        at = self._base + (self.index & self._mask)
        if length <= _SMALL and at + whole <= self._end:
            self._raw[at : at + whole] = _LENGTH.pack(length) + message
        else:
            self._copy(self.index, memoryview(_LENGTH.pack(length)))
            self._copy(self.index + HEADER, memoryview(message))
        if not self._atomics.ordered:
            self._atomics.fence()
        self.index = index = (self.index + whole) & _WORD
        self.room -= whole
        self._indexes[self._mine] = index

    def view(self, length: int, skip: int = 0) -> memoryview | None:
        """Give the next bytes to be written, after `skip` of them. None: they do not lie in one piece."""
        at = self._base + ((self.index + skip) & self._mask)
        return self.memory[at : at + length] if at + length <= self._end else None

    def in_one_piece(self, skip: int = 0) -> int:
        """How many bytes of the room lie in one piece, after `skip` of them."""
        place = (self.index + skip) & self._mask
        return min(self.room - skip, self._end - self._base - place)

    def fill(self, data: memoryview, skip: int = 0) -> None:
        """Write bytes that fit, after `skip` of the next ones. `advance` shows them."""
        self._copy(self.index + skip, data)

    def fill_length(self, length: int) -> None:
        """Write the length of a message that stands after it already. `advance` shows both."""
        self._copy(self.index, memoryview(_LENGTH.pack(length)))

    def advance(self, length: int) -> None:
        """Let the reader see what was written."""
        if not self._atomics.ordered:
            self._atomics.fence()
        self.index = (self.index + length) & _WORD
        self.room -= length
        self._indexes[self._mine] = self.index

    def _copy(self, index: int, data: memoryview) -> None:
        at = self._base + (index & self._mask)
        end = at + len(data)
        if end <= self._end:
            self.memory[at:end] = data
        else:
            first = self._end - at
            self.memory[at : self._end] = data[:first]
            self.memory[self._base : self._base + len(data) - first] = data[first:]


class Reader(_HalfRing):
    """The end that takes bytes out. `ready`: so many are known to be there."""

    __slots__ = ("ready",)

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.ready = 0
        self.refresh()

    def refresh(self) -> int:
        """Look at the writer's index. How many bytes are there.

        Raises:
            PeerBroke: it cannot be.
        """
        ready = (self._indexes[self._theirs] - self.index) & _WORD
        if not self.ready <= ready <= self.size:
            raise self._broken(f"where {self.ready} bytes were ready")
        self.ready = ready
        if not self._atomics.ordered:
            self._atomics.fence()
        return ready

    def unread(self) -> int:
        """How many bytes are there that have not been read. Any thread may ask.

        Raises:
            PeerBroke: as `refresh`.
        """
        unread = self._ahead()
        if unread > self.size:
            raise self._broken(f"where {self.ready} bytes were ready")
        return unread

    def take(self, length: int) -> bytes:
        """Read bytes that are there."""
        data = self._bytes(self.index, length)
        self.advance(length)
        return data

    def take_into(self, buffer: memoryview) -> None:
        """Read as many bytes as the buffer has room for; they are there."""
        self._copy(self.index, buffer)
        self.advance(len(buffer))

    def resume(self, index: int) -> None:
        """Go on where another process was; what it knew is to be looked for anew."""
        self.index, self.ready = index, 0

    def message_length(self) -> int | None:
        """How long the next message is; None: it is not there, or not all of it.

        Raises:
            PeerBroke: longer than the ring.
        """
        ready = self.ready
        if ready < HEADER:
            return None
        at = self._base + (self.index & self._mask)
        if at + HEADER <= self._end:
            length: int = _LENGTH.unpack_from(self._raw, at)[0]
        else:
            (length,) = _LENGTH.unpack(self._bytes(self.index, HEADER))
        if length + HEADER <= ready:
            return length
        if length + HEADER > self.size:
            raise PeerBroke(
                f"the peer's next message is said to be {length} bytes long, in a ring of {self.size}: that cannot be, "
                "or it does not send messages; then use read"
            )
        return None

    def take_message(self) -> bytes | None:
        """Read a message; None: it is not there, or not all of it.

        Raises:
            PeerBroke: it is longer than the ring.
        """
        length = self.message_length()
        if length is None:
            return None
        index = self.index
        at = self._base + (index & self._mask) + HEADER
        if at + length <= self._end:
            message: bytes = self._raw[at : at + length]
        else:
            message = self._bytes(index + HEADER, length)
        if not self._atomics.ordered:
            self._atomics.fence()
        whole = length + HEADER
        self.index = index = (index + whole) & _WORD
        self.ready -= whole
        self._indexes[self._mine] = index
        return message

    def copy_message(self, length: int, buffer: memoryview) -> None:
        """Read the next message, which is `length` bytes long, into a buffer that has the room."""
        self._copy(self.index + HEADER, buffer[:length])
        self.advance(length + HEADER)

    def view(self, length: int, skip: int = 0) -> memoryview | None:
        """Give the next bytes to be read, after `skip` of them. None: they do not lie in one piece."""
        at = self._base + ((self.index + skip) & self._mask)
        return self.memory[at : at + length].toreadonly() if at + length <= self._end else None

    def in_one_piece(self) -> int:
        """How many of the ready bytes lie in one piece."""
        return min(self.ready, self._end - self._base - (self.index & self._mask))

    def look(self, length: int, skip: int = 0) -> bytes:
        """Copy the next bytes, after `skip` of them."""
        return self._bytes(self.index + skip, length)

    def advance(self, length: int) -> None:
        """Give the writer the room of what was read."""
        if not self._atomics.ordered:
            self._atomics.fence()
        self.index = (self.index + length) & _WORD
        self.ready -= length
        self._indexes[self._mine] = self.index

    def _bytes(self, index: int, length: int) -> bytes:
        at = self._base + (index & self._mask)
        if at + length <= self._end:
            return bytes(self._raw[at : at + length])
        data = bytearray(length)
        self._copy(index, memoryview(data))
        return bytes(data)

    def _copy(self, index: int, buffer: memoryview) -> None:
        at = self._base + (index & self._mask)
        end = at + len(buffer)
        if end <= self._end:
            buffer[:] = self.memory[at:end]
        else:
            first = self._end - at
            buffer[:first] = self.memory[at : self._end]
            buffer[first:] = self.memory[self._base : self._base + len(buffer) - first]
