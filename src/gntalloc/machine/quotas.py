"""Share out what the machine has only so much of: descriptors, and memory for messages.

A user's domains together may take as much as is still free in the machine. One domain may take as much as is still free
for its user. So nobody can take all: one domain gets a third, two domains of one user a quarter each, and there is
always something left for a domain that comes later. What is refused is refused to the domain that asks.

Source: the rule is that of dynamic thresholds, by which switches share memory among their ports.
"""

from __future__ import annotations

import resource
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
        self.by_user: dict[Hashable, int] = {}


class Share:
    """Keep what one domain has of a pool.

    Attributes:
        taken: how much it has.
    """

    __slots__ = ("_domid", "_pool", "_user", "taken")

    def __init__(self, pool: Pool, user: Hashable, domid: int) -> None:
        self._pool = pool
        self._user = user
        self._domid = domid
        self.taken = 0

    @property
    def left(self) -> int:
        """How much more this domain may take now. 0 or less: nothing."""
        pool = self._pool
        for_user = pool.most - pool.taken - pool.by_user.get(self._user, 0)
        return for_user - self.taken

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
        self.give(-number)

    def give(self, number: int) -> None:
        """Give so much back."""
        self.taken -= number
        self._pool.taken -= number
        self._pool.by_user[self._user] = self._pool.by_user.get(self._user, 0) - number


def descriptors_of_this_process() -> Pool:
    """Make the pool of descriptors that this process may have, but for some of its own."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST if soft == resource.RLIM_INFINITY else soft
    return Pool(
        "descriptors", most - min(_RESERVE, most // 4), "close some files, mappings or connections, or raise ulimit -n"
    )
