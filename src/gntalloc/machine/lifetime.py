"""Visitors: programs that are in a domain for as long as a control channel of theirs is open.

`gntalloc run` is one: the domain is made when the first of them enters it, unless it is there, and ends with the last
of them. A machine that was started for them ends when nobody is left.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from gntalloc.places import lock_path

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

__all__ = ["Visits"]


class Visits:
    """The visitors of one machine.

    Args:
        folder: the machine's.
        is_there: whether there is a domain of that number.
        create: makes one, for this user.
        destroy: ends one.
        settle: takes in what programs have let go of.
    """

    def __init__(
        self,
        folder: str,
        *,
        is_there: Callable[[int], bool],
        create: Callable[[int], object],
        destroy: Callable[[int], None],
        settle: Callable[[], None],
    ) -> None:
        self.ends_when_left = False
        self.over = False
        """Whether nobody is left, and the machine is there for visitors only."""
        self._lock_path = lock_path(folder)
        self._is_there = is_there
        self._create = create
        self._destroy = destroy
        self._settle = settle
        self._visitors: dict[Hashable, set[int]] = {}
        self._made: set[int] = set()  # domains that are there for visitors only
        self._lock = -1

    def wait_for(self, visitor: Hashable) -> None:
        """The machine was started for this one, who will enter, and ends when nobody is left."""
        self.ends_when_left = True
        self._visitors[visitor] = set()

    def enter(self, visitor: Hashable, domid: int) -> None:
        """Let a visitor in.

        Raises:
            GntallocError: there can be no such domain.
        """
        if not self._is_there(domid):
            self._create(domid)
            self._made.add(domid)
        self._visitors.setdefault(visitor, set()).add(domid)
        self.over = False

    def leave(self, visitor: Hashable) -> None:
        """It is gone, and so are domains that nobody is in any more."""
        left = self._visitors.pop(visitor, set())
        self.over = self.ends_when_left and not self._visitors
        self._settle()  # its programs' maps went before it did: their peers are told before the ports go
        for domid in left & self._made:
            if not any(domid in domids for domids in self._visitors.values()):
                self.forget(domid)
                self._destroy(domid)

    def forget(self, domid: int) -> None:
        """The domain ends."""
        self._made.discard(domid)

    def may_end(self) -> bool:
        """Whether nobody is just coming in: who comes has the lock, and from now on we have it, until our end."""
        if self._lock < 0:
            self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """The folder is gone: let those in who wait for the lock, to start another machine."""
        if self._lock >= 0:
            os.unlink(self._lock_path)
            os.close(self._lock)
