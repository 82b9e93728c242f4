"""Name every error of this package, in one tree.

    GntallocError (an OSError)
    ├── DeviceError          a driver answered with an errno; the text says why
    │   └── PeerQuotaReached a peer has as much of this program as it may have at once (EDQUOT)
    ├── Closed               you closed it (EBADF)
    ├── Busy                 another thread or process is using it just now (EBUSY)
    ├── ViewsStillExported   a view of the pages is still alive (EBUSY, also a BufferError)
    ├── PeerBroke            the other side did what the protocol forbids (EPROTO)
    ├── PeerGone             there is nobody at the other end of a channel (also a ConnectionError)
    │   ├── PeerClosed       it closed its end (EPIPE)
    │   └── PeerDied         it ended without closing (ECONNRESET)
    ├── EventsLost           more events came than the port's file could keep (EFBIG)
    ├── TimedOut             the deadline passed (ETIMEDOUT, also a TimeoutError)
    ├── MachineGone          the machine went away under you (ECONNRESET, also a ConnectionError)
    ├── MachineBroke         no machine answers there, or one of another version (EPROTO)
    ├── NoMachine            no machine, no domain, no device to talk to (ENODEV)
    ├── NotKnownHere         real Xen cannot answer this; the text names what to do instead (EOPNOTSUPP)
    └── BadGrantText         the text is not a grant (EINVAL, also a ValueError)

Each carries `errno` and a text of three parts: what was asked, what stood in the way, what to do.
Each survives pickle, so that it can cross a process boundary.

`BooksWrong` is not in the tree: it ends the machine.
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar, Self

__all__ = [
    "BadGrantText",
    "Busy",
    "Closed",
    "DeviceError",
    "EventsLost",
    "GntallocError",
    "MachineBroke",
    "MachineGone",
    "NoMachine",
    "NotKnownHere",
    "PeerBroke",
    "PeerClosed",
    "PeerDied",
    "PeerGone",
    "PeerQuotaReached",
    "TimedOut",
    "ViewsStillExported",
]


class BooksWrong(BaseException):
    """The machine has found its own counters wrong. No handler may go on after that, so this is no Exception."""


class GntallocError(OSError):
    """The root of the tree. `Error(text)` takes the class's own errno, `Error(errno, text)` any other."""

    code: ClassVar[int] = _errno.EIO

    def __new__(cls, *args: object) -> Self:
        """Fill in the errno. Not in __init__: OSError parses here, and pickle calls the class with `args`."""
        if len(args) == 1:
            args = (cls.code, *args)
        return super().__new__(cls, *args)

    def __str__(self) -> str:
        return str(self.strerror)


class DeviceError(GntallocError):
    """A device file refused: `errno` is the driver's, the text says which of its reasons it was."""


class PeerQuotaReached(DeviceError):
    """A peer has as many of this program's pages as it may have at once. Other peers are not concerned."""

    code = _errno.EDQUOT


class Closed(GntallocError):
    """You closed this object (or its domain) and then used it."""

    code = _errno.EBADF


class Busy(GntallocError):
    """Another thread or process is using this just now."""

    code = _errno.EBUSY


class ViewsStillExported(GntallocError, BufferError):
    """Pages cannot be unmapped while a memoryview, slice or array of them is alive. Closing can be repeated."""

    code = _errno.EBUSY


class PeerBroke(GntallocError):
    """The other side did something its protocol forbids."""

    code = _errno.EPROTO


class PeerGone(GntallocError, ConnectionError):
    """Nobody is at the other end of a channel any more. What it sent before can still be read.

    `done`: the bytes that had been written before. The peer may not have read them.
    """

    code = _errno.EPIPE
    done: int = 0


class PeerClosed(PeerGone):
    """The peer closed its end of the channel."""

    code = _errno.EPIPE


class PeerDied(PeerGone):
    """The peer's process ended, or was killed, with the channel open: what it was sending is not whole."""

    code = _errno.ECONNRESET


class EventsLost(GntallocError):
    """A port's events were not taken for so long that some had no room. Look at everything they may have told of."""

    code = _errno.EFBIG


class TimedOut(GntallocError, TimeoutError):
    """The deadline you gave passed first. Nothing was lost: the call can be repeated.

    `done`: the bytes that were written before. Leave them out when you repeat the call.
    """

    code = _errno.ETIMEDOUT
    done: int = 0


class MachineGone(GntallocError, ConnectionError):
    """The machine ended, or dropped this program. Pages already mapped stay valid until unmapped."""

    code = _errno.ECONNRESET


class MachineBroke(GntallocError):
    """The machine sent what its protocol forbids. The connection is closed; the next call makes another."""

    code = _errno.EPROTO


class NoMachine(GntallocError):
    """There is no machine, no such domain, or no /dev/xen here."""

    code = _errno.ENODEV


class NotKnownHere(GntallocError):
    """The real hypervisor does not tell this to a guest."""

    code = _errno.EOPNOTSUPP


class BadGrantText(GntallocError, ValueError):
    """A text that `Grant.parse` cannot read."""

    code = _errno.EINVAL
