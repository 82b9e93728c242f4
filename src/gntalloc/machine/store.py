"""Where programs talk with xenstore: its connections, in an epoll of their own that the machine's loop waits on.

Nothing here waits for a program. What it does not read is kept: of a domain's programs as much as their memory quota
allows, after which they miss events as they would miss them with the real daemon; of domain 0's, 16 MiB each, after
which the connection ends. Who leaves twenty answers unread is not listened to until it reads.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections import deque
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from gntalloc.errors import DeviceError, PeerBroke
from gntalloc.machine import foreign
from gntalloc.xenstore import wire
from gntalloc.xenstore.daemon.limits import Refused
from gntalloc.xenstore.errors import error_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.xenstore.daemon.server import Server as Daemon
    from gntalloc.xenstore.daemon.session import Session
    from gntalloc.xenstore.wire import Message

__all__ = ["MAX_LINES", "MOST_SHOWN", "StoreFront"]

log = logging.getLogger("gntalloc.machine")

MAX_LINES = 1024  # of one domain, so that it cannot use up the machine's descriptors
MOST_SHOWN = 1000  # watches and transactions in one answer to a person
_LONGEST_SHOWN = 200  # characters
_MESSAGES_A_TURN = 8
_BYTES_A_TURN = 16384
_NEVER_WAIT = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_READABLE, _WRITABLE = int(select.EPOLLIN), int(select.EPOLLOUT)


class StoreFront:
    """All connections to `daemon`. When `fileno()` is readable, call `serve`."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._lines: dict[int, _Line] = {}
        self._by_session: dict[Session, _Line] = {}
        self._turns: deque[_Line] = deque()
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # rings while somebody waits for a turn
        self._rings = False
        self._epoll.register(self._bell, _READABLE)

    def fileno(self) -> int:
        """What to wait on."""
        return self._epoll.fileno()

    def connect(self, sock: socket.socket, domid: int, pid: int) -> None:
        """Serve a program of this domain on `sock`: process `pid`.

        Raises:
            DeviceError: ECONNREFUSED domain 0 has released the domain; EMFILE too many programs are connected.
        """
        if sum(session.domain.domid == domid for session in self._by_session) >= MAX_LINES:
            raise DeviceError(errno.EMFILE, f"{MAX_LINES} programs of domain {domid} use xenstore already; end some")
        try:
            session = self._daemon.connect(domid)
        except Refused:
            raise DeviceError(errno.ECONNREFUSED, f"xenstore was told to talk no more with domain {domid}") from None
        sock.setblocking(False)
        foreign.refuse(sock)
        line = self._lines[sock.fileno()] = self._by_session[session] = _Line(sock, session, pid)
        self._epoll.register(sock.fileno(), _READABLE)
        line.wanted = _READABLE

    def serve(self) -> None:
        """Take in what has come, serve some of it, send what can be sent."""
        for descriptor, events in self._epoll.poll(0, len(self._lines) + 1):
            line = self._lines.get(descriptor)
            if line is None:
                continue
            if events & ~_WRITABLE:
                self._let(line, line.receive)
            if events & _WRITABLE or line.broken:
                self._daemon.talking.add(line.session)
            self._plan(line)
        for _ in range(len(self._turns)):
            line = self._turns.popleft()
            line.queued = False
            self._let(line, partial(self._turn, line))
            self._plan(line)
        self._deliver()
        self._ring(on=bool(self._turns))

    def connections(self) -> list[dict[str, Any]]:
        """For people: each connection that keeps watches or transactions, of which process, and which they are.

        Path and token of each watch; number of each transaction, and the first path that it has seen, or "". They are
        cut where they are long, and all together are at most MOST_SHOWN.
        """
        shown: list[dict[str, Any]] = []
        room = MOST_SHOWN
        for line in self._lines.values():
            session = line.session
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

    def close(self) -> None:
        """End all connections."""
        for line in list(self._lines.values()):
            self._drop(line, "the machine ends")
        self._epoll.close()
        os.close(self._bell)

    def _turn(self, line: _Line) -> None:
        for _ in range(min(len(line.inbox), _MESSAGES_A_TURN)):
            if line.session.closed or not line.may_speak(self._daemon.quotas.outstanding):
                break
            message = line.inbox.popleft()
            refused = self._daemon.handle(line.session, message)
            if refused is not None and message.type != wire.WHY and log.isEnabledFor(logging.DEBUG):
                log.debug("xenstore, domain %d: %s", line.session.domain.domid, _said(message, refused))
        if line.broken and not line.inbox:
            self._daemon.talking.add(line.session)

    def _deliver(self) -> None:
        talking = self._daemon.talking
        while talking:
            line = self._by_session.get(session := talking.pop())
            if line is None:
                continue
            self._let(line, line.flush)
            if session.closed:
                self._drop(line, "its domain is gone, or it does not read")
            elif line.broken and not line.inbox:
                self._drop(line, "what it sent is no message")
            self._plan(line)

    def _let(self, line: _Line, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self._drop(line, error.strerror or str(error))
        except Exception:
            # A fault of ours. The program must not wait for ever, nobody else may notice, and we want to know.
            log.exception("a request to xenstore could not be served")
            self._drop(line, "serving it failed, see above")

    def _plan(self, line: _Line) -> None:
        """What to wait for on this line, and whether it has something to serve."""
        descriptor = line.sock.fileno()
        if descriptor not in self._lines:
            return
        speaks = line.may_speak(self._daemon.quotas.outstanding)
        wanted = _WRITABLE if line.wants_to_send else 0
        if speaks and not line.inbox and not line.broken:
            wanted |= _READABLE
        if wanted != line.wanted:
            line.wanted = wanted
            self._epoll.modify(descriptor, wanted)
        if speaks and line.inbox and not line.queued:
            line.queued = True
            self._turns.append(line)

    def _drop(self, line: _Line, why: str) -> None:
        descriptor = line.sock.fileno()
        if self._lines.pop(descriptor, None) is None:
            return
        log.debug("xenstore, domain %d: %s", line.session.domain.domid, why)
        del self._by_session[line.session]
        self._daemon.disconnect(line.session)
        line.inbox.clear()
        self._epoll.unregister(descriptor)
        foreign.hang_up(line.sock)

    def _ring(self, *, on: bool) -> None:
        if on != self._rings:
            self._rings = on
            if on:
                os.eventfd_write(self._bell, 1)
            else:
                os.eventfd_read(self._bell)


def _said(message: Message, refused: Refused) -> str:
    """The refusal of a request, for the log: what was asked, and why not."""
    first, end, _rest = message.body.partition(b"\0")
    path = first.decode("latin-1").encode("unicode_escape").decode() if end and first else None
    return str(error_for(refused.code, wire.type_name(message.type), path, refused.reason or None))


class _Line:
    """One connection."""

    __slots__ = ("_decoder", "_rest", "broken", "inbox", "pid", "queued", "session", "sock", "wanted")

    def __init__(self, sock: socket.socket, session: Session, pid: int) -> None:
        self.sock = sock
        self.pid = pid
        """Of the process that made it."""
        self.session = session
        self.inbox: deque[Message] = deque()
        self.broken = False
        """Whether what came is no message, so that nothing after it can be read."""
        self.queued = False
        self.wanted = 0
        self._decoder = wire.Decoder()
        self._rest = b""

    @property
    def wants_to_send(self) -> bool:
        """Whether something waits for the program to read."""
        return bool(self._rest) or bool(self.session.outbox)

    def may_speak(self, outstanding: int) -> bool:
        """Whether it has read enough of its answers to ask more."""
        return self.session.answers < outstanding

    def receive(self) -> None:
        """Take what has come.

        Raises:
            OSError: the program is gone.
        """
        try:
            data, descriptors = foreign.receive(self.sock, _BYTES_A_TURN)
        except BlockingIOError:
            return
        except foreign.Truncated:
            raise OSError(errno.EMFILE, "there was no room for the descriptors that it sent") from None
        foreign.let_go(descriptors)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "it went away")
        try:
            while messages := self._decoder.feed(data):
                self.inbox.extend(messages)
                data = b""
        except PeerBroke:
            self.broken = True

    def flush(self) -> None:
        """Send what waits, as far as it goes.

        Raises:
            OSError: the program is gone.
        """
        while self.wants_to_send:
            while self.session.outbox and len(self._rest) < _BYTES_A_TURN:
                self._rest += self.session.take()
            try:
                sent = self.sock.send(self._rest, _NEVER_WAIT)
            except BlockingIOError:
                return
            self._rest = self._rest[sent:]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
