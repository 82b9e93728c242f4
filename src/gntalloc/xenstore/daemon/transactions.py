"""Keep what a transaction has seen and changed.

A transaction sees each node as it was at its first look, and its own changes. At the end every node that it has seen
must still be of the same generation. Then its changes go into the common tree, in the order in which it first met the
nodes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gntalloc.xenstore.daemon.permissions import Entry
    from gntalloc.xenstore.daemon.tree import Node

__all__ = ["Seen", "Transaction"]


@dataclass(slots=True)
class Seen:
    """Keep one node in a transaction."""

    node: Node | None
    """The node as the transaction sees it. None: there is none."""
    generation: int | None
    """The node of the common tree, when the transaction met it. None: there was none."""
    permissions: tuple[Entry, ...] | None
    """The generation of that node."""
    changed: bool = False
    tells: bool = False
    """Whether watches fire for it in the end."""
    exactly: bool = False
    """Whether only watches on this very node fire."""
    charged: int = 0
    """Memory that the change takes."""


@dataclass(slots=True)
class Transaction:
    """Keep one transaction of one connection."""

    number: int
    seen: dict[str, Seen] = field(default_factory=dict)
    owned: Counter[int] = field(default_factory=Counter)
    """The number of nodes that each domain will own more."""
    created: bool = False
    """Whether it has made nodes, so that the quota must be checked."""
    over: bool = False
    """Whether it has ended: nothing goes on in it."""
    failure: str | None = None
    """The error that it has met and that cannot be undone. It cannot be committed any more."""

    def tell(self, path: str, *, exactly: bool) -> None:
        """Note that watches fire for this node in the end."""
        seen = self.seen.get(path)
        if seen is None:
            self.failure = f"it has lost sight of {path}"
        elif not seen.tells:
            seen.tells, seen.exactly = True, exactly
        elif not exactly:
            seen.exactly = False
