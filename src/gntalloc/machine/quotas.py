"""Share out what the machine has only so much of: its descriptors.

A user's domains together may take as much as is still free in the machine. One domain may take as much as is still free
for its user. So nobody can take all: one domain gets a third, two domains of one user a quarter each, and there is
always something left for a domain that comes later. What is refused is refused to the domain that asks.

Source: the rule is that of dynamic thresholds, by which switches share memory among their ports.
"""

from __future__ import annotations

import errno
import resource
import socket
from typing import TYPE_CHECKING

from gntalloc.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["Pool", "Share", "descriptors_of_this_process"]

_RESERVE = 64  # descriptors of the machine's own: loops, listeners, the log, one that is being passed on
_MOST = 1 << 20  # descriptors, where there is no limit


class Pool:
    """Keep something that the machine has `most` of, and what each user has of it.

    Args:
        name: what it is, for people.
        most: how much there is of it.
        remedy: what could be done if there is not enough.
    """

    def __init__(self, name: str, most: int, remedy: str) -> None:
        self.name = name
        self.most = most
        self.remedy = remedy
        self.taken = 0
        self._users: dict[Hashable, User] = {}

    def user(self, user: Hashable) -> User:
        """Give what is counted of a user."""
        return self._users.setdefault(user, User())


class User:
    """Count what the domains of one user have together."""

    __slots__ = ("taken",)

    def __init__(self) -> None:
        self.taken = 0


class Share:
    """Keep what one domain has of a pool.

    Attributes:
        taken: how much it has.
    """

    __slots__ = ("_domid", "_pool", "_user", "taken")

    def __init__(self, pool: Pool, user: Hashable, domid: int) -> None:
        self._pool = pool
        self._user = pool.user(user)
        self._domid = domid
        self.taken = 0

    @property
    def left(self) -> int:
        """How much more this domain may take now. 0 or less: nothing."""
        pool = self._pool
        return pool.most - pool.taken - self._user.taken - self.taken

    def take(self, number: int, why: int, what: str) -> None:
        """Take so much, for `what`.

        Raises:
            DeviceError: the errno `why`: there is too little left for this domain.
        """
        if number > self.left:
            pool = self._pool
            raise DeviceError(
                why,
                f"{what} takes {number} of the machine's {pool.most} {pool.name}, and domain {self._domid} has its "
                f"share of them: {self.taken}, with {pool.most - pool.taken} still free for all; {pool.remedy}",
            )
        self.taken += number
        self._user.taken += number
        self._pool.taken += number

    def socketpair(self, what: str) -> tuple[socket.socket, socket.socket]:
        """Make a pair of sockets, the first of which the machine keeps and counts: give it back when it is closed.

        Raises:
            DeviceError: EMFILE: there is too little left for this domain, or for the machine.
        """
        self.take(1, errno.EMFILE, what)
        try:
            return socket.socketpair()
        except OSError as error:
            self.give(1)
            raise DeviceError(errno.EMFILE, f"the machine has no descriptors left: {error.strerror}") from None

    def give(self, number: int) -> None:
        """Give so much back."""
        self.taken -= number
        self._pool.taken -= number
        self._user.taken -= number


def descriptors_of_this_process() -> Pool:
    """Make the pool of descriptors that this process may have, but for some of its own."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST if soft == resource.RLIM_INFINITY else soft
    return Pool(
        "descriptors", most - min(_RESERVE, most // 4), "close some files, mappings or connections, or raise ulimit -n"
    )
