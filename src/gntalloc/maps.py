"""Reserve addresses, place pages there, unmap them, and give views of them. The rules about closing are here.

A mapping is made in two steps. First a range of addresses is *reserved* with `mmap.mmap(-1, n)`. Then pages are
*placed* over it, piece by piece, with mmap(2) and MAP_FIXED. So no descriptor is kept, and a range may consist of any
pages. CPython itself guards the end: it refuses to close the reservation while a view, a slice or an array of it is
alive, and unmaps it with the last of them. (A map made by ctypes alone has neither guard: a forgotten view of it ends
in SIGSEGV.)

The price is that CPython believes the range to be writable. So memory that was placed without PROT_WRITE is given out
as a read-only view only.
"""

from __future__ import annotations

import ctypes
import mmap

from gntalloc.errors import Closed, ViewsStillExported
from gntalloc.libc import failure, libc

__all__ = ["PAGE_SIZE", "PROT_READ", "PROT_WRITE", "Mapping"]

PAGE_SIZE = 4096  # Xen's page; this computer's own pages must have that size too, see doctor
PROT_READ = mmap.PROT_READ
PROT_WRITE = mmap.PROT_WRITE

_MAP_FIXED = 0x10
_MAP_POPULATE = 0x8000
_POPULATED = 1 << 20  # so many bytes at most are made present at once: that costs less than a fault for each page
_MAP_FAILED = ctypes.c_void_p(-1).value

_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE: pages of others will be there
_PLACED = _MAP_FIXED | mmap.MAP_SHARED
_PLACED_AND_PRESENT = _PLACED | _MAP_POPULATE
_PLACED_PRIVATELY = _MAP_FIXED | mmap.MAP_PRIVATE

_mmap = libc.mmap
_addressof, _char_from = ctypes.addressof, ctypes.c_char.from_buffer


class Mapping:
    """Hold a range of `length` bytes, which is anonymous until something is placed there.

    Args:
        length: bytes; rounded up to whole pages, as mmap(2) does.
        prot: the rights of the pages that will be placed. Without PROT_WRITE `memory` is read-only.
        name: what this is, for the error that a live view causes. If it has several parts, they are put together then.
    """

    def __init__(
        self, length: int, *, prot: int = PROT_READ | PROT_WRITE, name: str | tuple[object, ...] = "a mapping"
    ) -> None:
        self.length = -(-length // PAGE_SIZE) * PAGE_SIZE
        self.name = name
        self._prot = prot
        self._range = mmap.mmap(-1, self.length, _RESERVED)
        self.address = _addressof(_char_from(self._range))
        self._memory: memoryview | None = self._view()

    def place(self, start: int, length: int, descriptor: int, offset: int, *, shared: bool = True) -> None:
        """Put `length` bytes of `descriptor`, from `offset` on, at `start` bytes into the range.

        The descriptor may be closed afterwards.

        Raises:
            OSError: what mmap(2) answered.
        """
        flags = _PLACED if shared else _PLACED_PRIVATELY
        if shared and length <= _POPULATED:
            flags = _PLACED_AND_PRESENT
        self._map(start, length, self._prot, flags, descriptor, offset)

    def unmap(self, start: int, length: int) -> None:
        """Give back a part. Anonymous memory takes its place, so a forgotten view reads zeros and causes no fault."""
        self._map(start, length, PROT_READ | PROT_WRITE, _MAP_FIXED | _RESERVED, -1, 0)

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
        """Unmap the whole range. The call may be repeated, also after a refusal.

        Raises:
            ViewsStillExported: a view of the memory is alive. The range stays mapped; take `memory` anew to go on.
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
        if self._memory is None:
            raise Closed(f"{self} was closed")
        if start % PAGE_SIZE or not 0 <= start < start + length <= self.length:
            raise ValueError(f"{start}+{length} is not a range of whole pages inside {self.length} bytes")
        if _mmap(self.address + start, length, prot, flags, descriptor, offset) == _MAP_FAILED:
            raise failure()
