"""Watch: be told when a node, or anything below it, changes.

An event says where something happened, not what: read the node. One comes when the watch is set, some come
for nothing, and two for the same path that nobody has taken yet are one. So are all of them, at the watch's own path,
once 1024 wait: whoever may write below a node can then not fill the memory of those who watch it.
"""

from __future__ import annotations

import contextlib
import os
import select
from typing import TYPE_CHECKING, Self

from gntalloc import waits
from gntalloc.clock import Deadline
from gntalloc.errors import Closed, GntallocError, TimedOut
from gntalloc.xenstore import wire
from gntalloc.xenstore.errors import error_for
from gntalloc.xenstore.path import problem
from gntalloc.xenstore.wire import Type

if TYPE_CHECKING:
    from gntalloc.xenstore.connection import Connection

__all__ = ["Watch"]

_MOST = 1024  # paths that wait to be taken


class Watch:
    """A watch that is set until it is closed. Made by `Store.watch`."""

    def __init__(self, connection: Connection, path: str, *, timeout: float | None) -> None:
        self.path = path
        self._connection = connection
        self._timeout = timeout
        self._open = True
        self._paths: dict[str, None] = {}  # what happened and nobody has taken: a set that keeps its order
        self._bell = -1  # an eventfd that is readable while there are _paths
        self._epoll: select.epoll | None = None
        # Before the daemon knows of it: the first event can come before the answer.
        self.token = connection.add_watcher(self)
        try:
            self._ask(Type.WATCH, "watch")
        except BaseException:
            connection.remove_watcher(self.token)
            raise

    def wait(self, *, timeout: float | None = None) -> str:
        """Wait for the next change, and return its path; relative if the watch is.

        Raises:
            TimedOut: nothing happened for `timeout` seconds.
            Closed: the watch or its store was closed, by this or another thread.
            MachineGone: xenstored went away.
        """
        path = self._connection.wait(self._take, Deadline(timeout))
        if path is None:
            raise TimedOut(f"nothing changed at {self.path} within {timeout} seconds; wait again")
        return path

    def poll(self) -> str | None:
        """Return the path of a change that is here already, or None. For use after select."""
        return self._connection.wait(self._take, Deadline(0))

    def drain(self) -> bool:
        """Take every change that is here already, and say whether there was any. For those who look at all anyway."""
        return bool(self._connection.wait(self._take_all, Deadline(0)))

    def fileno(self) -> int:
        """Give a descriptor that select and the like find readable when `poll` is worth calling.

        It is an epoll over the connection and a bell of this watch's own, because another thread may already
        have read this watch's event off the connection.
        """
        with self._connection.changed:
            self._check_open()
            if self._epoll is None:
                self._bell = os.eventfd(bool(self._paths), os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._epoll = waits.epoll()
                self._epoll.register(self._bell, select.EPOLLIN)
                self._epoll.register(self._connection.fd, select.EPOLLIN)
            return self._epoll.fileno()

    def close(self) -> None:
        """Remove the watch. Can be repeated; does not mind if the store is closed or the daemon gone."""
        if not self._open:
            return
        self._open = False
        with contextlib.suppress(GntallocError):
            self._ask(Type.UNWATCH, "unwatch")
        with contextlib.suppress(Closed):
            self._connection.remove_watcher(self.token)
        if self._epoll is not None:
            self._epoll.close()
            os.close(self._bell)
            self._epoll, self._bell = None, -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Watch {self.path}{'' if self._open else ' closed'}>"

    def _ask(self, kind: Type, operation: str) -> None:
        body = wire.join(self.path, self.token)
        answer = self._connection.request(kind, body, deadline=Deadline(self._timeout))
        if answer.type == Type.ERROR:
            reason = answer.reason or problem(self.path, watch=True)
            raise error_for(wire.error_code(answer.body), operation, self.path, reason)

    # What follows runs with the connection's lock held.

    def deliver(self, path: str) -> None:
        """Part of Watcher: remember a change."""
        if len(self._paths) >= _MOST:
            self._paths = {self.path: None}
        else:
            self._paths[path] = None
        self.end()

    def end(self) -> None:
        """Part of Watcher: wake whoever sleeps on fileno()."""
        if self._bell >= 0:
            os.eventfd_write(self._bell, 1)

    def _take(self) -> str | None:
        self._check_open()
        if not self._paths:
            return None
        path = next(iter(self._paths))
        del self._paths[path]
        self._see_to_bell()
        return path

    def _take_all(self) -> bool | None:
        self._check_open()
        if not self._paths:
            return None
        self._paths.clear()
        self._see_to_bell()
        return True

    def _see_to_bell(self) -> None:
        if not self._paths and self._bell >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._bell)

    def _check_open(self) -> None:
        if not self._open:
            raise Closed(f"the watch on {self.path} was closed; set another one")
