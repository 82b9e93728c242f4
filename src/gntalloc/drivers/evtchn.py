"""Serve /dev/xen/evtchn: bind event channels, send events, read the ports that had one, write back those re-armed.

A port that has an event is put into its file's ring, once. It is masked from then on, until the program writes its
number back. Events in between collapse into one, which comes right after the write. So a ring overflows only for a
program that writes ports back without reading them.

Ports in the ring travel to the program's end of the file, its `Outlet`, at once: there read(2) and poll(2) are the
kernel's own. The ring asks the outlet how much the program has read, and only when it seems full.

A port lives for as long as something refers to it: the file that bound it, and each unmap notification that is set for
it (`take`, `notify`, `drop`). So a notification fires even if the file was closed first.

Sources: Linux's evtchn.c and events_base.c as of 6.1, BIND_STATIC as of 6.6; docs/differences.md.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from typing import TYPE_CHECKING, Protocol

from gntalloc.abi.evtchn import (
    BIND_INTERDOMAIN,
    BIND_STATIC,
    BIND_UNBOUND_PORT,
    BIND_VIRQ,
    DEVICE,
    LEAST_RING,
    NOTIFY,
    PORT,
    RESET,
    RESTRICT_DOMID,
    UNBIND,
    BindInterdomain,
    BindStatic,
    BindUnboundPort,
    BindVirq,
    Notify,
    RestrictDomid,
    Unbind,
)
from gntalloc.abi.grants import DOMID_FIRST_RESERVED
from gntalloc.errors import DeviceError
from gntalloc.hypervisor.ports import PortRefused, Ports
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gntalloc.drivers.chardev import Caller, File, Plan, Record

__all__ = ["EvtchnDriver", "Outlet"]

log = logging.getLogger("gntalloc.machine")

MAX_REFERENCES = 32767  # to one port
USABLE_PORTS = 1024  # as long as Xen's event array is one page; LAST_PORT is its last
MAX_PORTS = 131072  # the most that any event array allows
_TIMER, _DEBUG = 0, 1  # virtual interrupts that a guest's kernel keeps for itself


class Outlet(Protocol):
    """Hold the program's end of a ring: a queue that the program itself reads."""

    def put(self, port: int) -> bool:
        """Add a port. False: the queue is full; `EvtchnDriver.hand_over` will be called when it is not."""

    def unread(self) -> int:
        """Count the ports that the program has not read."""


class EventRing:
    """Queue the ports of one file that had an event, oldest first."""

    __slots__ = ("_entries", "_handed", "outlet", "overflow", "size")

    def __init__(self) -> None:
        self.size = 0
        self.overflow = False
        self.outlet: Outlet | None = None
        self._entries: deque[int] = deque()  # as far as we know none of them was read
        self._handed = 0  # so many, from the left, are in the outlet

    def grow(self, ports: int) -> None:
        """Make room for one event of each of so many ports. The ring never shrinks."""
        if ports > self.size:
            self.size = 2 * self.size or LEAST_RING

    def put(self, port: int) -> None:
        """Add an event. Without room it is lost, and `overflow` is set."""
        if len(self._entries) >= self.size:
            self._forget_what_was_read()
        if len(self._entries) >= self.size:
            self.overflow = True
        else:
            self._entries.append(port)
            self.hand_over()

    def hand_over(self) -> None:
        """Give the outlet as many ports as it takes."""
        while self.outlet is not None and self._handed < len(self._entries):
            if not self.outlet.put(self._entries[self._handed]):
                break
            self._handed += 1

    def clear(self) -> None:
        """Empty the ring. Ports in the outlet are the program's, and its side throws them away."""
        self._forget_what_was_read()
        while len(self._entries) > self._handed:
            self._entries.pop()
        self.overflow = False

    def _forget_what_was_read(self) -> None:
        if self.outlet is not None:
            for _ in range(self._handed - self.outlet.unread()):
                self._entries.popleft()
                self._handed -= 1


class Bound:
    """Keep a port that a file bound. `references` counts the file's and those of notifications."""

    __slots__ = ("enabled", "file", "number", "references")

    def __init__(self, number: int, file: File) -> None:
        self.number = number
        self.file: File | None = file  # None: unbound, and kept by notifications
        self.enabled = True
        self.references = 1


class FileState:
    """Keep the state of an open file: its ports, its ring, and the one peer it may bind to, if it is restricted."""

    __slots__ = ("ports", "restricted", "ring")

    def __init__(self) -> None:
        self.ports: dict[int, Bound] = {}
        self.ring = EventRing()
        self.restricted: int | None = None


class EvtchnDriver:
    """Serve the device for the domain that has these `ports`."""

    name = DEVICE
    unknown_request = errno.ENOSYS

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self._bound: dict[int, Bound] = {}
        # A guest's kernel has ports of its own before any program has: to xenstore and the console in domain 0, and
        # of two virtual interrupts. They belong to no file, so no program can touch them.
        ports.bind_unbound(0)
        ports.bind_unbound(0)
        ports.bind_virq(_TIMER)
        ports.bind_virq(_DEBUG)
        ports.upcall = self._upcall
        self._requests = {
            BIND_VIRQ: self._bind_virq,
            BIND_INTERDOMAIN: self._bind_interdomain,
            BIND_UNBOUND_PORT: self._bind_unbound,
            UNBIND: self._unbind,
            NOTIFY: self._notify,
            RESET: self._reset,
            RESTRICT_DOMID: self._restrict,
            BIND_STATIC: self._bind_static,
        }

    @property
    def requests(self) -> Mapping[int, Callable[[File, int, Caller], int]]:
        """Request number -> the function that serves it."""
        return self._requests

    @property
    def in_use(self) -> int:
        """The number of ports that programs bound, or keep by notifications."""
        return len(self._bound)

    def ports_of(self, file: File) -> list[int]:
        """List the ports that this file has bound."""
        return list(_state(file).ports)

    def open(self) -> FileState:
        """Make the state of a new file: no ports, and so no ring."""
        return FileState()

    # The bind calls: each answers with the port, as the result of the ioctl.

    def _bind_virq(self, file: File, address: int, caller: Caller) -> int:
        _refuse_restricted(file)
        asked = BindVirq.unpack_from(caller.read(address, BindVirq.SIZE))
        return self._bind(file, lambda: self._ports.bind_virq(asked.virq))

    def _bind_interdomain(self, file: File, address: int, caller: Caller) -> int:
        asked = BindInterdomain.unpack_from(caller.read(address, BindInterdomain.SIZE))
        restricted = _state(file).restricted
        if restricted not in {None, asked.remote_domain}:
            why = f"this file is restricted to domain {restricted}, and {asked.remote_domain} was asked for"
            raise DeviceError(errno.EACCES, why)
        peer = asked.remote_domain & 0xFFFF  # the hypervisor sees these 16 bits only
        return self._bind(file, lambda: self._ports.bind_interdomain(peer, asked.remote_port))

    def _bind_unbound(self, file: File, address: int, caller: Caller) -> int:
        _refuse_restricted(file)
        asked = BindUnboundPort.unpack_from(caller.read(address, BindUnboundPort.SIZE))
        return self._bind(file, lambda: self._ports.bind_unbound(asked.remote_domain & 0xFFFF))

    def _bind_static(self, file: File, address: int, caller: Caller) -> int:
        """Take a port that the tool stack should have made. In this machine it never made one."""
        number = BindStatic.unpack_from(caller.read(address, BindStatic.SIZE)).port
        if number in _state(file).ports:
            raise DeviceError(errno.EISCONN, f"port {number} is bound to this file already")
        if number >= MAX_PORTS:
            raise DeviceError(errno.ENOMEM, f"there is no port {number}; the last is {MAX_PORTS - 1}")
        if number in self._bound or self._ports.get(number) is not None:
            raise DeviceError(errno.EBUSY, f"port {number} is another file's, or the kernel's")
        self._attach(file, number)
        return 0

    def _bind(self, file: File, make: Callable[[], int]) -> int:
        try:
            number = make()
        except PortRefused as refusal:
            raise DeviceError(refusal.code, refusal.why) from None
        if number in self._bound:  # a static one, which was taken before the hypervisor gave it out
            self._ports.close(number)
            raise DeviceError(errno.EBUSY, f"port {number} was bound with BIND_STATIC, and is another file's")
        self._attach(file, number)
        return number

    def _attach(self, file: File, number: int) -> None:
        state = _state(file)
        bound = Bound(number, file)
        self._bound[number] = state.ports[number] = bound
        state.ring.grow(len(state.ports))
        self._deliver(bound)  # a port bound to a peer's has an event from the start

    # UNBIND, NOTIFY, RESET, RESTRICT_DOMID.

    def _unbind(self, file: File, address: int, caller: Caller) -> int:
        number = Unbind.unpack_from(caller.read(address, Unbind.SIZE)).port
        if number >= USABLE_PORTS:
            raise DeviceError(errno.EINVAL, f"there is no port {number}; the last is {USABLE_PORTS - 1}")
        self._detach(_state(file), _bound_here(file, number))
        return 0

    def _notify(self, file: File, address: int, caller: Caller) -> int:
        number = Notify.unpack_from(caller.read(address, Notify.SIZE)).port
        self.notify(_bound_here(file, number).number)
        return 0

    def ring(self, file: File, argument: bytes) -> bool:
        """Carry out a NOTIFY, if the port that its argument names is bound to this file. Else do nothing."""
        number: int = PORT.unpack(argument)[0]
        state: FileState = file.state  # type: ignore[assignment]  # _state would cost as much as the rest
        if number not in state.ports:
            return False
        self.notify(number)
        return True

    def _reset(self, file: File, address: int, caller: Caller) -> int:
        """Empty the ring. Ports that were in it stay masked until they are written back."""
        _state(file).ring.clear()
        return 0

    def _restrict(self, file: File, address: int, caller: Caller) -> int:
        _refuse_restricted(file)
        domid = RestrictDomid.unpack_from(caller.read(address, RestrictDomid.SIZE)).domid
        if not 0 < domid < DOMID_FIRST_RESERVED:
            raise DeviceError(errno.EINVAL, f"a file can be restricted to a domain from 1 up, and {domid} is none")
        _state(file).restricted = domid
        return 0

    # Events.

    def _upcall(self, number: int) -> None:
        """Take an event of the hypervisor's for a port of this domain."""
        bound = self._bound.get(number)
        if bound is not None:
            self._deliver(bound)

    def _deliver(self, bound: Bound) -> None:
        if bound.enabled and bound.file is not None and self._ports.take_pending(bound.number):
            bound.enabled = False
            _state(bound.file).ring.put(bound.number)

    def read(self, file: File, size: int) -> bytes:
        """Give no ports: they are in the outlet. Reading here only tells of an overflow.

        Raises:
            DeviceError: EFBIG: the ring overflowed.
        """
        if size >= PORT.size and _state(file).ring.overflow:
            raise DeviceError(
                errno.EFBIG, "events were lost: ports were written back unread; RESET, and look at every port"
            )
        return b""

    def write(self, file: File, data: bytes) -> int:
        """Let these ports have events again. Ports of other files are ignored."""
        taken = min(len(data), PAGE_SIZE) & -PORT.size
        ports = _state(file).ports
        for (number,) in PORT.iter_unpack(data[:taken]):
            bound = ports.get(number)
            if bound is not None:
                bound.enabled = True
                self._deliver(bound)
        return taken

    def attach_outlet(self, file: File, outlet: Outlet) -> None:
        """Send events to `outlet` from now on."""
        _state(file).ring.outlet = outlet
        self.hand_over(file)

    def hand_over(self, file: File) -> None:
        """Give the outlet more ports, as it may have room."""
        _state(file).ring.hand_over()

    # For the notifications of the two grant drivers.

    def take(self, number: int) -> None:
        """Refer to a port that any file of this domain bound.

        Raises:
            DeviceError: EINVAL: no program has bound it, or it has too many references.
        """
        bound = self._bound.get(number)
        if bound is None:
            raise DeviceError(errno.EINVAL, f"no program of this domain has bound port {number}")
        if bound.references >= MAX_REFERENCES:
            raise DeviceError(errno.EINVAL, f"{bound.references} notifications are set for port {number} already")
        bound.references += 1

    def notify(self, number: int) -> None:
        """Send an event. A port without another end is no error."""
        try:
            self._ports.send(number)
        except PortRefused as refusal:
            log.debug("an event was dropped: %s", refusal.why)

    def drop(self, number: int) -> None:
        """Give up a reference to the port. The last one closes it."""
        bound = self._bound[number]
        bound.references -= 1
        if bound.references:
            return
        del self._bound[number]
        if self._ports.get(number) is not None:  # a static one is not there, and no port is if the domain died first
            self._ports.close(number)

    # The end.

    def _detach(self, state: FileState, bound: Bound) -> None:
        """Take the port off the file. Its event in the ring stays there."""
        del state.ports[bound.number]
        bound.file = None
        self.drop(bound.number)

    def release(self, file: File) -> None:
        """Free the ports of the file."""
        state = _state(file)
        for bound in list(state.ports.values()):
            self._detach(state, bound)

    # There is nothing to map.

    def mmap(self, file: File, offset: int, length: int, *, writable: bool, shared: bool) -> Plan:
        """Refuse to map.

        Raises:
            DeviceError: ENODEV.
        """
        raise DeviceError(errno.ENODEV, "evtchn has no pages to map; it is for ioctl, read, write and poll")

    def unmapped(self, record: Record) -> None:
        """Do nothing: no map is ever made."""


def _state(file: File) -> FileState:
    state: FileState = file.state  # type: ignore[assignment]  # a cast would cost as much as all the rest
    return state


def _bound_here(file: File, number: int) -> Bound:
    bound = _state(file).ports.get(number)
    if bound is None:
        raise DeviceError(errno.ENOTCONN, f"port {number} is not bound to this file")
    return bound


def _refuse_restricted(file: File) -> None:
    restricted = _state(file).restricted
    if restricted is not None:
        raise DeviceError(errno.EACCES, f"this file is restricted to bind to ports of domain {restricted}, and no more")
