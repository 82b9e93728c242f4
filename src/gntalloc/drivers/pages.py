"""Count the users of a domain's granted pages, and end a page with its last user.

When the last user of a page goes, so does the grant, and the page with it, unless the peer still maps it. Such a page
*lingers*: it cannot be taken away, it counts against the limit, and it is free when the peer lets go.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

from gntalloc.drivers.behaviour import OURS, Behaviour
from gntalloc.drivers.grefs import Range
from gntalloc.drivers.notify import Promise, clear_byte
from gntalloc.drivers.releases import Releases
from gntalloc.errors import BooksWrong
from gntalloc.steps import Later, Steps, finish, finish_steps

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gntalloc.drivers.chardev import Extent, Frames
    from gntalloc.drivers.grefs import Alloc, Pages
    from gntalloc.hypervisor.grants import GrantTable

__all__ = ["AT_ONCE", "Descriptors", "GrantedPages"]

AT_ONCE = 256
"""So many pages are made or let go in one step; more take several."""
_SPANS_A_STEP = 64
_PAGES_A_STEP = 1024  # of one span: to empty them takes the kernel a fraction of a millisecond
_NONE: dict[Pages, None] = {}


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
        count: how many there are.
        in_use: how many count against the limit.
        coming: how many of those are not made yet.
        lingering: those that have no user, by extent.
        releases: the waits for pages that peers hold.
    """

    def __init__(
        self,
        table: GrantTable[Pages],
        frames: Frames,
        *,
        behaviour: Behaviour = OURS,
        later: Later = finish,
        descriptors: Descriptors | None = None,
    ) -> None:
        self.count = 0
        self.in_use = 0
        self.coming = 0
        self.lingering: dict[Extent, dict[Pages, None]] = {}
        self.releases = Releases(table, later)
        self._hidden: dict[Extent, None] = {}  # those of the lingering ones whose pages some process has in secret
        self._table = table
        self._frames = frames
        self._behaviour = behaviour
        self._later = later
        self._descriptors = descriptors
        table.on_idle = self._peer_let_go
        table.on_split = self._note_split

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

    def give_back(self, alloc: Alloc, page: int, count: int) -> None:
        """Give pages of a memory file back, and the file with the last of them."""
        extent = alloc.memory
        self._frames.give_back(extent, page, count)
        if not extent.in_use:
            self.give_descriptor()
            alloc.state.remove(alloc)

    def give_up(self, span: Pages) -> None:
        """Undo what was made of an ALLOC that was never granted."""
        self._later(self._give_up_in_steps(span))

    def _give_up_in_steps(self, span: Pages) -> Steps[None]:
        alloc = span.grant
        for page in range(0, len(alloc.refs), _PAGES_A_STEP):
            count = min(_PAGES_A_STEP, len(alloc.refs) - page)
            self._table.free(span, page, count)
            self.count -= count
            self.in_use -= count
            self.give_back(alloc, page, count)
            self.check_books()
            yield

    def drop(self, ranges: Sequence[Range]) -> None:
        """Take pages off their file's list; many of them in steps, before anything else of this domain is done.

        Pages that are not on the list are left alone.
        """
        self._let_go(ranges, maps=0, unlist=True)

    def let_go_of_map(self, ranges: Sequence[Range], *, unlist: bool) -> None:
        """Count one user less for each page, as a map of theirs is gone. Its file's list may lose it too."""
        self._let_go(ranges, maps=1, unlist=unlist)

    def _let_go(self, ranges: Sequence[Range], *, maps: int, unlist: bool) -> None:
        steps = self._let_go_in_steps(ranges, maps, unlist=unlist)
        if sum([each.pages for each in ranges]) > AT_ONCE:
            self._later(steps)
        else:
            finish_steps(steps)

    def _let_go_in_steps(self, ranges: Sequence[Range], maps: int, *, unlist: bool) -> Steps[None]:
        """Count some users less for each page. With its last user a grant ends, now or when the peer lets go."""
        done = 0
        for alloc, page, count in ranges:
            for span in self._table.isolate(alloc, page, count, _PAGES_A_STEP):
                done += 1
                if span is not None:
                    lost = maps
                    if unlist and span.listed:
                        span.listed = False
                        lost += 1
                    if lost:
                        self._lose_users(span, lost)
                    done += span.count // (_PAGES_A_STEP // _SPANS_A_STEP)
                if done >= _SPANS_A_STEP:
                    done = 0
                    self.check_books()
                    yield
        self.check_books()

    def _lose_users(self, span: Pages, lost: int) -> None:
        span.users -= lost
        if span.users > 0:
            return
        if span.users < 0:
            raise BooksWrong(f"page {span.refs[0]} of domain {self._table.owner} has {span.users} users")
        if span.promise is not None:
            self._keep_promise(span, span.promise)
        if not self._behaviour.count_held_pages:
            self.in_use -= span.count
        if not self._end(span):
            self.lingering.setdefault(span.grant.memory, {})[span] = None
            self._note_if_hidden(span)

    def _keep_promise(self, span: Pages, promise: Promise) -> None:
        """Clear the byte, then send the event, before the grant ends: a peer that is woken finds the page there."""
        if promise.byte is not None:
            clear_byte(self._frames, span.grant.memory, span.page, promise.byte)
        promise.send()

    def _end(self, span: Pages) -> bool:
        """End these grants, if table and kernel agree that nobody else has the pages. False: they stay."""
        # If the locks are hidden, none names the holder. But the kernel says that the memory is open: its peer hides.
        if not self._table.end(span, busy=self._is_hidden(span.grant.memory)):
            return False
        self.count -= span.count
        if self._behaviour.count_held_pages:
            self.in_use -= span.count
        self.give_back(span.grant, span.page, span.count)
        return True

    def _is_hidden(self, extent: Extent) -> bool:
        return extent.hidden or (extent.lent and not extent.loans and self._frames.held(extent))

    def check_books(self) -> None:
        """Check that each page has one reference and counts once. Stop the machine otherwise: an ALLOC could do harm.

        This check is cheap enough for each change. `gntalloc.testing.recount` counts everything.
        """
        references = self._table.live
        in_use = self.in_use - self.coming
        counted = in_use if self._behaviour.count_held_pages else self.count  # Linux's has less, so it tells nothing
        if not self.count == references == counted:
            owner = self._table.owner
            raise BooksWrong(f"domain {owner} has {self.count} pages, {references} references, and {in_use} in use")

    def _note_if_hidden(self, span: Pages) -> None:
        """Note pages that linger though no domain maps them: the kernel says that a process has them all the same."""
        if not span.pins:
            self._hidden[span.grant.memory] = None

    def _note_split(self, span: Pages, part: Pages) -> None:
        if not span.users:
            self.lingering[span.grant.memory][part] = None

    def _peer_let_go(self, spans: list[Pages]) -> None:
        """Free the pages that linger no longer, and wake waiters, as no domain maps these pages any more."""
        extents = dict.fromkeys(span.grant.memory for span in spans)
        lingering = [span for span in spans if not span.users]
        if sum([span.count for span in lingering]) > AT_ONCE:
            self._later(self._end_in_steps(_ranges_of(lingering), extents))
        else:
            self._end_lingering(lingering)
            for extent in extents:
                self.releases.look(extent)

    def _end_in_steps(self, ranges: list[Range], extents: Iterable[Extent]) -> Steps[None]:
        for alloc, page, count in ranges:
            for part in self._table.isolate(alloc, page, count, _PAGES_A_STEP):
                if part is not None and not part.users and not part.pins:
                    self._end_lingering([part])
                    if part.count >= _SPANS_A_STEP:
                        yield
        for extent in extents:
            self.releases.look(extent)

    def _end_lingering(self, spans: Iterable[Pages]) -> None:
        for span in spans:
            extent = span.grant.memory
            if not self._end(span):
                self._note_if_hidden(span)
                continue
            lingering = self.lingering[extent]
            del lingering[span]
            if not lingering:
                del self.lingering[extent]
                self._hidden.pop(extent, None)
        self.check_books()

    def look_again(self, extent: Extent) -> None:
        """Free the pages that can be freed, and wake their waiters, as the holders of this extent have changed."""
        if extent in self._hidden and not self._is_hidden(extent):
            self._hidden.pop(extent)
            spans = [span for span in self.lingering.get(extent, _NONE) if not span.pins]
            self._later(self._end_in_steps(_ranges_of(spans), (extent,)))
        else:
            self.releases.look(extent)


def _ranges_of(spans: Iterable[Pages]) -> list[Range]:
    """Name the pages of spans, for later: where a peer can map again what has ended, it may split them until then."""
    return [Range(span.grant, span.page, span.count) for span in spans]
