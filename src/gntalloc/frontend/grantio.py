"""A backend's way to the pages that a request names: as memory that preadv and pwritev can use.

    Kept      maps a page when it is first named, and keeps it: for frontends with feature-persistent
    Mapped    maps them for one request
    Copied    does not map them: GRANT_COPY, from and to a buffer of its own

Each refuses with a GntallocError what cannot be mapped or copied, before anything was done.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
from typing import TYPE_CHECKING, Protocol

from gntalloc.abi.gntdev import COPY_DEST_GREF, COPY_SOURCE_GREF, GRANT_COPY, ForeignPage, GrantCopy, GrantCopySegment
from gntalloc.errors import DeviceError
from gntalloc.frontend.blkif import SECTOR, SEGMENTS_OF_A_PAGE
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from gntalloc.frontend.blkif import Segment
    from gntalloc.guest.domain import BareDomain
    from gntalloc.guest.pages import MappedPages

__all__ = ["Access", "Copied", "Kept", "Mapped"]

MOST_KEPT = 1056
"""Pages that are kept mapped; what a frontend names beyond that replaces what was mapped first."""


class Access(Protocol):
    """One way. Not for several threads."""

    def borrow(self, segments: Sequence[Segment], *, writable: bool) -> AbstractContextManager[list[memoryview]]:
        """Give the memory of the segments, for the length of a `with`. What is written there reaches the frontend.

        Raises:
            GntallocError: there is no such page, or not for this.
        """

    def close(self) -> None:
        """Let go of everything. Can be repeated."""


class Mapped:
    """Maps the pages of a request, and unmaps them after it."""

    def __init__(self, domain: BareDomain, granter: int) -> None:
        self._domain = domain
        self._granter = granter

    @contextlib.contextmanager
    def borrow(self, segments: Sequence[Segment], *, writable: bool) -> Iterator[list[memoryview]]:
        """See `Access`."""
        refs = [segment.ref for segment in segments]
        with self._domain.map(self._granter, refs, writable=writable, timeout=0) as pages:
            memory = pages.memory
            starts = [number * PAGE_SIZE for number in range(len(segments))]
            views = [
                memory[start + segment.first * SECTOR : start + (segment.last + 1) * SECTOR]
                for start, segment in zip(starts, segments, strict=True)
            ]
            try:
                yield views
            finally:
                _release(views)

    def close(self) -> None:
        """See `Access`. Nothing is kept."""


class Kept:
    """Maps each page once."""

    def __init__(self, domain: BareDomain, granter: int, most: int = MOST_KEPT) -> None:
        self._domain = domain
        self._granter = granter
        self._most = most
        self._pages: dict[int, memoryview] = {}  # by reference
        self._maps: list[tuple[MappedPages, list[int]]] = []  # oldest first, and the references of each

    @contextlib.contextmanager
    def borrow(self, segments: Sequence[Segment], *, writable: bool) -> Iterator[list[memoryview]]:
        """See `Access`. A page is kept writable, which a persistent frontend's must be."""
        missing = {segment.ref for segment in segments if segment.ref not in self._pages}
        if missing:
            self._make_room(len(missing), {segment.ref for segment in segments})
            missing.update(segment.ref for segment in segments if segment.ref not in self._pages)
            self._map(sorted(missing))
        views = [self._pages[segment.ref][segment.first * SECTOR : (segment.last + 1) * SECTOR] for segment in segments]
        try:
            yield views
        finally:
            _release(views)

    def _map(self, refs: list[int]) -> None:
        pages = self._domain.map(self._granter, refs, writable=True, timeout=0)
        self._maps.append((pages, refs))
        for number, ref in enumerate(refs):
            self._pages[ref] = pages.memory[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]

    def _make_room(self, wanted: int, named: set[int]) -> None:
        """Unmap pages until there is room. Some that are named may go as well; they are mapped again then."""
        while self._maps and len(self._pages) + max(wanted, len(named)) > self._most:
            self._forget()

    def _forget(self) -> None:
        pages, refs = self._maps.pop(0)
        _release([self._pages.pop(ref) for ref in refs])
        pages.close()

    def close(self) -> None:
        """See `Access`."""
        while self._maps:
            self._forget()


class Copied:
    """Copies by GRANT_COPY: all segments of a request in one call, and nothing is ever mapped.

    Its buffer begins at a page: then a segment that is a whole page is one copy, and not two.
    """

    def __init__(self, domain: BareDomain, granter: int) -> None:
        self._granter = granter
        self._buffer = mmap.mmap(-1, 8 * SEGMENTS_OF_A_PAGE * PAGE_SIZE)  # no more of it is there than was used
        self._file = domain.devices.open("gntdev")
        self._closed = False

    @contextlib.contextmanager
    def borrow(self, segments: Sequence[Segment], *, writable: bool) -> Iterator[list[memoryview]]:
        """See `Access`. Pages to be written are written at the end."""
        length = sum(segment.length for segment in segments)
        if length > len(self._buffer):
            raise DeviceError(errno.EINVAL, f"{len(segments)} segments are more than one request may have here")
        with memoryview(self._buffer) as all_of_it, all_of_it[:length] as whole:
            if not writable:
                self._copy(segments, whole, to_them=False)
            views, at = [], 0
            for segment in segments:
                views.append(whole[at : at + segment.length])
                at += segment.length
            try:
                yield views
            finally:
                _release(views)
            if writable:
                self._copy(segments, whole, to_them=True)

    def _copy(self, segments: Sequence[Segment], buffer: memoryview, *, to_them: bool) -> None:
        here = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        packed, at = bytearray(), 0
        for segment in segments:
            there = ForeignPage(segment.ref, segment.first * SECTOR, self._granter).to_word()
            ends = (here + at, there) if to_them else (there, here + at)
            flags = COPY_DEST_GREF if to_them else COPY_SOURCE_GREF
            packed += GrantCopySegment(*ends, segment.length, flags, 0).pack()
            at += segment.length
        table = ctypes.addressof(ctypes.c_char.from_buffer(packed))
        self._file.ioctl(GRANT_COPY, GrantCopy(len(segments), table).pack(), memory=[(table, packed), (here, buffer)])
        for number, segment in enumerate(segments):
            status = GrantCopySegment.unpack_from(packed, number * GrantCopySegment.SIZE).status
            if status:
                raise DeviceError(errno.EINVAL, f"reference {segment.ref} could not be copied (status {status})")

    def close(self) -> None:
        """See `Access`."""
        if not self._closed:
            self._closed = True
            self._file.close()
            self._buffer.close()


def _release(views: list[memoryview]) -> None:
    for view in views:
        view.release()
