"""Cause the faults that a test asks for: events late or repeated, quotas of xenstore reached. All are legal in Xen.

A fault lasts as long as the control connection that ordered it, so a test that is killed leaves none behind. Of several
faults at once the longest delay, the most repetitions and the smallest quotas hold.
"""

from __future__ import annotations

import errno
import heapq
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from gntalloc import clock
from gntalloc.errors import GntallocError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.hypervisor.ports import Port
    from gntalloc.machine.disturbed import DisturbedPorts
    from gntalloc.machine.machine import Machine

__all__ = ["Faults"]

_LONGEST_DELAY = 3600 * 1_000_000
_MOST_LATE = 65536  # events; further ones come on time


class _Fault(NamedTuple):
    """Keep the faults that one order asked for."""

    owner: object
    domid: int
    delay: float  # seconds
    repeats: int
    quotas: dict[str, int]


class _Late(NamedTuple):
    """Keep an event that waits for its time."""

    due: float
    number: int  # in the order of their coming
    ports: DisturbedPorts
    at: int
    port: Port


class Faults:
    """Keep the faults of one machine. The machine's loop waits no longer than `patience`, and calls `serve`."""

    def __init__(self, machine: Machine) -> None:
        self.late: list[_Late] = []
        """Events that wait: a heap."""
        self._machine = machine
        self._faults: list[_Fault] = []
        self._on_the_way: set[Port] = set()  # a later event for the same port is the same event meanwhile
        self._numbers = count()

    def disturb(
        self,
        owner: object,
        domid: int,
        *,
        delay: int = 0,
        repeats: int = 0,
        nodes: int | None = None,
        watches: int | None = None,
        transactions: int | None = None,
    ) -> None:
        """Disturb a domain, until `calm` is called for `owner`.

        Args:
            owner: the connection that asks.
            domid: the domain.
            delay: the delay of its events, in microseconds.
            repeats: how often each event comes again.
            nodes: so many more nodes it may own in xenstore.
            watches: so many more watches it may set.
            transactions: so many more transactions it may have open at a time.

        Raises:
            GntallocError: ESRCH: there is no such domain. EINVAL: a number is negative, or far too large.
        """
        self._machine.guest(domid)
        left = {"nodes": nodes, "watches": watches, "transactions": transactions}
        if (
            not 0 <= delay <= _LONGEST_DELAY
            or repeats < 0
            or any(more is not None and more < 0 for more in left.values())
        ):
            raise GntallocError(
                errno.EINVAL, f"a fault has numbers from 0 up, and a delay of {_LONGEST_DELAY} us at most"
            )
        domain = self._machine.store.domains.know(domid)
        quotas = {}
        for name, more in left.items():
            if more is not None and domain is not None:
                # Watches and transactions are compared before the new one is counted, and may be one more.
                quotas[name] = getattr(domain, name) + more - (name != "nodes")
        self._faults.append(_Fault(owner, domid, delay / 1e6, repeats, quotas))
        self._apply(domid)

    def calm(self, owner: object) -> None:
        """End the faults that `owner` asked for. Late events of those domains come now."""
        over = {fault.domid for fault in self._faults if fault.owner is owner}
        self._faults = [fault for fault in self._faults if fault.owner is not owner]
        for domid in over & self._machine.guests.keys():
            self._apply(domid)

    def patience(self) -> float | None:
        """Give the seconds until the next late event is due. None: none is late."""
        return max(0.0, self.late[0].due - clock.now()) if self.late else None

    def serve(self) -> None:
        """Deliver the events that are due."""
        now = clock.now()
        while self.late and self.late[0].due <= now:
            self._deliver(heapq.heappop(self.late))

    def _apply(self, domid: int) -> None:
        faults = [fault for fault in self._faults if fault.domid == domid]
        ports = self._machine.guest(domid).ports
        delay = max((fault.delay for fault in faults), default=0.0)
        ports.postpone = self._postpone(ports, delay) if delay else None
        if not delay:
            self._deliver_all(ports)
        ports.calm()
        ports.repeats = max((fault.repeats for fault in faults), default=0)
        domain = self._machine.store.domains.get(domid)
        if domain is not None:
            usual = self._machine.store.quotas
            lowered = [fault.quotas for fault in faults if fault.quotas]
            least = {name: min(each[name] for each in lowered if name in each) for each in lowered for name in each}
            domain.quotas = usual.but(**least) if least else usual

    def _postpone(self, ports: DisturbedPorts, delay: float) -> Callable[[int, Port], None]:
        def postpone(at: int, port: Port) -> None:
            if port in self._on_the_way:
                return
            if len(self.late) >= _MOST_LATE:
                ports.deliver(at, port)
                return
            self._on_the_way.add(port)
            heapq.heappush(self.late, _Late(clock.now() + delay, next(self._numbers), ports, at, port))

        return postpone

    def _deliver_all(self, ports: DisturbedPorts) -> None:
        now = sorted(event for event in self.late if event.ports is ports)
        self.late = [event for event in self.late if event.ports is not ports]
        heapq.heapify(self.late)
        for event in now:
            self._deliver(event)

    def _deliver(self, event: _Late) -> None:
        self._on_the_way.discard(event.port)
        event.ports.deliver(event.at, event.port)
