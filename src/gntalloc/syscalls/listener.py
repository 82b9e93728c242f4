"""Listen for the system calls that the kernel brings: take one, answer it, put a descriptor into its caller.

Each caller sleeps in its call until it is answered. Source: seccomp_unotify(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
from itertools import cycle
from struct import Struct
from typing import NamedTuple

__all__ = ["CALL_SIZE", "MOST_TAKEN", "NOTES_SIZE", "Call", "CallerGone", "Listener"]

_RECV, _SEND, _ID_VALID, _ADDFD, _SET_FLAGS = 0xC0502100, 0xC0182101, 0x40082102, 0x40182103, 0x40082104
_SYNC_WAKE_UP = 1
_CONTINUE = 1
_ADDFD_SETFD, _ADDFD_SEND = 1, 2
_ANY_FD = 0

MOST_TAKEN = 8  # calls that may be taken and not yet answered
_STRIDE, _WINDOW = 128, 2048
NOTES_SIZE = 4096

_NOTIFICATION = Struct("=QI4xi12x6Q")
_CALL = Struct("=QII6Q")
CALL_SIZE = _CALL.size
_RESPONSE = Struct("=QqiI")
_ADD = Struct("=QIIII")
_ID = Struct("=Q")
_ZEROS = bytes(_NOTIFICATION.size)  # the kernel wants an empty buffer


class CallerGone(Exception):
    """The caller died, or was interrupted, before it was answered. Its call is over."""


class Call(NamedTuple):
    """Hold one system call. `thread` is its caller's."""

    id: int
    thread: int
    number: int
    arguments: tuple[int, ...]

    def encode(self) -> bytes:
        """Make bytes of the call, for another process."""
        return _CALL.pack(self.id, self.thread, self.number, *self.arguments)

    @classmethod
    def decode(cls, data: bytes) -> Call:
        """Read a call from the first CALL_SIZE bytes."""
        number_of_call, thread, number, *arguments = _CALL.unpack_from(data)
        return cls(number_of_call, thread, number, tuple(arguments))


_new = tuple.__new__  # of a NamedTuple: in half the time


class Listener:
    """Take and answer calls over the descriptor that `install` gave, in any process.

    Args:
        descriptor: the listener.
        notes: NOTES_SIZE bytes, where the kernel itself writes the last MOST_TAKEN calls that were taken. If another
            process can read them too, it knows after our death which callers wait for an answer.
    """

    def __init__(self, descriptor: int, notes: bytearray | memoryview | None = None) -> None:
        self._descriptor = descriptor
        notes = bytearray(NOTES_SIZE) if notes is None else notes
        # These windows are so large that fcntl.ioctl hands them to the kernel as they are, and not a copy.
        view = memoryview(notes)
        places = range(0, MOST_TAKEN * _STRIDE, _STRIDE)
        self._windows = cycle([(view[at : at + _WINDOW], view[at : at + len(_ZEROS)]) for at in places])
        self._response = bytearray(_RESPONSE.size)
        try:
            # The caller waits for us and we for it, so let the two share a processor: 15 µs instead of 57 here.
            fcntl.ioctl(descriptor, _SET_FLAGS, _SYNC_WAKE_UP)
        except OSError:
            pass  # before Linux 6.6 this is not known, and calls are only slower

    def fileno(self) -> int:
        """Give the descriptor to wait for. Readable: a call is there. Hung up: no process is left to make one."""
        return self._descriptor

    def close(self) -> None:
        """Take no more calls: those that would be brought fail with ENOSYS. The notes are released."""
        os.close(self._descriptor)
        self._windows = cycle(())

    def receive(self) -> Call | None:
        """Take the next call, and wait for it if need be. None: it went away meanwhile."""
        buffer, head = next(self._windows)
        head[:] = _ZEROS
        try:
            fcntl.ioctl(self._descriptor, _RECV, buffer, True)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.EINTR}:
                return None
            raise
        head_of_call = _NOTIFICATION.unpack_from(head)
        return _new(Call, (*head_of_call[:3], head_of_call[3:]))

    def fail_all(self, notes: bytes | memoryview, code: int) -> None:
        """Let the calls fail that a process took, with these notes, and had not answered when it died."""
        for at in range(0, MOST_TAKEN * _STRIDE, _STRIDE):
            (number_of_call,) = _ID.unpack_from(notes, at)
            try:
                self.answer(Call(number_of_call, 0, 0, ()), -code)
            except CallerGone:
                pass  # answered, or never there

    def answer(self, call: Call, result: int) -> None:
        """Let the call return `result`. A negative number is an errno.

        Raises:
            CallerGone: the caller is gone. The other methods that have a call raise it too.
        """
        value, code = (result, 0) if result >= 0 else (0, result)
        self._send(call, value, code, 0)

    def go_on(self, call: Call) -> None:
        """Let the kernel carry the call out."""
        self._send(call, 0, 0, _CONTINUE)

    def give(self, call: Call, descriptor: int, *, flags: int) -> int:
        """Put a copy of `descriptor` into the caller, and return its number there.

        Raises:
            OSError: EMFILE: the caller has no room.
        """
        return self._add(_ADD.pack(call.id, 0, descriptor, _ANY_FD, flags))

    def answer_with(self, call: Call, descriptor: int, *, flags: int) -> int:
        """Put a copy of `descriptor` into the caller, and let the call return its number there, all in one step.

        Raises:
            OSError: EMFILE: the caller has no room. The call is not answered then.
        """
        return self._add(_ADD.pack(call.id, _ADDFD_SEND, descriptor, _ANY_FD, flags))

    def replace(self, call: Call, descriptor: int, theirs: int, *, flags: int) -> None:
        """Replace the caller's descriptor `theirs` with a copy of ours.

        Raises:
            OSError: it cannot be replaced.
        """
        self._add(_ADD.pack(call.id, _ADDFD_SETFD, descriptor, theirs, flags))

    def waits(self, call: Call) -> bool:
        """Say whether the caller still waits, so that the number of its thread is still its own."""
        try:
            fcntl.ioctl(self._descriptor, _ID_VALID, _ID.pack(call.id))
        except OSError:
            return False
        return True

    def _send(self, call: Call, result: int, code: int, flags: int) -> None:
        _RESPONSE.pack_into(self._response, 0, call.id, result, code, flags)
        try:
            fcntl.ioctl(self._descriptor, _SEND, self._response, True)
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
