"""A program under the filter, whose calls come to the test."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from limits import status_of
from runs import wait_for

from gntalloc.run import filter as filter_module
from gntalloc.run.filter import filter_program, install
from gntalloc.run.injector import Injector
from gntalloc.syscalls.listener import Call, Listener
from gntalloc.wire.messages import Lend, Serve

if TYPE_CHECKING:
    from gntalloc.guest.connection import Answer, MachineConnection

MARK = 0x5EA1
PATIENCE = 20.0  # seconds; against hangs
_PR_SET_PDEATHSIG = 1

libc = ctypes.CDLL(None, use_errno=True)


def ask_to_serve(channel: MachineConnection, descriptor: int) -> Answer:
    """Lend the machine a listener, and ask it to serve."""
    lent = channel.call(Lend(os.stat("/proc/self/ns/pid").st_ino))
    assert lent.result == 1
    with socket.socket(fileno=lent.descriptor().detach()) as line:
        socket.send_fds(line, [b"!"], [descriptor])
    return channel.call(Serve())


class Held:
    """A program under the filter, whose calls come to us.

    Args:
        command: its path and arguments.
        old: what the filter can, as of a kernel before 5.19.
        kind: of listener.
    """

    def __init__(self, *command: str, old: bool = False, kind: type[Listener] = Listener) -> None:
        line, theirs = socket.socketpair()
        there, here = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _become(command, theirs, there[0], here[1], old=old)
        theirs.close()
        os.close(there[0])
        os.close(here[1])
        self._input, self.output = os.fdopen(there[1], "wb", 0), os.fdopen(here[0], "rb", 0)
        with line:
            _, (descriptor,), _, _ = socket.recv_fds(line, 1, 1)
        self.listener = kind(descriptor)
        self.died: list[tuple[int, int]] = []
        self.injector = Injector(self.listener, MARK, lambda *end: self.died.append(end))

    def call(self) -> Call:
        """Its next."""
        assert readable(self.listener)
        call = self.listener.receive()
        assert call is not None
        return call

    def tell(self, line: str) -> None:
        """A line for it."""
        self._input.write(f"{line}\n".encode())

    def said(self) -> str:
        """Its next line."""
        assert readable(self.output), "it says nothing"
        return self.output.readline().decode().strip()

    def saw(self) -> dict[str, str]:
        """The line of what it saw."""
        return dict(word.split("=", 1) for word in self.said().split())

    def status(self, flags: int = 0) -> int:
        """Its next one, as its parent hears of it."""
        ended = (0, 0)

        def hears() -> bool:
            nonlocal ended
            ended = os.waitpid(self.pid, flags | os.WNOHANG)
            return ended[0] != 0

        wait_for(hears, "its parent hears nothing of it")
        return ended[1]

    def end(self) -> None:
        """It is over, if it is not yet."""
        if self._input.closed:
            return
        self.listener.close()
        self._input.close()
        self.output.close()
        try:
            os.kill(self.pid, signal.SIGKILL)
            status_of(self.pid)
        except (ProcessLookupError, ChildProcessError):
            pass


def _become(command: tuple[str, ...], line: socket.socket, stdin: int, stdout: int, *, old: bool) -> NoReturn:
    try:
        if old:
            filter_module._FLAG_WAIT_KILLABLE_RECV = 0
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        socket.send_fds(line, [b"x"], [install(filter_program(MARK))])
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.execv(command[0], command)
    finally:
        os._exit(127)


def readable(file: Any) -> bool:
    """Whether there is something to read, sooner or later."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(PATIENCE * 1000))


def state_of(thread: int) -> str:
    """As in /proc; nothing if it is not there any more."""
    try:
        return Path(f"/proc/{thread}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def refuse(*_: Any) -> None:
    """As if another program had the thread."""
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
