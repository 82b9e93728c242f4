"""Hold the changes of which watches are told: what is needed to judge later who may know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gntalloc.xenstore.daemon.permissions import Entry
    from gntalloc.xenstore.daemon.session import Session
    from gntalloc.xenstore.daemon.tree import Node

__all__ = ["Behind", "Change", "Firing"]


class Change(NamedTuple):
    """Hold one change of one node, with all that decides who is told of it."""

    path: str
    node: Node | None = None
    """The node as it was after the change, or, if it was removed, until then."""
    over: Node | None = None
    """The node above it at that moment."""
    before: tuple[Entry, ...] | None = None
    """The permissions before the change. A domain that could read the node then is told too."""
    exactly: bool = False
    """Whether only watches on this very node fire."""


class Firing(NamedTuple):
    """Hold the changes of one moment, of which these sessions have watches."""

    serial: int
    changes: Sequence[Change]
    sessions: Sequence[Session]
    first: int
    last: int
    """The numbers of the watches that fire, from `first` to `last`. Those set since do not."""


@dataclass(slots=True)
class Behind:
    """Say how far one session has been told of a firing: of `told` of its changes."""

    firing: Firing
    told: int = 0
