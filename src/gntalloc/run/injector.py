"""Make a map in place of the caller's: pages of other domains, at the very addresses that it asked for.

The caller sleeps in its mmap call. It gets the memory files as descriptors of its own for a moment. Its call is
answered, and ptrace(2) stops it on its way out of the kernel. There it makes, one instruction at a time, the calls that
place the pages and close the descriptors. Then it has its registers back, with the address as its result, and no
descriptor that it did not open. (Another of its threads may have copied one meanwhile. Any program of a domain gets
such descriptors for its own maps, so nothing depends on that.)

A caller that another tracer has (gdb, strace) cannot be stopped so: `Traced` is raised.

Sources: ptrace(2), linux/ptrace.h, sys/user.h. All numbers are x86-64's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from gntalloc.libc import failure, libc
from gntalloc.syscalls.listener import CallerGone
from gntalloc.syscalls.threads import leader_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gntalloc.run.files import Piece
    from gntalloc.syscalls.listener import Call, Listener

__all__ = ["Injector", "Traced"]

_CONT, _SINGLESTEP, _GETREGS, _SETREGS, _DETACH = 7, 9, 12, 13, 17
_GETSIGINFO, _SEIZE, _INTERRUPT, _GETSIGMASK, _SETSIGMASK = 0x4202, 0x4206, 0x4207, 0x420A, 0x420B
_EVENT_STOP = 128
_TRACED_ONLY = -1 << 31  # __WCLONE excludes our own children; threads that we trace are waited for in any case
_SYS_CLOSE, _SYS_MMAP, _SYS_MUNMAP, _SYS_TGKILL = 3, 9, 11, 234
_SYSCALL_SIZE = 2  # bytes of the instruction; no other makes calls with x86-64's numbers
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_FIXED_NOREPLACE = 1, 2, 0x10, 0x20, 0x100000
_FAULTS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP})
_MASK = (1 << 64) - 1
_BLOCKED = _MASK & ~sum(1 << (number - 1) for number in _FAULTS)  # a fault that is blocked loses its handler
_LOWEST_ERROR = _MASK - 4095

_REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)


class _Registers(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in _REGISTERS)


class Traced(Exception):
    """Another process traces the caller, or the kernel lets none do so."""


class _Died(Exception):
    """The thread ended while we held it. The argument is its status."""


class _NoInstruction(Exception):
    """The instruction that made the call is not there any more: another thread has removed it."""


def _ptrace(request: int, thread: int, address: int = 0, data: object = None) -> None:
    if libc.ptrace(request, thread, address, data) < 0:
        error = failure()
        raise _Died if error.errno == errno.ESRCH else error


def _nothing(_result: int) -> None:
    pass


class Injector:
    """Make calls in threads that wait for `listener` to answer them.

    Args:
        listener: answers their calls.
        mark: the mark that the filter lets pass: see filter.py.
        died: is told the thread and wait status of each that died while we held it. No other process will hear of
            it: a status is given out once.
    """

    def __init__(self, listener: Listener, mark: int, died: Callable[[int, int], None]) -> None:
        self._listener = listener
        self._mark = mark << 32
        self._died = died

    def place(
        self, call: Call, pieces: Sequence[Piece], descriptors: list[int], done: Callable[[int], None] = _nothing
    ) -> int:
        """Answer the mmap `call` with a map of `pieces`. Return the address, or a negative errno.

        `done` is told the result before the caller goes on.

        Raises:
            Traced: nothing has happened, and the call still waits.
            CallerGone: the caller is gone.
        """
        thread = call.thread
        try:
            _ptrace(_SEIZE, thread)
        except OSError as error:
            if not self._listener.waits(call):
                raise CallerGone from None  # a dead thread is refused too
            raise Traced(error.strerror) from error
        except _Died:
            raise CallerGone from None
        try:
            _ptrace(_INTERRUPT, thread)
            theirs, failure = self._answer(call, descriptors)
            held = self._until_stopped(thread)
            result = self._make_calls(call, pieces, theirs, failure, held)
            done(result)
            self._detach(thread, held)
        except _Died:
            self._collect(thread)
            raise CallerGone from None
        except CallerGone:
            self._let_go(thread)
            raise
        return result

    def _answer(self, call: Call, descriptors: list[int]) -> tuple[list[int], int]:
        """Let the call end, with these as descriptors of its caller.

        Return their numbers there, and 0, or the negative errno that kept some of them back.
        """
        theirs: list[int] = []
        try:
            for descriptor in descriptors[:-1]:
                theirs.append(self._listener.give(call, descriptor, flags=os.O_CLOEXEC))  # noqa: PERF401  each counts
            theirs.append(self._listener.answer_with(call, descriptors[-1], flags=os.O_CLOEXEC))
        except OSError as error:
            self._listener.answer(call, 0)
            return theirs, -(error.errno or errno.EMFILE)
        return theirs, 0

    def _make_calls(self, call: Call, pieces: Sequence[Piece], theirs: list[int], failure: int, held: list[int]) -> int:
        thread = call.thread
        saved = _Registers()
        _ptrace(_GETREGS, thread, 0, ctypes.byref(saved))
        with _signals_blocked(thread):

            def make(number: int, *arguments: int) -> int:
                return self._call(thread, saved, held, number, arguments)

            try:
                result = failure or self._map(make, call, pieces, theirs)
                for descriptor in theirs:
                    make(_SYS_CLOSE, descriptor)
            except _NoInstruction:
                result = -errno.EFAULT  # the caller will not see it: it cannot go on from there either
        saved.rax = result & _MASK
        _ptrace(_SETREGS, thread, 0, ctypes.byref(saved))
        return result

    def _map(self, make: Callable[..., int], call: Call, pieces: Sequence[Piece], theirs: list[int]) -> int:
        address, length, prot, flags, *_ = call.arguments
        if len(pieces) == 1:
            place, offset, size = pieces[0]
            return make(_SYS_MMAP, address, size, prot, flags, self._mark | theirs[place], offset)
        # A map of many parts is a range first, where the caller wants it, then the parts over it.
        how = flags & (_MAP_FIXED | _MAP_FIXED_NOREPLACE)
        start = make(_SYS_MMAP, address, length, 0, how | _MAP_PRIVATE | _MAP_ANONYMOUS, _MASK, 0)
        if start < 0:
            return start
        how = flags & ~_MAP_FIXED_NOREPLACE | _MAP_FIXED
        at = start
        for place, offset, size in pieces:
            done = make(_SYS_MMAP, at, size, prot, how, self._mark | theirs[place], offset)
            if done < 0:
                make(_SYS_MUNMAP, start, length)
                return done
            at += size
        return start

    def _call(self, thread: int, saved: _Registers, held: list[int], number: int, arguments: tuple[int, ...]) -> int:
        """Make one system call in the stopped thread. Return its result as the kernel gives it, errors negative."""
        registers = _Registers.from_buffer_copy(saved)
        registers.rip -= _SYSCALL_SIZE
        registers.rax = number
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(registers, name, value & _MASK)
        _ptrace(_SETREGS, thread, 0, ctypes.byref(registers))
        _ptrace(_SINGLESTEP, thread)
        while True:
            status = self._wait(thread)
            stopped_by, event = os.WSTOPSIG(status), status >> 16
            if stopped_by == signal.SIGTRAP and not event:
                _ptrace(_GETREGS, thread, 0, ctypes.byref(registers))
                if registers.rip == saved.rip:
                    break
            if not event:
                if stopped_by in _FAULTS and not _was_sent(thread):
                    raise _NoInstruction  # it faulted, or made another step; if it can go on, it will fault by itself
                held.append(stopped_by)
            _ptrace(_SINGLESTEP, thread)
        result = int(registers.rax)
        return result - (1 << 64) if result >= _LOWEST_ERROR else result

    def _until_stopped(self, thread: int) -> list[int]:
        """Wait for the stop that was asked for. Return the signals that came first, which are held back."""
        held: list[int] = []
        while True:
            status = self._wait(thread)
            if status >> 16 == _EVENT_STOP:
                return held
            held.append(os.WSTOPSIG(status))
            _ptrace(_CONT, thread)

    def _detach(self, thread: int, held: list[int]) -> None:
        leader = leader_of(thread) if held else 0
        for number in held:  # not with the detach: a stop like ours loses it
            libc.syscall(_SYS_TGKILL, leader, thread, number)
        _ptrace(_DETACH, thread)

    def _wait(self, thread: int) -> int:
        try:
            _, status = os.waitpid(thread, _TRACED_ONLY)
        except ChildProcessError:
            raise _Died from None  # by exec in another thread, whose number is this one's now
        if not os.WIFSTOPPED(status):
            self._died(thread, status)
            raise _Died
        return status

    def _let_go(self, thread: int) -> None:
        """Wait until the thread stops, and detach. Its call is answered, or it is dying."""
        try:
            self._detach(thread, self._until_stopped(thread))
        except _Died:
            self._collect(thread)

    def _collect(self, thread: int) -> None:
        """Collect a traced thread that dies. Otherwise its parent waits for ever."""
        with suppress(_Died):
            self._wait(thread)


def _was_sent(thread: int) -> bool:
    """Say whether the signal that stopped the thread comes from a process, and not from the processor."""
    information = (ctypes.c_int32 * 32)()  # siginfo_t: number, errno, code
    _ptrace(_GETSIGINFO, thread, 0, ctypes.byref(information))
    return information[2] <= 0


@contextmanager
def _signals_blocked(thread: int) -> Iterator[None]:
    """Block the thread's signals: no handler of the program may run between our instructions."""
    mask = ctypes.c_uint64()
    blocked = ctypes.c_uint64(_BLOCKED)
    _ptrace(_GETSIGMASK, thread, 8, ctypes.byref(mask))
    _ptrace(_SETSIGMASK, thread, 8, ctypes.byref(blocked))
    try:
        yield
    finally:
        libc.ptrace(_SETSIGMASK, thread, ctypes.c_void_p(8), ctypes.byref(mask))
