"""Find the process that a calling thread belongs to, and the file of its descriptor.

A thread's folder in /proc is kept open from its first call on. An open folder never becomes another thread's, even if
that gets the same number. So all that was found out about the thread stays true.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import NamedTuple

from gntalloc.libc import libc

__all__ = ["Threads", "fetch", "is_traced", "leader_of"]

_MOST_KNOWN = 64
_SOCKET, _MEMORY = "socket:[", "/memfd:"
_SYS_PIDFD_GETFD = 438
_PIDFD_THREAD = os.O_EXCL  # since Linux 6.9
_ENOUGH = 512  # bytes of a status, which have the lines at its beginning


class _Known(NamedTuple):
    folder: int  # in /proc, opened
    status: int  # the file of that name in it, opened too
    process: int


class Threads:
    """Remember the threads that called last."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        with socket.socket(socket.AF_UNIX) as sock:
            self._sockets = os.fstat(sock.fileno()).st_dev  # the file system of all sockets

    def identity(self, thread: int, descriptor: int) -> tuple[int, int] | None:
        """Give device and inode of the socket or memory file behind a descriptor of this thread.

        The device of a memory file is 0 here. None: there is no such descriptor, it cannot be seen, or it is a file of
        another kind, and none of ours.
        """
        known = self._known.get(thread)
        if known is not None:
            try:
                return self._identity(known.folder, descriptor)
            except OSError:
                self.forget(thread)  # another thread may have its number now
        try:
            return self._identity(self._meet(thread).folder, descriptor)
        except OSError:
            return None

    def _identity(self, folder: int, descriptor: int) -> tuple[int, int] | None:
        link = os.readlink(f"fd/{descriptor}", dir_fd=folder)
        if link.startswith(_SOCKET):
            return self._sockets, int(link[len(_SOCKET) : -1])
        if link.startswith(_MEMORY):
            return 0, _inode(folder, descriptor)
        return None

    def process(self, thread: int) -> int:
        """Give the process of a thread. Call it right after `identity`, which notices if a number was given anew."""
        known = self._known.get(thread)
        return leader_of(thread) if known is None else known.process

    def process_now(self, thread: int) -> int:
        """Give the process of a thread, or the thread itself if that cannot be seen."""
        known = self._known.get(thread)
        if known is not None:
            try:
                os.stat("fd", dir_fd=known.folder)
                return known.process
            except OSError:
                self.forget(thread)
        try:
            return self._meet(thread).process
        except OSError:
            return thread

    def close(self) -> None:
        """Forget all threads."""
        for thread in list(self._known):
            self.forget(thread)

    def is_traced(self, thread: int) -> bool:
        """Say whether a debugger (strace, gdb) traces a thread. Call it right after `identity`."""
        known = self._known.get(thread)
        return known is not None and _number(known.status, b"TracerPid:", 0) != 0

    def _meet(self, thread: int) -> _Known:
        folder = os.open(f"/proc/{thread}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status = os.open("status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
        except OSError:
            os.close(folder)
            raise
        if len(self._known) >= _MOST_KNOWN:
            self.forget(next(iter(self._known)))
        known = self._known[thread] = _Known(folder, status, _number(status, b"Tgid:", thread))
        return known

    def forget(self, thread: int) -> None:
        """Forget a thread: another one may have its number now."""
        known = self._known.pop(thread, None)
        if known is not None:
            os.close(known.folder)
            os.close(known.status)


def leader_of(thread: int) -> int:
    """Give the process of a thread, or the thread itself if that cannot be seen."""
    return _look(thread, b"Tgid:", thread)


def is_traced(thread: int) -> bool:
    """Say whether a debugger (strace, gdb) traces a thread."""
    return _look(thread, b"TracerPid:", 0) != 0


def _look(thread: int, name: bytes, unknown: int) -> int:
    try:
        status = os.open(f"/proc/{thread}/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return unknown
    try:
        return _number(status, name, unknown)
    finally:
        os.close(status)


def _number(status: int, name: bytes, unknown: int) -> int:
    """Read the number under this name from a status."""
    try:
        text = os.pread(status, _ENOUGH, 0)
    except OSError:
        return unknown
    at = text.find(b"\n" + name)
    return unknown if at < 0 else int(text[at + 1 + len(name) :].split(b"\n", 1)[0])


def _inode(folder: int, descriptor: int) -> int:
    """Read the inode of a descriptor's file, since Linux 5.14. No stat(2) is made.

    That may have to wait for another computer (NFS), or another program (FUSE), whose file may have any name.

    Raises:
        OSError: there is no such descriptor.
    """
    details = os.open(f"fdinfo/{descriptor}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return _number(details, b"ino:", 0)
    finally:
        os.close(details)


def fetch(thread: int, descriptor: int) -> int:
    """Make a copy of a thread's descriptor. -1: it has none, or it cannot be had.

    Before Linux 6.9 it is the descriptor of the thread's process. The two differ only for threads with descriptors of
    their own.
    """
    try:
        handle = _handle(thread)
    except OSError:
        return -1
    try:
        number: int = libc.syscall(_SYS_PIDFD_GETFD, handle, descriptor, 0)
        return number
    finally:
        os.close(handle)


def _handle(thread: int) -> int:
    try:
        return os.pidfd_open(thread, _PIDFD_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.pidfd_open(leader_of(thread), 0)
