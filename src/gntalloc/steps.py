"""Do long work in steps, between which other programs are served, as Xen continues a long hypercall.

A driver's function that may take long gives a generator in place of its result. It yields between its steps, each of
which takes a fraction of a millisecond, and returns the result. What other programs may see between two steps is what
they may see on Xen: some pages of a call are mapped, copied or free already, and others are not yet.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from types import GeneratorType
from typing import TypeAlias, TypeVar, cast

__all__ = ["PAGES_A_STEP", "Later", "Steps", "batches", "finish", "finish_steps"]

T = TypeVar("T")

Steps: TypeAlias = Generator[None, None, T]
"""The steps of a piece of work whose result is T."""

Later: TypeAlias = Callable[[Steps[None]], None]
"""Begins a piece of work now, and does what does not fit into this moment before the domain's next request."""

PAGES_A_STEP = 64
"""So many pages are mapped, freed or asked about in one step."""


def finish(work: T | Steps[T]) -> T:
    """Do the rest of the work at once, if it is not done, and return its result."""
    return finish_steps(work) if isinstance(work, GeneratorType) else cast("T", work)


def finish_steps(steps: Steps[T]) -> T:
    """Do the rest of the steps at once, and return their result."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return cast("T", end.value)


def batches(things: Iterable[T], size: int = PAGES_A_STEP) -> Iterator[list[T]]:
    """Give the things in lists of `size`, the last one shorter."""
    rest = iter(things)
    while batch := list(islice(rest, size)):
        yield batch
