"""One connection to the daemon: its watches, its transactions, and what it has not read yet."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.xenstore import wire
from gntalloc.xenstore.daemon.permissions import ALL
from gntalloc.xenstore.wire import Message, Type

if TYPE_CHECKING:
    from gntalloc.xenstore.daemon.domains import Domain
    from gntalloc.xenstore.daemon.limits import Refused
    from gntalloc.xenstore.daemon.permissions import Entry
    from gntalloc.xenstore.daemon.transactions import Transaction

__all__ = ["MOST_UNREAD", "Session", "Watch"]

MOST_UNREAD = 16 << 20  # bytes that even a privileged connection may leave unread before it is dropped


class Watch(NamedTuple):
    """One watch. `relative`: how many bytes of a path its events leave out."""

    session: Session
    number: int
    path: str
    token: bytes
    relative: int


class Session:
    """A connection of a program in `domain`. What is to be sent is in `outbox`: take it with `take`."""

    def __init__(self, domain: Domain, number: int, talking: set[Session]) -> None:
        self.domain = domain
        self.number = number
        self.watches: dict[tuple[str, bytes], Watch] = {}
        self.transactions: dict[int, Transaction] = {}
        self.last_transaction = 0
        self.outbox: deque[tuple[bytes, bool]] = deque()
        self.answers = 0
        """How many of what is in the outbox are answers."""
        self.unread = 0
        """Bytes in the outbox."""
        self.closed = False
        """Whether the daemon has ended it: nobody sends to it or reads from it any more."""
        self.refused: Refused | None = None
        """The last refusal that nobody has asked about."""
        self._events: set[bytes] = set()
        self._talking = talking

    @property
    def privileged(self) -> bool:
        """Whether it belongs to domain 0."""
        return self.domain.privileged

    def is_one_of(self, domid: int) -> bool:
        """Whether it acts for that domain: its own, or the one that it serves."""
        return domid in (self.domain.domid, self.domain.target)

    def rights(self, entries: tuple[Entry, ...]) -> int:
        """What it may do with a node that has these permissions."""
        if self.privileged or self.is_one_of(entries[0].domid):
            return ALL
        for entry in entries[1:]:
            if not entry.void and self.is_one_of(entry.domid):
                return entry.access
        return entries[0].access

    def answer(self, message: Message) -> None:
        """Send this answer."""
        self.answers += 1
        self._put(wire.encode(message), event=False)

    def event(self, path: str, token: bytes, *, quota: int) -> None:
        """Send an event; not if the same one waits already, nor if its domain's memory is nearly used up.

        A quarter of it is kept for requests, so that who does not read stops none of its domain's other programs.
        """
        body = path.encode("latin-1") + b"\0" + token + b"\0"
        if len(body) > wire.PAYLOAD_MAX:
            return
        data = wire.encode(Message(Type.WATCH_EVENT, 0, 0, body))
        if data in self._events and not path.startswith("@"):
            return
        if not self.privileged and self.domain.memory + len(data) >= quota - quota // 4:
            return
        self._events.add(data)
        self._put(data, event=True)

    def take(self) -> bytes:
        """The next message to send. The outbox is not empty."""
        data, event = self.outbox.popleft()
        self.unread -= len(data)
        self.domain.memory -= len(data)
        if event:
            self._events.discard(data)
        else:
            self.answers -= 1
        return data

    def drop_unread(self) -> None:
        """Forget what was to be sent."""
        while self.outbox:
            self.take()

    def end(self) -> None:
        """The daemon is done with it."""
        self.closed = True
        self._talking.add(self)

    def _put(self, data: bytes, *, event: bool) -> None:
        self._talking.add(self)
        self.outbox.append((data, event))
        self.unread += len(data)
        self.domain.memory += len(data)
        if self.unread > MOST_UNREAD:
            self.closed = True
