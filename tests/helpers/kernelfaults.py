"""Let the n-th call to the kernel of one thread fail, with an error that the kernel has for it.

`KernelFaults` replaces the functions through which Python code calls the kernel: those of `os`, `fcntl`, `socket`,
`select`, `mmap` and of the C library. Calls of other threads go through. Left out are calls that cannot fail with a
descriptor of one's own (close, fstat, epoll's wait, and changes of what it waits for).
"""

from __future__ import annotations

import _socket
import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import threading
from typing import TYPE_CHECKING, Any

from gntalloc import maps
from gntalloc.libc import libc

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

__all__ = ["KernelFaults"]

F_OFD_GETLK, F_OFD_SETLK = 36, 37

OF_OS = {
    "chmod": (errno.EPERM,),
    "dup": (errno.EMFILE,),
    "eventfd": (errno.EMFILE,),
    "listdir": (errno.EMFILE, errno.ENOMEM),
    "memfd_create": (errno.EMFILE, errno.ENOMEM),
    "open": (errno.EMFILE, errno.ENFILE, errno.EACCES),
    "pipe2": (errno.EMFILE,),
    "posix_fallocate": (errno.ENOMEM, errno.ENOSPC),
    "read": (errno.EIO,),
    "readlink": (errno.ENOMEM,),
    "rename": (errno.ENOSPC,),
    "unlink": (errno.EACCES,),
}
OF_FCNTL = {
    fcntl.F_ADD_SEALS: (errno.EBUSY, errno.ENOMEM),
    F_OFD_GETLK: (errno.ENOLCK, errno.EACCES),
    F_OFD_SETLK: (errno.ENOLCK, errno.ENOMEM),
    fcntl.F_SETLEASE: (errno.EACCES, errno.EINVAL, errno.ENOMEM),
}
OF_SOCKETS = {
    "accept": (errno.EMFILE, errno.ENOBUFS, errno.ENOMEM),
    "bind": (errno.ENOMEM,),
    "getsockopt": (errno.ENOMEM,),
    "listen": (errno.ENOMEM,),
    "recv": (errno.ENOMEM,),
    "recvmsg": (errno.ENOMEM,),
    "send": (errno.ENOBUFS,),
    "sendmsg": (errno.ENOBUFS, errno.ETOOMANYREFS),
    "setsockopt": (errno.ENOMEM,),
    "shutdown": (errno.ENOTCONN,),
}
OF_LIBC = {
    "fallocate": (errno.ENOSPC, errno.ENOMEM),
    "inotify_add_watch": (errno.ENOSPC, errno.ENOMEM),
    "inotify_init1": (errno.EMFILE,),
    "inotify_rm_watch": (errno.EINVAL,),
    "mmap": (errno.ENOMEM,),
}
NO_ROOM = (errno.EMFILE, errno.ENFILE)
FAILED = ctypes.c_void_p(-1).value


class KernelFaults:
    """Count the calls of a thread, and let one of them fail.

    Args:
        patch: puts back what is replaced.
        choice: which of the errors of a call it fails with: this one, or the last if there are fewer.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, choice: int = 0) -> None:
        self.thread = -1
        self.choice = choice
        self.failed = ""
        """The call that has failed. Empty: none has."""
        self._left = -1
        for name, codes in OF_OS.items():
            patch.setattr(os, name, self._failing(name, codes, getattr(os, name)))
        real = fcntl.fcntl

        def with_command(descriptor: int, command: int, *rest: Any) -> Any:
            if command in OF_FCNTL:
                self._maybe(f"fcntl {command}", OF_FCNTL[command])
            return real(descriptor, command, *rest)

        patch.setattr(fcntl, "fcntl", with_command)
        for name, codes in OF_SOCKETS.items():
            real_one = getattr(socket.socket, name) if name == "accept" else getattr(_socket.socket, name)
            patch.setattr(socket.socket, name, self._failing(name, codes, real_one), raising=False)
        patch.setattr(socket, "socketpair", self._failing("socketpair", NO_ROOM, socket.socketpair))
        patch.setattr(mmap, "mmap", self._failing("mmap", (errno.ENOMEM,), mmap.mmap))
        patch.setattr(select, "epoll", self._failing_epoll(select.epoll))
        for name, codes in OF_LIBC.items():
            patch.setattr(libc, name, self._failing_in_c(name, codes, getattr(libc, name)))
        patch.setattr(maps, "_mmap", libc.mmap)

    def arm(self, thread: int, number: int) -> None:
        """Let call `number`, from 1 on, of this thread fail from now on."""
        self.thread, self.failed, self._left = thread, "", number

    def disarm(self) -> str:
        """Let no call fail any more, and return which one has failed. Empty: none has."""
        self._left = -1
        return self.failed

    def _hit(self, name: str) -> bool:
        if self._left < 0 or threading.get_ident() != self.thread:
            return False
        self._left -= 1
        if self._left:
            return False
        self._left = -1
        self.failed = name
        return True

    def _code(self, codes: tuple[int, ...]) -> int:
        return codes[min(self.choice, len(codes) - 1)]

    def _maybe(self, name: str, codes: tuple[int, ...]) -> None:
        if self._hit(name):
            code = self._code(codes)
            self.failed = f"{name} with {errno.errorcode[code]}"
            raise OSError(code, os.strerror(code))

    def _failing(self, name: str, codes: tuple[int, ...], real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self._maybe(name, codes)
            return real(*arguments, **named)

        return call

    def _failing_in_c(self, name: str, codes: tuple[int, ...], real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if not self._hit(name):
                return real(*arguments)
            code = self._code(codes)
            self.failed = f"{name} with {errno.errorcode[code]}"
            ctypes.set_errno(code)
            return FAILED if name == "mmap" else -1

        return call

    def _failing_epoll(self, real: Any) -> Callable[..., Any]:
        faults = self

        class Epoll:
            """An epoll of which `register` may fail."""

            def __init__(self) -> None:
                faults._maybe("epoll", NO_ROOM)
                self._real = real()

            def register(self, *arguments: Any) -> None:
                faults._maybe("register", (errno.ENOSPC, errno.ENOMEM))
                self._real.register(*arguments)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._real, name)

        return Epoll
