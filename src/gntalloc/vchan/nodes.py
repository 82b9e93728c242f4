"""How two ends find each other: two nodes in xenstore, `<path>/ring-ref` and `<path>/event-channel`.

The server writes them, readable by the client and nobody else; the client waits until it can read both. ring-ref comes
first and event-channel last, and a client reads ring-ref again after it, so no transaction is needed: a domain may have
ten of those open, and programs that set up many channels at once have run out of them.

The C library builds the nodes' names in 64 bytes, and cuts longer ones off without a word. So a path has 49 characters
at most, unless both ends are this package's.

Sources: libxenvchan's init.c, as it behaves; docs/misc/xenstore-paths of Xen for the convention.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple, Protocol

from gntalloc.digits import whole_number
from gntalloc.errors import TimedOut
from gntalloc.xenstore.errors import Denied, NoNode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    from gntalloc.clock import Deadline

__all__ = ["LONGEST", "Address", "Nodes", "Tree", "full_path"]

LONGEST = 49  # characters of a path that the C library can use
_LOOK_AGAIN = 0.25  # seconds: what is not seen in xenstore (a port that is free again) is tried at this rate


class Watching(Protocol):
    """See `gntalloc.xenstore.watch.Watch`."""

    def wait(self, *, timeout: float | None = None) -> str:
        """Until something may have changed."""


class Tree(Protocol):
    """What is needed of `gntalloc.xenstore.client.Store`."""

    def read(self, path: str) -> bytes:
        """Read the value of a node."""

    def write(self, path: str, value: bytes | str) -> None:
        """Set it."""

    def remove(self, path: str) -> None:
        """Remove it, and all below."""

    def set_permissions(self, path: str, permissions: Iterable[str]) -> None:
        """Who may read it."""

    def watch(self, path: str) -> AbstractContextManager[Watching]:
        """Be told of changes."""


class Address(NamedTuple):
    """Where a server waits: the reference of its page, and its port."""

    reference: int
    port: int


def full_path(path: str, server: int, client: int, *, only_ours: bool = False) -> str:
    """Where the nodes of a channel are. A path that does not begin with / is below the usual place of such channels.

    Raises:
        ValueError: it is too long for a C library at the other end.
    """
    full = path if path.startswith("/") else f"/local/domain/{server}/data/vchan/{client}/{path}"
    if len(full) > LONGEST and not only_ours:
        raise ValueError(
            f"{full} has {len(full)} characters, and libxenvchan cuts names off after {LONGEST}; choose a shorter one, "
            "or say extensions=True if both ends are this package's"
        )
    return full


class Nodes:
    """The two nodes of a path.

    Args:
        store: what finds the store, asked each time: it may have been opened anew since.
        path: in full.
    """

    def __init__(self, store: Callable[[], Tree], path: str) -> None:
        self.path = path
        self._find = store
        self._reference, self._port = f"{path}/ring-ref", f"{path}/event-channel"

    @property
    def _store(self) -> Tree:
        return self._find()

    def publish(self, server: int, client: int, address: Address) -> None:
        """Tell the client, and it alone, where this server waits. What was there before is replaced."""
        with contextlib.suppress(NoNode):  # of a server that was killed: nobody shall mix its port with our page
            self._store.remove(self._port)
        for node, value in zip((self._reference, self._port), address, strict=True):
            self._store.write(node, str(value))
            self._store.set_permissions(node, (f"n{server}", f"r{client}"))

    def withdraw(self) -> None:
        """Take both away, and the path."""
        with contextlib.suppress(NoNode):
            self._store.remove(self.path)

    def read(self) -> Address | None:
        """Where a server waits; None: none does, or it is not for us."""
        try:
            before = self._store.read(self._reference)
            port = self._store.read(self._port)
            if self._store.read(self._reference) != before:
                return None
        except (NoNode, Denied):
            return None
        numbers = whole_number(before, 0xFFFF_FFFF), whole_number(port, 0xFFFF_FFFF)
        if not (numbers[0] and numbers[1]):
            return None  # the C library takes no zeros either
        return Address(numbers[0], numbers[1])

    def attempts(self, deadline: Deadline) -> Iterable[Address]:
        """Each time that there may be a server, where it waits. Ends with the deadline; that may be past already.

        Raises:
            TimedOut: there was none all the time.
        """
        found = self.read()
        if found:
            yield found
        if not deadline.expired:
            with self._store.watch(self._port) as watch:
                while not deadline.expired:
                    with contextlib.suppress(TimedOut):
                        watch.wait(timeout=deadline.within(_LOOK_AGAIN))
                    address = self.read()
                    if address:
                        found = address
                        yield address
        if not found:
            raise TimedOut(
                f"no server waits at {self.path}: the nodes ring-ref and event-channel are not there, or are not for "
                "this domain; start the server, or see that both sides mean the same path"
            )
