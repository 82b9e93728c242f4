"""Choose which speaker is served next, how much of it, and which has to wait until it reads.

A speaker is a program's connection, a connection of the machine's owner, a connection to xenstore, or the system calls
of a run. The same rules hold for all. A speaker that has something to serve gets a turn of a few messages, then another
one gets its turn. A speaker that does not read its replies is not listened to. A speaker that leaves the machine
waiting is dropped.

A *note* is a call without an answer: IoctlTold, Placed, close(2), munmap(2). Rounds make notes as synchronous as in a
kernel. A round admits the messages that have come, and then hears once more those that have come since. It settles the
files and maps that programs have given up. It serves the notes, admitted or not, and only then the admitted requests. A
note that was sent before a request is heard in that second look. So it is served before the request, over whichever
connections both came.
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
"""The most messages of one speaker that are served in a turn."""
RUNNABLE, STALLING = 1 << 16, 1 << 17
"""Bits of a speaker's standing, beside epoll's."""
_EVENTS = READABLE | WRITABLE
_CHECK_FOR_STALLS = 1.0  # seconds


class Dropped(Exception):
    """The machine cannot go on with this speaker; the text says why."""


class Speaker(Protocol):
    """Send messages to be served. Each of these calls may raise Dropped, but `close`."""

    companion: Speaker | None
    """Another speaker, which is listened to only while this one reads what is sent to it."""

    @property
    def standing(self) -> int:
        """The state of the speaker, in bits.

        READABLE: more may come from it. WRITABLE: something waits to be sent. RUNNABLE: a message waits and may be
        served. STALLING: it keeps the machine waiting.
        """

    @property
    def has_notes(self) -> bool:
        """Whether the message that waits first is a note."""

    def fileno(self) -> int:
        """Give the descriptor to wait for."""

    def receive(self, events: int) -> None:
        """Take in the bytes that have come; `events` are epoll's."""

    def flush(self) -> None:
        """Send the replies that wait, as far as they go."""

    def admit(self) -> None:
        """Let the messages that have come until now be served at the next turn."""

    def take_turn(self) -> None:
        """Serve MESSAGES_A_TURN of the messages that were admitted, at most."""

    def take_notes(self) -> None:
        """Serve the notes before the first request, admitted or not."""

    def stalled(self, now: float) -> bool:
        """Say whether it keeps the machine waiting for too long."""

    def close(self) -> None:
        """End the speaker."""


class _Seat:
    """Keep what `Turns` knows of one speaker."""

    __slots__ = ("ended", "listened_to", "queued", "speaker", "wanted")

    def __init__(self, speaker: Speaker, ended: Callable[[], None] | None) -> None:
        self.speaker = speaker
        self.ended = ended
        self.queued = False
        self.listened_to = True
        self.wanted = READABLE


class Turns:
    """Give all speakers their turns.

    Args:
        loop: waits for them.
        settle: takes in the files and maps that programs have given up.
    """

    def __init__(self, loop: Loop, settle: Callable[[], None]) -> None:
        self._loop = loop
        self._settle = settle
        self._seats: dict[Speaker, _Seat] = {}
        self._queue: deque[_Seat] = deque()
        self._slow: set[Speaker] = set()

    def patience(self) -> float | None:
        """Give the seconds until a round is due though nothing comes. None: none is."""
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
        """End a speaker. A speaker that is not there any more is no error."""
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
        """Decide, after a change, what to wait for of a speaker, and whether it has something to serve."""
        seat = self._seats.get(speaker)
        if seat is not None:
            self._plan(seat)

    def serve(self) -> None:
        """Serve a round, or only settle if no speaker has sent anything."""
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
        """Serve a speaker's messages with `work`. No other speaker notices if that fails."""
        speaker = seat.speaker
        if speaker not in self._seats:
            return
        try:
            work()
        except Dropped as reason:
            self.drop(speaker, str(reason))
            return
        except Exception:
            # This is our own fault. The program must not wait for ever, no other may notice, and the log shows it.
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
