"""`block`: contextlib.contextmanager, whose failures end at the caller's `with` for whoever reads a traceback.

pytest leaves out modules that say `__tracebackhide__`, as those of this package do. Those of contextlib are between
them, and do not say it.
"""

from __future__ import annotations

import contextlib
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeVar

from gntalloc.errors import GntallocError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

__all__ = ["Block", "block"]

__tracebackhide__ = True  # for pytest: what is raised here is about the caller's program

T = TypeVar("T")
P = ParamSpec("P")


class Block(Generic[T]):
    """A context manager around another one, without contextlib in what it raises."""

    def __init__(self, inner: AbstractContextManager[T]) -> None:
        self._inner = inner

    def __enter__(self) -> T:
        try:
            return self._inner.__enter__()
        except BaseException as error:
            _end_at_the_caller(error)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return self._inner.__exit__(kind, error, trace)
        except BaseException as raised:
            _end_at_the_caller(raised)
            raise


def block(function: Callable[P, Iterator[T]]) -> Callable[P, Block[T]]:
    """Make a context manager of a generator function, as contextlib.contextmanager does."""
    make = contextlib.contextmanager(function)

    @wraps(function)
    def begin(*args: P.args, **named: P.kwargs) -> Block[T]:
        return Block(make(*args, **named))

    return begin


def _end_at_the_caller(error: BaseException) -> None:
    """Of errors whose text says it all nothing is left of the way here; of others all but contextlib."""
    if isinstance(error, (GntallocError, AssertionError, ValueError)):
        error.__traceback__ = None
    trace = error.__traceback__
    kept = []
    while trace is not None:
        if trace.tb_frame.f_code.co_filename != contextlib.__file__:
            kept.append(trace)
        trace = trace.tb_next
    for each in reversed(kept):
        trace = TracebackType(trace, each.tb_frame, each.tb_lasti, each.tb_lineno)
    error.__traceback__ = trace
