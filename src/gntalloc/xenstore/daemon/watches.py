"""Find the watches that an event fires."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gntalloc.xenstore.daemon.permissions import READ
from gntalloc.xenstore.daemon.session import Watch
from gntalloc.xenstore.daemon.tree import above, parent

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gntalloc.xenstore.daemon.domains import Domains
    from gntalloc.xenstore.daemon.limits import Quotas
    from gntalloc.xenstore.daemon.permissions import Entry
    from gntalloc.xenstore.daemon.session import Session
    from gntalloc.xenstore.daemon.tree import Node, Tree

__all__ = ["Watches"]


class Watches:
    """Keep all watches, found by the node they are on."""

    def __init__(self, tree: Tree, domains: Domains, quotas: Quotas) -> None:
        self._tree = tree
        self._domains = domains
        self._quotas = quotas
        self._on: dict[str, dict[Watch, None]] = {}
        self._last = 0

    def add(self, session: Session, path: str, token: bytes, relative: int) -> Watch:
        """Set a watch. The caller has checked that it may be set."""
        self._last += 1
        watch = Watch(session, self._last, path, token, relative)
        session.watches[path, token] = watch
        self._on.setdefault(path, {})[watch] = None
        session.domain.watches += 1
        session.domain.memory += len(path) + len(token)
        return watch

    def remove(self, watch: Watch) -> None:
        """Take a watch off."""
        session = watch.session
        del session.watches[watch.path, watch.token]
        here = self._on[watch.path]
        del here[watch]
        if not here:
            del self._on[watch.path]
        session.domain.watches -= 1
        session.domain.memory -= len(watch.path) + len(watch.token)

    def tell(self, watch: Watch, path: str) -> None:
        """Send one event of one watch."""
        watch.session.event(path[watch.relative :], watch.token, quota=self._quotas.memory)

    def fire(
        self, path: str, node: Node | None = None, *, exactly: bool = False, before: tuple[Entry, ...] | None = None
    ) -> None:
        """Fire the watches on a node that has changed and, if not `exactly`, on the nodes above it.

        Args:
            path: the node's name.
            node: the node as it is, or was until now. None: as the tree has it.
            exactly: fire only watches on this very node.
            before: its permissions before the change. A domain that could read the node then is told too.
        """
        for session, watches in self._by_session(path, exactly=exactly):
            if self._may_know(session, path, node, before):
                for watch in watches:
                    self.tell(watch, path)

    def fire_special(self, name: str, entries: tuple[Entry, ...]) -> None:
        """Fire watches of @introduceDomain or @releaseDomain, where the watching domain may know."""
        for session, watches in self._by_session(name, exactly=True):
            if session.rights(entries) & READ:
                for watch in watches:
                    self.tell(watch, name)

    def _by_session(self, path: str, *, exactly: bool) -> Iterable[tuple[Session, list[Watch]]]:
        found: dict[Session, list[Watch]] = {}
        for name in [path] if exactly else above(path):
            for watch in self._on.get(name, ()):
                found.setdefault(watch.session, []).append(watch)
        for session in sorted(found, key=lambda session: session.number):
            yield session, sorted(found[session], key=lambda watch: watch.number)

    def _may_know(self, session: Session, path: str, node: Node | None, before: tuple[Entry, ...] | None) -> bool:
        if before is not None and session.rights(before) & READ:
            return True
        if node is None:
            node = self._tree.get(path)
        if node is None:
            return False
        if session.rights(self._domains.current(node).permissions) & READ:
            return True
        over = self._tree.get(parent(path))
        return over is not None and bool(session.rights(self._domains.current(over).permissions) & READ)
