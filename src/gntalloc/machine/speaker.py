"""Say what the machine asks of whatever sends it messages to be served.

A speaker is a program's connection, a connection of the machine's owner, a connection to xenstore, or the system calls
of a run.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["MESSAGES_A_TURN", "RUNNABLE", "STALLING", "Dropped", "Speaker"]

MESSAGES_A_TURN = 8
"""The most messages of one speaker that are served in a turn."""
RUNNABLE, STALLING = 1 << 16, 1 << 17
"""Bits of a speaker's standing, beside epoll's."""


class Dropped(Exception):
    """The machine cannot go on with this speaker; the text says why."""


class Speaker(Protocol):
    """Send messages to be served. Each of these calls may raise Dropped, but `close`."""

    weight: int
    """Bytes of its messages that came and were not served, if they are many. Few count as none."""
    companion: Speaker | None
    """Another speaker, which is listened to only while this one reads what is sent to it."""

    @property
    def standing(self) -> int:
        """The state of the speaker, in bits.

        READABLE: more may come from it. WRITABLE: something waits to be sent. RUNNABLE: a message waits and may be
        served, or one is served in part. STALLING: it keeps the machine waiting.
        """

    def fileno(self) -> int:
        """Give the descriptor to wait for."""

    def receive(self, events: int) -> None:
        """Take in the bytes that have come; `events` are epoll's."""

    def flush(self) -> None:
        """Send the replies that wait, as far as they go."""

    def admit(self) -> None:
        """Let the messages that have come until now be served at the next turn."""

    def take_turn(self, until: float) -> None:
        """Serve MESSAGES_A_TURN of the messages that were admitted, at most, and begin none after `until`.

        At least one message is served, or a piece of it.
        """

    def stalled(self, now: float) -> bool:
        """Say whether it keeps the machine waiting for too long."""

    def close(self) -> None:
        """End the speaker."""
