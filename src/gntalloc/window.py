"""Map a memory file into this process, for the machine's own use: to write where no program may, and to wipe."""

from __future__ import annotations

import ctypes
import mmap

from gntalloc.libc import failure, libc

__all__ = ["Window"]

_SHARED_AND_PRESENT = mmap.MAP_SHARED | 0x8000  # MAP_POPULATE
_SHARED = mmap.MAP_SHARED
_POPULATED = 1 << 20  # bytes of a window that are made present at once
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FAILED = ctypes.c_void_p(-1).value


class Window:
    """Map `length` bytes of `descriptor`, from `offset` on, until `close`. The descriptor may be closed.

    Raises:
        OSError: what mmap(2) answered.
    """

    __slots__ = ("_address", "_length")

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        how = _SHARED_AND_PRESENT if length <= _POPULATED else _SHARED
        self._address = libc.mmap(None, length, _READ_WRITE, how, descriptor, offset)
        self._length = length
        if self._address == _MAP_FAILED:
            raise failure()

    def view(self, start: int, length: int) -> memoryview:
        """Give a part of it, to be used at once: nothing keeps the window while a view is alive."""
        assert 0 <= start <= start + length <= self._length
        return memoryview((ctypes.c_ubyte * length).from_address(self._address + start)).cast("B")

    def wipe(self, start: int, length: int) -> None:
        """Fill a part with zeros."""
        assert 0 <= start <= start + length <= self._length
        ctypes.memset(self._address + start, 0, length)

    def close(self) -> None:
        """Unmap it."""
        libc.munmap(self._address, self._length)
