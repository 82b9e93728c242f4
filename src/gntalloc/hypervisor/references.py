"""Keep the free references of a grant table, in the order in which they became free.

They are kept as bare numbers: an object for each would hold memory in place that very many grants had once.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["References"]

_MUCH = 4096  # numbers that were given out, after which their room is given back


class References:
    """Keep a queue of numbers."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = array("I", numbers)
        self._first = 0  # those before it were given out

    def __len__(self) -> int:
        return len(self._numbers) - self._first

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers[self._first :])

    def append(self, number: int) -> None:
        """Add a number, which is free for the shortest time now."""
        self._numbers.append(number)

    def extend(self, numbers: Iterable[int]) -> None:
        """Add numbers, one after the other."""
        self._numbers.extend(numbers)

    def take_oldest(self, count: int) -> list[int]:
        """Take up to `count` numbers, those that have been free for longest, in order."""
        end = self._first + count
        taken = self._numbers[self._first : end].tolist()
        self._first += len(taken)
        if self._first >= _MUCH and self._first > len(self._numbers) // 2:
            del self._numbers[: self._first]
            self._first = 0
        return taken

    def take_newest(self, count: int) -> list[int]:
        """Take up to `count` numbers, those that were freed last, the last one first."""
        begin = max(self._first, len(self._numbers) - count)
        taken = self._numbers[begin:].tolist()
        del self._numbers[begin:]
        taken.reverse()
        return taken
