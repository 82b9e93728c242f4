"""Find the watches that an event fires, and fire them.

A change may fire very many watches, so this has two parts. At the moment of the change it is noted which sessions have
watches that see it (`fire`). Later, in pieces, these sessions are told (`catch_up`). Each session is told of changes in
the order in which they were made, whichever request goes on with it: no session waits for another one's events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gntalloc.xenstore.daemon.changes import Change
from gntalloc.xenstore.daemon.permissions import READ, Entry
from gntalloc.xenstore.daemon.session import Behind, Firing, Watch
from gntalloc.xenstore.daemon.tree import above, parent

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gntalloc.steps import Steps
    from gntalloc.xenstore.daemon.domains import Domains
    from gntalloc.xenstore.daemon.limits import Quotas
    from gntalloc.xenstore.daemon.session import Session
    from gntalloc.xenstore.daemon.tree import Node, Tree

__all__ = ["Watches"]

_CHANGES_A_PIECE = 16


class Watches:
    """Keep all watches, found by the node they are on."""

    def __init__(self, tree: Tree, domains: Domains, quotas: Quotas) -> None:
        self._tree = tree
        self._domains = domains
        self._quotas = quotas
        self._on: dict[str, dict[Watch, None]] = {}
        self._last = 0
        self._serial = 0
        self._fresh: list[Firing] = []  # nobody has begun to tell of these
        self._lagging: dict[Session, None] = {}  # sessions that are behind

    def add(self, session: Session, path: str, token: bytes, relative: int) -> Watch:
        """Set a watch. The caller has checked that it may be set."""
        self._last += 1
        watch = Watch(session, self._last, path, token, relative)
        session.watches[path, token] = watch
        session.on.setdefault(path, []).append(watch)
        self._on.setdefault(path, {})[watch] = None
        session.domain.watches += 1
        session.domain.memory += len(path) + len(token)
        return watch

    def remove(self, watch: Watch) -> None:
        """Take a watch off. Changes of which it was not told yet are not told to it any more."""
        session = watch.session
        del session.watches[watch.path, watch.token]
        session.on[watch.path].remove(watch)
        if not session.on[watch.path]:
            del session.on[watch.path]
        here = self._on[watch.path]
        del here[watch]
        if not here:
            del self._on[watch.path]
        session.domain.watches -= 1
        session.domain.memory -= len(watch.path) + len(watch.token)

    # At the moment of a change.

    def is_watched(self, path: str) -> bool:
        """Say whether there is a watch on this very node."""
        return path in self._on

    def change(
        self, path: str, node: Node | None = None, *, exactly: bool = False, before: tuple[Entry, ...] | None = None
    ) -> Change:
        """Hold a change that was just made.

        Args:
            path: the node's name.
            node: the node as it is, or was until now. None: as the tree has it.
            exactly: fire only watches on this very node, and not on the nodes above it.
            before: its permissions before the change. A domain that could read the node then is told too.
        """
        tree = self._tree
        return Change(path, tree.get(path) if node is None else node, tree.get(parent(path)), before, exactly)

    def fire(self, changes: Sequence[Change]) -> None:
        """Note which sessions are told of these changes, which were made at this moment."""
        if self._on and changes:
            self._note(changes, self._listeners(changes))

    def fire_special(self, name: str, entries: tuple[Entry, ...]) -> None:
        """Fire watches of @introduceDomain or @releaseDomain, where the watching domain may know."""
        self.fire((Change(name, before=entries, exactly=True),))

    def fire_first(self, watch: Watch) -> None:
        """Send the one event that a new watch gets."""
        if watch.session.behind:
            change = Change(watch.path, before=(Entry(watch.session.domain.domid, READ),), exactly=True)
            self._note((change,), (watch.session,), watch.number)
        else:
            self._tell(watch, watch.path)

    def _note(self, changes: Sequence[Change], sessions: Sequence[Session], first: int = 0) -> None:
        if not sessions:
            return
        self._serial += 1
        firing = Firing(self._serial, changes, sessions, first, first or self._last)
        for session in sessions:
            session.behind.append(Behind(firing))
            self._lagging[session] = None
        self._fresh.append(firing)

    def _listeners(self, changes: Sequence[Change]) -> list[Session]:
        """Find the sessions that have watches on these nodes or above. Each node is looked at once."""
        on = self._on
        found: dict[Session, None] = {}
        climbed: set[str] = set()
        for change in changes:
            name = change.path
            if change.exactly:
                found.update((watch.session, None) for watch in on.get(name, ()))
                continue
            while name not in climbed:
                climbed.add(name)
                if name in on:
                    found.update((watch.session, None) for watch in on[name])
                name = parent(name)
        return sorted(found, key=lambda session: session.number)

    # Afterwards.

    def take_fresh(self) -> list[Firing]:
        """Take the firings that have been noted since the last call. The caller has to `catch_up`."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def forget(self, session: Session) -> None:
        """Tell a session nothing any more."""
        session.behind.clear()
        self._lagging.pop(session, None)

    def catch_up_all(self) -> Steps[None]:
        """Tell all sessions, in pieces, of all that they have missed."""
        while self._lagging:
            self._tell_more(next(iter(self._lagging)))
            yield

    def catch_up(self, firings: Iterable[Firing]) -> Steps[None]:
        """Tell all sessions that these firings concern, in pieces, and of what they have missed before."""
        for firing in firings:
            for session in firing.sessions:
                while session.behind and session.behind[0].firing.serial <= firing.serial:
                    self._tell_more(session)
                    yield

    def _tell_more(self, session: Session) -> None:
        """Go on with the oldest firing of a session: a few changes, or one that fires watches."""
        behind = session.behind[0]
        firing = behind.firing
        for change in firing.changes[behind.told : behind.told + _CHANGES_A_PIECE]:
            behind.told += 1
            fired = [watch for watch in _on_or_above(session, change) if firing.first <= watch.number <= firing.last]
            if fired and self._may_know(session, change):
                for watch in sorted(fired, key=lambda watch: watch.number):
                    self._tell(watch, change.path)
                break
        if behind.told == len(firing.changes):
            session.behind.popleft()
            if not session.behind:
                del self._lagging[session]

    def _tell(self, watch: Watch, path: str) -> None:
        watch.session.event(path[watch.relative :], watch.token, quota=self._quotas.memory)

    def _may_know(self, session: Session, change: Change) -> bool:
        if change.before is not None and session.rights(change.before) & READ:
            return True
        node, over = change.node, change.over
        if node is None:
            return False
        if session.rights(self._domains.current(node).permissions) & READ:
            return True
        return over is not None and bool(session.rights(self._domains.current(over).permissions) & READ)


def _on_or_above(session: Session, change: Change) -> list[Watch]:
    """List a session's watches that see a change, by the shorter way: from the node up, or from watch to watch."""
    on, path = session.on, change.path
    if change.exactly:
        return on.get(path, [])
    if len(on) > path.count("/"):
        return [watch for name in above(path) for watch in on.get(name, ())]
    return [watch for name, watches in on.items() if _is_above(name, path) for watch in watches]


def _is_above(name: str, path: str) -> bool:
    return path.startswith(name) and (path[len(name) : len(name) + 1] in ("", "/") or name == "/")
