"""Run work that is done in pieces: a generator that yields after each."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["finish"]

T = TypeVar("T")


def finish(pieces: Generator[None, None, T]) -> T:
    """Do all pieces at once, and return the work's result."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: T = end.value
            return result
