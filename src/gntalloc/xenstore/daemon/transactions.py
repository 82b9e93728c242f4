"""Keep what a transaction has seen and changed.

A transaction sees each node as it was at its first look, and its own changes. At the end every node that it has seen
must still be of the same generation. Then its changes go into the common tree, in the order in which it first met the
nodes.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gntalloc.xenstore.daemon.tree import Node

__all__ = ["Seen", "Transaction"]


class Seen:
    """Keep one node in a transaction.

    Attributes:
        node: the node as the transaction sees it. None: there is none.
        generation: of the node of the common tree, when the transaction met it. None: there was none.
        permissions: of that node.
        changed: whether the transaction has changed it.
        tells: whether watches fire for it in the end.
        exactly: whether only watches on this very node fire.
        charged: memory that the change takes.
    """

    __slots__ = ("changed", "charged", "exactly", "generation", "node", "permissions", "tells")

    def __init__(self, node: Node | None) -> None:
        self.node = node
        self.generation = None if node is None else node.generation
        self.permissions = None if node is None else node.permissions
        self.changed = self.tells = self.exactly = False
        self.charged = 0


class Transaction:
    """Keep one transaction of one connection.

    Attributes:
        number: its own, on the connection.
        seen: its nodes, by path.
        owned: the number of nodes that each domain will own more.
        created: whether it has made nodes, so that the quota must be checked.
        over: whether it has ended: nothing goes on in it.
        failure: the error that it has met and that cannot be undone. It cannot be committed any more.
    """

    __slots__ = ("created", "failure", "number", "over", "owned", "seen")

    def __init__(self, number: int) -> None:
        self.number = number
        self.seen: dict[str, Seen] = {}
        self.owned: Counter[int] = Counter()
        self.created = self.over = False
        self.failure: str | None = None

    def tell(self, path: str, *, exactly: bool) -> None:
        """Note that watches fire for this node in the end."""
        seen = self.seen.get(path)
        if seen is None:
            self.failure = f"it has lost sight of {path}"
        elif not seen.tells:
            seen.tells, seen.exactly = True, exactly
        elif not exactly:
            seen.exactly = False
