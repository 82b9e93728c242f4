"""Say whether to look before sleeping, as a test wants it, and take down how that went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gntalloc import clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.clock import Deadline

PATIENCE = 20.0


class Recorder:
    """Takes a Look's place. `answer` says until when to look."""

    def __init__(self, answer: Callable[[], float]) -> None:
        self.answer = answer
        self.heard: list[str] = []

    def until(self, _: Deadline) -> float:
        self.heard.append("until")
        return self.answer()

    def paid(self) -> None:
        self.heard.append("paid")

    def woken(self) -> None:
        self.heard.append("woken")


def long() -> float:
    return clock.now() + PATIENCE


def short() -> float:
    return clock.now() + 0.001


def no_look() -> float:
    return 0.0


WAYS = [short, no_look]
"""How to look where nothing comes soon."""
