"""System calls that the kernel brings to us: take one, answer it, put a descriptor into its caller.

Each caller sleeps in its call until it is answered. Source: seccomp_unotify(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
from struct import Struct
from typing import NamedTuple

__all__ = ["Call", "CallerGone", "Listener"]

_RECV, _SEND, _ID_VALID, _ADDFD, _SET_FLAGS = 0xC0502100, 0xC0182101, 0x40082102, 0x40182103, 0x40082104
_SYNC_WAKE_UP = 1
_CONTINUE = 1
_ADDFD_SEND = 2
_ANY_FD = 0

_NOTIFICATION = Struct("=QII iIQ 6Q".replace(" ", ""))
_RESPONSE = Struct("=QqiI")
_ADD = Struct("=QIIII")
_ID = Struct("=Q")


class CallerGone(Exception):
    """The caller died, or was interrupted, before it was answered. There is nobody to serve any more."""


class Call(NamedTuple):
    """One system call: `thread` is its caller's."""

    id: int
    thread: int
    number: int
    arguments: tuple[int, ...]


class Listener:
    """The descriptor that install gave, in whichever process it is now."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = bytearray(_NOTIFICATION.size)
        self._zeros = bytes(_NOTIFICATION.size)
        try:
            # The caller waits for us and we for it, so let the two share a processor: 15 µs instead of 57 here.
            fcntl.ioctl(descriptor, _SET_FLAGS, _SYNC_WAKE_UP)
        except OSError:
            pass  # before Linux 6.6 it is only slower

    def fileno(self) -> int:
        """To wait for: readable, a call is there; hung up, nobody is left who could make one."""
        return self._descriptor

    def close(self) -> None:
        """From now on the calls that would be brought to us fail with ENOSYS."""
        os.close(self._descriptor)

    def receive(self) -> Call | None:
        """The next call. Waits if there is none; None if it went away meanwhile."""
        buffer = self._buffer
        buffer[:] = self._zeros
        try:
            fcntl.ioctl(self._descriptor, _RECV, buffer, True)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.EINTR}:
                return None
            raise
        number_of_call, thread, _flags, number, _arch, _ip, *arguments = _NOTIFICATION.unpack(buffer)
        return Call(number_of_call, thread, number, tuple(arguments))

    def answer(self, call: Call, result: int) -> None:
        """Let it return `result`; a negative number is an errno.

        Raises:
            CallerGone: see there. So for all of these.
        """
        if result < 0:
            self._send(_RESPONSE.pack(call.id, 0, result, 0))
        else:
            self._send(_RESPONSE.pack(call.id, result, 0, 0))

    def go_on(self, call: Call) -> None:
        """It is not for us: let the kernel carry it out."""
        self._send(_RESPONSE.pack(call.id, 0, 0, _CONTINUE))

    def give(self, call: Call, descriptor: int, *, flags: int) -> int:
        """Put a copy of ours into the caller. Its number there.

        Raises:
            OSError: EMFILE the caller has no room.
        """
        return self._add(_ADD.pack(call.id, 0, descriptor, _ANY_FD, flags))

    def answer_with(self, call: Call, descriptor: int, *, flags: int) -> int:
        """Put a copy of ours into the caller and return its number there, all in one step.

        Raises:
            OSError: EMFILE the caller has no room. The call is not answered then.
        """
        return self._add(_ADD.pack(call.id, _ADDFD_SEND, descriptor, _ANY_FD, flags))

    def waits(self, call: Call) -> bool:
        """Whether its caller still waits, so that the number of its thread is still its own."""
        try:
            fcntl.ioctl(self._descriptor, _ID_VALID, _ID.pack(call.id))
        except OSError:
            return False
        return True

    def _send(self, response: bytes) -> None:
        try:
            fcntl.ioctl(self._descriptor, _SEND, response)
        except OSError as error:
            raise _gone(error) from error

    def _add(self, request: bytes) -> int:
        try:
            # The result is the number, which fcntl.ioctl only gives with a buffer that may change.
            number: int = fcntl.ioctl(self._descriptor, _ADDFD, bytearray(request), True)
        except OSError as error:
            raise _gone(error) from error
        return number


def _gone(error: OSError) -> Exception:
    return CallerGone() if error.errno in {errno.ENOENT, errno.EINPROGRESS} else error
