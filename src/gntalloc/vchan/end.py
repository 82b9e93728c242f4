"""End: what both directions of a channel have in common: who the peer is, how to wait for it, how to wake it.

How an end sleeps. It looks a while (`spin`); then it *asks*: it sets a bit in a byte of the page, and looks once more.
Whoever moves an index *tells*: it looks at the bit, and rings if it is set. Between moving and looking, and between
asking and looking, there is a fence, so that of the two at least one sees the other.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from gntalloc.clock import now
from gntalloc.errors import Closed, MachineGone, PeerBroke, PeerClosed, PeerDied, PeerGone, TimedOut
from gntalloc.vchan.extension import CLI_STATE, FINISHED, GOODBYE, SRV_STATE
from gntalloc.vchan.layout import (
    CLI_LIVE,
    CLI_NOTIFY,
    GONE,
    LEFT_CONS,
    LEFT_PROD,
    NOT_YET,
    NOTIFY_READ,
    NOTIFY_WRITE,
    RIGHT_CONS,
    RIGHT_PROD,
    SRV_LIVE,
    SRV_NOTIFY,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.atomics import Atomics
    from gntalloc.clock import Deadline
    from gntalloc.vchan.bells import Bells
    from gntalloc.vchan.pages import ChannelPages

__all__ = ["CLIENT", "SERVER", "SPIN", "Asking", "End", "Progress", "Role", "flag_word"]

SPIN = 50e-6
"""Seconds to look before sleeping, if not told otherwise: about what a wake-up costs."""
_LOOKS = 16  # between two looks at the clock


class Role(NamedTuple):
    """Which bytes and words of the page are whose."""

    my_live: int
    peer_live: int
    asking: int  # the byte in which this end sets bits
    asked: int  # the byte in which the peer does
    writes: tuple[int, int]  # the words of the index this end moves as a writer, and of the reader's
    reads: tuple[int, int]
    my_state: int
    peer_state: int
    reads_left: bool


SERVER = Role(
    SRV_LIVE,
    CLI_LIVE,
    CLI_NOTIFY,
    SRV_NOTIFY,
    (RIGHT_PROD, RIGHT_CONS),
    (LEFT_CONS, LEFT_PROD),
    SRV_STATE,
    CLI_STATE,
    reads_left=True,
)
CLIENT = Role(
    CLI_LIVE,
    SRV_LIVE,
    SRV_NOTIFY,
    CLI_NOTIFY,
    (LEFT_PROD, LEFT_CONS),
    (RIGHT_CONS, RIGHT_PROD),
    CLI_STATE,
    SRV_STATE,
    reads_left=False,
)


class Progress(NamedTuple):
    """What an end knows by itself: its indexes, and what the extension says of it."""

    read: int
    written: int
    state_at: int | None
    state: int


class End:
    """One end of a channel.

    Args:
        role: SERVER or CLIENT.
        peer: the domid at the other end.
        pages: mapped, and filled in as far as this end has to.
        bells: of the port.
        atomics: how memory is ordered here.
        spin: seconds to look before sleeping.

    Attributes:
        reader: the ring that this end reads.
        writer: the one it writes.
        closing: `close` has begun.
        closed_because: what Closed says of it.
    """

    def __init__(
        self, role: Role, peer: int, pages: ChannelPages, bells: Bells, atomics: Atomics, *, spin: float = SPIN
    ) -> None:
        self.role = role
        self.peer = peer
        self.pages = pages
        self.bells = bells
        self.atomics = atomics
        self.spin = spin
        self.reader, self.writer = pages.rings(role, atomics)
        self.closing = False
        self.closed_because = "cannot be used any more; connect again"
        self._page: Any = pages.raw
        self._asking = threading.Lock()
        self._askers = {NOTIFY_WRITE: 0, NOTIFY_READ: 0}
        self._wanted = 0  # what is asked for, of the two
        self._join: Callable[[End], None] | None = None  # what a server does when its client has come
        self._joining = threading.Lock()
        self._state_at: int | None = None  # where the states of the extension are, if the peer is one of ours
        self._state = 0  # what this end's says
        self._broken: PeerBroke | None = None
        self._left = False  # the peer was told that this end goes
        self.owner = os.getpid()

    def await_peer(self, deadline: Deadline) -> None:
        """Until a server has its client, and both know what the other is."""
        while self._join is not None:
            seen = self.bells.news
            if self._page[self.role.peer_live] != NOT_YET:
                with self._joining:  # a reader and a writer may both have waited
                    if self._join is not None:
                        try:
                            self._join(self)
                        except PeerBroke as broken:
                            raise self.give_up(broken) from None
                        finally:
                            self._join = None
                return
            self.check_open()
            left = deadline.remaining
            if left == 0:
                raise TimedOut(f"{self} still has nobody at the other end; wait again")
            self.bells.sleep(seen, left)

    def wait(
        self,
        bit: int,
        refresh: Callable[[], int],
        count: int,
        over: Callable[[], bool],
        deadline: Deadline,
        what: str,
    ) -> bool:
        """Until there are so many. False: it is `over`, and there are not.

        Written out in one piece, as what it calls most is: of a wake-up's time this is half.

        Args:
            bit: what the peer is asked to tell.
            refresh: looks at the page, and says how many there are. If the peer lies there, that is the end.
            count: wanted.
            over: whether that will not change any more.
            deadline: for all of it.
            what: is waited for, for the TimedOut.
        """
        bells = self.bells
        try:
            if refresh() >= count or (self.spin and self._look_a_while(refresh, count, over, deadline)):
                return True
            self.ask(bit)
            try:
                while True:
                    seen = bells.news
                    if refresh() >= count:
                        return True
                    if over():
                        return refresh() >= count
                    if self.closing or self._broken is not None:
                        self.check_open()
                    left = deadline.remaining
                    if left == 0:
                        raise TimedOut(f"{self} has waited in vain for {what}; wait again")
                    bells.sleep(seen, left)
                    if refresh() >= count:
                        return True
                    self.ask_again()
            finally:
                self.ask_no_more(bit)
        except PeerBroke as broken:
            raise self.give_up(broken) from None

    def _look_a_while(
        self, refresh: Callable[[], int], count: int, over: Callable[[], bool], deadline: Deadline
    ) -> bool:
        """Whether there were enough before `spin` had passed."""
        until = now() + deadline.within(self.spin)
        while now() < until:
            for _ in range(_LOOKS):
                if refresh() >= count:
                    return True
            if over() or self.closing:
                break
        return False

    def __repr__(self) -> str:
        return f"the channel with domain {self.peer}"

    # Asking and telling.

    def ask(self, bit: int) -> None:
        """From now on the peer rings when it has done that."""
        with self._asking:
            self._askers[bit] += 1
            self._wanted |= bit
            if not self.closing:
                self._page[self.role.asking] = self._wanted
        if not self.atomics.ordered:  # else releasing the lock was a fence
            self.atomics.fence()

    def ask_again(self) -> None:
        """The peer clears a bit when it rings."""
        with self._asking:
            if not self.closing:
                self._page[self.role.asking] = self._wanted
        if not self.atomics.ordered:
            self.atomics.fence()

    def ask_no_more(self, bit: int) -> None:
        """Once for each `ask`."""
        with self._asking:
            self._askers[bit] -= 1
            if not self._askers[bit]:
                self._wanted &= ~bit
            if not self.closing:
                self._page[self.role.asking] = self._wanted

    def tell(self, bit: int) -> None:
        """Ring, if the peer has asked for it. What it is told of comes before a fence."""
        if self._page[self.role.asked] & bit:
            pages = self.pages
            if self.atomics.take(pages.memory, self.role.asked, pages.address, bit):
                self.bells.ring()

    def say(self, state: int) -> None:
        """Tell a peer of our own about this end, whether it has asked or not."""
        if self._state_at is not None:
            self._state |= state
            self._page[self._state_at + self.role.my_state] = self._state
            self.atomics.fence()
            self.bells.ring()

    # What the peer is.

    def wait_with(self, join: Callable[[End], None]) -> None:
        """This end has no peer yet. When one has come, call `join`."""
        self._join = join

    def joined(self, state_at: int) -> None:
        """The peer is an end of this package; the extension's states are at this byte of the page."""
        self._state_at = state_at

    def progress(self) -> Progress:
        """How far this end has got, for another process to go on."""
        return Progress(self.reader.index, self.writer.index, self._state_at, self._state)

    def resume(self, progress: Progress) -> None:
        """Go on where another process was."""
        self.reader.resume(progress.read)
        self.writer.resume(progress.written)
        self._state_at, self._state = progress.state_at, progress.state

    def enlarge(self, left: int, right: int) -> None:
        """Both ends have agreed on rings of so many bytes."""
        self.reader.enlarge(left if self.role.reads_left else right)
        self.writer.enlarge(right if self.role.reads_left else left)

    @property
    def waiting(self) -> bool:
        """Whether this is a server's, and nobody has come yet."""
        return self._join is not None

    @property
    def extended(self) -> bool:
        """Whether the peer is an end of this package."""
        return self._state_at is not None

    @property
    def finished(self) -> bool:
        """Whether this end has said that it writes no more."""
        return bool(self._state & FINISHED)

    @property
    def connected(self) -> bool:
        """Whether there is a peer now."""
        return not (self.closing or self.bells.hung_up) and self._page[self.role.peer_live] not in {GONE, NOT_YET}

    def peer_is_gone(self) -> bool:
        """It closed, or ended."""
        return self.bells.hung_up or bool(self._page[self.role.peer_live] == GONE)

    def no_more_comes(self) -> bool:
        """It writes no more, whatever the reason."""
        page, role, states = self._page, self.role, self._state_at
        if self.bells.hung_up or page[role.peer_live] == GONE:
            return True
        return states is not None and bool(page[states + role.peer_state] & FINISHED)

    def _peer_state(self) -> int:
        return 0 if self._state_at is None else int(self._page[self._state_at + self.role.peer_state])

    def orderly(self) -> bool:
        """Whether an end of what comes is one that the peer meant. Of a libxenvchan nobody knows."""
        return self._state_at is None or bool(self._peer_state() & (FINISHED | GOODBYE))

    def gone(self) -> PeerGone:
        """The error for it."""
        if self.orderly():
            return PeerClosed(f"domain {self.peer} has closed its end of the channel, or writes no more")
        return PeerDied(f"the program in domain {self.peer} ended without closing its end of the channel")

    # What this end is.

    def check_open(self) -> None:
        """Raise Closed or PeerBroke, if this end is."""
        if self.closing:
            raise Closed(f"{self} {self.closed_because}")
        if self._broken is not None:
            raise PeerBroke(str(self._broken)) from None

    def look(self, refresh: Callable[[], int]) -> int:
        """Call a ring's `refresh`. If the peer lies there, that is the end."""
        try:
            return refresh()
        except PeerBroke as broken:
            raise self.give_up(broken) from None

    def give_up(self, broken: PeerBroke) -> PeerBroke:
        """The channel is of no more use."""
        self._broken = broken
        self.reader.ready = self.writer.room = 0
        return broken

    def give_away(self, why: str) -> None:
        """This end is another process's; the peer is told nothing."""
        self.closed_because = why
        self.closing = True
        self.reader.ready = self.writer.room = 0

    def leave(self) -> None:
        """Tell the peer that this end closes."""
        if self._left:
            return  # said already
        self._left = True
        with contextlib.suppress(MachineGone):
            self.say(GOODBYE)
        self._page[self.role.my_live] = GONE
        self.atomics.fence()
        with contextlib.suppress(MachineGone):  # then the peer hears of it by itself
            self.bells.ring_both()


class Asking:
    """As long as this is entered, the peer is asked to ring."""

    def __init__(self, end: End, bit: int) -> None:
        self._end = end
        self._bit = bit

    def again(self) -> None:
        """A bell has rung, and the next is asked for."""
        self._end.ask_again()

    def __enter__(self) -> Self:
        self._end.ask(self._bit)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.ask_no_more(self._bit)


def flag_word(at: int, value: int) -> int:
    """The four bytes from cli_live on as one number, with `value` in one of them."""
    return int.from_bytes(bytes(value if byte == at else 0 for byte in range(CLI_LIVE, CLI_LIVE + 4)), sys.byteorder)
