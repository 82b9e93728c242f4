"""What a machine tells its owner of itself: typed, and made of the JSON that the control channel carries."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from gntalloc.errors import MachineBroke

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DomainStatistics", "GrantedPage", "OpenFile", "Statistics"]


class GrantedPage(NamedTuple):
    """One page that is granted, or released and still mapped by a peer."""

    granter: int
    ref: int
    peer: int
    writable: bool
    opener: int
    """The pid that opened the device file it was allocated with."""
    users: int
    """The file's list and the granter's maps; 0: it was released, and stays until the peer lets go."""
    mapped_by: tuple[int, ...]
    """The domains that map it."""
    held: bool
    """Whether it was released, or is mapped by a peer."""
    age: float
    """Seconds."""

    @classmethod
    def of(cls, fields: object) -> Self:
        """Make one of the machine's answer.

        Raises:
            MachineBroke: it is none.
        """
        made: Self = _made(cls, fields)
        return made


class OpenFile(NamedTuple):
    """One open device file."""

    domid: int
    device: str
    opener: int
    """The pid that opened it."""
    ports: tuple[int, ...]
    """The event channel ports that are bound on it."""
    mapped: int
    """Bytes of it that are mapped."""

    @classmethod
    def of(cls, fields: object) -> Self:
        """Make one of the machine's answer.

        Raises:
            MachineBroke: it is none.
        """
        made: Self = _made(cls, fields)
        return made


class DomainStatistics(NamedTuple):
    """Counters of one domain."""

    domid: int
    uid: int
    """Whose programs may enter it."""
    limit: int
    """Pages that may be granted at once."""
    pages_in_use: int
    references: int
    ports: int
    files: int
    files_mapped: int
    """Files of which something is mapped."""
    nodes: int
    """Of xenstore, as are the following two."""
    watches: int
    transactions: int


class Statistics(NamedTuple):
    """Counters of a machine."""

    pid: int
    pages: int
    """Of memory."""
    extents: int
    """Pieces that the memory consists of."""
    descriptors: int
    """That the machine's process has open."""
    domains: tuple[DomainStatistics, ...]

    @classmethod
    def of(cls, fields: object) -> Self:
        """Make one of the machine's answer.

        Raises:
            MachineBroke: it is none.
        """
        made: Self = _made(cls, fields)
        return made


def _numbers(value: object) -> tuple[int, ...]:
    return tuple([_number(each) for each in _list(value)])


def _domains(value: object) -> tuple[DomainStatistics, ...]:
    return tuple([_made(DomainStatistics, each) for each in _list(value)])


def _list(value: object) -> list[object]:
    if type(value) is not list:
        raise TypeError("no list")
    return value


def _number(value: object) -> int:
    if type(value) is not int:
        raise TypeError("no whole number")
    return value


def _seconds(value: object) -> float:
    if type(value) is int:
        return float(value)
    if type(value) is not float or not isfinite(value):
        raise TypeError("no number")
    return value


def _truth(value: object) -> bool:
    if type(value) is not bool:
        raise TypeError("neither true nor false")
    return value


def _word(value: object) -> str:
    if type(value) is not str:
        raise TypeError("no text")
    return value


# How the fields that are no whole numbers are read.
_READERS: dict[str, Callable[[object], Any]] = {
    "writable": _truth,
    "held": _truth,
    "age": _seconds,
    "mapped_by": _numbers,
    "device": _word,
    "ports of OpenFile": _numbers,
    "domains": _domains,
}


def _made(cls: Any, fields: object) -> Any:
    """Make a named tuple of an object in JSON that has its fields, each of its type."""
    try:
        if type(fields) is not dict or len(fields) != len(cls._fields):
            raise TypeError(f"{fields!r:.80} is no {cls.__name__}")
        readers = [_READERS.get(name, _READERS.get(f"{name} of {cls.__name__}", _number)) for name in cls._fields]
        return cls(*(read(fields[name]) for name, read in zip(cls._fields, readers, strict=True)))
    except (TypeError, KeyError, OverflowError) as error:
        raise MachineBroke(f"the machine's books cannot be read: {error}; use one gntalloc for both") from None
