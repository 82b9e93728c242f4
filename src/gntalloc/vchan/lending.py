"""In place: room in the shared pages to be filled in, and bytes to be looked at where they lie. Nothing is copied.

One view of each direction may be out at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gntalloc.vchan.core import Lent
from gntalloc.vchan.layout import NOTIFY_READ, NOTIFY_WRITE
from gntalloc.vchan.ring import HEADER

if TYPE_CHECKING:
    from gntalloc.vchan.core import Core
    from gntalloc.vchan.waiting import Steps

__all__ = ["commit", "peek", "release", "reserve"]


def reserve(core: Core, size: int | None, *, message: bool) -> Steps[memoryview]:
    """See `Channel.reserve`."""
    head = HEADER if message else 0
    if size is not None and size < 1:
        raise ValueError(f"{size} bytes cannot be reserved")
    yield from core.room_comes((size or 1) + head)
    ring = core.outgoing
    if size is None:
        if not core.end.waiting:
            core.end.look(ring.refresh)
        size = max(1, ring.in_one_piece(head))
    view = ring.view(size, head)
    copy = None
    if view is None:
        copy = bytearray(size)
        view = memoryview(copy)
    core.reserved = Lent(view, size, head, ring.room, copy)
    ring.room = 0  # none for anybody else while this is out
    return view


def commit(core: Core, size: int | None) -> None:
    """See `Channel.commit`."""
    core.end.check_open()
    lent = core.reserved
    if lent is None:
        raise ValueError("nothing was reserved that could be committed")
    with core.writing:  # nobody waits in there, as long as something is reserved
        core.end.check_open()
        count = lent.size if size is None else size
        if not 0 <= count <= lent.size:
            raise ValueError(f"{count} bytes cannot be committed of {lent.size} that were reserved")
        core.reserved = None
        ring = core.outgoing
        ring.room = lent.known
        if not count:
            return
        if lent.copy is not None:
            ring.fill(memoryview(lent.copy)[:count], lent.head)
        if lent.head:
            ring.fill_length(count)
        ring.advance(count + lent.head)
        core.tell(NOTIFY_WRITE)


def peek(core: Core, size: int | None, *, message: bool) -> Steps[memoryview]:
    """See `Channel.peek`."""
    ring = core.incoming
    if message:
        length, head = (yield from core.message_comes()), HEADER
    else:
        if not (yield from core.bytes_come(1 if size is None else size)) and not ring.ready:
            return memoryview(b"")
        core.end.look(ring.refresh)
        length, head = ring.in_one_piece() if size is None else min(size, ring.ready), 0
    view = ring.view(length, head)
    if view is None:
        view = memoryview(ring.look(length, head))
    core.peeked = Lent(view, length, head, ring.ready, None)
    ring.ready = 0  # nothing is there for anybody else while this is out
    return view


def release(core: Core, size: int | None) -> None:
    """See `Channel.release`."""
    core.end.check_open()
    lent = core.peeked
    if lent is None:
        raise ValueError("nothing was peeked that could be released")
    with core.reading:  # nobody waits in there, as long as something is peeked
        core.end.check_open()
        count = lent.size if size is None else size
        if not 0 <= count <= lent.size or (lent.head and count != lent.size):
            why = f"{count} bytes cannot be released of {lent.size} that were peeked; a message goes whole"
            raise ValueError(why)
        core.peeked = None
        core.incoming.ready = lent.known
        core.incoming.advance(count + lent.head)
        core.tell(NOTIFY_READ)
