"""Keep granted pages: those of one ALLOC, those with all in common, those of an open file; and what is told of a page.

Indexes only ever grow in a file. So a file's list of its ALLOCs by index is nearly always added to at its end.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right, insort
from typing import TYPE_CHECKING, NamedTuple, Self

from gntalloc.hypervisor.grants import Grant, Span
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc.drivers.chardev import Extent, File
    from gntalloc.drivers.notify import Promise

__all__ = ["Alloc", "FileState", "GrantInfo", "Pages", "Range"]

_MANY = 64


class Alloc(Grant["Extent"]):
    """Keep what all pages of one ALLOC have in common. `index` is the first one's."""

    __slots__ = ("born", "file", "index", "state")

    def __init__(
        self, file: File, state: FileState, index: int, extent: Extent, domid: int, readonly: bool, born: float
    ) -> None:
        super().__init__(domid, extent, readonly)
        self.file = file
        self.state = state
        self.index = index
        self.born = born


class Pages(Span[Alloc]):
    """Keep pages of one ALLOC with all in common: their users, and what is to be done when the last one goes."""

    __slots__ = ("listed", "promise", "users")

    def __init__(self, alloc: Alloc) -> None:
        super().__init__(alloc)
        self.users = 1  # the file's list
        self.listed = True
        self.promise: Promise | None = None  # of one page at most

    def part(self, page: int, count: int) -> Self:
        """See `Span`."""
        part = super().part(page, count)
        part.users = self.users
        part.listed = self.listed
        return part


class Range(NamedTuple):
    """Name pages of one ALLOC, however they are split."""

    alloc: Alloc
    page: int
    pages: int


class FileState:
    """Keep the state of an open file: its ALLOCs of which a page is left, and the next index."""

    __slots__ = ("_firsts", "allocs", "next_index")

    def __init__(self) -> None:
        self.allocs: dict[int, Alloc] = {}  # by index
        self.next_index = 0
        self._firsts = array("Q")  # the indexes of ALLOCs, in order; some may be gone

    def add(self, alloc: Alloc) -> None:
        """Add a new ALLOC. A large one may have taken so long that others with higher indexes are there already."""
        self.allocs[alloc.index] = alloc
        if len(self._firsts) > 2 * len(self.allocs) + _MANY:
            self._firsts = array("Q", sorted(self.allocs))
        else:
            insort(self._firsts, alloc.index)

    def remove(self, alloc: Alloc) -> None:
        """Remove an ALLOC, as its last page is free. One that never was there is no error."""
        if self.allocs.get(alloc.index) is not alloc:
            return
        del self.allocs[alloc.index]
        if self._firsts and self._firsts[-1] == alloc.index:  # the next one may have its index
            self._firsts.pop()

    def ranges(self, index: int, count: int) -> Iterator[Range]:
        """Give the pages from `index` on that ALLOCs with a page left have, in order. Some of them may be free."""
        if index % PAGE_SIZE:
            return
        end = index + count * PAGE_SIZE
        alloc = self.allocs.get(index)
        if alloc is not None and len(alloc.refs) >= count:  # as nearly always
            yield Range(alloc, 0, count)
            return
        for at in range(max(0, bisect_right(self._firsts, index) - 1), len(self._firsts)):
            alloc = self.allocs.get(self._firsts[at])
            if alloc is None:
                continue
            if alloc.index >= end:
                break
            first = max(0, -(-(index - alloc.index) // PAGE_SIZE))
            last = min(len(alloc.refs), -(-(end - alloc.index) // PAGE_SIZE))
            if first < last:
                yield Range(alloc, first, last - first)


class GrantInfo(NamedTuple):
    """Describe one page, for people and programs to look at."""

    ref: int
    peer: int
    writable: bool
    opener: int  # pid
    users: int  # 0: released, and lingers
    mapped_by: tuple[int, ...]
    held: bool
    age: float  # seconds
