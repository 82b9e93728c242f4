"""Try, for `gntalloc doctor`, what `run` needs of a kernel and its settings, with a program of a few lines.

The program opens a device that no machine has, and maps a page of it. Both calls are served here, by the parts that
serve all programs. Each trial goes one step further than the one before, so the first that fails names the step that
this computer lacks.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from gntalloc.descriptors import receive_with
from gntalloc.libc import PR_SET_PDEATHSIG, failure, libc
from gntalloc.run import program
from gntalloc.run.files import Piece
from gntalloc.run.filter import filter_program, install
from gntalloc.run.injector import Injector, Traced
from gntalloc.syscalls.listener import Call, Listener
from gntalloc.syscalls.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["memory", "namespace", "notification", "placing"]

_PATH = b"/dev/xen/trial"
_MARK = 0x5EA1
_PATIENCE = 5000  # milliseconds


def notification() -> str:
    """Try to have an open brought to us, and to answer it with a descriptor.

    Raises:
        OSError: it cannot be done. All trials here raise it so.
    """
    with _program() as listener, _Home() as home:
        listener.answer_with(_next(listener), home.fileno(), flags=0)
    return "an open was answered with a descriptor"


def memory() -> str:
    """Try to read the path of an open from the program's memory."""
    with _program() as listener:
        _read(_next(listener))
    return "a child's memory can be read"


def placing() -> str:
    """Try to map a page in the program, and to find its bytes in our file."""
    page = os.memfd_create("trial", os.MFD_CLOEXEC)
    os.ftruncate(page, mmap.PAGESIZE)
    with _program() as listener, _Home() as home:
        opening = _next(listener)
        _read(opening)
        listener.answer_with(opening, home.fileno(), flags=0)
        injector = Injector(listener, _MARK, lambda *_: None)
        try:
            result = injector.place(_next(listener), [Piece(0, 0, mmap.PAGESIZE)], [page])
        except Traced as refusal:
            raise refusal.__cause__ or refusal from None
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        home.peer.settimeout(_PATIENCE / 1000)
        home.peer.recv(1)  # it has written
    if os.pread(page, 5, 0) != b"hello":
        raise OSError("what a child wrote is not in the file")
    return "a page can be mapped in a child"


def namespace() -> str:
    """Try all of it with a child in a user namespace, whose ids we write."""
    with _program(userns=True) as listener:
        _read(_next(listener))
    return "can be entered, given ids and looked into"


class _Home(socket.socket):
    """Be a file for the program, with our end of it."""

    peer: socket.socket

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        super().__init__(fileno=theirs.detach())
        self.peer = ours


def _read(call: Call) -> None:
    if Memory().path(call.thread, call.arguments[1]) != _PATH:
        raise failure()


def _next(listener: Listener) -> Call:
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    if poll.poll(_PATIENCE) and (call := listener.receive()):
        return call
    raise OSError("a call was not brought to us")


@contextmanager
def _program(*, userns: bool = False) -> Iterator[Listener]:
    """Start the program, and end it."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        _be_served(theirs, userns=userns)
    theirs.close()
    try:
        with ours:
            if userns:
                _told(ours)
                program.map_ids(child)
                ours.send(b"\0")
            listener = Listener(_told(ours))
        try:
            yield listener
        finally:
            listener.close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _told(line: socket.socket) -> int:
    """Receive the descriptor that the child sends when it got so far."""
    data, descriptors = receive_with(line, 4, 1)
    code = int.from_bytes(data, "little")
    if code:
        raise OSError(code, os.strerror(code))
    return descriptors[0] if descriptors else -1


def _be_served(line: socket.socket, *, userns: bool) -> NoReturn:
    """Be the program, in the child."""
    try:
        if userns:
            program.enter_namespace()
            line.send(bytes(4))
            line.recv(1)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        listener = install(filter_program(_MARK))
        socket.send_fds(line, [bytes(4)], [listener])
        file = os.open(_PATH, os.O_RDWR)
        mmap.mmap(file, mmap.PAGESIZE)[:5] = b"hello"
        os.write(file, b"!")
    except OSError as error:
        line.send((error.errno or 1).to_bytes(4, "little"))
    finally:
        os._exit(0)
