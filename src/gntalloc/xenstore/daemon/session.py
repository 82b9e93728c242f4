"""Keep one connection to the daemon: its watches, its transactions, and its unread messages."""

from __future__ import annotations

from collections import deque
from struct import Struct, pack
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.xenstore import wire
from gntalloc.xenstore.daemon.permissions import ALL
from gntalloc.xenstore.wire import Message, Type

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gntalloc.xenstore.daemon.changes import Change
    from gntalloc.xenstore.daemon.domains import Domain
    from gntalloc.xenstore.daemon.limits import Refused
    from gntalloc.xenstore.daemon.permissions import Entry
    from gntalloc.xenstore.daemon.transactions import Transaction

__all__ = ["MOST_UNREAD", "Behind", "Firing", "Session", "Watch"]

_EVENT = Struct("=I8xI")
_AN_EVENT = pack("=I", Type.WATCH_EVENT)

MOST_UNREAD = 16 << 20  # bytes that even a privileged connection may leave unread before it is dropped


class Watch(NamedTuple):
    """Keep one watch. `relative` is the number of bytes of a path that its events leave out."""

    session: Session
    number: int
    path: str
    token: bytes
    relative: int


class Session:
    """Keep a connection of a program in `domain`. Messages to send are in `outbox`: take them with `take`."""

    def __init__(self, domain: Domain, number: int, talking: set[Session]) -> None:
        self.domain = domain
        self.number = number
        self.watches: dict[tuple[str, bytes], Watch] = {}
        self.transactions: dict[int, Transaction] = {}
        self.last_transaction = 0
        self.on: dict[str, list[Watch]] = {}
        """The watches by path."""
        self.behind: deque[Behind] = deque()
        """Changes of which watches have not been told yet, the oldest first."""
        self.outbox: deque[bytes] = deque()
        self.answers = 0
        """The number of answers in the outbox."""
        self.unread = 0
        """The number of bytes in the outbox."""
        self.closed = False
        """Whether the daemon has ended it: nothing is sent to it or read from it any more."""
        self.gone = False
        """Whether its program is not connected any more."""
        self.refused: Refused | None = None
        """The last refusal, until the program asks for its reason."""
        self._events: set[bytes] = set()
        self._talking = talking

    @property
    def privileged(self) -> bool:
        """Whether it belongs to domain 0."""
        return self.domain.privileged

    def is_one_of(self, domid: int) -> bool:
        """Say whether the connection acts for that domain: its own, or the one that it serves."""
        return domid in (self.domain.domid, self.domain.target)

    def rights(self, entries: tuple[Entry, ...]) -> int:
        """Give what the connection may do with a node that has these permissions."""
        if self.privileged or self.is_one_of(entries[0].domid):
            return ALL
        for entry in entries[1:]:
            if not entry.void and self.is_one_of(entry.domid):
                return entry.access
        return entries[0].access

    def answer(self, message: Message) -> None:
        """Put an answer into the outbox."""
        self.answers += 1
        self._put(wire.encode(message))

    def event(self, path: str, token: bytes, *, quota: int) -> None:
        """Put an event into the outbox, unless the same one waits already or the domain's memory is nearly used up.

        A quarter of the memory is kept for requests. So a program that does not read stops no other of its domain.
        """
        length = len(path) + len(token) + 2
        if length > wire.PAYLOAD_MAX:
            return
        if self.domain.memory + wire.HEADER.size + length >= quota - quota // 4 and not self.privileged:
            return
        data = b"".join((_EVENT.pack(Type.WATCH_EVENT, length), path.encode("latin-1"), b"\0", token, b"\0"))
        if data in self._events and not path.startswith("@"):
            return
        self._events.add(data)
        self._put(data)

    def take(self) -> bytes:
        """Take the next message to send. The outbox must not be empty."""
        data = self.outbox.popleft()
        self.unread -= len(data)
        self.domain.memory -= len(data)
        if data.startswith(_AN_EVENT):
            self._events.discard(data)
        else:
            self.answers -= 1
        return data

    def drop_unread(self) -> None:
        """Drop the messages that were to be sent."""
        self.domain.memory -= self.unread
        self.answers = self.unread = 0
        self.outbox.clear()
        self._events.clear()

    def end(self) -> None:
        """End the connection, as the daemon is done with it."""
        self.closed = True
        self._talking.add(self)

    def leave(self) -> None:
        """Note that its program is not connected any more. Nothing is sent to it from now on."""
        self.gone = True
        self.drop_unread()

    def _put(self, data: bytes) -> None:
        if self.gone:
            return
        self._talking.add(self)
        self.outbox.append(data)
        self.unread += len(data)
        self.domain.memory += len(data)
        if self.unread > MOST_UNREAD:
            self.closed = True


class Firing(NamedTuple):
    """Hold the changes of one moment, of which these sessions have watches."""

    serial: int
    changes: Sequence[Change]
    sessions: Sequence[Session]
    first: int
    last: int
    """The numbers of the watches that fire, from `first` to `last`. Those set since do not."""


class Behind:
    """Say how far one session has been told of a firing: of `told` of its changes."""

    __slots__ = ("firing", "told")

    def __init__(self, firing: Firing) -> None:
        self.firing = firing
        self.told = 0
