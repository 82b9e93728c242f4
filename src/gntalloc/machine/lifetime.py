"""Let domains and machines last as long as their visitors.

A visitor is a program that is in a domain for as long as its control channel is open. `gntalloc run` is one. The domain
is made when the first visitor enters it, unless it is there, and ends with the last. A machine that was started for
visitors ends when none is left.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

from gntalloc.claims import open_lock
from gntalloc.places import lock_path

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

__all__ = ["Visits"]


class Visits:
    """Keep the visitors of one machine.

    Args:
        folder: the machine's folder.
        is_there: says whether there is a domain of that number.
        create: makes a domain, for this user.
        destroy: ends a domain.
        settle: takes in the files and maps that programs have given up.
    """

    def __init__(
        self,
        folder: str,
        *,
        is_there: Callable[[int], bool],
        create: Callable[[int], object],
        destroy: Callable[[int], object],
        settle: Callable[[], None],
    ) -> None:
        self.ends_when_left = False
        self.over = False
        """Whether no visitor is left, and the machine is there for visitors only."""
        self._lock_path = lock_path(folder)
        self._is_there = is_there
        self._create = create
        self._destroy = destroy
        self._settle = settle
        self._visitors: dict[Hashable, set[int]] = {}
        self._made: set[int] = set()  # domains that are there for visitors only
        self._lock = -1

    def wait_for(self, visitor: Hashable) -> None:
        """Wait for the visitor that the machine was started for. The machine ends when no visitor is left."""
        self.ends_when_left = True
        self._visitors[visitor] = set()

    def enter(self, visitor: Hashable, domid: int) -> None:
        """Let a visitor into a domain.

        Raises:
            GntallocError: there can be no such domain.
        """
        if not self._is_there(domid):
            self._create(domid)
            self._made.add(domid)
        self._visitors.setdefault(visitor, set()).add(domid)
        self.over = False

    def leave(self, visitor: Hashable) -> None:
        """Forget a visitor that is gone, and end the domains that were made for visitors and have none left."""
        left = self._visitors.pop(visitor, set())
        self.over = self.ends_when_left and not self._visitors
        self._settle()  # its programs' maps went before it: their peers are told before the ports go
        for domid in left & self._made:
            if not any(domid in domids for domids in self._visitors.values()):
                self.forget(domid)
                self._destroy(domid)

    def forget(self, domid: int) -> None:
        """Forget a domain, as it ends."""
        self._made.discard(domid)

    def may_end(self) -> bool:
        """Say whether no visitor is coming in: it would have the lock. Then the lock is held here until the end."""
        if self._lock < 0:
            try:
                self._lock = open_lock(self._lock_path)
            except OSError as error:  # a run cannot open it either, unless it is only this process that lacks something
                return error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Release the lock, as the folder is gone. Runs that wait for it may start another machine."""
        if self._lock >= 0:
            os.unlink(self._lock_path)
            os.close(self._lock)
