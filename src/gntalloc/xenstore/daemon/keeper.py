"""Keep the common tree with its books: who owns which nodes, and how much memory they take."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gntalloc.xenstore.daemon.domains import Domains
    from gntalloc.xenstore.daemon.limits import Quotas
    from gntalloc.xenstore.daemon.tree import Node, Tree
    from gntalloc.xenstore.daemon.watches import Watches

__all__ = ["Keeper", "cost"]


class Keeper:
    """Keep the tree and the rest that all views share."""

    def __init__(self, tree: Tree, domains: Domains, watches: Watches, quotas: Quotas) -> None:
        self.tree = tree
        self.domains = domains
        self.watches = watches
        self.quotas = quotas

    def place(self, path: str, node: Node | None) -> None:
        """Set a node of the common tree, or remove it, and keep the books of who owns what."""
        old = self.tree.get(path)
        if old is not None:
            self.domains.charge(old.permissions[0].domid, -cost(path, old))
        if node is not None:
            self.domains.charge(node.permissions[0].domid, cost(path, node))
            self.tree[path] = node
        elif old is not None:
            del self.tree[path]
        self.tree.owner_changed(path, old, node)

    def remove(self, nodes: list[tuple[str, Node]]) -> None:
        """Remove nodes that are there, and count them no more."""
        tree = self.tree
        counts: Counter[int] = Counter()
        sizes: Counter[int] = Counter()
        for path, node in nodes:
            owner = node.permissions[0].domid
            counts[owner] += 1
            sizes[owner] += cost(path, node)
            del tree[path]
            del tree.owned[owner][path]
        for owner, count in counts.items():
            if not tree.owned[owner]:
                del tree.owned[owner]
            self.domains.count_node(owner, -count)
            self.domains.charge(owner, -sizes[owner])


def cost(path: str, node: Node) -> int:
    """Count the bytes that a node takes of its owner's memory."""
    return node.size + len(path)
