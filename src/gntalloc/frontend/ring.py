"""A shared ring: requests go one way, responses come back, in the same slots. Pure: nobody is woken here.

A page begins with four words, and slots follow from byte 64 on, as many as fit, rounded down to a power of two:

    req_prod   requests that the front has put there           req_event  wake the back when it reaches this
    rsp_prod   responses that the back has put there           rsp_event  wake the front when it reaches this

All run freely over 32 bits; a slot is an index modulo the number of slots. A response takes the slot of a request that
the back has consumed; so the front may put in as many requests as there are slots without a response that it has taken.

Each end moves its own producer, and keeps it, and how far it has consumed, in private: what lies in the shared page is
never read back. The other's producer is believed as far as it can be true:

    front    taken <= rsp_prod <= requests shown        back    taken <= req_prod <= responses shown + slots

and neither ever goes back. Anything else is `PeerBroke`, at once and for good. The other's event index says only when
*it* wants to be woken, so any value will do. A slot is copied out once, and its copy is what is looked at.

Sources: Xen's public io/ring.h, for layout and thresholds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from gntalloc.errors import PeerBroke

__all__ = ["HEADER", "Back", "Front", "Order", "slots_of"]

HEADER = 64
"""Bytes before the first slot."""
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT = range(4)
_WORDS = 16  # bytes of the indexes
_WORD = 0xFFFF_FFFF
_HALF = 1 << 31


class Order(Protocol):
    """How memory is ordered here. See `gntalloc.atomics.Atomics`."""

    ordered: bool

    def fence(self) -> None:
        """Nothing that comes after overtakes anything that came before."""


def slots_of(size: int, entry: int) -> int:
    """How many slots of `entry` bytes a ring of `size` bytes has.

    Raises:
        ValueError: not one.
    """
    fit = (size - HEADER) // entry
    if fit < 1:
        raise ValueError(f"a ring of {size} bytes has no room for an entry of {entry}; its header takes {HEADER}")
    return 1 << fit.bit_length() - 1


class _RingEnd(ABC):
    """What both ends have in common.

    Args:
        memory: the ring's pages, all of them.
        entry: bytes of a slot: the larger of request and response, with its padding.
        order: how memory is ordered here.

    Attributes:
        slots: how many there are; a power of two.
    """

    __slots__ = (
        "_broken",
        "_entry",
        "_indexes",
        "_mask",
        "_memory",
        "_order",
        "_put",
        "_seen",
        "_shown",
        "_taken",
        "slots",
    )
    _mine, _theirs = REQ_PROD, RSP_PROD  # which producer this end moves, and which the other does
    _asked, _asking = REQ_EVENT, RSP_EVENT  # where the other says when it is to be woken, and where this end does
    _what = "responses"  # that come from the other

    def __init__(self, memory: memoryview, entry: int, order: Order) -> None:
        self.slots = slots_of(len(memory), entry)
        self._memory = memory
        self._entry = entry
        self._mask = self.slots - 1
        self._order = order
        self._indexes = memory[:_WORDS].cast("I")
        self._put = 0  # entries written, shown or not
        self._shown = 0  # the same, as the other end knows it
        self._taken = 0  # entries of the other's that were taken
        self._seen = 0  # its producer when it was last looked at
        self._broken: str | None = None

    @abstractmethod
    def _limit(self) -> int:
        """Give the largest value that the other end's producer index can have."""

    def put(self, entry: bytes) -> None:
        """Write an entry into the next slot; there must be one. `show` shows it."""
        at = HEADER + (self._put & self._mask) * self._entry
        self._memory[at : at + len(entry)] = entry
        self._put = (self._put + 1) & _WORD

    def show(self) -> bool:
        """Let the other end see what was put. Whether it is to be woken."""
        old, new = self._shown, self._put
        if old == new:
            return False
        if not self._order.ordered:
            self._order.fence()
        self._indexes[self._mine] = self._shown = new
        self._order.fence()
        return ((new - self._indexes[self._asked]) & _WORD) < ((new - old) & _WORD)

    def ready(self) -> int:
        """Look how many entries of the other's are there to be taken.

        Raises:
            PeerBroke: so many cannot be; and from then on always.
        """
        if self._broken is not None:
            raise PeerBroke(self._broken)
        theirs = self._indexes[self._theirs]
        known = (self._seen - self._taken) & _WORD
        ready, most = (theirs - self._taken) & _WORD, (self._limit() - self._taken) & _WORD
        if not known <= ready <= most:
            how = "goes back" if ready >= _HALF or ready < known else "runs ahead"
            self._broken = (
                f"the peer's count of {self._what} {how}: it is {theirs:#x} where {self._taken:#x} were taken and "
                f"{known} to {most} more are possible, in a ring of {self.slots} slots; the ring is of no more use"
            )
            raise PeerBroke(self._broken)
        self._seen = theirs
        if not self._order.ordered:
            self._order.fence()
        return ready

    def take(self, length: int) -> bytes:
        """Copy the first `length` bytes of the next entry, which `ready` has found."""
        at = HEADER + (self._taken & self._mask) * self._entry
        entry = bytes(self._memory[at : at + length])
        self._taken = (self._taken + 1) & _WORD
        return entry

    def ask(self, more: int = 1) -> int:
        """Before sleeping: be woken when the other has shown `more` entries. How many are there after all.

        Whoever sleeps although this is not 0 may never be woken.

        Raises:
            PeerBroke: as `ready`.
        """
        ready = self.ready()
        if ready:
            return ready
        self._indexes[self._asking] = (self._taken + more) & _WORD
        self._order.fence()
        return self.ready()

    def release(self) -> None:
        """Let go of the memory, so that it can be unmapped. Can be repeated."""
        self._indexes.release()
        self._memory.release()


class Front(_RingEnd):
    """The end that asks. It makes the ring: whatever the memory holds is written over."""

    __slots__ = ()

    def __init__(self, memory: memoryview, entry: int, order: Order) -> None:
        super().__init__(memory[:], entry, order)
        self._memory[:HEADER] = bytes(HEADER)
        self._indexes[REQ_EVENT] = self._indexes[RSP_EVENT] = 1

    @property
    def room(self) -> int:
        """So many requests can be put now."""
        return self.slots - ((self._put - self._taken) & _WORD)

    def _limit(self) -> int:
        return self._shown


class Back(_RingEnd):
    """The end that answers. It goes on where the ring says that a back has come to: zero in a new one.

    Raises:
        PeerBroke: there cannot be so many requests as the ring says.
    """

    __slots__ = ()
    _mine, _theirs = RSP_PROD, REQ_PROD
    _asked, _asking = RSP_EVENT, REQ_EVENT
    _what = "requests"

    def __init__(self, memory: memoryview, entry: int, order: Order) -> None:
        super().__init__(memory[:], entry, order)
        self._put = self._shown = self._taken = self._seen = self._indexes[RSP_PROD]
        self.ready()

    @property
    def unanswered(self) -> int:
        """Requests that were taken and have no response yet. `put` is for them alone."""
        return (self._taken - self._put) & _WORD

    def _limit(self) -> int:
        return self._put + self.slots
