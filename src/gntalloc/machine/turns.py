"""Choose which speaker is served next, how much of it, and which has to wait until it reads.

A speaker is a program's connection, a connection of the machine's owner, a connection to xenstore, or the system calls
of a run. The same rules hold for all. Each belongs to an account, a domain's or the owner's, which is charged for what
its speakers cost: hearing them, and serving them. `accounts` says which account is next. A speaker that does not read
its replies is not listened to. A speaker that leaves the machine waiting is dropped.

Serving goes in rounds of a few milliseconds. In a round an account gets one slice after the other, as long as it has
had the least. In a slice one speaker after the other gets a turn of a few messages. What takes longer than a slice is
done in pieces: the speaker goes on with it at its next turn.

*Giving up comes before asking.* A program gives files and maps up by close(2) and munmap(2), and writes
ports back to a home. None of that has an answer, and still it is as synchronous as in a kernel. A round admits the
messages that have come, and then hears once more. What a program gave up before any of these messages was sent is heard
there at the latest, since the kernel had told it by then. It is settled before the first of them is served. A message
that has come since is admitted to the next round. The looks have only so much time. Accounts that have had the least
come first.
"""

from __future__ import annotations

import errno
import logging
import os
from functools import partial
from typing import TYPE_CHECKING

from gntalloc import clock
from gntalloc.errors import DeviceError
from gntalloc.machine.accounts import Accounts, Seat
from gntalloc.machine.loop import READABLE, SOMETHING_CAME, WRITABLE, Loop
from gntalloc.machine.speaker import RUNNABLE, STALLING, Dropped

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from gntalloc.machine.accounts import Account
    from gntalloc.machine.speaker import Speaker

__all__ = ["OWN", "Turns"]

log = logging.getLogger("gntalloc.machine")

OWN = "the machine's own"
"""The key of the account of the machine itself, and of its owner's connections."""
_EVENTS = READABLE | WRITABLE
_CHECK_FOR_STALLS = 1.0  # seconds
_SLICE = 0.001  # seconds
_ROUND = 0.002  # seconds of slices, until those are heard that have come meanwhile
_HEARING = 0.001  # seconds of a look
_HEAVY_DOMAIN, _HEAVY_USER = 16 << 20, 64 << 20  # bytes of messages that came and were not served yet
_FEW = 4  # speakers of an account that need no loop of their own
_HEARD_AT_ONCE = 16  # speakers of an account, before it is looked at how long that took


class Turns:
    """Give all speakers their turns.

    Args:
        loop: waits for them.
        settle: takes in the files and maps that programs have given up.
    """

    def __init__(self, loop: Loop, settle: Callable[[], None]) -> None:
        self._loop = loop
        self._settle = settle
        self._accounts = Accounts(loop)
        self._by_key: dict[Hashable, Account] = {OWN: self._accounts.open(os.getuid())}
        self._seats: dict[Speaker, Seat] = {}
        self._calling: list[Account] = []  # with something to hear
        self._came: list[Seat] = []  # with messages that were not admitted yet
        self._slow: set[Speaker] = set()
        self._running: Account | None = None
        self._charged = clock.processor_time()  # all until then is charged

    def patience(self) -> float | None:
        """Give the seconds until a round is due though nothing comes. None: none is."""
        if self._came or self._accounts.any_ready:
            return 0.0
        return _CHECK_FOR_STALLS if self._slow else None

    def __iter__(self) -> Iterator[Speaker]:
        return iter(list(self._seats))

    # Accounts.

    def open_account(self, key: Hashable, uid: int) -> None:
        """Make the account of a domain of this user."""
        self._by_key[key] = self._accounts.open(uid)

    def close_account(self, key: Hashable) -> None:
        """End an account, and all speakers that it still has."""
        account = self._by_key.pop(key)
        for seat in [each for each in self._seats.values() if each.account is account]:
            self.drop(seat.speaker, "its domain was destroyed")
        own = self._by_key.get(OWN)
        if own is not None and account.chores:
            own.chores.extend(account.chores)
            account.chores.clear()
            self._accounts.wake(own)
        self._accounts.close(account)

    def close(self) -> None:
        """End all accounts, the machine's own last."""
        for key in list(reversed(self._by_key)):
            self.close_account(key)

    def do(self, key: Hashable, chore: Iterator[None]) -> None:
        """Do work of an account's own, a slice of it now. The rest comes before its messages.

        The machine does it on its own account if the domain has ended.
        """
        account = self._by_key.get(key) or self._by_key[OWN]
        if account.chores:
            account.chores.append(chore)
            return
        self._run_for(account)
        if not _go_on(chore, clock.now() + _SLICE):
            account.chores.append(chore)
            self._accounts.wake(account)

    # Speakers.

    def add(self, speaker: Speaker, key: Hashable, ended: Callable[[], None] | None = None) -> None:
        """Serve a speaker from now on, for the account `key`. `ended` is called when it has been dropped.

        Raises:
            DeviceError: ENOMEM: the computer waits for no more sockets. The speaker is the caller's then.
        """
        account = self._by_key[key]
        if account.speakers >= _FEW and account.loop is self._loop:
            self._move_apart(account)
        seat = Seat(speaker, account, ended)
        try:
            account.loop.watch(speaker.fileno(), partial(self._heard, seat))
        except OSError as error:
            raise DeviceError(errno.ENOMEM, f"the computer waits for no more sockets: {error.strerror}") from None
        account.speakers += 1
        self._seats[speaker] = seat

    def _move_apart(self, account: Account) -> None:
        """Give an account of many speakers a loop of its own, so that it is heard as a whole, and as far as is fair.

        If the computer has none left, the account stays where it is.
        """
        try:
            loop = Loop()
        except OSError:
            return
        theirs = [seat for seat in self._seats.values() if seat.account is account]
        try:
            for seat in theirs:
                loop.watch(seat.speaker.fileno(), partial(self._heard, seat), seat.wanted)
            self._loop.watch(loop.fileno(), lambda _events: self._calling.append(account))
        except OSError:
            loop.close()
            return
        account.loop = loop
        for seat in theirs:
            self._loop.unwatch(seat.speaker.fileno())

    def drop(self, speaker: Speaker, why: str) -> None:
        """End a speaker. A speaker that is not there any more is no error."""
        seat = self._seats.pop(speaker, None)
        if seat is None:
            return
        log.debug("%s: %s", type(speaker).__name__, why)
        self._slow.discard(speaker)
        seat.account.speakers -= 1
        seat.account.loop.unwatch(speaker.fileno())
        if seat.weight or seat.account.favoured is seat:
            self._weigh(seat, 0)
        try:
            speaker.close()
        finally:
            if seat.ended is not None:
                seat.ended()

    def plan(self, speaker: Speaker) -> None:
        """Decide, after a change, what to wait for of a speaker, and whether it has something to serve."""
        seat = self._seats.get(speaker)
        if seat is not None:
            self._plan(seat)

    # A round.

    def serve(self) -> None:
        """Serve a round, or only settle if no speaker has sent anything."""
        if self._calling:
            self._hear()
        if self._came:
            self._admit()
            self._loop.hear(0)
            if self._calling:
                self._hear()
        self._settle()
        if self._accounts.any_ready:
            self._serve_accounts()
        if self._slow:
            self._drop_the_stalled()

    def _hear(self) -> None:
        """Hear the accounts with loops of their own that have something to be heard."""
        calling, self._calling = self._calling, []
        calling.sort(key=_spent)
        end = clock.now() + _HEARING
        for account in calling:
            if account.closed:  # by what was heard of another
                continue
            if clock.now() < end:
                self._hear_one(account, end)
            else:
                account.calling = True
                self._accounts.wake(account)

    def _hear_one(self, account: Account, end: float) -> None:
        """Hear speakers of an account until then, a few at least. If there is more, the loop says so again."""
        account.calling = False
        while account.loop.hear(0, _HEARD_AT_ONCE) == _HEARD_AT_ONCE:
            if account.closed or clock.now() >= end:
                break

    def _admit(self) -> None:
        came, self._came = self._came, []
        for seat in came:
            account = seat.account
            account.came -= 1
            if self._could(seat, seat.speaker.admit):
                account.waiting.append(seat)
                self._accounts.wake(account)
            elif not account.has_work:
                self._accounts.rest(account)

    def _serve_accounts(self) -> None:
        """Serve the account that has had the least, again and again, until a round is over or nothing is left."""
        end = clock.now() + _ROUND
        now = 0.0
        while now < end and (account := self._accounts.next()) is not None:
            now = self._serve_slice(account, end)

    def _serve_slice(self, account: Account, end: float) -> float:
        """Serve one account for a slice, and return the time."""
        self._run_for(account)
        now = clock.now()
        until = min(now + _SLICE, end)
        while account.chores and now < until:
            if _go_on(account.chores[0], until):
                account.chores.popleft()
            now = clock.now()
        if account.calling and now < until:
            self._hear_one(account, until)
            now = clock.now()
        while account.waiting and now < until:
            seat = account.waiting.popleft()
            seat.queued = False
            self._let(seat, seat.speaker.take_turn, until)
            now = clock.now()
        if self._accounts.contended:
            self._charge()
        if not account.has_work:
            self._accounts.rest(account)
        return now

    def _run_for(self, account: Account) -> None:
        """Do for an account whatever is done until the next call of this."""
        if account is not self._running:
            self._charge()
            self._running = account

    def _charge(self) -> None:
        """Charge the account for which something is done, for the time since the last charge."""
        now, account = clock.processor_time(), self._running
        if account is not None:
            account.spent += (now - self._charged) * (account.user.busy or 1)
        self._charged = now

    def _heard(self, seat: Seat, events: int) -> None:
        """Take in what a speaker has sent, unless it or its domain has sent more than it may."""
        account, speaker = seat.account, seat.speaker
        if account is not self._running:
            self._run_for(account)
        if seat.queued and not speaker.standing & _EVENTS:  # it has sent more than it may: hear no more of it
            self._plan(seat)
            return
        if account.weight and self._is_too_heavy(seat) and not events & WRITABLE:
            self._hold_back(seat)
            return
        if events & WRITABLE and not self._could(seat, speaker.flush):
            return
        if events & SOMETHING_CAME and not self._could(seat, speaker.receive, events):
            return
        if not speaker.standing & RUNNABLE:
            self._plan(seat)
        elif not seat.queued:  # it is looked at again when it has had its turn
            self._queue(seat)

    def _queue(self, seat: Seat) -> None:
        """Let a speaker that has something to be served be admitted to the next round."""
        seat.queued = True
        self._came.append(seat)
        seat.account.came += 1

    def _let(self, seat: Seat, work: Callable[..., None], until: float) -> None:
        """Serve a speaker's messages with `work`."""
        if self._could(seat, work, until) and not seat.queued:  # else it is looked at when it has had its turn
            self._plan(seat)

    def _could(self, seat: Seat, work: Callable[..., None], *arguments: float) -> bool:
        """Let a speaker do its work, and say whether it is there afterwards. No other speaker notices if that fails."""
        speaker = seat.speaker
        if speaker not in self._seats:
            return False
        try:
            work(*arguments)
        except Dropped as reason:
            self.drop(speaker, str(reason))
        except MemoryError:
            self.drop(speaker, "the machine has no memory left for its messages")
        except Exception:
            # This is our own fault. The program must not wait for ever, no other may notice, and the log shows it.
            log.exception("a message could not be served")
            self.drop(speaker, "serving it failed, see above")
        if speaker not in self._seats:  # this or what it did has ended it
            return False
        if speaker.weight != seat.weight or seat.account.favoured is seat:
            self._weigh(seat, speaker.weight)
        return True

    def _plan(self, seat: Seat) -> None:
        speaker = seat.speaker
        standing = speaker.standing
        if standing & RUNNABLE and not seat.queued:
            self._queue(seat)
        wanted = standing & (_EVENTS if seat.listened_to else WRITABLE)
        if wanted != seat.wanted:
            seat.wanted = wanted
            seat.account.loop.change(speaker.fileno(), wanted)
        if standing & STALLING:
            self._slow.add(speaker)
        elif self._slow:
            self._slow.discard(speaker)
        if speaker.companion is not None:
            companion = self._seats.get(speaker.companion)
            if companion is not None:
                companion.listened_to = not standing & WRITABLE
                self._plan(companion)

    # Memory. A domain with many long messages that are not whole yet is heard one message after the other.

    def _weigh(self, seat: Seat, weight: int) -> None:
        """Count what a speaker's messages weigh now. If they weigh nothing others may be heard again."""
        account = seat.account
        account.weight += weight - seat.weight
        account.user.weight += weight - seat.weight
        seat.weight = weight
        if not weight:
            if account.favoured is seat:
                account.favoured = None
            held, account.held_back = account.held_back, []
            for other in held:
                if other.speaker in self._seats:
                    self._plan(other)

    def _is_too_heavy(self, seat: Seat) -> bool:
        """Say whether a speaker has to wait until others of its domain have got their messages to the end."""
        account = seat.account
        if account.weight <= _HEAVY_DOMAIN and account.user.weight <= _HEAVY_USER:
            return False
        if account.favoured is None:
            account.favoured = seat
        return account.favoured is not seat

    def _hold_back(self, seat: Seat) -> None:
        seat.account.held_back.append(seat)
        seat.wanted = 0
        seat.account.loop.change(seat.speaker.fileno(), 0)

    def _drop_the_stalled(self) -> None:
        now = clock.now()
        for speaker in [speaker for speaker in self._slow if speaker.stalled(now)]:
            self.drop(speaker, "it left a message half sent, or a reply unread, for too long")


def _spent(account: Account) -> float:
    return account.spent


def _go_on(chore: Iterator[None], until: float) -> bool:
    """Do pieces of a chore until then, one at least. Return whether it is done."""
    try:
        next(chore)
        while clock.now() < until:
            next(chore)
    except StopIteration:
        return True
    except Exception:
        log.exception("a piece of work could not be done")  # a fault of ours: the machine goes on
        return True
    return False
