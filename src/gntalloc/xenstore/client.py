"""Store: xenstore as a domain sees it, over the daemon's socket or the kernel's device.

    with Store() as store:
        store.write("data/greeting", "hello")
        with store.watch("data") as watch:
            watch.wait(timeout=1.0)

A relative path is relative to the domain's own /local/domain/<domid>. Values are bytes; str is accepted and
sent as UTF-8. Any method may be called from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import stat
import time
from typing import TYPE_CHECKING, Self, TypeVar

from gntalloc import waits
from gntalloc.clock import Deadline
from gntalloc.digits import whole_number
from gntalloc.errors import NoMachine, PeerBroke, TimedOut
from gntalloc.unasked import refuse
from gntalloc.xenstore import wire
from gntalloc.xenstore.connection import Connection
from gntalloc.xenstore.errors import Conflict, NoNode, StoreError, error_for
from gntalloc.xenstore.path import ABSOLUTE_MAX, Permission, problem
from gntalloc.xenstore.watch import Watch
from gntalloc.xenstore.wire import Type

if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Iterable

__all__ = ["Store", "Transaction"]

Result = TypeVar("Result")

SOCKETS = ("/run/xenstored/socket", "/var/run/xenstored/socket")
DEVICES = ("/dev/xen/xenbus", "/proc/xen/xenbus")

_ALL_ARE_OPEN = frozenset((errno.ENOSPC, errno.EBUSY))  # the C daemon's word, and that of the one in OCaml
_FIRST_PAUSE, _LONGEST_PAUSE = 1e-3, 0.05  # seconds between two attempts to begin a transaction


class _Tree:
    """What can be done with nodes, inside a transaction or outside of one."""

    _connection: Connection
    _timeout: float | None
    _tx_id: int

    def read(self, path: str) -> bytes:
        """Read the value of a node."""
        return self._ask(Type.READ, "read", path)

    def read_text(self, path: str) -> str:
        """Read the value of a node as text. Bytes that are not UTF-8 come as U+FFFD."""
        return self.read(path).decode("utf-8", "replace")

    def write(self, path: str, value: bytes | str) -> None:
        """Set the value of a node; it and its parents are made if they are missing."""
        raw = value.encode() if isinstance(value, str) else value
        self._ask(Type.WRITE, "write", path, raw)

    def mkdir(self, path: str) -> None:
        """Make sure that a node exists; a value it has stays."""
        self._ask(Type.MKDIR, "mkdir", path)

    def remove(self, path: str) -> None:
        """Remove a node and all below it. It may be missing, its parent may not."""
        self._ask(Type.RM, "remove", path)

    def exists(self, path: str) -> bool:
        """Whether there is such a node. One that may not be read is an error."""
        try:
            self.read(path)
        except NoNode:
            return False
        return True

    def list(self, path: str) -> tuple[str, ...]:
        """List the names of a node's children, in no particular order."""
        try:
            return tuple(wire.split(self._ask(Type.DIRECTORY, "list", path)))
        except StoreError as error:
            if error.errno != errno.E2BIG:
                raise
        return self._list_in_parts(path)

    def get_permissions(self, path: str) -> tuple[Permission, ...]:
        """Read a node's permissions: the owner's entry, then the others."""
        entries = wire.split(self._ask(Type.GET_PERMS, "get permissions of", path))
        try:
            return tuple(Permission.parse(entry) for entry in entries)
        except ValueError as error:
            raise PeerBroke(f"xenstored: permissions of {path}: {error}") from error

    def set_permissions(self, path: str, permissions: Iterable[Permission | str]) -> None:
        """Replace a node's permissions, such as ("n0", "r3"): owned by 0, nothing for others, 3 may read."""
        entries = wire.join(*(str(entry) for entry in permissions))
        self._ask(Type.SET_PERMS, "set permissions of", path, entries)

    def _list_in_parts(self, path: str) -> tuple[str, ...]:
        """List the children of a node with more than fit one message.

        Each part starts with the node's generation: if it changes, the node did, and all begins again. The
        list ends where an empty name stands.
        """
        generation: bytes | None = None
        names = b""
        while not (names.endswith(b"\0\0") or names == b"\0"):
            part = self._ask(Type.DIRECTORY_PART, "list", path, wire.join(str(len(names))))
            now, _, more = part.partition(b"\0")
            if now != generation:
                generation, stale, names = now, names, b""
                if stale:
                    continue
            if not more:
                raise PeerBroke(f"xenstored: the list of {path} goes on without an end")
            names += more
        return tuple(wire.split(names[:-1]))

    def _ask(self, kind: Type, operation: str, path: str, rest: bytes = b"") -> bytes:
        """Send a request about one node. The body is the path, a NUL, and `rest`."""
        if "\0" in path or not path.isascii() or len(path) > ABSOLUTE_MAX:
            # The daemon would take it for something else, or drop the connection.
            raise error_for(errno.EINVAL, operation, path[:80], problem(path))
        return self._request(kind, operation, wire.join(path) + rest, path)

    def _request(self, kind: Type, operation: str, body: bytes, path: str | None = None) -> bytes:
        if len(body) > wire.PAYLOAD_MAX:
            room = f"path and value are {len(body)} bytes together; {wire.PAYLOAD_MAX} are allowed"
            raise error_for(errno.E2BIG, operation, path, room)
        deadline = Deadline(self._timeout)
        answer = self._connection.request(kind, body, tx_id=self._tx_id, deadline=deadline)
        if answer.type == Type.ERROR:
            code = wire.error_code(answer.body)
            reason = problem(path) if path is not None and code == errno.EINVAL else None
            raise error_for(code, operation, path, answer.reason or reason)
        return answer.body


class Store(_Tree):
    """A connection to xenstore.

    Args:
        path: a Unix socket of xenstored, or its device; or a connected descriptor, which the store then
            owns. None: $XENSTORED_PATH, else the usual sockets, else the usual devices.
        timeout: seconds that each request may take; None waits for ever.

    Raises:
        NoMachine: there is nothing to connect to; the text says what was tried.
    """

    _tx_id = 0

    def __init__(self, path: str | int | None = None, *, timeout: float | None = 10.0) -> None:
        self._timeout = timeout
        self._connection = Connection(path, "xenstore") if isinstance(path, int) else _open(path)

    def belongs_to_a_domain(self) -> None:
        """Whoever uses it did not open it, so it goes without a warning."""
        self._connection.others = True

    @property
    def domid(self) -> int:
        """The number of the domain this program runs in, which is in its own relative node `domid`."""
        text = self.read_text("domid")
        domid = whole_number(text, 0xFFFF)
        if domid is None:
            raise PeerBroke(f"xenstored: our domid is {text[:40]!r}, which is no domain's number")
        return domid

    def get_domain_path(self, domid: int) -> str:
        """Where a domain's nodes are: /local/domain/<domid>."""
        return self._about_domain(Type.GET_DOMAIN_PATH, "get domain path of", domid)

    def is_domain_introduced(self, domid: int) -> bool:
        """Whether xenstored talks with that domain. For privileged domains."""
        return self._about_domain(Type.IS_DOMAIN_INTRODUCED, "is domain introduced:", domid) == "T"

    def watch(self, path: str) -> Watch:
        """Watch a node and all below it, or @introduceDomain or @releaseDomain."""
        if "\0" in path or not path.isascii() or len(path) > ABSOLUTE_MAX:
            raise error_for(errno.EINVAL, "watch", path[:80], problem(path, watch=True))
        return Watch(self._connection, path, timeout=self._timeout)

    def transaction(self) -> Transaction:
        """Begin a transaction: `with store.transaction() as t:` commits at the end.

        An exception aborts it. The commit raises Conflict if somebody else changed the same nodes; `transact`
        then does it all again.
        """
        text = self._request(Type.TRANSACTION_START, "begin transaction", wire.join("")).rstrip(b"\0")
        number = whole_number(text, 0xFFFFFFFF)
        if not number:
            raise PeerBroke(f"xenstored: {text[:40]!r} is not the number of a transaction")
        return Transaction(self._connection, number, timeout=self._timeout)

    def transact(self, work: Callable[[Transaction], Result], *, timeout: float | None = None) -> Result:
        """Call `work` with a transaction and commit, again and again until there is no conflict.

        A domain may have so many transactions open at once, whichever of its programs began them: while all of them
        are, this waits for one to end.

        Args:
            work: reads and writes through the transaction, maybe more than once. Its result is returned.
            timeout: seconds after which no new attempt is made; None: those of the store.

        Raises:
            TimedOut: every attempt met a conflict, or no transaction could be begun; the text says which quota it was.
        """
        deadline = Deadline(self._timeout if timeout is None else timeout)
        attempts = 0
        while True:
            transaction = self._begin_by(deadline)
            attempts += 1
            try:
                with transaction:
                    return work(transaction)
            except Conflict as conflict:
                if deadline.expired:
                    raise TimedOut(f"{attempts} attempts at a transaction met a conflict; try later") from conflict

    def _begin_by(self, deadline: Deadline) -> Transaction:
        """Begin a transaction as soon as the domain's quota lets us: the daemon does not tell when one ends."""
        pause = _FIRST_PAUSE
        while True:
            try:
                return self.transaction()
            except StoreError as refused:
                if refused.errno not in _ALL_ARE_OPEN:
                    raise
                if deadline.expired:
                    raise TimedOut(f"no transaction could be begun in time; try later: {refused}") from refused
            time.sleep(deadline.within(pause * random.uniform(0.5, 1)))  # not all come back at once
            pause = min(2 * pause, _LONGEST_PAUSE)

    @property
    def closed(self) -> bool:
        """Whether it is of no use any more: closed, or the daemon went away."""
        return self._connection.failed

    def close(self) -> None:
        """Close the connection; xenstored forgets its watches and transactions. Can be repeated."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Store {self._connection.name}>"

    def _about_domain(self, kind: Type, operation: str, domid: int) -> str:
        body = self._request(kind, f"{operation} {domid}", wire.join(str(domid)))
        return wire.split(body)[0]


class Transaction(_Tree):
    """Reads and writes that happen at once or not at all. Made by `Store.transaction`."""

    def __init__(self, connection: Connection, tx_id: int, *, timeout: float | None) -> None:
        self._connection = connection
        self._tx_id = tx_id
        self._timeout = timeout
        self._open = True

    def commit(self) -> None:
        """Make it happen. Raises Conflict if somebody else changed the same nodes; it is over either way."""
        self._end("T", "commit")

    def abort(self) -> None:
        """Forget it. Can be repeated, also after a commit."""
        if self._open:
            self._end("F", "abort")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if kind is None:
            if self._open:
                self.commit()
            return
        with contextlib.suppress(OSError):  # what ended the body is what matters
            self.abort()

    def _end(self, how: str, operation: str) -> None:
        self._open = False
        self._request(Type.TRANSACTION_END, operation, wire.join(how))


def _open(path: str | None) -> Connection:
    """Connect to the first that there is."""
    given = path or os.environ.get("XENSTORED_PATH")
    tried = []
    for candidate in (given,) if given else SOCKETS + DEVICES:
        try:
            return Connection(_connect(candidate), f"xenstore at {candidate}")
        except OSError as error:
            tried.append(f"{candidate}: {error.strerror or error}")
    if given:
        advice = "start the machine (or the xenstored) that serves it, or name another in $XENSTORED_PATH"
    else:
        advice = "in a guest, load the module xenfs and be root; in dom0, start xenstored"
    raise NoMachine(f"no xenstore to talk to ({', '.join(tried)}); {advice}")


def _connect(path: str) -> int:
    """Connect to a Unix socket, or open a device. Gives the descriptor."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    with waits.Socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected:
        refuse(connected)
        connected.connect(path)
        return connected.detach()
