"""Keep the promise of SET_UNMAP_NOTIFY: clear a byte, send an event, or both, when pages go. Both grant drivers use it.

So a program that is killed still tells its peer. A promise is kept once. It has a reference to its port from the time
it is made. Otherwise the event could not be sent when all files of a dying program are closed, in whatever order.

Any port of the domain will do, whichever program bound it, as in Linux.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

from gntalloc.abi.gntalloc import UNMAP_NOTIFY_CLEAR_BYTE, UNMAP_NOTIFY_SEND_EVENT
from gntalloc.errors import DeviceError

if TYPE_CHECKING:
    from gntalloc.drivers.chardev import Extent, Frames

__all__ = ["PortReferences", "Promise", "check_action", "clear_byte"]

_KNOWN = UNMAP_NOTIFY_CLEAR_BYTE | UNMAP_NOTIFY_SEND_EVENT


class PortReferences(Protocol):
    """Refer to event channels, as `EvtchnDriver` lets promises do."""

    def take(self, number: int) -> None:
        """Refer to a port.

        Raises:
            DeviceError: EINVAL: there is no such port.
        """

    def notify(self, number: int) -> None:
        """Send an event."""

    def drop(self, number: int) -> None:
        """Give up a reference to a port."""


class Promise:
    """Promise what a program asked for: `byte` is the offset of the byte to clear, or None.

    Raises:
        DeviceError: EINVAL: there is no such port.
    """

    __slots__ = ("_port", "_ports", "byte")

    def __init__(self, action: int, byte: int, port: int, ports: PortReferences) -> None:
        self.byte = byte if action & UNMAP_NOTIFY_CLEAR_BYTE else None
        self._ports = ports
        self._port = port if action & UNMAP_NOTIFY_SEND_EVENT else None
        if self._port is not None:
            ports.take(self._port)

    def send(self) -> None:
        """Send the event, if one was promised. This ends the promise."""
        if self._port is not None:
            self._ports.notify(self._port)
        self.forget()

    def forget(self) -> None:
        """End the promise without keeping it, as another one took its place."""
        if self._port is not None:
            self._ports.drop(self._port)


def check_action(action: int) -> None:
    """Check that an action has no unknown bit.

    Raises:
        DeviceError: EINVAL: it has one.
    """
    if action & ~_KNOWN:
        raise DeviceError(errno.EINVAL, f"action {action:#x} has more than clear byte (1) and send event (2)")


def clear_byte(frames: Frames, extent: Extent, page: int, byte: int) -> None:
    """Clear one byte of a page. The window of its extent must be open."""
    frames.page(extent, page)[byte] = 0
