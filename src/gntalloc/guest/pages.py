"""Pages a program shares, and pages it maps: objects to be used in a `with`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from gntalloc import waits
from gntalloc.abi.gntalloc import (
    SET_UNMAP_NOTIFY,  # gntdev's is the same
    UNMAP_NOTIFY_CLEAR_BYTE,
    UNMAP_NOTIFY_SEND_EVENT,
    UnmapNotify,
)
from gntalloc.clock import Deadline
from gntalloc.errors import Closed, GntallocError, MachineGone, TimedOut, ViewsStillExported
from gntalloc.maps import PAGE_SIZE
from gntalloc.unclosed import warn_unclosed

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from gntalloc.guest.devices import DeviceFile
    from gntalloc.guest.grant import Grant
    from gntalloc.guest.quotas import Charge
    from gntalloc.maps import Mapping

__all__ = ["MappedPages", "SharedPages"]


class _Pages:
    """What both kinds have in common: memory, and an end that never loses anything."""

    def __init__(self, file: DeviceFile, index: int, grant: Grant, mapping: Mapping, *, kept: bool) -> None:
        self.grant = grant
        self._count = len(grant.refs)
        self._kept = kept  # on the file's list, until it is given back
        self._file = file
        self._index = index
        self._mapping = mapping
        self._closed = False
        self._pid = os.getpid()

    @property
    def memory(self) -> memoryview:
        """The bytes, all pages of them: changes are seen by the other side at once.

        Raises:
            Closed: after `close`.
        """
        return self._mapping.memory

    @property
    def closed(self) -> bool:
        """Whether `close` has succeeded."""
        return self._closed

    def notify_when_unmapped(self, *, clear: int | None = None, port: int | None = None) -> None:
        """When the last of this side's maps goes, by whatever way, let the kernel clear a byte and send an event.

        Args:
            clear: the offset of the byte in `memory`; None: no byte.
            port: the number of a port that a program of this domain has bound; None: no event.

        Raises:
            DeviceError: EINVAL there is no such port.
        """
        action = UNMAP_NOTIFY_CLEAR_BYTE if clear is not None else 0
        action |= UNMAP_NOTIFY_SEND_EVENT if port is not None else 0
        self._file.ioctl(SET_UNMAP_NOTIFY, UnmapNotify(self._index + (clear or 0), action, port or 0).pack())

    def close(self) -> None:
        """Unmap, and give back. May be repeated, also after a refusal.

        In a child made by fork only the child's own map is undone; the grant is its maker's.

        Raises:
            ViewsStillExported: a slice, a cast or an array of `memory` is alive. Nothing has changed.
        """
        if self._closed:
            return
        self._mapping.close()
        self._closed = True
        self._give_back()
        self._count_no_more()

    @property
    def index(self) -> int:
        """What their device file knows them by."""
        return self._index

    def let_go(self) -> None:
        """Unmap here, and give nothing back: the end of the device file does that, whichever process has it.

        Raises:
            ViewsStillExported: as `close`.
        """
        self._pid = -1
        self._mapping.close()
        self._closed = True
        self._count_no_more()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except ViewsStillExported as still:
            if error is None:
                raise
            error.add_note(str(still))  # the body's own exception is the one to tell

    def __del__(self, _warn: Callable[[object, int], bool] = warn_unclosed) -> None:
        if getattr(self, "_closed", True):
            return
        self._closed = True
        if _warn(self, self._pid):
            self._give_back()  # a view may still be alive: what is not kept goes with it
            self._count_no_more(ask=False)  # a question has no place in whatever this thread does just now

    def _give_back(self) -> None:
        if os.getpid() == self._pid:
            try:
                self._file.end(self._index, self._count, kept=self._kept)
            except (MachineGone, Closed):
                pass  # then there is nothing left to undo: what was on a file's list went with the file
            except GntallocError:
                if not self._mapping.closed:
                    raise
                # The domain was destroyed, and its files with it. The map is gone too, so all is done.

    def _count_no_more(self, *, ask: bool = True) -> None:
        """Only what this side has granted counts for a peer. Without `ask` the machine is not asked about the peer."""


class SharedPages(_Pages):
    """Pages of this domain that a peer may map, mapped here, writable here.

    Made by `Domain.share`. Closing takes them back: at once if no peer maps them, else when it lets go.
    """

    def __init__(
        self,
        file: DeviceFile,
        index: int,
        grant: Grant,
        mapping: Mapping,
        charge: Charge | None = None,
        *,
        kept: bool = False,
    ) -> None:
        super().__init__(file, index, grant, mapping, kept=kept)
        self._charge = charge

    @property
    def refs(self) -> tuple[int, ...]:
        """The references, one a page, to tell the peer."""
        return self.grant.refs

    @property
    def held(self) -> bool:
        """Whether a peer has any of the pages mapped now, as the kernel counts it, also after `close`.

        Raises:
            NotKnownHere: on real Xen.
        """
        return self._file.holders(self._index, len(self.refs)).held

    @property
    def mapped_by(self) -> tuple[int, ...]:
        """The domains that map any of the pages now.

        Raises:
            NotKnownHere: on real Xen.
        """
        return self._file.holders(self._index, len(self.refs)).mapped_by

    def released_descriptor(self) -> int | None:
        """Give a descriptor that becomes readable when no peer has any of the pages mapped. The caller closes it.

        None: none has now. When it is readable ask again: another may have come.

        Raises:
            NotKnownHere: on real Xen.
        """
        return self._file.holders(self._index, len(self.refs), wait=True).released

    def wait_released(self, *, timeout: float | None = None) -> None:
        """Wait until no peer has any of the pages mapped, by whatever way it let go: unmapped, exited, was killed.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            TimedOut: they are still held.
            NotKnownHere: on real Xen.
            MachineGone: the machine ended, and nobody counts any more.
        """
        deadline = Deadline(timeout)
        while (released := self.released_descriptor()) is not None:
            try:
                poll = waits.poll()
                poll.register(released, waits.POLLIN)
                ended = poll.poll(deadline.milliseconds)
            finally:
                os.close(released)
            if not ended:
                who = ", ".join(map(str, self.mapped_by)) or "its peer, which hides it"
                raise TimedOut(f"grant {self.grant} is still mapped by domain {who} after {timeout} s; wait longer")

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<{state} SharedPages {self.grant} index {self._index:#x}>"

    def _count_no_more(self, *, ask: bool = True) -> None:
        if self._charge is not None:
            self._charge.end(self.released_descriptor if ask else None)


class MappedPages(_Pages):
    """Pages of a peer, mapped here. Made by `Domain.map`; `memory` is read-only unless mapped writable."""

    def __init__(
        self, file: DeviceFile, index: int, grant: Grant, mapping: Mapping, count: int, *, kept: bool = False
    ) -> None:
        super().__init__(file, index, grant, mapping, kept=kept)
        self._count = count  # references mapped: each twice, if mirrored

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<{state} MappedPages {self.grant}, {len(self.grant.refs) * PAGE_SIZE} bytes>"
