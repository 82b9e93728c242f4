"""End: the shared page, as one end sees it: what the peer is, and how each asks the other to be woken.

Nobody waits here: see `waiting`.

How an end sleeps. It looks a while (`spin`), unless that does harm; then it *asks*: it sets a bit in a byte of the
page, and looks once more. Whoever moves an index *tells*: it looks at the bit, and rings if it is set. Between moving
and looking, and between asking and looking, there is a fence, so that of the two at least one sees the other.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from gntalloc.errors import Closed, DeviceError, MachineGone, PeerBroke, PeerClosed, PeerDied, PeerGone
from gntalloc.looking import Look
from gntalloc.vchan.extension import FINISHED, GOODBYE
from gntalloc.vchan.layout import GONE, NOT_YET, NOTIFY_READ, NOTIFY_WRITE

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.atomics import Atomics
    from gntalloc.vchan.bells import Bells
    from gntalloc.vchan.pages import ChannelPages
    from gntalloc.vchan.role import Role

__all__ = ["SPIN", "End", "Progress"]

SPIN = 50e-6
"""Seconds to look before sleeping, if not told otherwise: about what a wake-up costs."""


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
        broken: how the peer has lied; None: as far as is known it has not.
        looks: how long to look, by the bit that the peer is asked by. None, if this end does not look.
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
        self.looks = {bit: Look(spin) for bit in (NOTIFY_WRITE, NOTIFY_READ) if spin}
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
        self.broken: PeerBroke | None = None
        self._left = False  # the peer was told that this end goes
        self.owner = os.getpid()

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
        """Ask the peer to ring again: it clears its bit when it rings."""
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
        """Call `join` when a peer has come. This end has none yet."""
        self._join = join

    def has_come(self) -> bool:
        """Tell whether there is a peer to `join`, or whether another thread has joined it meanwhile."""
        return self._join is None or self._page[self.role.peer_live] != NOT_YET

    def join(self) -> None:
        """Find out what the peer is that has come.

        Raises:
            PeerBroke: it is none that this end can have.
        """
        with self._joining:  # a reader and a writer may both have waited
            if self._join is not None:
                try:
                    self._join(self)
                except PeerBroke as broken:
                    raise self.give_up(broken) from None
                finally:
                    self._join = None

    def joined(self, state_at: int) -> None:
        """Note that the peer is an end of this package; the extension's states are at this byte of the page."""
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
        """Tell whether the peer has closed, or has ended."""
        return self.bells.hung_up or bool(self._page[self.role.peer_live] == GONE)

    def no_more_comes(self) -> bool:
        """Tell whether the peer writes no more, whatever the reason."""
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
        """Build the error for it."""
        if self.orderly():
            return PeerClosed(f"domain {self.peer} has closed its end of the channel, or writes no more")
        return PeerDied(f"the program in domain {self.peer} ended without closing its end of the channel")

    # What this end is.

    def check_open(self) -> None:
        """Raise Closed or PeerBroke, if this end is."""
        if self.closing:
            raise Closed(f"{self} {self.closed_because}")
        if self.broken is not None:
            raise PeerBroke(str(self.broken)) from None

    def look(self, refresh: Callable[[], int]) -> int:
        """Call a ring's `refresh`. If the peer lies there, that is the end."""
        try:
            return refresh()
        except PeerBroke as broken:
            raise self.give_up(broken) from None

    def give_up(self, broken: PeerBroke) -> PeerBroke:
        """Mark the channel as broken: it is of no more use."""
        self.broken = broken
        self.reader.ready = self.writer.room = 0
        return broken

    def give_away(self, why: str) -> None:
        """Mark this end as another process's. The peer is told nothing."""
        self.closed_because = why
        self.closing = True
        self.reader.ready = self.writer.room = 0

    def leave(self) -> None:
        """Tell the peer that this end closes."""
        if self._left:
            return  # said already
        self._left = True
        # The machine or this port may have gone before. Then the peer hears of it by itself.
        with contextlib.suppress(MachineGone, DeviceError):
            self.say(GOODBYE)
        self._page[self.role.my_live] = GONE
        self.atomics.fence()
        with contextlib.suppress(MachineGone, DeviceError):
            self.bells.ring_both()
