"""Say when things are to be looked at again: each several times after something was heard of it, ever more rarely."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Generic, TypeVar

from gntalloc import clock

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

__all__ = ["Timetable"]

Thing = TypeVar("Thing", bound="Hashable")


class Timetable(Generic[Thing]):
    """Keep the time of the next look at each thing.

    Args:
        intervals: seconds before each look, counted from the one before it.
        eager: so many looks of a thing come with every `take`, be they due or not.
    """

    def __init__(self, intervals: Sequence[float], eager: int) -> None:
        self._intervals = intervals
        self._eager_looks = eager
        self._planned: dict[Thing, tuple[int, float]] = {}  # looks so far, time of the next
        self._heap: list[tuple[float, int, Thing]] = []  # times, some of which stand no more
        self._number = count()  # keeps order where two times are the same
        self.eager: dict[Thing, None] = {}
        """Things with few looks so far."""

    def __bool__(self) -> bool:
        return bool(self._planned)

    def __iter__(self) -> Iterator[Thing]:
        return iter(self._planned)

    def plan(self, thing: Thing, so_far: int) -> None:
        """Plan the next look at a thing that has had `so_far`, fewer than there are intervals."""
        planned = self._planned.get(thing)
        if planned is not None and planned[0] == so_far:
            return  # its time stands
        self.discard(thing)
        due = clock.now() + self._intervals[so_far]
        self._planned[thing] = so_far, due
        heappush(self._heap, (due, next(self._number), thing))
        if so_far < self._eager_looks:
            self.eager[thing] = None

    def discard(self, thing: Thing) -> None:
        """Look at a thing no more. One that is not there is no error."""
        if self._planned:
            self._planned.pop(thing, None)
            self.eager.pop(thing, None)

    @property
    def due(self) -> float | None:
        """The time of the next look, or an earlier one at which nothing is to be done. None: nothing is planned."""
        return self._heap[0][0] if self._planned else None

    def take(self) -> dict[Thing, int]:
        """Give the things whose look is due, or eager, each with its looks so far. Those that were due are off."""
        if not self._planned:
            self._heap.clear()
            return {}
        now = clock.now()
        found = {thing: self._planned[thing][0] for thing in self.eager}
        while self._heap and self._heap[0][0] <= now:
            due, _, thing = heappop(self._heap)
            so_far, really_due = self._planned.get(thing, (0, 0.0))
            if really_due == due:
                self.discard(thing)
                found[thing] = so_far + 1
        return found
