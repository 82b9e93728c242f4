"""Look at many things now and then, for as long as they are there, at a cost that does not grow with their number.

Each thing's turn comes once a period. Where there are so many, or a look takes so long, that this would cost more than
a small share of the time, the turns come later instead.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Generic, TypeVar

from gntalloc import clock

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

__all__ = ["Rounds"]

Thing = TypeVar("Thing", bound="Hashable")

_AT_ONCE = 16  # things of one turn
_LEAST = 0.02  # seconds between two turns
_REST = 100  # after a turn there is rest, so many times as long as the turn took


class Rounds(Generic[Thing]):
    """Say which things are to be looked at now. Each comes once in `period` seconds, or later if there are many."""

    def __init__(self, period: float) -> None:
        self._period = period
        self.things: dict[Thing, None] = {}
        """All things. The first is the next."""
        self._due = 0.0

    def __contains__(self, thing: Thing) -> bool:
        return thing in self.things

    def __iter__(self) -> Iterator[Thing]:
        return iter(self.things)

    def add(self, thing: Thing) -> None:
        """Look at a thing from now on, a period from now for the first time. A thing that is there keeps its place."""
        if not self.things:
            self._due = clock.now() + self._period
        self.things.setdefault(thing)

    def discard(self, thing: Thing) -> None:
        """Look at a thing no more."""
        if self.things:
            self.things.pop(thing, None)

    @property
    def due(self) -> float | None:
        """The time of the next turn. None: there is nothing to look at."""
        return self._due if self.things else None

    def take(self) -> list[Thing]:
        """Give the things whose turn is now. They stay, at the end of the line."""
        now = clock.now()
        if not self.things or self._due > now:
            return []
        turns = -(-len(self.things) // _AT_ONCE)
        self._due = now + max(self._period / turns, _LEAST)
        things = list(islice(self.things, _AT_ONCE))
        for thing in things:
            del self.things[thing]
            self.things[thing] = None
        return things

    def took(self, seconds: float) -> None:
        """Put the next turn off, as the last one has taken `seconds`."""
        self._due = max(self._due, clock.now() + _REST * seconds)
