"""Choose the index of each thing: a run of page numbers in an open file of gntdev, which overlaps no other.

Linux looks at the runs in order, and takes the first gap that is larger than needed, or else the end. So does this
module, without looking at the runs that are packed from the beginning on: if none was ever given back it looks at none.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Indexes"]

Thing = TypeVar("Thing")


class Indexes(Generic[Thing]):
    """Keep things by the number of their first page."""

    __slots__ = ("_firsts", "_packed", "_things")

    def __init__(self) -> None:
        self._things: dict[int, tuple[int, Thing]] = {}  # first page -> how many, and what
        self._firsts: list[int] = []  # in order
        self._packed = 0  # below this page there is no gap at all

    def __iter__(self) -> Iterator[Thing]:
        """Give the things, in order."""
        return (self._things[first][1] for first in self._firsts)

    def first_gap(self, pages: int) -> int:
        """Find the place for `pages` pages. A gap that they would just fill is not taken, as in Linux."""
        first = self._packed
        for at in range(bisect_left(self._firsts, first), len(self._firsts)):
            if first + pages < self._firsts[at]:
                break
            first = self._firsts[at] + self._things[self._firsts[at]][0]
        return first

    @property
    def end(self) -> int:
        """The number of the page after the last one in use."""
        return self._firsts[-1] + self._things[self._firsts[-1]][0] if self._firsts else 0

    def has_room(self, first: int, pages: int) -> bool:
        """Say whether nothing is at any of these pages."""
        at = bisect_right(self._firsts, first + pages - 1) - 1
        return at < 0 or self._firsts[at] + self._things[self._firsts[at]][0] <= first

    def put(self, first: int, pages: int, thing: Thing) -> None:
        """Put a thing there. The pages must be free, and at least one."""
        insort(self._firsts, first)
        self._things[first] = pages, thing
        while self._packed in self._things:
            self._packed += self._things[self._packed][0]

    def at(self, first: int) -> Thing | None:
        """Give the thing that begins at page `first`."""
        found = self._things.get(first)
        return found[1] if found else None

    def around(self, page: int) -> Thing | None:
        """Give the thing that this page belongs to."""
        at = bisect_right(self._firsts, page) - 1
        if at < 0:
            return None
        pages, thing = self._things[self._firsts[at]]
        return thing if page < self._firsts[at] + pages else None

    def remove(self, first: int) -> None:
        """Remove the thing that begins at page `first`."""
        del self._things[first]
        del self._firsts[bisect_left(self._firsts, first)]
        self._packed = min(self._packed, first)
