"""Tell what is behind descriptors, as /proc says, and receive files from other processes."""

from __future__ import annotations

import array
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import _socket

__all__ = ["MOST", "inode_of_socket", "open_files", "receive_with"]

MOST = 253
"""The most descriptors of one message: the kernel's SCM_MAX_FD."""
_SOCKET = "socket:["


def receive_with(sock: _socket.socket, size: int, most: int = MOST, *, how: int = 0) -> tuple[bytes, list[int]]:
    """Receive up to `size` bytes, and up to `most` descriptors with them, which no program that we start inherits.

    `socket.recv_fds` takes flags and ignores them, so its descriptors are inherited (seen in Python 3.11 to 3.14).

    Args:
        sock: a Unix socket.
        size: bytes.
        most: descriptors.
        how: flags of recvmsg(2).

    Raises:
        OSError: what recvmsg(2) answered.
    """
    numbers = array.array("i")
    room = socket.CMSG_SPACE(most * numbers.itemsize)
    data, controls, _, _ = sock.recvmsg(size, room, how | socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in controls:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(content[: len(content) // numbers.itemsize * numbers.itemsize])
    return data, list(numbers)


def open_files(pid: int | None = None) -> list[str]:
    """List the targets of a process's descriptors, one entry each, without the code that it runs.

    A library may keep its own file open: libffi 3.8 does, from `import ctypes` on. No program opened that descriptor,
    and nobody can write to it.

    Args:
        pid: this process if not given.

    Raises:
        OSError: the process is gone, or belongs to another user.
    """
    folder = f"/proc/{os.getpid() if pid is None else pid}"
    code = _code(folder)
    found = []
    for name in os.listdir(f"{folder}/fd"):
        try:
            target = os.readlink(f"{folder}/fd/{name}")
            if target not in code or not _is_read_only(f"{folder}/fdinfo/{name}"):
                found.append(target)
        except FileNotFoundError:  # the descriptor that listed the others
            continue
    return found


def inode_of_socket(descriptor: int) -> int | None:
    """Give the inode of the socket behind a descriptor of this process. None: it is no socket.

    No fstat(2) is made: of a file on FUSE it may wait for another program.
    """
    try:
        link = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return None
    return int(link[len(_SOCKET) : -1]) if link.startswith(_SOCKET) else None


def _code(folder: str) -> set[str]:
    """List the files that are mapped to be executed."""
    with open(f"{folder}/maps", encoding="utf-8", errors="surrogateescape") as lines:
        fields = [line.rstrip("\n").split(maxsplit=5) for line in lines]
    return {each[5] for each in fields if len(each) == 6 and "x" in each[1]}


def _is_read_only(path: str) -> bool:
    with open(path, encoding="ascii") as lines:
        flags = next(line.split()[1] for line in lines if line.startswith("flags:"))
    return int(flags, 8) & os.O_ACCMODE == os.O_RDONLY
