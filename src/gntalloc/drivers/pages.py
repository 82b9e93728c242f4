"""Count the users of a domain's granted pages, and end a page with its last user.

When the last user of a page goes, so does the grant, and the page with it, unless the peer still maps it. Such a page
*lingers*: it cannot be taken away, it counts against the limit, and it is free when the peer lets go.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

from gntalloc.drivers.behaviour import OURS, Behaviour
from gntalloc.drivers.chardev import Extent, Frame, Frames, pieces_of
from gntalloc.drivers.notify import Promise, clear_byte
from gntalloc.drivers.releases import Releases
from gntalloc.errors import BooksWrong
from gntalloc.steps import Later, Steps, batches, finish

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from gntalloc.drivers.grefs import Gref
    from gntalloc.hypervisor.grants import GrantTable

__all__ = ["AT_ONCE", "Descriptors", "GrantedPages"]

AT_ONCE = 256
"""So many pages are made, mapped or freed in one step; more take several."""
_NONE: dict[int, Gref] = {}


class Descriptors(Protocol):
    """Count the descriptors that a domain has of the machine's."""

    def take(self, number: int, why: int, what: str) -> None:
        """Take so many, for `what`.

        Raises:
            DeviceError: the errno `why`: there are too few left for this domain.
        """

    def give(self, number: int) -> None:
        """Give so many back."""


class GrantedPages:
    """Keep all pages that a domain grants: listed by a file, only mapped, or lingering.

    Args:
        table: the domain's grant table.
        frames: the machine's memory.
        behaviour: ours, or as Linux does.
        later: begins what may take long, see `Later`.
        descriptors: the domain's share of the machine's descriptors. None: it is not counted.

    Attributes:
        grefs: all there are.
        in_use: how many count against the limit.
        coming: how many of those are not made yet.
        lingering: those that have no user, by extent and reference.
        releases: the waits for pages that peers hold.
    """

    def __init__(
        self,
        table: GrantTable[Frame],
        frames: Frames,
        *,
        behaviour: Behaviour = OURS,
        later: Later = finish,
        descriptors: Descriptors | None = None,
    ) -> None:
        self.grefs: dict[Gref, None] = {}
        self.in_use = 0
        self.coming = 0
        self.lingering: dict[Extent, dict[int, Gref]] = {}
        self.releases = Releases(self.is_held, later)
        self._hidden: dict[Extent, dict[int, Gref]] = {}  # of those that linger, those that no domain maps
        self._table = table
        self._frames = frames
        self._behaviour = behaviour
        self._later = later
        self._descriptors = descriptors
        table.on_idle = self._peer_let_go

    def take_descriptor(self) -> None:
        """Count the descriptor of another memory file.

        Raises:
            DeviceError: ENOMEM: the domain has its share of them.
        """
        if self._descriptors is not None:
            self._descriptors.take(1, errno.ENOMEM, "each ALLOC has a memory file, which")

    def give_descriptor(self) -> None:
        """Count the descriptor of a memory file no longer."""
        if self._descriptors is not None:
            self._descriptors.give(1)

    def give_back(self, extent: Extent, page: int, pages: int) -> None:
        """Give pages of a memory file back, and the file with the last of them."""
        self._frames.give_back(extent, page, pages)
        if not extent.in_use:
            self.give_descriptor()

    def drop(self, grefs: list[Gref]) -> None:
        """Take pages off their file's list; many of them in steps, before anything else of this domain is done."""
        if len(grefs) > AT_ONCE:
            self._later(self._drop_in_steps(grefs))
        else:
            self._drop_some(grefs)

    def _drop_in_steps(self, grefs: list[Gref]) -> Steps[None]:
        for some in batches(grefs):
            self._drop_some([gref for gref in some if gref.state.grefs.get(gref.index) is gref])
            yield

    def _drop_some(self, grefs: Iterable[Gref]) -> None:
        dropped = list(grefs)
        for gref in dropped:
            del gref.state.grefs[gref.index]
            if gref.users > 1:  # mapped
                gref.state.released[gref.index] = gref
        self._let_go(dropped)
        self.check_books()

    def let_go_of_map(self, grefs: list[Gref]) -> None:
        """Count one user less for each page, as a map of theirs is gone."""
        if len(grefs) > AT_ONCE:
            self._later(self._let_go_in_steps(grefs))
        else:
            self._let_go(grefs)
            self.check_books()

    def _let_go_in_steps(self, grefs: list[Gref]) -> Steps[None]:
        for some in batches(grefs):
            self._let_go(some)
            self.check_books()
            yield

    def _let_go(self, grefs: Iterable[Gref]) -> None:
        """Count one user less for each page. With its last user a grant ends, now or when the peer lets go."""
        last: list[Gref] = []
        for gref in grefs:
            gref.users -= 1
            if gref.users:
                if gref.users < 0:
                    raise BooksWrong(f"page {gref.ref} of domain {self._table.owner} has {gref.users} users")
                continue
            if gref.promise is not None:
                self._keep_promise(gref, gref.promise)
            last.append(gref)
        if not last:
            return
        if not self._behaviour.count_held_pages:
            self.in_use -= len(last)
        for gref in self._end(last):
            self.lingering.setdefault(gref.frame.extent, {})[gref.ref] = gref
            gref.state.released[gref.index] = gref
            self._note_if_hidden(gref)

    def _keep_promise(self, gref: Gref, promise: Promise) -> None:
        """Clear the byte, then send the event, before the grant ends: a peer that is woken finds the page there."""
        if promise.byte is not None:
            clear_byte(self._frames, gref.frame, promise.byte)
        promise.send()

    def _end(self, grefs: Collection[Gref]) -> list[Gref]:
        """End these grants, where table and kernel agree that nobody else has the page. Return those that stay."""
        # If the locks are hidden, none names the holder. But the kernel says that the memory is open: its peer hides.
        hidden = {extent for extent in {gref.frame.extent for gref in grefs} if self._is_hidden(extent)}
        others = [gref for gref in grefs if gref.frame.extent not in hidden] if hidden else grefs
        kept = set(self._table.end([gref.ref for gref in others]))
        if hidden:
            busy = [gref.ref for gref in grefs if gref.frame.extent in hidden]
            kept.update(self._table.end(busy, busy=True))
        self._give_back([gref for gref in grefs if gref.ref not in kept] if kept else grefs)
        return [gref for gref in grefs if gref.ref in kept] if kept else []

    def _is_hidden(self, extent: Extent) -> bool:
        return extent.hidden or (extent.lent and not extent.loans and self._frames.held(extent))

    def _give_back(self, ended: Collection[Gref]) -> None:
        """Free pages whose grants have ended, neighbours together: each emptying is a system call."""
        for extent, page, pages in pieces_of([gref.frame for gref in ended]):
            self.give_back(extent, page, pages)
        for gref in ended:
            del self.grefs[gref]
            gref.state.released.pop(gref.index, None)
        if not self.grefs:
            self.grefs.clear()  # gives the memory of very many back
        if self._behaviour.count_held_pages:
            self.in_use -= len(ended)

    def check_books(self) -> None:
        """Check that each page has one reference and counts once. Stop the machine otherwise: an ALLOC could do harm.

        This check is cheap enough for each change. `gntalloc.testing.recount` counts everything.
        """
        pages, references = len(self.grefs), self._table.live
        in_use = self.in_use - self.coming
        counted = in_use if self._behaviour.count_held_pages else pages  # Linux's has less, so it tells nothing
        if not pages == references == counted:
            owner = self._table.owner
            raise BooksWrong(f"domain {owner} has {pages} pages, {references} references, and {in_use} in use")

    def _note_if_hidden(self, gref: Gref) -> None:
        """Note a page that lingers though no domain maps it: the kernel says that a process has it all the same."""
        if not self._table.is_mapped(gref.ref):
            self._hidden.setdefault(gref.frame.extent, {})[gref.ref] = gref

    def _peer_let_go(self, entries: list[tuple[int, Frame]]) -> None:
        """Free the pages that linger no longer, and wake waiters, as no domain maps these pages any more."""
        by_extent: dict[Extent, list[Gref]] = {}
        for ref, frame in entries:
            gref = self.lingering.get(frame.extent, _NONE).get(ref)
            free = by_extent.setdefault(frame.extent, [])
            if gref is not None:
                free.append(gref)
        for extent, grefs in by_extent.items():
            self._end_lingering(extent, grefs)
            self.releases.look(extent)

    def _end_lingering(self, extent: Extent, grefs: list[Gref]) -> None:
        if not grefs:
            return
        stay = {gref.ref for gref in self._end(grefs)}
        lingering = self.lingering[extent]
        for gref in grefs:
            if gref.ref in stay:
                self._note_if_hidden(gref)
            else:
                del lingering[gref.ref]
        if not lingering:
            del self.lingering[extent]
        self.check_books()

    def look_again(self, extent: Extent) -> None:
        """Free the pages that can be freed, and wake their waiters, as the holders of this extent have changed."""
        if extent in self._hidden and not self._is_hidden(extent):
            self._later(self._look_in_steps(extent))
        else:
            self.releases.look(extent)

    def _look_in_steps(self, extent: Extent) -> Steps[None]:
        hidden = self._hidden.pop(extent, _NONE)
        for grefs in batches(hidden.values()):
            self._end_lingering(extent, grefs)
            yield
        self.releases.look(extent)

    def is_held(self, gref: Gref) -> bool:
        """Say whether a peer holds this page."""
        known = not gref.users or self._table.is_mapped(gref.ref) or gref.frame.extent.hidden
        return known and gref in self.grefs
