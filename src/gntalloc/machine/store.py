"""Serve connections of programs to xenstore, each a `Speaker`.

Nothing here waits for a program. Messages that a program does not read are kept. A domain's programs may leave as much
unread as their memory quota allows; beyond it they miss events, as with the real daemon. A program of domain 0 may
leave 16 MiB unread; beyond it the connection ends. A program that leaves twenty answers unread is not listened to until
it reads.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any

from gntalloc import clock
from gntalloc.errors import DeviceError, PeerBroke
from gntalloc.machine import descriptors as received
from gntalloc.machine.loop import READABLE, WRITABLE
from gntalloc.machine.speaker import MESSAGES_A_TURN, RUNNABLE, Dropped
from gntalloc.xenstore import wire
from gntalloc.xenstore.daemon.limits import Refused
from gntalloc.xenstore.errors import error_for

if TYPE_CHECKING:
    from gntalloc.machine.speaker import Speaker
    from gntalloc.machine.turns import Turns
    from gntalloc.xenstore.daemon.server import Daemon
    from gntalloc.xenstore.daemon.session import Session
    from gntalloc.xenstore.wire import Message

__all__ = ["MAX_LINES", "MOST_SHOWN", "StoreFront"]

log = logging.getLogger("gntalloc.machine")

MAX_LINES = 1024  # connections of one domain, so that it cannot use up the machine's descriptors
MOST_SHOWN = 1000  # watches and transactions in one answer to a person
_LONGEST_SHOWN = 200  # characters
_BYTES_A_TURN = 16384
_NEVER_WAIT = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class StoreFront:
    """Keep all connections to a daemon.

    Args:
        daemon: the store.
        turns: the turns in which they are served.
    """

    def __init__(self, daemon: Daemon, turns: Turns) -> None:
        self._daemon = daemon
        self._turns = turns
        self._lines: dict[Session, StoreLine] = {}

    def connect(self, sock: socket.socket, domid: int, pid: int) -> None:
        """Serve a program of this domain on `sock`: process `pid`.

        Raises:
            DeviceError: ECONNREFUSED: domain 0 has released the domain. EMFILE: too many programs are connected.
        """
        if sum(session.domain.domid == domid for session in self._lines) >= MAX_LINES:
            raise DeviceError(errno.EMFILE, f"{MAX_LINES} programs of domain {domid} use xenstore already; end some")
        try:
            session = self._daemon.connect(domid)
        except Refused:
            raise DeviceError(errno.ECONNREFUSED, f"xenstore was told to talk no more with domain {domid}") from None
        line = self._lines[session] = StoreLine(sock, session, pid, self)
        self._turns.add(line, domid, lambda: self._ended(session))

    def handle(self, line: StoreLine, message: Message) -> None:
        """Serve one request, and send all that it has caused, on any connection."""
        refused = self._daemon.handle(line.session, message)
        if refused is not None and message.type != wire.WHY and log.isEnabledFor(logging.DEBUG):
            log.debug("xenstore, domain %d: %s", line.session.domain.domid, _said(message, refused))
        self.deliver()

    @property
    def outstanding(self) -> int:
        """The number of answers that a program may leave unread."""
        return self._daemon.quotas.outstanding

    def deliver(self) -> None:
        """Send the daemon's messages, as far as they go, and hang up where the daemon is done."""
        talking = self._daemon.talking
        while talking:
            line = self._lines.get(session := talking.pop())
            if line is None:
                continue
            try:
                line.flush()
            except Dropped as reason:
                self._turns.drop(line, str(reason))
                continue
            if session.closed:
                self._turns.drop(line, "its domain is gone, or it does not read")
            else:
                self._turns.plan(line)

    def connections(self) -> list[dict[str, Any]]:
        """List, for people, the connections that keep watches or transactions, with their processes.

        A watch has its path and token. A transaction has its number, and the first path that it has seen, or "". Long
        texts are cut, and at most MOST_SHOWN watches and transactions are listed.
        """
        shown: list[dict[str, Any]] = []
        room = MOST_SHOWN
        for session, line in self._lines.items():
            watches = [[_cut(path), _cut(token.decode("latin-1"))] for path, token in islice(session.watches, room)]
            room -= len(watches)
            transactions = [
                [number, _cut(next(iter(transaction.seen), ""))]
                for number, transaction in islice(session.transactions.items(), room)
            ]
            room -= len(transactions)
            if watches or transactions:
                domid = session.domain.domid
                shown.append({"domid": domid, "pid": line.pid, "watches": watches, "transactions": transactions})
        return shown

    def _ended(self, session: Session) -> None:
        del self._lines[session]
        self._daemon.disconnect(session)


def _said(message: Message, refused: Refused) -> str:
    """Make a line for the log of a refused request: what was asked, and why it was refused."""
    first, end, _rest = message.body.partition(b"\0")
    path = first.decode("latin-1").encode("unicode_escape").decode() if end and first else None
    return str(error_for(refused.code, wire.type_name(message.type), path, refused.reason or None))


class StoreLine:
    """Be one connection: a `Speaker`.

    Args:
        sock: the socket to the program.
        session: the daemon's session.
        pid: the process that made it.
        front: serves its requests.
    """

    companion: Speaker | None = None
    weight = 0
    has_notes = False

    def __init__(self, sock: socket.socket, session: Session, pid: int, front: StoreFront) -> None:
        sock.setblocking(False)
        received.refuse(sock)
        self.session = session
        self.pid = pid
        self._sock = sock
        self._front = front
        self._inbox: deque[Message] = deque()
        self._broken = False  # whether bytes came that are no message, so that nothing after them can be read
        self._admitted = 0
        self._decoder = wire.Decoder()
        self._rest = b""

    def fileno(self) -> int:
        """See `Speaker`."""
        return self._sock.fileno()

    @property
    def standing(self) -> int:
        """See `Speaker`."""
        wanted = WRITABLE if self._rest or self.session.outbox else 0
        if not self._may_speak():
            return wanted
        return wanted | RUNNABLE if self._inbox or self._broken else wanted | READABLE

    def stalled(self, now: float) -> bool:
        """See `Speaker`. Unread messages count against the domain's memory."""
        return False

    def receive(self, events: int) -> None:
        """Take the bytes that have come.

        Raises:
            Dropped: the program is gone.
        """
        try:
            data, descriptors = received.receive(self._sock, _BYTES_A_TURN)
        except BlockingIOError:
            return
        except received.Truncated:
            raise Dropped("there was no room for the descriptors that it sent") from None
        except OSError as error:
            raise Dropped(error.strerror or str(error)) from None
        received.let_go(descriptors)
        if not data:
            raise Dropped("it went away")
        try:
            while messages := self._decoder.feed(data):
                self._inbox.extend(messages)
                data = b""
        except PeerBroke:
            self._broken = True

    def flush(self) -> None:
        """Send the messages that wait, as far as they go.

        Raises:
            Dropped: the program is gone.
        """
        while self._rest or self.session.outbox:
            while self.session.outbox and len(self._rest) < _BYTES_A_TURN:
                self._rest += self.session.take()
            try:
                sent = self._sock.send(self._rest, _NEVER_WAIT)
            except BlockingIOError:
                return
            except OSError as error:
                raise Dropped(error.strerror or str(error)) from None
            self._rest = self._rest[sent:]

    def admit(self) -> None:
        """See `Speaker`."""
        self._admitted = len(self._inbox)

    def take_notes(self, until: float) -> None:
        """See `Speaker`. Every message here is answered."""

    def take_turn(self, until: float) -> None:
        """See `Speaker`.

        Raises:
            Dropped: the next bytes that it sent are no message.
        """
        for _ in range(min(self._admitted, MESSAGES_A_TURN)):
            if self.session.closed or not self._may_speak():
                break
            self._front.handle(self, self._inbox.popleft())
            if clock.now() >= until:
                break
        if self._broken and not self._inbox:
            raise Dropped("what it sent is no message")

    def close(self) -> None:
        """See `Speaker`."""
        self._inbox.clear()
        received.hang_up(self._sock)

    def _may_speak(self) -> bool:
        return self.session.answers < self._front.outstanding


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
