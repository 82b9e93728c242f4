"""Delay or repeat the events of event channel ports, when a test asks for it.

Both are legal in Xen: no guest can rely on more. A port whose event is repeated is pending once more as soon as the
event was taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gntalloc.hypervisor.ports import Port, Ports

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["DisturbedPorts"]


class DisturbedPorts(Ports):
    """Keep the ports of one domain. They behave as `Ports` do until `postpone` or `repeats` is set."""

    def __init__(self, domid: int, domains: Mapping[int, Ports]) -> None:
        super().__init__(domid, domains)
        self.postpone: Callable[[int, Port], None] | None = None
        """The function that is told of each event instead, if there is one. It calls `deliver` later."""
        self.repeats = 0
        """The number of times that an event comes again, each time when the one before was taken."""
        # By the numbers of ports. The next event at a number, of this port or of a later one, begins both anew.
        self._left: dict[int, int] = {}  # so often the event still comes again
        self._echoes: set[int] = set()  # the last event was one that came again

    def arrive(self, number: int) -> None:
        """See `Ports`."""
        if self.postpone is not None:
            self.postpone(number, self._ports[number])
        else:
            self.deliver(number, self._ports[number])

    def deliver(self, number: int, port: Port) -> None:
        """Let an event come now for a port, if that is still in use."""
        if self.get(number) is not port:
            return
        self._echoes.discard(number)
        if self.repeats:
            self._left[number] = self.repeats
        super().arrive(number)

    def calm(self) -> None:
        """End all repetitions. A port that is pending only by one is pending no more."""
        self.repeats = 0
        for number in self._echoes:
            super().take_pending(number)
        self._echoes.clear()
        self._left.clear()

    def take_pending(self, number: int) -> bool:
        """See `Ports`. The port is pending again if its event comes again."""
        taken = super().take_pending(number)
        if taken and number in self._left:
            self._come_again(number)
        return taken

    def _come_again(self, number: int) -> None:
        self._ports[number].pending = True
        self._echoes.add(number)
        self._left[number] -= 1
        if not self._left[number]:
            del self._left[number]
