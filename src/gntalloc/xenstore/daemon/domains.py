"""The domains that the daemon knows, and what each has in use.

A domain is known from the moment it is introduced, or a permission names it or it owns a node, until it is gone. What a
node's permissions say of a domain that is younger than the node means another domain, which had that number before.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gntalloc.xenstore.daemon.limits import Quotas, Refused

if TYPE_CHECKING:
    from gntalloc.xenstore.daemon.permissions import Entry
    from gntalloc.xenstore.daemon.session import Session
    from gntalloc.xenstore.daemon.tree import Node, Tree

__all__ = ["Domain", "Domains"]


@dataclass(eq=False)
class Domain:
    """What is known of one domain, and what it has in use."""

    domid: int
    generation: int
    quotas: Quotas
    introduced: bool = False
    nodes: int = 0
    watches: int = 0
    transactions: int = 0
    memory: int = 0
    target: int | None = None
    """The domain whose rights it has too."""
    sessions: list[Session] = field(default_factory=list)

    @property
    def privileged(self) -> bool:
        """Whether it is domain 0, which no permission and no quota stops."""
        return self.domid == 0


class Domains(dict[int, Domain]):
    """The known domains by number."""

    def __init__(self, tree: Tree, quotas: Quotas) -> None:
        super().__init__()
        self.quotas = quotas
        """Of every domain, unless it is given others of its own."""
        self.existing: set[int] = {0}
        """The numbers of all domains that there are, known or not: what the hypervisor would say."""
        self._tree = tree

    def know(self, domid: int) -> Domain | None:
        """The domain of that number, if there is one."""
        domain = self.get(domid)
        if domain is None and domid in self.existing:
            domain = self[domid] = Domain(domid, self._tree.generation, self.quotas)
        return domain

    def connected(self, domid: int) -> Domain:
        """The domain of that number, if it was introduced.

        Raises:
            Refused: ENOENT.
        """
        domain = self.get(domid)
        if domain is None or not domain.introduced:
            raise Refused(errno.ENOENT)
        return domain

    def meant(self, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        """New permissions, where those of domains that are not there are void from the start."""
        return tuple(entry._replace(void=self.know(entry.domid) is None) for entry in entries)

    def current(self, node: Node) -> Node:
        """The node, where permissions of domains that have gone since are void."""
        entries = node.permissions
        if len(entries) == 1:
            return node
        now = tuple(
            entry._replace(void=True) if place and not entry.void and self._newer(entry.domid, node) else entry
            for place, entry in enumerate(entries)
        )
        return node if now == entries else node._replace(permissions=now)

    def count_node(self, domid: int, by: int) -> bool:
        """A domain owns more nodes, or fewer. False: there is no such domain."""
        domain = self.know(domid) if by > 0 else self.get(domid)
        if domain is None:
            return False
        domain.nodes += by
        return True

    def charge(self, domid: int, size: int) -> None:
        """A domain uses more memory, or less."""
        domain = self.get(domid)
        if domain is not None:
            domain.memory += size

    def _newer(self, domid: int, node: Node) -> bool:
        domain = self.get(domid)
        return domain is None or domain.generation > node.generation
