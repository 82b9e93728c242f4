"""AsyncOnly: what is to be used in `async with`, and says so where somebody uses it in a `with`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

__all__ = ["AsyncOnly"]


class AsyncOnly:
    """A base class. A type checker sees no `__enter__` in it, and finds such a `with` before it runs."""

    if not TYPE_CHECKING:

        def __enter__(self) -> NoReturn:
            raise TypeError(f"{self!r} is used in an `async with`; here is a `with`")

        def __exit__(self, *error: object) -> None:
            """Be there, so that `with` gets as far as `__enter__`."""
