"""The memory of a program: copy from it and to it, as far as its own rights go.

Source: process_vm_readv(2). It fails where the program's own access would, unlike /proc/PID/mem, which writes to
read-only pages. A copy is cut at page boundaries, so that one that cannot be whole tells how far it got.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Memory", "inode_of", "leader_of"]

_MOST_PIECES = 1024  # IOV_MAX
_TOP = 1 << 64

_libc = ctypes.CDLL(None, use_errno=True)


class _Piece(ctypes.Structure):
    _fields_ = (("base", ctypes.c_size_t), ("length", ctypes.c_size_t))


for _function in (_libc.process_vm_readv, _libc.process_vm_writev):
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    )


class Memory:
    """Copies between programs and a buffer here. One object a supervisor; not for several threads."""

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(PAGE_SIZE)
        self._here = _Piece(ctypes.addressof(self._buffer), 0)
        self._there = _Piece()
        self._here_at = ctypes.addressof(self._here)
        self._there_at = ctypes.addressof(self._there)

    def read(self, thread: int, address: int, size: int) -> bytes:
        """Up to `size` bytes: fewer if not all of them can be read."""
        if 0 <= size <= PAGE_SIZE - address % PAGE_SIZE:  # within one page, as nearly always
            self._here.length = self._there.length = size
            self._there.base = address
            got = _libc.process_vm_readv(thread, self._here_at, 1, self._there_at, 1, 0)
            return self._buffer.raw[:got] if got > 0 else b""
        buffer = ctypes.create_string_buffer(size)
        got = self._copy(_libc.process_vm_readv, thread, address, buffer, size)
        return buffer.raw[:got]

    def write(self, thread: int, address: int, data: bytes) -> int:
        """Put `data` there; how many bytes could be written."""
        buffer = ctypes.create_string_buffer(bytes(data), len(data))
        return self._copy(_libc.process_vm_writev, thread, address, buffer, len(data))

    def writable(self, thread: int, address: int, size: int) -> int:
        """How many of `size` bytes from `address` on can be written.

        There is no way to ask but to write. So the first byte in each page is written as it is; the caller is about to
        have it written anyway.
        """
        end = min(address + size, _TOP)
        at = address
        while at < end:
            byte = self.read(thread, at, 1)
            if not byte or not self.write(thread, at, byte):
                return at - address
            at += PAGE_SIZE - at % PAGE_SIZE
        return end - address

    def path(self, thread: int, address: int) -> bytes:
        """A string of at most 255 bytes. Empty if there is none."""
        size = min(256, PAGE_SIZE - address % PAGE_SIZE)
        found = self.read(thread, address, size)
        if b"\0" not in found and size < 256:
            found += self.read(thread, address + size, 256 - size)
        return found[: max(0, found.find(b"\0"))]

    def _copy(
        self, copy: Callable[..., int], thread: int, address: int, buffer: ctypes.Array[ctypes.c_char], size: int
    ) -> int:
        done = 0
        start = ctypes.addressof(buffer)
        while done < size and address + done < _TOP:
            pieces: list[_Piece] = []
            at = address + done
            end = min(address + size, _TOP)
            while at < end and len(pieces) < _MOST_PIECES:
                length = min(PAGE_SIZE - at % PAGE_SIZE, end - at)
                pieces.append(_Piece(at, length))
                at += length
            there = (_Piece * len(pieces))(*pieces)
            here = _Piece(start + done, at - address - done)
            got = copy(thread, ctypes.addressof(here), 1, ctypes.addressof(there), len(pieces), 0)
            if got <= 0:
                break
            done += got
        return done


def leader_of(thread: int) -> int:
    """The process that a thread belongs to; itself if that cannot be seen."""
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            for line in file:
                if line.startswith(b"Tgid:"):
                    return int(line[5:])
    except OSError:
        pass
    return thread


def inode_of(thread: int, descriptor: int) -> int:
    """Which file a program's descriptor is, as a number; 0 if it is none. Sockets have their own each."""
    try:
        return os.stat(f"/proc/{thread}/fd/{descriptor}").st_ino
    except OSError:
        return 0
