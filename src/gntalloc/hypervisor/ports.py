"""Event channel ports: which port of mine belongs to which port of whom, and which of them is pending.

The life of a port. `peer` is the one domain that may be, or is, at the other end.

    state        send                 a peer binds to it   close             the other end closes, or its domain dies
    free         refused              refused              refused           -
    unbound      dropped              -> interdomain       -> free           -
    interdomain  the other: pending   refused              -> free           -> unbound, for the same peer
    virq         refused              refused              -> free           -

A port is pending or not: what is sent before the guest has taken it collapses into one. Port 0 is never given out;
the lowest free port is, as soon as it is free.

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
    """Xen would not: `code` is its errno, the text the reason."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(code, why)
        self.code = code
        self.why = why


class State(enum.Enum):
    """Of a port in use; one that is free is not there."""

    UNBOUND = "unbound"
    INTERDOMAIN = "interdomain"
    VIRQ = "virq"


class Port:
    """One port in use. `remote` is the number of the other end in domain `peer`, once there is one."""

    __slots__ = ("peer", "pending", "remote", "state", "virq")

    def __init__(self, state: State, *, peer: int = -1, remote: int = 0, virq: int = -1) -> None:
        self.state = state
        self.peer = peer
        self.remote = remote
        self.virq = virq
        self.pending = False


class Ports:
    """The ports of one domain. `upcall` is told the number of each port that becomes pending."""

    def __init__(self, domid: int, domains: Mapping[int, Ports]) -> None:
        self.domid = domid
        self.upcall: Callable[[int], None] | None = None
        self._domains = domains
        self._ports: dict[int, Port] = {}
        self._freed: list[int] = []  # a heap
        self._never_used = 1

    def get(self, number: int) -> Port | None:
        """The port of that number, if it is in use."""
        return self._ports.get(number)

    def bind_unbound(self, peer: int) -> int:
        """A new port, which domain `peer` may bind to. There need not be such a domain.

        Raises:
            PortRefused: ENOSPC there is no free port.
        """
        return self._take(Port(State.UNBOUND, peer=self.domid if peer == DOMID_SELF else peer))

    def bind_interdomain(self, peer: int, remote: int) -> int:
        """A new port whose other end is port `remote` of domain `peer`. It is pending at once.

        Raises:
            PortRefused: ESRCH no such domain; ENOSPC no free port; EINVAL that port is not for us, or not any more.
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
        """A new port for a virtual interrupt; nothing in this machine ever raises one.

        Raises:
            PortRefused: EINVAL there is none of that number; EEXIST it is bound already; ENOSPC no free port.
        """
        if not 0 <= virq < VIRQS:
            raise PortRefused(errno.EINVAL, f"there is no virtual interrupt {virq}; they go from 0 to {VIRQS - 1}")
        if any(port.virq == virq for port in self._ports.values()):
            raise PortRefused(
                errno.EEXIST, f"virtual interrupt {virq} is bound to a port of domain {self.domid} already"
            )
        return self._take(Port(State.VIRQ, virq=virq))

    def send(self, number: int) -> None:
        """Make the other end pending. Nobody there is no error.

        Raises:
            PortRefused: EINVAL the port is free, or a virtual interrupt's.
        """
        port = self._ports.get(number)
        if port is None or port.state is State.VIRQ:
            raise PortRefused(errno.EINVAL, f"port {number} of domain {self.domid} has no other end to send to")
        if port.state is State.INTERDOMAIN:
            self._domains[port.peer].arrive(port.remote)

    def arrive(self, number: int) -> None:
        """An event for a port in use. While it is pending, further ones are nothing new."""
        port = self._ports[number]
        if not port.pending:
            port.pending = True
            if self.upcall is not None:
                self.upcall(number)

    def left_alone(self, number: int) -> None:
        """The other end of a port closed: it waits for another one, of the same domain."""
        port = self._ports[number]
        port.state = State.UNBOUND
        port.remote = 0

    def take_pending(self, number: int) -> bool:
        """Whether the port was pending. It is not any more."""
        port = self._ports.get(number)
        if port is None or not port.pending:
            return False
        port.pending = False
        return True

    def close(self, number: int) -> None:
        """Free the port.

        Raises:
            PortRefused: EINVAL it is free already.
        """
        port = self._ports.pop(number, None)
        if port is None:
            raise PortRefused(errno.EINVAL, f"port {number} of domain {self.domid} is free already")
        heapq.heappush(self._freed, number)
        if port.state is State.INTERDOMAIN:
            self._domains[port.peer].left_alone(port.remote)

    def close_all(self) -> None:
        """The domain dies."""
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
    """The ports of all domains."""

    def __init__(self) -> None:
        self._domains: dict[int, Ports] = {}

    def create(self, domid: int, kind: type[AnyPorts]) -> AnyPorts:
        """Make the ports of a new domain: none in use."""
        ports = self._domains[domid] = kind(domid, self._domains)
        return ports

    def of(self, domid: int) -> Ports | None:
        """The ports of a domain, if it is there."""
        return self._domains.get(domid)

    def destroy(self, domid: int) -> None:
        """The domain dies: its ports are free, their other ends wait for a domain of that number."""
        self._domains[domid].close_all()
        del self._domains[domid]
