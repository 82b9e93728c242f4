"""Link: a frontend's connection with its backend: one ring, one port, and what tells of the backend's end.

For any device whose requests go through one ring: see docs/frontends.md.
"""

from __future__ import annotations

import contextlib
import os
import select
from typing import TYPE_CHECKING

from gntalloc import waits
from gntalloc.atomics import atomics
from gntalloc.errors import EventsLost, GntallocError, NotKnownHere, PeerClosed, PeerDied
from gntalloc.frontend.ring import Front
from gntalloc.frontend.xenbus import State, StepRefused

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gntalloc.clock import Deadline
    from gntalloc.frontend.nodes import Device
    from gntalloc.frontend.xenbus import End
    from gntalloc.guest.domain import BareDomain

__all__ = ["Link", "part", "recover"]

_GONE = (State.UNKNOWN, State.CLOSING, State.CLOSED)


def recover(end: End, deadline: Deadline) -> None:
    """Bring both ends to the beginning, whatever a predecessor left; until the backend waits for this frontend.

    Raises:
        TimedOut: it did not come there.
        PeerClosed: it is gone from xenstore.
    """
    if end.state not in {State.INITIALISING, State.CLOSED}:
        end.go(State.CLOSING)
        end.wait({State.CLOSING, State.CLOSED, State.INIT_WAIT, State.INITIALISING}, timeout=deadline.remaining)
        end.go(State.CLOSED)
    if end.state == State.CLOSED and end.peer not in {State.INITIALISING, State.INIT_WAIT}:
        end.wait({State.CLOSED}, timeout=deadline.remaining)
    end.go(State.INITIALISING)
    end.wait({State.INIT_WAIT}, timeout=deadline.remaining)


def part(end: End, *, timeout: float, alone: bool = False) -> None:
    """Close in order: tell the backend, wait until it has let go. `alone`: there is none that would.

    Raises:
        TimedOut: it has not; this end is closed nevertheless.
    """
    if end.state in {State.INITIALISED, State.CONNECTED}:
        end.go(State.CLOSING)
    try:
        if not alone:
            end.wait({State.CLOSING, State.CLOSED, State.UNKNOWN}, timeout=timeout, unless=())
    finally:
        end.go(State.CLOSED)
    if not alone:
        end.wait({State.CLOSED, State.UNKNOWN}, timeout=timeout, unless=())


class Link:
    """Made by publishing a ring and a port, and waiting until the backend is connected to both.

    The caller then reads what the backend offers, and goes to CONNECTED.

    Args:
        domain: this program's.
        device: which.
        end: recovered.
        entry: bytes of a slot.
        nodes: what else to publish, beside ring-ref and event-channel.
        deadline: for the backend to get there.

    Raises:
        PeerClosed: the backend does not want it; the text says why, if it does.
        TimedOut: it did not get there.
        DeviceError: ENOSPC there is no page for the ring, or no port.

    Attributes:
        ring: the front of it.
    """

    def __init__(
        self, domain: BareDomain, device: Device, end: End, entry: int, nodes: Mapping[str, str], deadline: Deadline
    ) -> None:
        self._end = end
        self._masked = False
        self._unjudged = False  # news was taken that may be the backend's end
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self._bell)
            self._pages = undo.enter_context(domain.share(device.backend, pages=1, writable=True))
            self.ring = Front(self._pages.memory, entry, atomics())
            undo.callback(self.ring.release)
            self._port = undo.enter_context(domain.events.bind(device.backend))
            where = {"ring-ref": str(self._pages.refs[0]), "event-channel": str(self._port.number)}
            try:
                end.go(State.INITIALISED, {**where, **nodes})
                end.wait({State.CONNECTED}, timeout=deadline.remaining, unless=_GONE)
                self._watch = undo.enter_context(domain.store.watch(f"{end.other}/state"))
                self._released = self._released_descriptor()
            except BaseException:
                self.give_up()
                raise
            if self._released >= 0:
                undo.callback(os.close, self._released)
            self._poll = undo.enter_context(waits.epoll())
            for number in (self._port.fileno(), self._watch.fileno(), self._bell, self._released):
                if number >= 0:
                    self._poll.register(number, select.EPOLLIN)
            self._undo = undo.pop_all()

    def notify(self) -> None:
        """Wake the backend."""
        self._port.notify_soon()

    def sleep(self, *, timeout: float | None) -> bool:
        """Until something may have happened; one thread at a time. Whether to ask for the `verdict`."""
        self._rearm()
        ready = {number for number, _ in waits.ready(self._poll, timeout)}
        if self._port.fileno() in ready:
            try:
                self._masked = self._port.take()
            except EventsLost:
                pass  # all is looked at anyway
        if self._bell in ready:
            os.eventfd_read(self._bell)
        unjudged, self._unjudged = self._unjudged, False
        return unjudged or self._watch.fileno() in ready or self._released in ready

    def fileno(self) -> int:
        """For an event loop: readable when there is something for `heard`."""
        return self._poll.fileno()

    def heard(self) -> bool:
        """Take the event that made `fileno` readable, and be ready for the next. Whether to ask for the `verdict`."""
        look = self.sleep(timeout=0)
        self._rearm()
        return look

    def wake(self) -> None:
        """Let who sleeps, or will, come back."""
        os.eventfd_write(self._bell, 1)

    def verdict(self) -> GntallocError | None:
        """Say what has become of the backend. None: it is there, as far as is known."""
        self._watch.drain()
        held = self._held()  # first: who closes in order says so before it lets go
        state = self._end.peer
        if state in _GONE:
            why = "is gone from xenstore" if state == State.UNKNOWN else f"went to state {state}"
            complaint = self._end.complaint()
            return PeerClosed(f"the backend {self._end.other} {why}" + (f"; it says: {complaint}" if complaint else ""))
        return None if held else self._died()

    def has_news(self) -> bool:
        """Whether the backend has written its state since somebody looked last. Who sleeps is told of it as well."""
        with contextlib.suppress(GntallocError):  # closed: there will be none
            if self._watch.drain():
                self._unjudged = True
                self.wake()
                return True
        return False

    def give_up(self) -> None:
        """Tell the backend that nothing comes of it, if it can be told."""
        with contextlib.suppress(GntallocError, StepRefused):  # the state may be another's by now
            self._end.go(State.CLOSING)
            self._end.go(State.CLOSED)

    def close(self) -> None:
        """Take back the ring, and the port. Can be repeated."""
        self._undo.close()

    def _rearm(self) -> None:
        if self._masked:
            self._port.rearm()
            self._masked = False

    def _held(self) -> bool:
        try:
            return self._pages.held
        except NotKnownHere:  # on real Xen only xenstore tells
            return True

    def _released_descriptor(self) -> int:
        """Give a descriptor that tells when the backend has unmapped the ring. -1: that is not known here."""
        try:
            number = self._pages.released_descriptor()
        except NotKnownHere:
            return -1
        if number is None:
            raise self._died()
        return number

    def _died(self) -> PeerDied:
        return PeerDied(
            f"the backend {self._end.other} has let go of the ring without closing: it died; start it, and reconnect"
        )
