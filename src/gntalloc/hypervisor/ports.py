"""Keep event channel ports: which port of a domain belongs to which port of another, and which of them is pending.

The life of a port. `peer` is the one domain that may be, or is, at the other end.

    state        send                 a peer binds to it   close             the other end closes, or its domain dies
    free         refused              refused              refused           -
    unbound      dropped              -> interdomain       -> free           -
    interdomain  the other: pending   refused              -> free           -> unbound, for the same peer
    virq         refused              refused              -> free           -

A port is pending or not: events that come before the guest has taken the first collapse into one. Port 0 is never given
out. The lowest free port is given out, as soon as it is free.

Sources: Xen's public event_channel.h and common/event_channel.c (order of the checks, errnos, the lowest free port,
a port that is pending as soon as it is bound to a peer's), xen.h (24 virtual interrupts), libxl (1023 ports a guest).
"""

from __future__ import annotations

import enum
import errno
import heapq
from typing import TYPE_CHECKING, TypeVar

from gntalloc.abi.grants import DOMID_SELF

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["LAST_PORT", "EventChannels", "Port", "PortRefused", "Ports", "State"]

AnyPorts = TypeVar("AnyPorts", bound="Ports")

LAST_PORT = 1023  # what libxl gives a guest unless told otherwise
VIRQS = 24


class PortRefused(Exception):
    """Xen would not carry out an operation: `code` is its errno, the text the reason."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(code, why)
        self.code = code
        self.why = why


class State(enum.Enum):
    """Name the state of a port in use. A free port has no entry."""

    UNBOUND = "unbound"
    INTERDOMAIN = "interdomain"
    VIRQ = "virq"


class Port:
    """Keep one port in use. `remote` is the number of the other end in domain `peer`, once there is one."""

    __slots__ = ("peer", "pending", "remote", "state", "virq")

    def __init__(self, state: State, *, peer: int = -1, remote: int = 0, virq: int = -1) -> None:
        self.state = state
        self.peer = peer
        self.remote = remote
        self.virq = virq
        self.pending = False


class Ports:
    """Keep the ports of one domain. `upcall` is told the number of each port that becomes pending."""

    def __init__(self, domid: int, domains: Mapping[int, Ports]) -> None:
        self.domid = domid
        self.upcall: Callable[[int], None] | None = None
        self._domains = domains
        self._ports: dict[int, Port] = {}
        self._freed: list[int] = []  # a heap
        self._never_used = 1

    def get(self, number: int) -> Port | None:
        """Give the port of that number, if it is in use."""
        return self._ports.get(number)

    def bind_unbound(self, peer: int) -> int:
        """Make a port that domain `peer` may bind to. There need not be such a domain.

        Raises:
            PortRefused: ENOSPC: there is no free port.
        """
        return self._take(Port(State.UNBOUND, peer=self.domid if peer == DOMID_SELF else peer))

    def bind_interdomain(self, peer: int, remote: int) -> int:
        """Make a port whose other end is port `remote` of domain `peer`. It is pending at once.

        Raises:
            PortRefused: ESRCH: no such domain. ENOSPC: no free port. EINVAL: that port does not wait for this domain.
        """
        peer = self.domid if peer == DOMID_SELF else peer
        domain = self._domains.get(peer)
        if domain is None:
            raise PortRefused(errno.ESRCH, f"there is no domain {peer}")
        number = self._free_number()
        other = domain.get(remote)
        if other is None or other.state is not State.UNBOUND or other.peer != self.domid:
            what = "free" if other is None else f"{other.state.value}, for domain {other.peer}"
            raise PortRefused(errno.EINVAL, f"port {remote} of domain {peer} does not wait for us: it is {what}")
        self._take(Port(State.INTERDOMAIN, peer=peer, remote=remote))
        other.state = State.INTERDOMAIN
        other.remote = number
        self.arrive(number)
        return number

    def bind_virq(self, virq: int) -> int:
        """Make a port for a virtual interrupt. Nothing in this machine ever raises one.

        Raises:
            PortRefused: EINVAL: no interrupt has that number. EEXIST: it is bound already. ENOSPC: no free port.
        """
        if not 0 <= virq < VIRQS:
            raise PortRefused(errno.EINVAL, f"there is no virtual interrupt {virq}; they go from 0 to {VIRQS - 1}")
        if any(port.virq == virq for port in self._ports.values()):
            raise PortRefused(
                errno.EEXIST, f"virtual interrupt {virq} is bound to a port of domain {self.domid} already"
            )
        return self._take(Port(State.VIRQ, virq=virq))

    def send(self, number: int) -> None:
        """Make the other end pending. A port without another end is no error.

        Raises:
            PortRefused: EINVAL: the port is free, or a virtual interrupt's.
        """
        port = self._ports.get(number)
        if port is None or port.state is State.VIRQ:
            raise PortRefused(errno.EINVAL, f"port {number} of domain {self.domid} has no other end to send to")
        if port.state is State.INTERDOMAIN:
            self._domains[port.peer].arrive(port.remote)

    def arrive(self, number: int) -> None:
        """Take an event for a port in use. While the port is pending, further events change nothing."""
        port = self._ports[number]
        if not port.pending:
            port.pending = True
            if self.upcall is not None:
                self.upcall(number)

    def left_alone(self, number: int) -> None:
        """Note that the other end of a port closed. The port waits for another end, of the same domain."""
        port = self._ports[number]
        port.state = State.UNBOUND
        port.remote = 0

    def take_pending(self, number: int) -> bool:
        """Return whether the port was pending, and make it not pending."""
        port = self._ports.get(number)
        if port is None or not port.pending:
            return False
        port.pending = False
        return True

    def close(self, number: int) -> None:
        """Free the port.

        Raises:
            PortRefused: EINVAL: it is free already.
        """
        port = self._ports.pop(number, None)
        if port is None:
            raise PortRefused(errno.EINVAL, f"port {number} of domain {self.domid} is free already")
        heapq.heappush(self._freed, number)
        if port.state is State.INTERDOMAIN:
            self._domains[port.peer].left_alone(port.remote)

    def close_all(self) -> None:
        """Free all ports, as the domain dies."""
        for number in list(self._ports):
            self.close(number)

    def _free_number(self) -> int:
        if self._freed:
            return self._freed[0]
        if self._never_used > LAST_PORT:
            raise PortRefused(errno.ENOSPC, f"domain {self.domid} has all of its {LAST_PORT} ports in use; close some")
        return self._never_used

    def _take(self, port: Port) -> int:
        number = self._free_number()
        if self._freed:
            heapq.heappop(self._freed)
        else:
            self._never_used += 1
        self._ports[number] = port
        return number


class EventChannels:
    """Keep the ports of all domains."""

    def __init__(self) -> None:
        self._domains: dict[int, Ports] = {}

    def create(self, domid: int, kind: type[AnyPorts]) -> AnyPorts:
        """Make the ports of a new domain: none in use."""
        ports = self._domains[domid] = kind(domid, self._domains)
        return ports

    def of(self, domid: int) -> Ports | None:
        """Give the ports of a domain, if it is there."""
        return self._domains.get(domid)

    def destroy(self, domid: int) -> None:
        """Free the ports of a domain that dies. Their other ends wait for a domain of that number."""
        self._domains[domid].close_all()
        del self._domains[domid]
