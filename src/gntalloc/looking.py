"""Decide whether to look for a while before sleeping, by what came of the looks before.

A *look* asks again and again whether something is there, and does not sleep. It pays if the peer runs meanwhile, on
another processor: then what is waited for comes sooner than a wake-up would. If both share a processor, the peer cannot
run before the look is over. Nothing tells beforehand which it is: it changes with each move to another processor. But
a look that was *in vain* tells afterwards. After several in a row there is a pause without looks, which gets longer up
to a limit; after one that paid there is none. So looks in vain have a small share of the time, and what changes is
noticed soon.

A look does not yield (sched_yield). That is a little faster where two share a processor, and a thousand times slower
where a third process has work for it too: the kernel lets that run for a whole slice, for a reason that is long over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gntalloc.clock import now

if TYPE_CHECKING:
    from gntalloc.clock import Deadline

__all__ = ["Look"]

_MOST = 31  # a pause is no longer than so many looks, which leaves them a thirty-second of the time,
_LONGEST = 0.01  # and no longer than so many seconds, where the user wants long looks


class Look:
    """Say how long to look now, before sleeping. One for each thing that is waited for again and again.

    Threads may share it: a look more or less does no harm.

    Args:
        seconds: how long a look is.
    """

    __slots__ = ("_again", "_most", "_pause", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._most = min(_MOST * seconds, _LONGEST)
        self._pause = 0.0  # that follows the next look in vain
        self._again = 0.0

    def until(self, deadline: Deadline) -> float:
        """Give the moment until which to look, by `clock.now`. 0: sleep at once, there is a pause."""
        moment = now()
        return moment + deadline.within(self._seconds) if moment >= self._again else 0.0

    def paid(self) -> None:
        """Note that what was looked for has come during a look."""
        self._pause = self._again = 0.0

    def in_vain(self, deadline: Deadline) -> None:
        """Note that a look was over before. If the deadline cut it short, it tells nothing."""
        if not deadline.expired:
            self._again = now() + self._pause
            self._pause = min(2 * self._pause + self._seconds, self._most)
