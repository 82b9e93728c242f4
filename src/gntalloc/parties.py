"""Take things of several parties in turn, so that one with very many does not keep the others waiting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["Parties"]

Thing = TypeVar("Thing", bound="Hashable")


class Parties(Generic[Thing]):
    """Keep a queue for each party."""

    def __init__(self) -> None:
        self._queues: dict[Hashable, dict[Thing, None]] = {}  # the party whose turn is next comes first

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, party: Hashable, thing: Thing) -> None:
        """Add a thing at the end of its party's queue. A thing that is there keeps its place."""
        self._queues.setdefault(party, {})[thing] = None

    def discard(self, party: Hashable, thing: Thing) -> None:
        """Remove a thing. A thing that is not there is no error."""
        queue = self._queues.get(party)
        if queue is not None:
            queue.pop(thing, None)
            if not queue:
                del self._queues[party]

    def take(self) -> Thing:
        """Take the first thing of the party whose turn it is. There must be one."""
        party, queue = next(iter(self._queues.items()))
        thing = next(iter(queue))
        del queue[thing], self._queues[party]
        if queue:
            self._queues[party] = queue  # at the end
        return thing
