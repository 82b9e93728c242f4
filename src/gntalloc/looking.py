"""Decide whether to look for a while before sleeping, by whether looks have done harm.

A *look* asks again and again whether something is there, and does not sleep. It pays if the peer runs meanwhile, on
another processor: then what is waited for comes sooner than a wake-up would. If both share a processor, the peer cannot
run before the look is over. Nothing tells beforehand which it is, and it changes with each move to another processor.

But it can be measured. After a few looks in vain, in a row, a few waits are without a look. If these are shorter, by
half a look, looks do harm, and there is a *rest* from them. Each rest is longer than the one before, up to a limit, and
after it one look tries again. A look that pays ends all that. If waits without a look are not shorter, looks go on, and
it takes more of them until the next measurement: the peer may be slow, or asleep, and find us looking next time.

Other processes make waits longer, and none makes them shorter. So the shortest of each kind are compared.

A look does not yield (sched_yield). That is a little faster where two share a processor, and a thousand times slower
where a third process has work for it too: the kernel lets that run for a whole slice, for a reason that is long over.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from gntalloc.clock import now

if TYPE_CHECKING:
    from gntalloc.clock import Deadline

__all__ = ["Look"]

_LEAST_PATIENCE, _MOST_PATIENCE = 2, 64  # looks in vain until waits with and without one are compared
_SAMPLES = 3  # waits without a look that are compared
_HARM = 0.5  # of a look: so much longer waits are with it, if it does harm
_TELLING = 8  # looks: a wait that is longer tells of the peer only
_LONGEST_REST = 31  # looks, which leaves them a thirty-second of the time,
_LONGEST = 0.01  # and no longer than so many seconds, where the user wants long looks


class Look:
    """Say how long to look now, before sleeping. One for each thing that is waited for again and again.

    Threads may share it: a look more or less does no harm.

    Args:
        seconds: how long a look is.
    """

    __slots__ = (
        "_again", "_began", "_looked", "_patience", "_rest", "_resting", "_samples", "_seconds", "_vain",
        "_with", "_without",
    )  # fmt: skip

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began = 0.0  # the wait
        self._looked = True  # in that wait
        self._vain = 0  # looks in a row
        self._patience = _LEAST_PATIENCE
        self._resting = False
        self._again = 0.0  # when the rest ends
        self._rest = 0.0  # seconds of the next rest
        self._samples = 0  # waits without a look, in this rest
        self._with = self._without = inf  # seconds of the shortest waits with a look in vain, and without a look

    def until(self, deadline: Deadline) -> float:
        """Begin a wait. Give the moment until which to look, by `clock.now`. 0: sleep at once."""
        moment = self._began = now()
        self._looked = not self._resting or (self._samples == _SAMPLES and moment >= self._again)
        return moment + deadline.within(self._seconds) if self._looked else 0.0

    def paid(self) -> None:
        """End a wait: what was waited for has come during the look."""
        if self._vain:
            self._look_on()

    def woken(self) -> None:
        """End a wait: what was waited for has come by a wake-up."""
        took = now() - self._began
        if took > _TELLING * self._seconds:
            return
        if not self._looked:
            if self._samples < _SAMPLES:
                self._samples += 1
                self._without = min(self._without, took)
            return
        self._vain += 1
        self._with = min(self._with, took)
        if self._resting:
            self._judge()
        elif self._vain >= self._patience:
            self._begin_rest(0.0)

    def _judge(self) -> None:
        if self._with - self._without > _HARM * self._seconds:
            self._patience = _LEAST_PATIENCE
            self._rest = min(2 * self._rest + self._seconds, _LONGEST_REST * self._seconds, _LONGEST)
            self._begin_rest(self._rest)
        else:
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
            self._look_on()

    def _begin_rest(self, seconds: float) -> None:
        self._resting = True
        self._again = now() + seconds
        self._samples = 0
        self._without = inf

    def _look_on(self) -> None:
        self._resting = False
        self._vain = 0
        self._rest = 0.0
        self._with = inf
