"""Serves the system calls of one `run`: a process beside the program, one thread around one poll.

It stands between two that must not wait for each other. A program's memory may be another program's to fill in
(userfaultfd, FUSE), and a thread under ptrace may not stop for long: both hold up this process, which serves nobody
else, and never the machine. To that it is a program in the domain like any other.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from typing import TYPE_CHECKING

from gntalloc.abi.evtchn import RESET
from gntalloc.errors import GntallocError
from gntalloc.run import filter as calls
from gntalloc.run.arguments import regions_of
from gntalloc.run.injector import Injector, Traced
from gntalloc.run.listener import Call, CallerGone
from gntalloc.run.machine import OpenFile, empty
from gntalloc.run.memory import Memory, inode_of, leader_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.run.listener import Listener
    from gntalloc.run.machine import Files

__all__ = ["Supervisor"]

_FOLDER = b"/dev/xen/"
_STORE = "xenbus"
_MAP_SHARED_BITS = 0x03  # MAP_SHARED, MAP_PRIVATE; both are MAP_SHARED_VALIDATE
_MAP_PRIVATE = 0x02
_LOW_INT = 0xFFFFFFFF
_SYS_PIDFD_GETFD = 438

_libc = ctypes.CDLL(None)


class Supervisor:
    """Serves the calls of `listener` with `files`.

    Args:
        mark: the filter's.
        store: where the domain's xenstore listens, if it has one.
        died: told of threads whose end we saw in passing: see Injector.
        say: tells the user something.
    """

    def __init__(
        self,
        listener: Listener,
        files: Files,
        *,
        mark: int,
        store: str | None,
        died: Callable[[int, int], None],
        say: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._files = files
        self._store = store
        self._say = say
        self._memory = Memory()
        self._injector = Injector(listener, mark, died, self._memory.read)
        self._serve: dict[int, Callable[[Call], None]] = {
            calls.IOCTL: self._ioctl,
            calls.MMAP: self._mmap,
            calls.OPEN: lambda call: self._open(call, call.arguments[0], call.arguments[1]),
            calls.OPENAT: lambda call: self._open(call, call.arguments[1], call.arguments[2]),
        }
        self._said: set[str] = set()

    def serve(self) -> None:
        """Answer one call."""
        call = self._listener.receive()
        if call is None:
            return
        try:
            try:
                self._serve[call.number](call)
            except GntallocError as error:
                self._listener.answer(call, -(error.errno or errno.EIO))
            except CallerGone:
                raise
            except Exception as error:
                # A fault of ours. The caller must not wait for ever.
                self._say_once(f"a call of thread {call.thread} could not be served: {error!r}")
                self._listener.answer(call, -errno.EIO)
        except CallerGone:
            pass  # nobody waits for the answer

    def _open(self, call: Call, path: int, flags: int) -> None:
        name = self._memory.path(call.thread, path)
        if not name.startswith(_FOLDER) or flags & os.O_PATH:
            self._listener.go_on(call)
            return
        device = name[len(_FOLDER) :].decode(errors="replace")
        if device == _STORE:
            self._open_store(call, flags)
            return
        try:
            home = self._files.open(device, flags)
        except GntallocError as error:
            if error.errno != errno.ENOENT:
                raise
            self._listener.go_on(call)  # no device of ours: what the computer says itself
            return
        try:
            self._hand_over(call, home.fileno(), flags)
        finally:
            home.close()

    def _open_store(self, call: Call, flags: int) -> None:
        """The device gives what the daemon's socket does, so the file is a connection to it."""
        if self._store is None:
            self._listener.go_on(call)
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            try:
                sock.connect(self._store)
            except OSError:
                self._listener.answer(call, -errno.ENODEV)
                return
            os.set_blocking(sock.fileno(), not flags & os.O_NONBLOCK)
            self._hand_over(call, sock.fileno(), flags)

    def _hand_over(self, call: Call, descriptor: int, flags: int) -> None:
        try:
            self._listener.answer_with(call, descriptor, flags=flags & os.O_CLOEXEC)
        except OSError as error:
            self._listener.answer(call, -(error.errno or errno.EMFILE))

    def _file(self, call: Call, descriptor: int) -> tuple[int, OpenFile | None]:
        """The file behind a caller's descriptor, and its inode."""
        inode = inode_of(call.thread, descriptor)
        if not inode:
            return 0, None
        file = self._files.known(inode)
        if file is not None:
            return inode, file
        home = _fetch(call.thread, descriptor)
        if home < 0:
            return inode, None
        try:
            return inode, self._files.show(inode, home)
        finally:
            os.close(home)

    def _ioctl(self, call: Call) -> None:
        descriptor, request, address, *_ = call.arguments
        inode, file = self._file(call, descriptor & _LOW_INT)
        if file is None:
            self._listener.go_on(call)
            return
        request &= _LOW_INT
        if request == RESET and file.name == "evtchn":
            home = _fetch(call.thread, descriptor & _LOW_INT)
            if home >= 0:
                empty(home)
                os.close(home)
        regions = regions_of(file.name, request, address, self._memory, call.thread)
        result, written = self._files.ioctl(file, request, address, regions)
        if result == -errno.EBADF:
            self._files.forget(inode)
        if written and not self._listener.waits(call):
            raise CallerGone
        for region in written:
            if self._memory.write(call.thread, region.address, bytes(region.data)) < len(region.data):
                result = -errno.EFAULT  # it was writable a moment ago: another thread of the program sees to that
        self._listener.answer(call, result)

    def _mmap(self, call: Call) -> None:
        _address, length, prot, flags, descriptor, offset = call.arguments
        _inode, file = self._file(call, descriptor & _LOW_INT)
        if file is None:
            self._listener.go_on(call)
            return
        shared = flags & _MAP_SHARED_BITS != _MAP_PRIVATE
        plan = self._files.mmap(file, offset, length, prot=prot & _LOW_INT, shared=shared)
        try:
            numbers = [descriptor.fileno() for descriptor in plan.descriptors]
            address = self._injector.place(call, plan.pieces, numbers)
        except Traced:
            self._say_once(
                f"process {call.thread} maps pages of {file.name} while another program traces it (gdb, strace): they "
                "cannot be placed; detach while it maps"
            )
            self._listener.answer(call, -errno.EBUSY)
            return
        finally:
            for each in plan.descriptors:
                each.close()
        if address >= 0:
            self._files.placed(plan, address)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)


def _fetch(thread: int, descriptor: int) -> int:
    """A copy of a caller's descriptor, if it is a socket; -1 if it is not, or cannot be had."""
    try:
        if not os.readlink(f"/proc/{thread}/fd/{descriptor}").startswith("socket:"):
            return -1
        process = os.pidfd_open(leader_of(thread), 0)
    except OSError:
        return -1
    try:
        number: int = _libc.syscall(_SYS_PIDFD_GETFD, process, descriptor, 0)
        return number
    finally:
        os.close(process)
