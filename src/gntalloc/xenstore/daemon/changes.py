"""Hold the changes of which watches are told: what is needed to judge later who may know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gntalloc.xenstore.daemon.permissions import Entry
    from gntalloc.xenstore.daemon.tree import Node

__all__ = ["Change"]


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
