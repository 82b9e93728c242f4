"""Event channels: a port here, a port in a peer's domain, and a bell between them.

    port = domain.events.bind(peer)                 # here; tell the peer port.number
    port = domain.events.connect(peer, number)      # there
    port.notify()
    port.wait(timeout=1.0)

An event says that something happened, not how often: those that nobody has taken yet are one. So look at what the
event is about after each `wait`, and at all of it.

A port that has had its event is masked until it is *re-armed*. `wait` re-arms before it waits, so the order is the
safe one: event, work, re-arm. Who waits on `fileno()` instead calls `take`, works, and calls `rearm`.

Each port is a device file of its own: its descriptor tells of nothing else, and goes with it.

Sources: the kernel's UAPI header xen/evtchn.h; xenevtchn.h of Xen for the order of things.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Self

from gntalloc import waits
from gntalloc.abi.evtchn import (
    BIND_INTERDOMAIN,
    BIND_UNBOUND_PORT,
    NOTIFY,
    PORT,
    RESET,
    BindInterdomain,
    BindUnboundPort,
    Notify,
)
from gntalloc.clock import Deadline
from gntalloc.errors import Busy, Closed, DeviceError, EventsLost, TimedOut
from gntalloc.guest.peers import count_of, domid_of
from gntalloc.unclosed import warn_unclosed

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.guest.devices import DeviceFile, Devices
    from gntalloc.guest.peers import HasDomid

__all__ = ["Events", "Port"]


class Events:
    """The event channels of a domain. `Domain.events` is one."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    def bind(self, peer: int | HasDomid) -> Port:
        """Bind a new port that `peer`, a Domain or a domid, may connect to: tell it the port's number.

        Events sent before it has connected are lost.

        Raises:
            DeviceError: ENOSPC the domain has no port left.
        """
        domid = domid_of(peer)
        return self._open(domid, BIND_UNBOUND_PORT, BindUnboundPort(domid).pack())

    def connect(self, peer: int | HasDomid, number: int) -> Port:
        """Connect a new port to the port `number` that `peer` has bound for this domain.

        It has an event from the start, without anybody's doing.

        Raises:
            DeviceError: ESRCH there is no such domain; EINVAL that port is not for this domain, or is connected
                already; ENOSPC the domain has no port left.
        """
        domid = domid_of(peer)
        port = count_of(number, "the number of a port")
        return self._open(domid, BIND_INTERDOMAIN, BindInterdomain(domid, port).pack())

    def reopen(self, descriptor: int, number: int, peer: int) -> Port:
        """Take over a bound port, by the descriptor of its file that another process gave. This object owns it then."""
        return Port(self._devices.reopen("evtchn", descriptor), number, peer)

    def _open(self, peer: int, request: int, argument: bytes) -> Port:
        file = self._devices.open("evtchn")
        try:
            number = file.ioctl(request, bytearray(argument))
        except BaseException:
            file.close()
            raise
        return Port(file, number, peer)


class Port:
    """One end of an event channel. Any thread may notify; one at a time may wait.

    Attributes:
        number: of the port in this domain.
        peer: the domid at the other end.
    """

    def __init__(self, file: DeviceFile, number: int, peer: int) -> None:
        self.number = number
        self.peer = peer
        self._file = file
        self._notify = Notify(number).pack()
        self._written = PORT.pack(number)
        self._masked = False
        self._waiting = threading.Lock()
        self._poll = waits.poll()  # of the file alone; used with the lock held
        self._poll.register(file.fileno(), waits.POLLIN)
        self._bell = -1  # an eventfd that wakes a waiter when the port is closed
        self._closed = False

    def notify(self) -> None:
        """Send an event. That nobody is at the other end any more is no error."""
        self._file.ioctl(NOTIFY, self._notify)

    def notify_soon(self) -> None:
        """Notify without waiting for it: the event may come a moment after the call."""
        self._file.notify(self.number)

    def wait(self, *, timeout: float | None = None) -> None:
        """Wait for an event. The port stays masked until the next `wait` or `rearm`.

        Args:
            timeout: seconds; None waits for ever, 0 does not wait.

        Raises:
            TimedOut: there was none.
            Busy: another thread waits on this port.
            EventsLost: see there. The port is as good as new.
            Closed: the port was closed.
            MachineGone: nobody will send events any more.
        """
        deadline = Deadline(timeout)
        if not self._waiting.acquire(blocking=False):
            raise Busy(f"{self!r} cannot be waited on: another thread does; one waiter a port")
        try:
            if self._masked:
                self.rearm()
            if self._bell < 0 and not self._closed:  # before it is looked whether the port is closed
                self._bell = os.eventfd(0, os.EFD_CLOEXEC)
            while not self._take():
                if not self._sleep(deadline.milliseconds):
                    raise TimedOut(f"no event came to {self!r} within {timeout} s; wait again")
        finally:
            self._waiting.release()

    def take(self) -> bool:
        """Take an event if one is there. For use after select on `fileno()`; `rearm` when the work is done.

        Raises:
            Busy, EventsLost, Closed, MachineGone: as `wait`.
        """
        if not self._waiting.acquire(blocking=False):
            raise Busy(f"{self!r} has a waiter, which will take the event")
        try:
            return self._take()
        finally:
            self._waiting.release()

    def take_and_rearm(self) -> None:
        """Both at once, for the only waiter, who has just seen that `fileno()` is readable: fewer system calls.

        Raises:
            EventsLost, Closed, MachineGone: as `wait`.
        """
        if self._read():
            self.rearm()

    def rearm(self) -> None:
        """Let the port have its next event; one that came meanwhile follows at once. Too often does no harm."""
        self._masked = False
        self._file.write(self._written)

    def fileno(self) -> int:
        """Give a descriptor that is readable while an event waits to be taken, or when the machine is gone."""
        return self._file.fileno()

    @property
    def lost(self) -> bool:
        """Whether the machine or the domain that it was bound in has ended."""
        return self._file.lost

    def close(self) -> None:
        """Give the port back; the peer's is free to be connected to again. Can be repeated. A waiter gets Closed."""
        self._closed = True
        if self._bell >= 0:
            os.eventfd_write(self._bell, 1)
        with self._waiting:
            self._file.close()
            if self._bell >= 0:
                os.close(self._bell)
                self._bell = -1

    def let_go(self) -> None:
        """Close this process's descriptor of it. The port is for another process, which has one too."""
        self._closed = True
        self._file.close()
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, _warn: Callable[[object], bool] = warn_unclosed) -> None:
        if not getattr(self, "_closed", True) and _warn(self):
            self.close()

    def __repr__(self) -> str:
        return f"<{'closed ' if self._closed else ''}Port {self.number}, of domain {self.peer}>"

    def _sleep(self, milliseconds: float | None) -> bool:
        """Until there may be an event, or the port is closed. False: neither."""
        poll = waits.poll()
        poll.register(self._file.fileno(), waits.POLLIN)
        poll.register(self._bell, waits.POLLIN)
        return bool(poll.poll(milliseconds))

    def _take(self) -> bool:
        """Never waits: the descriptor is looked at first. Its O_NONBLOCK cannot be relied on with some kernels."""
        if self._closed:
            raise Closed(f"{self!r} cannot be waited on; bind another")
        return bool(self._poll.poll(0)) and self._read()

    def _read(self) -> bool:
        try:
            events = self._file.read(PORT.size)
        except DeviceError as error:
            if error.errno == errno.EAGAIN:  # a child made by fork was faster
                return False
            if error.errno != errno.EFBIG:
                raise
            self._file.ioctl(RESET, None)
            self.rearm()
            raise EventsLost(
                f"events of {self!r} were lost: it was re-armed without taking them; look at all that they may have "
                "been about, and go on"
            ) from error
        self._masked = bool(events)
        return self._masked
