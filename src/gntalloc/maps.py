"""Addresses: reserve, place, unmap, views. The one home of the rules about closing.

A mapping is made in two steps. First a range of addresses is *reserved* with `mmap.mmap(-1, n)`; then pages are
*placed* over it, piece by piece, with mmap(2) and MAP_FIXED. So no descriptor is kept, a range may be composed
of any pages, and CPython itself guards the end: it refuses to close the reservation while a view, a slice or an
array of it is alive, and unmaps it with the last of them. (A map made by ctypes alone has neither guard: a
forgotten view of it ends in SIGSEGV.)

The price is that CPython believes the range to be writable. So memory placed without PROT_WRITE is only ever
handed out as a read-only view.
"""

from __future__ import annotations

import ctypes
import mmap

from gntalloc.errors import Closed, ViewsStillExported
from gntalloc.libc import failure, libc

__all__ = ["PAGE_SIZE", "PROT_READ", "PROT_WRITE", "Mapping"]

PAGE_SIZE = 4096  # what Xen grants; this computer's own pages must be of that size too, see doctor
PROT_READ = mmap.PROT_READ
PROT_WRITE = mmap.PROT_WRITE

_MAP_FIXED = 0x10
_MAP_POPULATE = 0x8000
_POPULATED = 1 << 20  # bytes at most: page by page, on their first use, costs more; of a great many it would be a wait
_MAP_FAILED = ctypes.c_void_p(-1).value

_mmap = libc.mmap


class Mapping:
    """A range of `length` bytes, anonymous until something is placed.

    Args:
        length: bytes; rounded up to whole pages, as mmap(2) does.
        prot: rights of what will be placed. Without PROT_WRITE `memory` is read-only.
        name: what this is, for the error that a live view causes; of several objects, to be put together only then.
    """

    def __init__(
        self, length: int, *, prot: int = PROT_READ | PROT_WRITE, name: str | tuple[object, ...] = "a mapping"
    ) -> None:
        self.length = -(-length // PAGE_SIZE) * PAGE_SIZE
        self.name = name
        self._prot = prot
        self._range = mmap.mmap(-1, self.length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        guard = ctypes.c_char.from_buffer(self._range)
        self.address = ctypes.addressof(guard)
        del guard
        self._memory: memoryview | None = self._view()

    def place(self, start: int, length: int, descriptor: int, offset: int, *, shared: bool = True) -> None:
        """Put `length` bytes of `descriptor`, from `offset` on, at `start` bytes into the range.

        The descriptor may be closed afterwards.

        Raises:
            OSError: what mmap(2) answered.
        """
        flags = _MAP_FIXED | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
        if shared and length <= _POPULATED:
            flags |= _MAP_POPULATE
        self._map(start, length, self._prot, flags, descriptor, offset)

    def unmap(self, start: int, length: int) -> None:
        """Give back a part. Anonymous memory takes its place, so a forgotten view reads zeros, and lives."""
        flags = _MAP_FIXED | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map(start, length, PROT_READ | PROT_WRITE, flags, -1, 0)

    @property
    def memory(self) -> memoryview:
        """The bytes. Read-only where the pages are.

        Raises:
            Closed: after `close`.
        """
        if self._memory is None:
            raise Closed(f"{self} was closed, so its memory cannot be used; map it again")
        return self._memory

    @property
    def closed(self) -> bool:
        """Whether `close` has succeeded."""
        return self._memory is None

    def close(self) -> None:
        """Unmap. May be repeated, also after a refusal.

        Raises:
            ViewsStillExported: something still looks at the memory. It stays mapped; take `memory` anew to go on.
        """
        if self._memory is None:
            return
        try:
            self._memory.release()  # an array on top of our own view makes this fail
            self._range.close()  # and this, a slice or a cast of it
        except BufferError as error:
            self._memory = self._view()
            raise ViewsStillExported(
                f"{self} cannot be unmapped while a view of it is alive (a slice, a cast or an array of "
                f".memory); drop it, then close again"
            ) from error
        self._memory = None

    def __str__(self) -> str:
        return self.name if isinstance(self.name, str) else " ".join(map(str, self.name))

    def _view(self) -> memoryview:
        view = memoryview(self._range)
        return view if self._prot & PROT_WRITE else view.toreadonly()

    def _map(self, start: int, length: int, prot: int, flags: int, descriptor: int, offset: int) -> None:
        if self.closed:
            raise Closed(f"{self} was closed")
        if start % PAGE_SIZE or not 0 <= start < start + length <= self.length:
            raise ValueError(f"{start}+{length} is not a range of whole pages inside {self.length} bytes")
        if _mmap(self.address + start, length, prot, flags, descriptor, offset) == _MAP_FAILED:
            raise failure()
