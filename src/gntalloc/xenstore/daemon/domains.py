"""Keep the domains that the daemon knows, and count what each has in use.

A domain is known from the moment it is introduced, or a permission names it or it owns a node, until it is gone.

A permission names a number. Two rules tell which domain that is. By xenstored's rule it is the domain that had the
number when the permission was given. A younger domain gets nothing of it, and a number without a domain is void. With
`by_number` it is any domain that has the number, as long as the node is there and domain 0 has not released the number
since. By both rules a node's owner is a living domain, and its nodes go when it does.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from gntalloc.xenstore.daemon.limits import Quotas, Refused

if TYPE_CHECKING:
    from gntalloc.xenstore.daemon.permissions import Entry
    from gntalloc.xenstore.daemon.tree import Node, Tree

__all__ = ["Domain", "Domains"]


class Domain:
    """Keep one domain, and count what it has in use."""

    def __init__(self, domid: int, generation: int, quotas: Quotas) -> None:
        self.domid = domid
        self.generation = generation
        self.quotas = quotas
        self.introduced = False
        self.nodes = 0
        self.watches = 0
        self.transactions = 0
        self.memory = 0
        self.target: int | None = None
        """The domain whose rights this one has too."""

    @property
    def privileged(self) -> bool:
        """Whether it is domain 0, which no permission and no quota stops."""
        return self.domid == 0


class Domains(dict[int, Domain]):
    """Keep the known domains by number."""

    def __init__(self, tree: Tree, quotas: Quotas, *, by_number: bool = False) -> None:
        super().__init__()
        self.by_number = by_number
        """Whether a permission holds for every domain that ever has its number."""
        self.quotas = quotas
        """The quotas of every domain that is given no others."""
        self.existing: set[int] = {0}
        """The numbers of all domains that there are, known or not, as the hypervisor would list them."""
        self._tree = tree
        self._released: dict[int, int] = {}  # number -> the generation at which domain 0 released it

    def know(self, domid: int) -> Domain | None:
        """Find the domain of that number, if there is one, and know it from now on."""
        domain = self.get(domid)
        if domain is None and domid in self.existing:
            since = self._released.get(domid, 0) if self.by_number else self._tree.generation
            domain = self[domid] = Domain(domid, since, self.quotas)
        return domain

    def forget_permissions(self, domid: int) -> None:
        """Void all permissions that were given to this number until now: the next domain that has it gets none."""
        self._released[domid] = self._tree.advance()

    def connected(self, domid: int) -> Domain:
        """Find the domain of that number, if it was introduced.

        Raises:
            Refused: ENOENT: it was not.
        """
        domain = self.get(domid)
        if domain is None or not domain.introduced:
            raise Refused(errno.ENOENT)
        return domain

    def meant(self, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        """Mark new permissions void that name no living domain, unless permissions hold by number."""
        if self.by_number:
            return entries
        return tuple(entry._replace(void=self.know(entry.domid) is None) for entry in entries)

    def current(self, node: Node) -> Node:
        """Give the node with the permissions void that name domains which have gone since."""
        entries = node.permissions
        if len(entries) == 1:
            return node
        now = tuple(
            entry._replace(void=True) if place and not entry.void and self._newer(entry.domid, node) else entry
            for place, entry in enumerate(entries)
        )
        return node if now == entries else node._replace(permissions=now)

    def count_node(self, domid: int, by: int) -> bool:
        """Count more nodes of a domain, or fewer. False: there is no such domain."""
        domain = self.know(domid) if by > 0 else self.get(domid)
        if domain is None:
            return False
        domain.nodes += by
        return True

    def charge(self, domid: int, size: int) -> None:
        """Count more memory of a domain, or less."""
        domain = self.get(domid)
        if domain is not None:
            domain.memory += size

    def _newer(self, domid: int, node: Node) -> bool:
        domain = self.get(domid)
        if domain is not None:
            return domain.generation > node.generation
        return not self.by_number or self._released.get(domid, 0) > node.generation
