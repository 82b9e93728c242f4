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
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any

from gntalloc import clock
from gntalloc.errors import DeviceError
from gntalloc.machine.loop import NOT_NOW, READABLE, WRITABLE
from gntalloc.machine.speaker import RUNNABLE, Dropped
from gntalloc.machine.turns import OWN
from gntalloc.unasked import Inlet
from gntalloc.xenstore import wire
from gntalloc.xenstore.daemon.limits import Refused
from gntalloc.xenstore.errors import error_for

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from gntalloc.machine.speaker import Speaker
    from gntalloc.machine.turns import Turns
    from gntalloc.unasked import Disposal
    from gntalloc.xenstore.daemon.server import Daemon
    from gntalloc.xenstore.daemon.session import Session
    from gntalloc.xenstore.wire import Message

__all__ = ["MAX_LINES", "MOST_SHOWN", "StoreFront"]

log = logging.getLogger("gntalloc.machine")

MAX_LINES = 1024  # connections of one domain, so that it cannot use up the machine's descriptors
MOST_SHOWN = 1000  # watches and transactions in one answer to a person
_LONGEST_SHOWN = 200  # characters
_BYTES_A_TURN = 16384
_MESSAGES_A_FLUSH = 64
_PIECES_A_DELIVERY = 16
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
        self._lines_of: Counter[int] = Counter()  # by domain

    def connect(
        self, sock: socket.socket, domid: int, pid: int, disposal: Disposal, *, ended: Callable[[], None]
    ) -> None:
        """Serve a program of this domain on `sock`: process `pid`. `disposal` is the domain's.

        `ended` is called when it has gone, unless it was refused.

        Raises:
            DeviceError: ECONNREFUSED: domain 0 has released the domain. EMFILE: too many programs are connected.
        """
        if self._lines_of[domid] >= MAX_LINES:
            raise DeviceError(errno.EMFILE, f"{MAX_LINES} programs of domain {domid} use xenstore already; end some")
        try:
            session = self._daemon.connect(domid)
        except Refused:
            raise DeviceError(errno.ECONNREFUSED, f"xenstore was told to talk no more with domain {domid}") from None
        line = StoreLine(sock, session, pid, self, disposal)
        try:
            self._turns.add(line, domid, lambda: self._ended(session, ended))
        except DeviceError:
            self._daemon.disconnect(session)
            raise
        self._lines[session] = line
        self._lines_of[domid] += 1

    def begin(self, session: Session, message: Message) -> Generator[None, None, None]:
        """Serve one request in pieces. `deliver` sends all that it has caused, on any connection."""
        refused = yield from self._daemon.begin(session, message)
        if refused is not None and message.type != wire.WHY and log.isEnabledFor(logging.DEBUG):
            log.debug("xenstore, domain %d: %s", session.domain.domid, _said(message, refused))

    def bring_to_an_end(self, domid: int, work: Iterator[None]) -> None:
        """Go on with a request of a connection that has ended: others are still to be told of what it changed."""
        self._turns.do(domid, self._delivering(work))

    def settle(self) -> None:
        """Send all that is to be told and that no request tells: what the machine changed, or a domain that ended."""
        self.deliver()
        self._turns.do(OWN, self._delivering(self._daemon.catch_up()))

    def _delivering(self, work: Iterator[None]) -> Iterator[None]:
        for number, _ in enumerate(work, 1):
            if number % _PIECES_A_DELIVERY == 0:
                self.deliver()
            yield
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
                line.send()
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

    def _ended(self, session: Session, ended: Callable[[], None]) -> None:
        ended()
        del self._lines[session]
        self._lines_of[session.domain.domid] -= 1
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
        disposal: closes descriptors that come though none are due.
    """

    companion: Speaker | None = None
    weight = 0

    def __init__(self, sock: socket.socket, session: Session, pid: int, front: StoreFront, disposal: Disposal) -> None:
        sock.setblocking(False)
        self.session = session
        self.pid = pid
        self._sock = sock
        self._inlet = Inlet(sock, disposal)
        self._front = front
        self._work: Generator[None, None, None] | None = None  # the rest of a request that is being served
        self._admitted = 0  # so many bytes may be served
        self._decoder = wire.Decoder()
        self._rest = b""

    def fileno(self) -> int:
        """See `Speaker`."""
        return self._sock.fileno()

    @property
    def standing(self) -> int:
        """See `Speaker`."""
        wanted = WRITABLE if self._rest or self.session.outbox else 0
        if self._work is not None:
            return wanted | RUNNABLE
        if not self._may_speak():
            return wanted
        return wanted | RUNNABLE if self._decoder.first else wanted | READABLE

    def stalled(self, now: float) -> bool:
        """See `Speaker`. Unread messages count against the domain's memory."""
        return False

    def receive(self, events: int) -> None:
        """Take the bytes that have come.

        Raises:
            Dropped: the program is gone.
        """
        try:
            data = self._inlet.receive(_BYTES_A_TURN)
        except OSError as error:
            if error.errno in NOT_NOW:
                return
            raise Dropped(error.strerror or str(error)) from None
        if not data:
            raise Dropped("it went away")
        self._decoder.add(data)

    def flush(self) -> None:
        """Send some of the messages that wait, as far as they go.

        Raises:
            Dropped: the program is gone.
        """
        outbox = self.session.outbox
        if not self._rest:
            self._rest = b"".join([self.session.take() for _ in range(min(len(outbox), _MESSAGES_A_FLUSH))])
        if not self._rest:
            return
        try:
            sent = self._sock.send(self._rest, _NEVER_WAIT)
        except OSError as error:
            if error.errno in NOT_NOW:
                return
            raise Dropped(error.strerror or str(error)) from None
        self._rest = self._rest[sent:]

    def send(self) -> None:
        """Send some of the messages that wait, unless the loop does so as soon as the program reads.

        Raises:
            Dropped: the program is gone.
        """
        if not self._rest:
            self.flush()

    def admit(self) -> None:
        """See `Speaker`."""
        self._admitted = self._decoder.pending

    def take_turn(self, until: float) -> None:
        """See `Speaker`.

        Raises:
            Dropped: the next bytes that it sent are no message.
        """
        while self._work is not None or self._may_begin():
            if self._work is None:
                self._work = self._front.begin(self.session, self._take())
            if _is_done(self._work):
                self._work = None
            if clock.now() >= until:
                break
        self._front.deliver()
        if self._work is None and self._decoder.first < 0:
            raise Dropped("what it sent is no message")

    def close(self) -> None:
        """See `Speaker`."""
        self._inlet.close()
        if self._work is not None:
            self._front.bring_to_an_end(self.session.domain.domid, self._work)

    def _may_begin(self) -> bool:
        """Say whether a request may be served now."""
        if not self._may_speak():
            self._front.deliver()  # answers that have gone do not count
        if self.session.closed or not self._may_speak():
            return False
        return 0 < self._decoder.first <= self._admitted

    def _take(self) -> Message:
        self._admitted -= self._decoder.first
        return self._decoder.take()

    def _may_speak(self) -> bool:
        return self.session.answers < self._front.outstanding


def _is_done(work: Generator[None, None, None]) -> bool:
    """Do the next piece of some work, and say whether it was the last."""
    try:
        next(work)
    except StopIteration:
        return True
    return False


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
