"""Make pages and take them back: memory files, seals, the machine's own window on them, and wiping.

Each ALLOC has one memory file (memfd), its `Extent`. All pages of an extent have the same grantee and the same rights.
The file is never used again for another allocation, so a process that kept it learns nothing of what comes later.
`holders` knows which mappings of it still live.

Read-only means read-only: a descriptor opened O_RDONLY alone can be opened again for writing by the process that gets
it. So before a read-only grant goes to a peer the file is sealed against all future writable maps. The granter's
earlier map goes on writing, and so does the machine's own `window`, which is made before the seal. A peer that may
write gets a file to which no seal can be added: a seal of the peer's would shut out the granter and the machine.

The kernel counts no descriptor that was opened with O_PATH, and such a descriptor can be opened again at any time. So
each page is emptied when it is freed: a process that kept a way to it finds zeros.

Sources: fcntl(2), memfd_create(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

from gntalloc.errors import DeviceError
from gntalloc.holders import Extent, Holder, Loans
from gntalloc.libc import libc
from gntalloc.maps import PAGE_SIZE
from gntalloc.steps import Steps, finish
from gntalloc.window import Window

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Frames"]

_F_SEAL_FUTURE_WRITE = 0x0010  # not in fcntl before Python 3.13
_MFD_NOEXEC_SEAL = 0x0008
_FALLOC_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02
# The last place in their file where pages may begin, in pages. A peer that may write may also fill the part before
# them. That memory goes with the extent, and the peer could have as much from the kernel itself.
_FARTHEST = 1 << 16
_ZEROED_AT_ONCE = 512  # pages


class Frames(Loans[Holder]):
    """Keep the machine's memory, and the loans of it."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = 0  # held by extents, in use or not
        self.extents = 0

    # Making and giving back.

    def allocate(
        self, pages: int, changed: Callable[[Extent[Holder]], None], *, writable: bool = True, first: int = 0
    ) -> Extent[Holder]:
        """Make `pages` zeroed pages, all of them present: a lack of memory is an error now and no SIGBUS later.

        Pages that peers shall only read are made with `writable` false, and `seal` is called later. The pages begin at
        page `first` of their file, unless that is too far: a program that makes its maps itself can have them only at
        that offset.

        Raises:
            DeviceError: ENOMEM, with the reason.
        """
        return finish(self.begin_allocate(pages, changed, writable=writable, first=first))

    def begin_allocate(
        self, pages: int, changed: Callable[[Extent[Holder]], None], *, writable: bool = True, first: int = 0
    ) -> Steps[Extent[Holder]]:
        """Give the steps to what `allocate` does: to have a thousand pages zeroed takes a millisecond."""
        first = first if first + pages <= _FARTHEST else 0
        self._see_to_room(pages * PAGE_SIZE, f"{pages} pages" if pages != 1 else "1 page")
        try:
            master = _memory_file()
        except OSError as error:
            todo = "; each ALLOC needs one: raise the machine's ulimit -n, or allocate more pages at once"
            todo *= error.errno == errno.EMFILE
            raise DeviceError(errno.ENOMEM, f"no memory file could be made: {error.strerror}{todo}") from error
        try:
            for page in range(first, first + pages, _ZEROED_AT_ONCE):
                if page > first:
                    yield
                os.posix_fallocate(master, page * PAGE_SIZE, min(_ZEROED_AT_ONCE, first + pages - page) * PAGE_SIZE)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | (fcntl.F_SEAL_SEAL if writable else 0)
            fcntl.fcntl(master, fcntl.F_ADD_SEALS, seals)
        except BaseException as error:  # the program's end, too
            os.close(master)
            if not isinstance(error, OSError):
                raise
            what = "1 page" if pages == 1 else f"{pages} pages"
            raise DeviceError(errno.ENOMEM, f"{what} could not be had from the computer: {error.strerror}") from error
        self.pages += pages
        self.extents += 1
        return Extent(pages, master, changed, first=first)

    def give_back(self, extent: Extent[Holder], page: int, pages: int = 1) -> None:
        """Take back pages that are free. They are emptied at once; the extent goes with its last page."""
        extent.in_use -= pages
        # If no program has ever had it, its memory can go with its last page. But of much memory that takes long.
        if extent.next_byte or extent.pages > _ZEROED_AT_ONCE:
            offset, length = (extent.first + page) * PAGE_SIZE, pages * PAGE_SIZE
            # A hole also gives the memory back. It is refused (EPERM) once the file is sealed. The granter itself can
            # have sealed read-only pages: then there may be no window, and no peer has ever had the pages.
            punched = not extent.sealed and (
                libc.fallocate(extent.master, _FALLOC_KEEP_SIZE_PUNCH_HOLE, offset, length) == 0
            )
            if not punched and extent.window is not None:
                extent.window.wipe(page * PAGE_SIZE, length)
        if not extent.in_use:
            self._discard(extent)

    def _discard(self, extent: Extent[Holder]) -> None:
        self.forget(extent)
        if extent.window is not None:
            extent.window.close()
        os.close(extent.master)
        self.pages -= extent.pages
        self.extents -= 1

    def seal(self, extent: Extent[Holder]) -> None:
        """Refuse every writable map of the extent that is made from now on. Maps that exist go on writing.

        Raises:
            DeviceError: ENOMEM: no window could be made.
        """
        if extent.sealed:
            return
        self.open_window(extent)
        try:
            fcntl.fcntl(extent.master, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
        except OSError as error:
            raise DeviceError(errno.ENOMEM, f"a read-only grant could not be sealed: {error.strerror}") from error
        extent.sealed = True

    # The machine's own access.

    def open_window(self, extent: Extent[Holder]) -> None:
        """Map the extent into the machine, for as long as it lives. What the machine does later must not fail then.

        Raises:
            DeviceError: ENOMEM.
        """
        if extent.window is not None:
            return
        try:
            extent.window = Window(extent.master, extent.first * PAGE_SIZE, extent.pages * PAGE_SIZE)
        except OSError as error:
            raise DeviceError(errno.ENOMEM, f"the machine could not map granted pages: {error.strerror}") from error

    def page(self, extent: Extent[Holder], page: int) -> memoryview:
        """Give the bytes of one page, to be used at once, writable whatever was granted. The window must be open."""
        assert extent.window is not None
        return extent.window.view(page * PAGE_SIZE, PAGE_SIZE)


def _memory_file() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("gntalloc", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # older than Linux 6.3
            raise
        return os.memfd_create("gntalloc", flags)
