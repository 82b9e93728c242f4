"""The checks of what every call is told: which domain it is about, and how many of something are wanted."""

from __future__ import annotations

from operator import index
from typing import Protocol, SupportsIndex

__all__ = ["HasDomid", "count_of", "domid_of"]

_LARGEST = 0xFFFF
"""As it stands in a grant entry and in the kernel's calls: 16 bits. The reserved numbers, DOMID_SELF too, are the
kernel's to judge."""


class HasDomid(Protocol):
    """A `gntalloc.Domain`, or another object that stands for a domain."""

    @property
    def domid(self) -> int:
        """The number of the domain."""


def domid_of(peer: SupportsIndex | HasDomid) -> int:
    """Get the number of a domain, which may be given as a Domain or as a whole number.

    Raises:
        TypeError: it is neither.
        ValueError: it is no domain's number.
    """
    given = getattr(peer, "domid", peer)
    if type(given) is int and 0 <= given <= _LARGEST:  # as nearly always
        return given
    why = f"{given!r} is no domain's number; give a Domain, or a whole number from 0 to {_LARGEST}"
    return _whole(given, 0, _LARGEST, why)


def count_of(count: SupportsIndex, what: str, *, least: int = 0, most: int = 0xFFFF_FFFF) -> int:
    """Get a whole number that a call can take: a count, a port, a reference.

    Args:
        count: the number.
        what: it is, for the error: "a number of pages".
        least: that it may be.
        most: that it may be.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is below `least`, or above `most`.
    """
    if type(count) is int and least <= count <= most:
        return count
    return _whole(count, least, most, f"{what} is a whole number from {least} to {most}, not {count!r}")


def _whole(value: object, least: int, most: int, why: str) -> int:
    if isinstance(value, bool):
        raise TypeError(why)
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(why) from None
    if not least <= number <= most:
        raise ValueError(why)
    return number
