"""Turns: which speaker is served next, how much of it, and which has to wait until it reads.

A speaker is a connection of a program's, of the machine's owner, to xenstore, or a run's system calls. Once for all of
them: each that has something to serve gets a turn of a few messages, then it is another's; one that does not read what
was sent to it is not listened to; one that leaves the machine waiting is dropped.

Rounds make calls that are told and not asked (IoctlTold, Placed, close(2), munmap(2)) as synchronous as in a kernel. A
round admits what has come; hears once more what has come since; settles what programs have let go of; serves what was
told, admitted or not; and only then what was asked and admitted. Whatever was told before a question was sent is in
that second look, so it is served before that question, over whichever connections both came.
"""

from __future__ import annotations

import logging
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Protocol

from gntalloc import clock
from gntalloc.machine.loop import READABLE, SOMETHING_CAME, WRITABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc.machine.loop import Loop

__all__ = ["MESSAGES_A_TURN", "RUNNABLE", "STALLING", "Dropped", "Speaker", "Turns"]

log = logging.getLogger("gntalloc.machine")

MESSAGES_A_TURN = 8
"""So many messages of one speaker are served before it is another's turn."""
RUNNABLE, STALLING = 1 << 16, 1 << 17
"""Bits of a speaker's standing, beside epoll's."""
_EVENTS = READABLE | WRITABLE
_CHECK_FOR_STALLS = 1.0  # seconds


class Dropped(Exception):
    """There is no way to go on with this speaker; the text says why."""


class Speaker(Protocol):
    """One that sends messages to be served. Each of these calls may raise Dropped, but `close`."""

    companion: Speaker | None
    """Another speaker, which is listened to only while this one reads what is sent to it."""

    @property
    def standing(self) -> int:
        """How things stand with it, in bits.

        READABLE while more may come of it, and WRITABLE while something waits to be sent. RUNNABLE if a message waits
        and may be served. STALLING if it keeps the machine waiting.
        """

    @property
    def has_notes(self) -> bool:
        """Whether what waits first was told, and not asked."""

    def fileno(self) -> int:
        """What to wait for."""

    def receive(self, events: int) -> None:
        """Take in what has come; `events` are epoll's."""

    def flush(self) -> None:
        """Send what waits, as far as it goes."""

    def admit(self) -> None:
        """Let what has come until now be served at the next turn."""

    def take_turn(self) -> None:
        """Serve MESSAGES_A_TURN of the messages that were admitted, at most."""

    def take_notes(self) -> None:
        """Serve what was told before anything was asked, admitted or not."""

    def stalled(self, now: float) -> bool:
        """Whether it keeps the machine waiting for too long."""

    def close(self) -> None:
        """End it."""


class _Seat:
    """What Turns knows of one speaker."""

    __slots__ = ("ended", "listened_to", "queued", "speaker", "wanted")

    def __init__(self, speaker: Speaker, ended: Callable[[], None] | None) -> None:
        self.speaker = speaker
        self.ended = ended
        self.queued = False
        self.listened_to = True
        self.wanted = READABLE


class Turns:
    """All speakers.

    Args:
        loop: waits for them.
        settle: takes in what programs have let go of.
    """

    def __init__(self, loop: Loop, settle: Callable[[], None]) -> None:
        self._loop = loop
        self._settle = settle
        self._seats: dict[Speaker, _Seat] = {}
        self._queue: deque[_Seat] = deque()
        self._slow: set[Speaker] = set()

    def patience(self) -> float | None:
        """Seconds until a round is due though nothing comes; None: none is."""
        if self._queue:
            return 0.0
        return _CHECK_FOR_STALLS if self._slow else None

    def __iter__(self) -> Iterator[Speaker]:
        return iter(list(self._seats))

    def add(self, speaker: Speaker, ended: Callable[[], None] | None = None) -> None:
        """Serve a speaker from now on. `ended` is called when it has been dropped."""
        seat = self._seats[speaker] = _Seat(speaker, ended)
        self._loop.watch(speaker.fileno(), partial(self._ready, seat))

    def drop(self, speaker: Speaker, why: str) -> None:
        """End a speaker. One that is not there any more is no error."""
        seat = self._seats.pop(speaker, None)
        if seat is None:
            return
        log.debug("%s: %s", type(speaker).__name__, why)
        self._slow.discard(speaker)
        self._loop.unwatch(speaker.fileno())
        speaker.close()
        if seat.ended is not None:
            seat.ended()

    def plan(self, speaker: Speaker) -> None:
        """Settle what to wait for of a speaker, and whether it has something to serve, after anything has changed."""
        seat = self._seats.get(speaker)
        if seat is not None:
            self._plan(seat)

    def serve(self) -> None:
        """Serve a round; it only settles if nobody has said anything."""
        queue = self._queue
        admitted = len(queue)
        if admitted:
            for seat in queue:
                seat.speaker.admit()
            self._loop.hear(0)
        self._settle()
        for seat in list(queue):
            if seat.speaker.has_notes:
                self._let(seat, seat.speaker.take_notes)
        for _ in range(admitted):
            seat = queue.popleft()
            seat.queued = False
            self._let(seat, seat.speaker.take_turn)
        if self._slow:
            self._drop_the_stalled()

    def _ready(self, seat: _Seat, events: int) -> None:
        speaker = seat.speaker
        try:
            if events & WRITABLE:
                speaker.flush()
            if events & SOMETHING_CAME:
                speaker.receive(events)
        except Dropped as reason:
            self.drop(speaker, str(reason))
            return
        if not speaker.standing & RUNNABLE:
            self._plan(seat)
        elif not seat.queued:  # it is looked at again when it has had its turn
            seat.queued = True
            self._queue.append(seat)

    def _let(self, seat: _Seat, work: Callable[[], None]) -> None:
        """Let a speaker's messages be served; nobody else notices if that fails."""
        speaker = seat.speaker
        if speaker not in self._seats:
            return
        try:
            work()
        except Dropped as reason:
            self.drop(speaker, str(reason))
            return
        except Exception:
            # A fault of ours. The program must not wait for ever, nobody else may notice, and we want to know.
            log.exception("a message could not be served")
            self.drop(speaker, "serving it failed, see above")
            return
        if speaker in self._seats:
            self._plan(seat)

    def _plan(self, seat: _Seat) -> None:
        speaker = seat.speaker
        standing = speaker.standing
        if standing & RUNNABLE and not seat.queued:
            seat.queued = True
            self._queue.append(seat)
        wanted = standing & (_EVENTS if seat.listened_to else WRITABLE)
        if wanted != seat.wanted:
            seat.wanted = wanted
            self._loop.change(speaker.fileno(), wanted)
        if standing & STALLING:
            self._slow.add(speaker)
        elif self._slow:
            self._slow.discard(speaker)
        if speaker.companion is not None:
            companion = self._seats.get(speaker.companion)
            if companion is not None:
                companion.listened_to = not standing & WRITABLE
                self._plan(companion)

    def _drop_the_stalled(self) -> None:
        now = clock.now()
        for speaker in [speaker for speaker in self._slow if speaker.stalled(now)]:
            self.drop(speaker, "it left a message half sent, or a reply unread, for too long")
