"""Start a program under the filter, and prepare its process.

The supervisor forks. The child installs the filter, hands over the listener, and calls execve. From us it keeps only
its inheritance: streams, folder, process group, environment, limits, signals.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import socket
from typing import TYPE_CHECKING, NoReturn

from gntalloc.descriptors import receive_with
from gntalloc.errors import GntallocError
from gntalloc.libc import PR_SET_PDEATHSIG, check, libc
from gntalloc.run.filter import filter_program, install

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["LIMITS", "CannotExecute", "Program", "enter_namespace", "map_ids", "signal_descriptor", "start"]

_CLONE_NEWUSER = 0x10000000
_SFD_CLOEXEC, _SFD_NONBLOCK = 0o2000000, 0o4000
LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_DATA)
"""The limits that a supervisor raises as far as it may."""
_CHANGED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores them
_SHELL = "/bin/sh"


class Program:
    """Describe a program to start, with all that it inherits from the process that makes this object.

    Args:
        path: the path of the file.
        arguments: its arguments, with the zeroth.
        mask: the signals that are blocked in it.
        userns, all_opens, verbose: see `run`.
    """

    def __init__(
        self,
        path: str,
        arguments: list[str],
        mask: Iterable[int],
        *,
        userns: bool,
        all_opens: bool,
        verbose: bool = False,
    ) -> None:
        self.path = path
        self.arguments = arguments
        self.mask = mask
        self.userns = userns
        self.umask = os.umask(0)
        os.umask(self.umask)
        self.limits = [(limit, resource.getrlimit(limit)) for limit in LIMITS]
        self.ignores_children = signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
        self.mark = int.from_bytes(os.urandom(4), "little") | 1
        self.all_opens = all_opens
        self.verbose = verbose
        self.filter = filter_program(self.mark, all_opens=all_opens or verbose, users=os.geteuid() == 0)


class CannotExecute(Exception):
    """execve refused the program."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def start(program: Program, extra: dict[str, str], announce: Callable[[int], None]) -> tuple[int, int]:
    """Start a program with `extra` in its environment. Return its pid and its listener.

    `announce` is told the pid before the program runs its first instruction.

    Raises:
        GntallocError: the kernel or a sandbox forbids a step.
        CannotExecute: execve refused the program.
    """
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    child = os.fork()
    if not child:
        ours.close()
        _become(program, extra, theirs, parent)
    theirs.close()
    with ours:
        if program.userns:
            _expect(ours, "a user namespace cannot be entered")
            map_ids(child)
            ours.send(b"\0")
        _, listener = _expect(ours, "system calls cannot be brought to us (seccomp)")
        announce(child)
        ours.send(b"\0")
        failure = ours.recv(4)
        if failure:
            os.close(listener)
            raise CannotExecute(int.from_bytes(failure, "little"))
    return child, listener


def _expect(line: socket.socket, what: str) -> tuple[int, int]:
    data, descriptors = receive_with(line, 4, 1)
    code = int.from_bytes(data, "little")
    if len(data) < 4 or code:
        why = "it runs under `gntalloc run` already" if code == errno.EBUSY else os.strerror(code or errno.ECHILD)
        raise GntallocError(code or errno.ECHILD, f"{what}: {why}; `gntalloc doctor` says what this computer allows")
    return code, descriptors[0] if descriptors else -1


def _become(program: Program, extra: dict[str, str], line: socket.socket, parent: int) -> NoReturn:
    """Become the program, in the child. A failure is told over `line`, as an errno."""
    try:
        environment = _environment() | {os.fsencode(name): os.fsencode(value) for name, value in extra.items()}
        if program.userns:
            enter_namespace()
            line.send(bytes(4))
            line.recv(1)
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        if os.getppid() != parent:
            os._exit(1)  # it died before its death could end us
        listener = install(program.filter)  # from here on no file may be opened: no process serves us yet
        socket.send_fds(line, [bytes(4)], [listener])
        os.close(listener)
        line.recv(1)
        for number in _CHANGED_BY_PYTHON:
            signal.signal(number, signal.SIG_DFL)
        if program.ignores_children:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        os.umask(program.umask)
        for limit, wanted in program.limits:
            resource.setrlimit(limit, wanted)
        signal.pthread_sigmask(signal.SIG_SETMASK, program.mask)
        try:
            os.execve(program.path, program.arguments, environment)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            os.execve(
                _SHELL, [_SHELL, program.path, *program.arguments[1:]], environment
            )  # a script, as execvp(3) does
    except OSError as error:
        line.send((error.errno or errno.EIO).to_bytes(4, "little"))
    finally:
        os._exit(127)


def _environment() -> dict[bytes, bytes]:
    """Give the environment that we were started with. Python adds LC_CTYPE to it where the locale is C."""
    try:
        with open("/proc/self/environ", "rb") as file:
            pairs = [entry.partition(b"=") for entry in file.read().split(b"\0")]
    except OSError:
        return dict(os.environb)
    ours = {name: value for name, sign, value in pairs if sign and name}
    return {name: value for name, value in os.environb.items() if name in ours or name != b"LC_CTYPE"}


def enter_namespace() -> None:
    """Enter a user namespace of one's own.

    Raises:
        OSError: the kernel's or a sandbox's refusal.
    """
    check(libc.unshare(_CLONE_NEWUSER))


def map_ids(child: int) -> None:
    """Give every id in the namespace of `child` the number it has here. An ordinary user may do so for its own alone.

    Raises:
        GntallocError: the kernel or a sandbox forbids it.
    """
    root = os.geteuid() == 0
    for what, number in (("uid", os.geteuid()), ("gid", os.getegid())):
        if what == "gid" and not root:
            _write(f"/proc/{child}/setgroups", "deny")
        _write(f"/proc/{child}/{what}_map", _all_ids(what) if root else f"{number} {number} 1")


def _all_ids(what: str) -> str:
    """List the ids that there are here, which in a container may be few."""
    with open(f"/proc/self/{what}_map") as file:
        ranges = [line.split() for line in file]
    return "\n".join(f"{first} {first} {count}" for first, _, count in ranges)


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        raise GntallocError(error.errno or errno.EIO, f"{path} cannot be written: {error.strerror}") from None


def signal_descriptor(numbers: Iterable[int]) -> int:
    """Make a descriptor that tells of these signals, which must be blocked."""
    wanted = (ctypes.c_uint64 * 16)()  # as large as any C library's set
    for number in numbers:
        wanted[0] |= 1 << (number - 1)
    return check(libc.signalfd(-1, wanted, _SFD_CLOEXEC | _SFD_NONBLOCK))
