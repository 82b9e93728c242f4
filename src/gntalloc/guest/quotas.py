"""Count the pages that a program has granted to each peer, so that one peer cannot use up what is for all.

Pages count from `share` on, until they are closed here. Pages that were shared under a quota count until the peer has
let go of them, which the machine tells by a descriptor: a peer may keep them mapped for ever. Real Xen does not tell.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple

from gntalloc import waits
from gntalloc.errors import GntallocError, PeerQuotaReached

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Charge", "Quotas"]


class _Kept(NamedTuple):
    """Pages that are closed here, and that a peer has still mapped."""

    peer: int
    pages: int
    released: int  # a descriptor, readable when the peer has let go


class Quotas:
    """The pages of one program in one domain, by peer. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: Counter[int] = Counter()  # those that are kept are among them
        self._kept: list[_Kept] = []
        # What has ended since, noted without the lock: an object may end in the middle of anything.
        self._ended: deque[tuple[int, int, int | None]] = deque()

    def charge(self, peer: int, pages: int, most: int | None) -> Charge:
        """Count `pages` more for `peer`.

        Args:
            peer: its domid.
            pages: how many.
            most: that it may have then. None: any number.

        Raises:
            PeerQuotaReached: it would have more. Nothing is counted.
        """
        with self._lock:
            self._note_ended()
            if most is not None and self._pages[peer] + pages > most:
                self._see_what_is_kept()
                if self._pages[peer] + pages > most:
                    raise PeerQuotaReached(self._why(peer, pages, most))
            self._pages[peer] += pages
        return Charge(self._ended, peer, pages, to_the_end=most is not None)

    def close(self) -> None:
        """Wait for no peer any more."""
        with self._lock:
            self._note_ended()
            for kept in self._kept:
                os.close(kept.released)
                self._pages[kept.peer] -= kept.pages
            self._kept.clear()

    def _note_ended(self) -> None:
        while self._ended:
            peer, pages, released = self._ended.popleft()
            if released is None:
                self._pages[peer] -= pages
            else:
                self._kept.append(_Kept(peer, pages, released))

    def _see_what_is_kept(self) -> None:
        still = []
        for kept in self._kept:
            poll = waits.poll()
            poll.register(kept.released, waits.POLLIN)
            if poll.poll(0):
                os.close(kept.released)
                self._pages[kept.peer] -= kept.pages
            else:
                still.append(kept)
        self._kept = still

    def _why(self, peer: int, pages: int, most: int) -> str:
        there = self._pages[peer]
        kept = sum(each.pages for each in self._kept if each.peer == peer)
        closed = f" ({kept} of them closed here, and kept by it)" if kept else ""
        more = "1 page" if pages == 1 else f"{pages} pages"
        return (
            f"{more} for domain {peer} would be too many: it has {there} of this program's{closed}, and may have "
            f"{most} at once; let it close some, or raise most_per_peer"
        )


class Charge:
    """Pages that count for a peer, until `end`."""

    __slots__ = ("_ended", "_open", "_pages", "_peer", "_pid", "_to_the_end")

    def __init__(
        self, ended: deque[tuple[int, int, int | None]], peer: int, pages: int, *, to_the_end: bool = False
    ) -> None:
        self._ended = ended
        self._peer = peer
        self._pages = pages
        self._to_the_end = to_the_end
        self._pid = os.getpid()
        self._open = True

    def end(self, released: Callable[[], int | None] | None = None) -> None:
        """Count them no more, once the peer has let go. Can be repeated. In a child made by fork: nothing.

        Args:
            released: makes the descriptor that tells of it; None: it need not be waited for.
        """
        if not self._open or os.getpid() != self._pid:
            return
        self._open = False
        descriptor = None
        if self._to_the_end and released is not None:
            try:
                descriptor = released()
            except GntallocError:
                pass  # the machine is gone, or this is real Xen
        self._ended.append((self._peer, self._pages, descriptor))
