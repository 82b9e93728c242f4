"""Which index a thing gets: runs of page numbers in an open file of gntdev, none overlapping another.

Linux looks at what is there in order, and takes the first gap that is larger than it needs to be, or else the end. So
does this, without looking at what is packed from the beginning on: with nothing ever given back it looks at nothing.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Indexes"]

Thing = TypeVar("Thing")


class Indexes(Generic[Thing]):
    """Things by the number of their first page."""

    __slots__ = ("_firsts", "_packed", "_things")

    def __init__(self) -> None:
        self._things: dict[int, tuple[int, Thing]] = {}  # first page -> how many, and what
        self._firsts: list[int] = []  # in order
        self._packed = 0  # below this page there is no gap at all

    def __iter__(self) -> Iterator[Thing]:
        """In order."""
        return (self._things[first][1] for first in self._firsts)

    def first_gap(self, pages: int) -> int:
        """Where `pages` pages would go. A gap that they would just fill is not taken, as in Linux."""
        first = self._packed
        for at in range(bisect_left(self._firsts, first), len(self._firsts)):
            if first + pages < self._firsts[at]:
                break
            first = self._firsts[at] + self._things[self._firsts[at]][0]
        return first

    @property
    def end(self) -> int:
        """The page after the last that is there."""
        return self._firsts[-1] + self._things[self._firsts[-1]][0] if self._firsts else 0

    def has_room(self, first: int, pages: int) -> bool:
        """Whether nothing is at any of these pages."""
        at = bisect_right(self._firsts, first + pages - 1) - 1
        return at < 0 or self._firsts[at] + self._things[self._firsts[at]][0] <= first

    def put(self, first: int, pages: int, thing: Thing) -> None:
        """It is there from now on. The pages must be free, and at least one."""
        insort(self._firsts, first)
        self._things[first] = pages, thing
        while self._packed in self._things:
            self._packed += self._things[self._packed][0]

    def at(self, first: int) -> Thing | None:
        """What begins there."""
        found = self._things.get(first)
        return found[1] if found else None

    def around(self, page: int) -> Thing | None:
        """What this page belongs to."""
        at = bisect_right(self._firsts, page) - 1
        if at < 0:
            return None
        pages, thing = self._things[self._firsts[at]]
        return thing if page < self._firsts[at] + pages else None

    def remove(self, first: int) -> None:
        """It is not there any more."""
        del self._things[first]
        del self._firsts[bisect_left(self._firsts, first)]
        self._packed = min(self._packed, first)
