"""Copy from the memory of a program and to it, as far as the program's own rights go.

Source: process_vm_readv(2). It fails where the program's own access would, unlike /proc/PID/mem, which writes to
read-only pages. A copy is cut at page boundaries, so a copy that cannot be whole tells how far it got.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

from gntalloc.libc import failure, libc_with_gil
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Denied", "Memory"]

_MOST_PIECES = 1024  # IOV_MAX
_TOP = 1 << 64


class Denied(PermissionError):
    """The kernel does not let us look into this program at all: Yama, or the mode of the program's file."""


class _Piece(ctypes.Structure):
    _fields_ = (("base", ctypes.c_size_t), ("length", ctypes.c_size_t))


# No argtypes here: all arguments but the thread are made once, so that a call need not convert them.
_read, _write = libc_with_gil.process_vm_readv, libc_with_gil.process_vm_writev
_ONE, _NONE = ctypes.c_ulong(1), ctypes.c_ulong(0)


class Memory:
    """Copy between programs and a buffer here. A process has one such object, for one thread."""

    def __init__(self) -> None:
        self._buffer = bytearray(PAGE_SIZE)
        self._buffer_at = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self._here = _Piece(self._buffer_at, 0)
        self._there = _Piece()
        self._here_at = ctypes.byref(self._here)
        self._there_at = ctypes.byref(self._there)

    def read(self, thread: int, address: int, size: int) -> bytes:
        """Read up to `size` bytes: fewer if not all of them can be read.

        Raises:
            Denied: the kernel forbids it. The other methods raise it too.
        """
        if 0 <= size <= PAGE_SIZE - address % PAGE_SIZE:  # within one page, as nearly always
            self._here.length = self._there.length = size
            self._there.base = address
            got = _read(thread, self._here_at, _ONE, self._there_at, _ONE, _NONE)
            if got > 0:
                return bytes(self._buffer[:got])
            if got < 0:
                _see_whether_denied()
            return b""
        buffer = ctypes.create_string_buffer(size)
        if self._whole(_read, thread, address, buffer, size):
            return buffer.raw
        got = self._copy(_read, thread, address, buffer, size)
        return buffer.raw[:got]

    def write(self, thread: int, address: int, data: bytes) -> int:
        """Write `data` at `address`, and return how many bytes could be written."""
        size = len(data)
        if size <= PAGE_SIZE - address % PAGE_SIZE:
            self._buffer[:size] = data
            self._here.length = self._there.length = size
            self._there.base = address
            written: int = _write(thread, self._here_at, _ONE, self._there_at, _ONE, _NONE)
            if written < 0:
                _see_whether_denied()
            return max(written, 0)
        buffer = ctypes.create_string_buffer(data, size)
        if self._whole(_write, thread, address, buffer, size):
            return size
        return self._copy(_write, thread, address, buffer, len(data))

    def writable(self, thread: int, address: int, size: int) -> int:
        """Count how many of `size` bytes from `address` on can be written.

        Only a write can tell. So the first byte in each page is written as it is. The caller is about to have it
        written anyway.
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
        """Read a string of at most 255 bytes. It is empty if there is none."""
        size = min(256, PAGE_SIZE - address % PAGE_SIZE)
        found = self.read(thread, address, size)
        if b"\0" not in found and size < 256:
            found += self.read(thread, address + size, 256 - size)
        return found[: max(0, found.find(b"\0"))]

    def _whole(
        self, copy: Callable[..., int], thread: int, address: int, buffer: ctypes.Array[ctypes.c_char], size: int
    ) -> bool:
        """Copy all in one piece, as is nearly always possible. Otherwise only a copy page by page tells how far."""
        if not 0 <= address <= _TOP - size:
            return False
        self._there.base, self._there.length = address, size
        here = _Piece(ctypes.addressof(buffer), size)
        return copy(thread, ctypes.byref(here), _ONE, self._there_at, _ONE, _NONE) == size

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
            got = copy(thread, ctypes.byref(here), _ONE, there, ctypes.c_ulong(len(pieces)), _NONE)
            if got <= 0:
                if got < 0:
                    _see_whether_denied()
                break
            done += got
        return done


def _see_whether_denied() -> None:
    if failure().errno == errno.EPERM:
        raise Denied(errno.EPERM, os.strerror(errno.EPERM))
