"""Charge each domain for the time that it takes, and say which domain is served next.

A domain has one account, however many connections, runs and waits it has. The account that has had the least is next.
An account that was idle saves nothing up by that: when it wakes it starts where the others are. So a quiet domain is
served as soon as what is being done is done, and busy ones share the rest.

Domains of one user have a bound together: each is charged as many times as that user has busy ones. So a user gets no
more by having more domains.

Source: start-time fair queueing, as schedulers of processors and networks do it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from gntalloc.machine.loop import READABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc.machine.loop import Loop
    from gntalloc.machine.speaker import Speaker

__all__ = ["Account", "Accounts", "Seat"]


class Seat:
    """Keep what is known of one speaker."""

    __slots__ = ("account", "ended", "listened_to", "queued", "speaker", "wanted", "weight")

    def __init__(self, speaker: Speaker, account: Account, ended: Callable[[], None] | None) -> None:
        self.speaker = speaker
        self.account = account
        self.ended = ended
        self.queued = False
        self.listened_to = True
        self.wanted = READABLE
        self.weight = 0


class User:
    """Count the accounts of one user that have work, and the bytes of its messages that wait."""

    __slots__ = ("busy", "weight")

    def __init__(self) -> None:
        self.busy = 0
        self.weight = 0


class Account:
    """Keep what one domain has cost, and what of it waits.

    Attributes:
        spent: seconds of processor time, each as many times as its user has busy accounts.
        came: how many of its speakers have messages that were not admitted yet.
        waiting: its speakers that have messages to be served.
        chores: work of its own that is done in pieces, before its messages.
        calling: whether some of its speakers have sent something that there was no time to hear.
        closed: whether its domain has ended.
        speakers: how many it has.
        weight: bytes of long messages that came and were not served yet.
        favoured: if they are too many, the speaker that is heard all the same.
        held_back: those that are not.
        loop: waits for its speakers: the machine's own, or one of its own in that, if they are many.
    """

    __slots__ = (
        "busy",
        "calling",
        "came",
        "chores",
        "closed",
        "favoured",
        "held_back",
        "loop",
        "speakers",
        "spent",
        "user",
        "waiting",
        "weight",
    )

    def __init__(self, user: User, loop: Loop) -> None:
        self.user = user
        self.spent = 0.0
        self.busy = False
        self.calling = False
        self.closed = False
        self.came = 0
        self.waiting: deque[Seat] = deque()
        self.chores: deque[Iterator[None]] = deque()
        self.speakers = 0
        self.weight = 0
        self.favoured: Seat | None = None
        self.held_back: list[Seat] = []
        self.loop = loop

    @property
    def has_work(self) -> bool:
        """Whether anything of it waits."""
        return bool(self.waiting or self.chores or self.calling)


class Accounts:
    """Keep all accounts, and which of them have work.

    Args:
        loop: waits for all of them.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._users: dict[int, User] = {}
        self._ready: dict[Account, None] = {}  # with something to be served
        self._floor = 0.0  # what the account has had that was served last

    def open(self, uid: int) -> Account:
        """Make an account for a domain of this user."""
        return Account(self._users.setdefault(uid, User()), self._loop)

    def close(self, account: Account) -> None:
        """End an account. No speaker has it any more."""
        for chore in account.chores:
            chore.close()  # type: ignore[attr-defined]  # a generator
        account.chores.clear()
        account.waiting.clear()
        account.calling = False
        account.closed = True
        account.came = 0
        self.rest(account)
        if account.loop is not self._loop:
            self._loop.unwatch(account.loop.fileno())
            account.loop.close()

    def wake(self, account: Account) -> None:
        """Note that an account has something to be served. It gets no credit for the time in which it had nothing."""
        if account.closed:
            return
        if not account.busy:
            account.busy = True
            account.user.busy += 1
            account.spent = max(account.spent, self._floor)
        self._ready[account] = None

    def rest(self, account: Account) -> None:
        """Note that nothing of an account can be served now. It is busy all the same if its speakers have sent more."""
        self._ready.pop(account, None)
        if account.busy and not account.came:
            account.busy = False
            account.user.busy -= 1
        if not self._ready:  # nobody else has waited for what it had
            self._floor = max(self._floor, account.spent)

    @property
    def any_ready(self) -> bool:
        """Whether anything can be served."""
        return bool(self._ready)

    @property
    def contended(self) -> bool:
        """Whether several accounts have something to be served."""
        return len(self._ready) > 1

    def next(self) -> Account | None:
        """Give the account that has had the least, of those that have something to be served. None: none has."""
        ready = self._ready
        if not ready:
            return None
        account = next(iter(ready)) if len(ready) == 1 else min(ready, key=_spent)
        self._floor = max(self._floor, account.spent)
        return account


def _spent(account: Account) -> float:
    return account.spent
