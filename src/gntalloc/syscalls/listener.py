"""System calls that the kernel brings to us: take one, answer it, put a descriptor into its caller.

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
_ZEROS = bytes(_NOTIFICATION.size)  # what the kernel wants to find


class CallerGone(Exception):
    """The caller died, or was interrupted, before it was answered. There is nobody to serve any more."""


class Call(NamedTuple):
    """One system call: `thread` is its caller's."""

    id: int
    thread: int
    number: int
    arguments: tuple[int, ...]

    def encode(self) -> bytes:
        """For another process."""
        return _CALL.pack(self.id, self.thread, self.number, *self.arguments)

    @classmethod
    def decode(cls, data: bytes) -> Call:
        """The other way round, from the first CALL_SIZE bytes."""
        number_of_call, thread, number, *arguments = _CALL.unpack_from(data)
        return cls(number_of_call, thread, number, tuple(arguments))


_new = tuple.__new__  # of a NamedTuple: in half the time


class Listener:
    """The descriptor that install gave, in whichever process it is now.

    Args:
        descriptor: it.
        notes: NOTES_SIZE bytes, where the kernel itself writes down the last MOST_TAKEN calls that were taken. If
            another process can read them too, it knows after our death who waits for an answer.
    """

    def __init__(self, descriptor: int, notes: bytearray | memoryview | None = None) -> None:
        self._descriptor = descriptor
        notes = bytearray(NOTES_SIZE) if notes is None else notes
        # Windows so large that fcntl.ioctl hands them to the kernel as they are, and not a copy.
        view = memoryview(notes)
        places = range(0, MOST_TAKEN * _STRIDE, _STRIDE)
        self._windows = cycle([(view[at : at + _WINDOW], view[at : at + len(_ZEROS)]) for at in places])
        self._response = bytearray(_RESPONSE.size)
        try:
            # The caller waits for us and we for it, so let the two share a processor: 15 µs instead of 57 here.
            fcntl.ioctl(descriptor, _SET_FLAGS, _SYNC_WAKE_UP)
        except OSError:
            pass  # before Linux 6.6 it is only slower

    def fileno(self) -> int:
        """To wait for: readable, a call is there; hung up, nobody is left who could make one."""
        return self._descriptor

    def close(self) -> None:
        """From now on the calls that would be brought to us fail with ENOSYS. The notes are let go of."""
        os.close(self._descriptor)
        self._windows = cycle(())

    def receive(self) -> Call | None:
        """The next call. Waits if there is none; None if it went away meanwhile."""
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
        """Whoever took calls, with these notes, is dead: let those fail that it had not answered."""
        for at in range(0, MOST_TAKEN * _STRIDE, _STRIDE):
            (number_of_call,) = _ID.unpack_from(notes, at)
            try:
                self.answer(Call(number_of_call, 0, 0, ()), -code)
            except CallerGone:
                pass  # answered, or never there

    def answer(self, call: Call, result: int) -> None:
        """Let it return `result`; a negative number is an errno.

        Raises:
            CallerGone: see there. So for all of these.
        """
        value, code = (result, 0) if result >= 0 else (0, result)
        self._send(call, value, code, 0)

    def go_on(self, call: Call) -> None:
        """It is not for us: let the kernel carry it out."""
        self._send(call, 0, 0, _CONTINUE)

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

    def replace(self, call: Call, descriptor: int, theirs: int, *, flags: int) -> None:
        """Let the caller's descriptor `theirs` be a copy of ours from now on.

        Raises:
            OSError: it cannot be.
        """
        self._add(_ADD.pack(call.id, _ADDFD_SETFD, descriptor, theirs, flags))

    def waits(self, call: Call) -> bool:
        """Whether its caller still waits, so that the number of its thread is still its own."""
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
