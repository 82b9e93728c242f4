"""One connection to xenstore, shared by any number of threads.

Nobody owns the reading: a thread that waits for something becomes the reader if there is none, and hands what
arrives to whom it belongs. Thus there is no thread of our own, and a program with one thread pays for none.

One request at a time, and none while an answer is still to come that nobody waits for any more. xenstored serves a
connection in order anyway; and on the kernel's device anything else is dangerous: Linux (6.1, and later as far as
read) holds the file's buffer lock while it carries out a WATCH or UNWATCH, and wants the same lock to deliver the
answer to any other request of that file. If both happen at once, xenstore hangs for the whole domain (seen).

The device carries the same messages as the daemon's Unix socket, and has other ways of its own:
  * poll() never says that it is writable, so we write first and wait only if that fails;
  * a request can be refused by write() itself, and then has no answer;
  * answers to WATCH and UNWATCH may carry request id 0;
  * the ids of watch events mean nothing, and the first event of a watch can come before the answer to WATCH.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from gntalloc import waits
from gntalloc.errors import Closed, GntallocError, MachineGone, PeerBroke, TimedOut
from gntalloc.unclosed import warn_unclosed
from gntalloc.xenstore import wire
from gntalloc.xenstore.wire import Message, Type

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.clock import Deadline

__all__ = ["Answer", "Connection", "Watcher"]

Found = TypeVar("Found")

_READ_SIZE = 8192
_MAY_HAVE_A_REASON = frozenset((errno.ENOSPC, errno.E2BIG, errno.EIO, errno.ENOMEM, errno.EBUSY, errno.EINVAL))
_MAY_LACK_AN_ID = (Type.WATCH, Type.UNWATCH)


class Answer(NamedTuple):
    """An answer. `reason`: what our own daemon has said of an ERROR, when asked WHY; empty if nothing."""

    type: int
    body: bytes
    reason: str


class Watcher(Protocol):
    """Who gets the events of one token. Called under the connection's lock: must not block or call back."""

    def deliver(self, path: str) -> None:
        """Something happened at this path."""

    def end(self) -> None:
        """Note that this end closed the connection."""


def _is_worth_asking(kind: int, answer: Message) -> bool:
    """Whether the answer is a refusal that may have a quota for its reason.

    A list that is too long for one message is no matter of quotas: it is asked for in parts then.
    """
    if answer.type != Type.ERROR:
        return False
    code = wire.error_code(answer.body)
    return code in _MAY_HAVE_A_REASON and (kind, code) != (Type.DIRECTORY, errno.E2BIG)


class Connection:
    """Requests, answers and watch events over one descriptor, which it owns.

    Args:
        fd: a connected socket or an open device. It is made non-blocking.
        name: what to call it in errors.
    """

    def __init__(self, fd: int, name: str) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.others = False  # somebody else's to close, and nobody's fault if it is not
        self.name = name
        self.changed = threading.Condition(threading.Lock())  # guards everything below
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)  # readable from the moment of close()
        self._process = os.getpid()
        self._asking = threading.Lock()  # held by the thread whose request it is
        self._reading = False
        self._decoder = wire.Decoder()
        self._awaited: tuple[int, int] | None = None  # id and type of the request that has no answer yet
        self._answer: Message | None = None
        self._watchers: dict[str, Watcher] = {}
        self._last_id = 0
        self._explains = stat.S_ISSOCK(os.fstat(fd).st_mode)  # the kernel's device knows no requests of our own
        self._failure: GntallocError | None = None  # why this connection is of no use any more

    def request(self, kind: Type, body: bytes, *, deadline: Deadline, tx_id: int = 0) -> Answer:
        """Send a request and wait for its answer, which may be an ERROR.

        Raises:
            ValueError: the body is too long.
            TimedOut: no answer by the deadline. The request may still be carried out.
            MachineGone: the daemon closed the connection.
            Closed: this end did, or it belongs to the process that forked this one.
        """
        self._check_process()
        busy = f"{self.name} has not answered in time, neither {kind.name} nor what came before; try again"
        if not deadline.acquire(self._asking):
            raise TimedOut(busy)
        try:
            if not self.wait(lambda: True if self._awaited is None else None, deadline):
                raise TimedOut(busy)
            answer = self._exchange(kind, body, tx_id, deadline)
            asks = self._explains and _is_worth_asking(kind, answer)
            return Answer(answer.type, answer.body, self._why(deadline) if asks else "")
        finally:
            self._asking.release()

    def _exchange(self, kind: int, body: bytes, tx_id: int, deadline: Deadline) -> Message:
        """One request and its answer. The caller holds `_asking`."""
        with self.changed:
            self._check_alive()
            req_id = self._new_id()
            data = wire.encode(Message(kind, req_id, tx_id, body))
            self._awaited, self._answer = (req_id, kind), None
        if refusal := self._write(data, deadline):
            return Message(Type.ERROR, req_id, tx_id, wire.join(wire.error_name(refusal)))
        answer = self.wait(lambda: self._answer, deadline)
        if answer is None:
            raise TimedOut(f"{self.name} has not answered {wire.type_name(kind)} in time; try again")
        return answer

    def _why(self, deadline: Deadline) -> str:
        """Ask the daemon why it has just refused; empty if it gives no reason, as every daemon but ours."""
        try:
            answer = self._exchange(wire.WHY, b"\0", 0, deadline)
        except GntallocError:
            return ""  # the refusal itself is what matters
        if answer.type == Type.ERROR:
            self._explains = wire.error_code(answer.body) == errno.ENOENT
            return ""
        return answer.body.decode("utf-8", "replace")

    def wait(self, look: Callable[[], Found | None], deadline: Deadline) -> Found | None:
        """Read, or let another thread read, until `look()` finds something; None if the deadline comes first.

        `look` is called with the lock held. Even with a deadline in the past, what has arrived is read.
        """
        self._check_process()
        tried = False
        while True:
            with self.changed:
                if (found := look()) is not None:
                    return found
                self._check_alive()
                left = deadline.remaining
                if tried and left == 0:
                    return None
                tried = True
                if self._reading:
                    self.changed.wait(left)
                    continue
                self._reading = True
            try:
                self._read(left)
            finally:
                with self.changed:
                    self._reading = False
                    self.changed.notify_all()

    @property
    def failed(self) -> bool:
        """Whether it is closed, or broken for good, or the daemon has hung up."""
        return self.fd < 0 or self._failure is not None or waits.hung_up(self.fd)

    def add_watcher(self, watcher: Watcher) -> str:
        """Give events to this watcher, and get the token that says so. No token is used twice."""
        self._check_process()
        with self.changed:
            token = f"gntalloc-{self._new_id()}"
            self._watchers[token] = watcher
            return token

    def remove_watcher(self, token: str) -> None:
        """Drop the events with this token."""
        self._check_process()
        with self.changed:
            self._watchers.pop(token, None)

    def close(self) -> None:
        """Give the descriptor back; who waits gets Closed. Can be repeated, and called in a forked child."""
        if self.fd < 0 or os.getpid() != self._process:
            self._close_descriptors()
            return
        with self.changed:
            self._failure = Closed(f"{self.name}: this store was closed; open another one")
            os.eventfd_write(self._wake, 1)
            self.changed.notify_all()
            while self._reading:
                self.changed.wait()
            for watcher in self._watchers.values():
                watcher.end()
        with self._asking:
            self._close_descriptors()

    def __del__(self, _warn: Callable[[object, int], bool] = warn_unclosed) -> None:
        if getattr(self, "fd", -1) >= 0 and (self.others or _warn(self, self._process)):
            self._close_descriptors()

    def __repr__(self) -> str:
        return f"<connection to {self.name}>"

    def _close_descriptors(self, _close: Callable[[int], None] = os.close) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            _close(fd)
            _close(self._wake)

    def _check_process(self) -> None:
        # Before any lock: after a fork, a lock may be held by a thread that does not exist here.
        if os.getpid() != self._process:
            raise Closed(
                f"{self.name}: opened by process {self._process} and used in its child {os.getpid()}; they "
                "would take each other's answers: open a Store of its own in the child"
            )

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)

    def _new_id(self) -> int:
        self._last_id = self._last_id % 0xFFFFFFFF + 1  # 1 to 2**32 - 1: 0 is the kernel's
        return self._last_id

    def _write(self, data: bytes, deadline: Deadline) -> int:
        """Write the awaited request. Returns 0, or the errno with which the device refused it."""
        cut_off = MachineGone(f"{self.name}: a request was cut off in the middle; open the store again and watch anew")
        sent = 0
        try:
            while sent < len(data):
                sent += self._write_some(data[sent:], deadline)
        except GntallocError:  # the deadline, or close()
            if sent:
                self._fail(cut_off)
            self._forget()
            raise
        except ConnectionError as error:
            self._fail(MachineGone(f"{self.name} went away ({error.strerror}); open the store again and watch anew"))
        except OSError as error:
            self._forget()
            return error.errno or errno.EIO
        except BaseException:  # Ctrl-C, say: nobody knows how much went out
            self._fail(cut_off)
            raise
        return 0

    def _write_some(self, data: bytes, deadline: Deadline) -> int:
        while True:
            try:
                return os.write(self.fd, data)
            except BlockingIOError:
                if not self._poll(waits.POLLOUT, deadline.remaining):
                    with self.changed:
                        self._check_alive()
                    raise TimedOut(f"{self.name} takes no requests; try again") from None

    def _forget(self) -> None:
        """Forget a request that was not sent: there will be no answer."""
        with self.changed:
            self._awaited = None

    def _read(self, left: float | None) -> None:
        """Wait at most `left` seconds for something to read, and hand it out. Failures are kept."""
        if not self._poll(waits.POLLIN, left):
            return
        try:
            data = os.read(self.fd, _READ_SIZE)
            if not data:
                raise MachineGone(f"{self.name} closed the connection; open the store again and watch anew")
            while messages := self._decoder.feed(data):
                with self.changed:
                    for message in messages:
                        self._hand_out(message)
                data = b""
        except BlockingIOError:
            pass  # poll() was wrong, which it may be
        except GntallocError as error:
            self._fail(error)
        except OSError as error:
            self._fail(MachineGone(f"{self.name} went away ({error.strerror}); open the store again and watch anew"))

    def _fail(self, failure: GntallocError) -> None:
        with self.changed:
            self._failure = self._failure or failure
            self.changed.notify_all()

    def _poll(self, event: int, left: float | None) -> bool:
        """Whether the descriptor is ready; False at the deadline and while closing."""
        poll = waits.poll()
        poll.register(self.fd, event)
        poll.register(self._wake, waits.POLLIN)
        ready = [fd for fd, _ in poll.poll(None if left is None else left * 1000)]
        return ready == [self.fd]

    def _hand_out(self, message: Message) -> None:
        if message.type == Type.WATCH_EVENT:
            strings = wire.split(message.body)
            if len(strings) < 2:
                raise PeerBroke(f"{self.name} sent a watch event without a token")
            # Events of a watch that was just removed have no watcher.
            if watcher := self._watchers.get(strings[1]):
                watcher.deliver(strings[0])
            return
        if self._awaited is None:
            raise PeerBroke(f"{self.name} sent an answer ({wire.type_name(message.type)}) that nobody asked for")
        req_id, kind = self._awaited
        asked = wire.type_name(kind)
        if message.req_id != req_id and not (message.req_id == 0 and kind in _MAY_LACK_AN_ID):
            raise PeerBroke(f"{self.name} answered request {message.req_id} instead of {req_id} ({asked})")
        if message.type not in (kind, Type.ERROR):
            raise PeerBroke(f"{self.name} answered {asked} with {wire.type_name(message.type)}")
        self._awaited, self._answer = None, message
