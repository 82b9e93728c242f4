"""Show the tree as one request sees it: the common tree, or the tree in a transaction.

Each look at a node counts in a transaction, also a look for permissions: each can make a conflict.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from gntalloc.steps import finish_steps
from gntalloc.xenstore.daemon.keeper import cost
from gntalloc.xenstore.daemon.limits import Refused
from gntalloc.xenstore.daemon.permissions import ALL
from gntalloc.xenstore.daemon.transactions import Seen, Transaction
from gntalloc.xenstore.daemon.tree import Node, is_name, last, parent, too_long

if TYPE_CHECKING:
    from gntalloc.steps import Steps
    from gntalloc.xenstore.daemon.changes import Change
    from gntalloc.xenstore.daemon.keeper import Keeper
    from gntalloc.xenstore.daemon.permissions import Entry
    from gntalloc.xenstore.daemon.session import Session

__all__ = ["View"]


class View:
    """Show and change the tree for one request.

    Args:
        keeper: the tree, and all around it.
        session: the connection that asks. None: the daemon itself, which may do everything.
        transaction: the request's transaction, if it has one.
    """

    def __init__(self, keeper: Keeper, session: Session | None, transaction: Transaction | None = None) -> None:
        self._keeper = keeper
        self._tree = keeper.tree
        self._domains = keeper.domains
        self._watches = keeper.watches
        self._quotas = keeper.quotas
        self._session = session
        self._transaction = transaction

    # Looking.

    @property
    def limited(self) -> bool:
        """Whether permissions and quotas hold."""
        return self._session is not None and not self._session.privileged

    def rights(self, entries: tuple[Entry, ...]) -> int:
        """Give what may be done with a node of these permissions."""
        return ALL if self._session is None else self._session.rights(entries)

    def find(self, path: str) -> Node | None:
        """Find a node, without a look at its permissions.

        Raises:
            Refused: ENOSPC: the transaction has seen too many.
        """
        if self._transaction is None:
            node = self._tree.get(path)
        elif (seen := self._transaction.seen.get(path)) is not None:
            node = seen.node
        else:
            return self._meet(self._transaction, path).node
        return None if node is None else self._domains.current(node)

    def get(self, path: str, wanted: int) -> Node:
        """Find a node with which `wanted` may be done.

        Raises:
            Refused: EINVAL: that is no name. ENOENT: there is no such node. EACCES: it may not be done, or the node
                above does not let the asker know whether the node is there.
        """
        if not is_name(path, self._quotas.path_max):
            raise Refused(errno.EINVAL, too_long(path, self._quotas.path_max))
        node = self.find(path)
        if node is not None and self.rights(node.permissions) & wanted == wanted:
            return node
        over = None
        name = path
        while over is None:
            name = parent(name)
            over = self.find(name)
            if name == "/":
                break
        may_know = over is not None and self.rights(over.permissions) & wanted
        raise Refused(errno.ENOENT if node is None and may_know else errno.EACCES)

    # Changing.

    def put(self, path: str, node: Node, *, free: bool = False) -> Node:
        """Set a node, and return it as it is then.

        Args:
            path: its name.
            node: the new node, which gets a generation.
            free: whether it may have any size.

        Raises:
            Refused: ENOSPC: it is too large. EIO: the domain has no memory left.
        """
        node = self._domains.current(node._replace(generation=self._tree.advance()))
        limit = self.limited and not free
        transaction = self._transaction
        if transaction is None:
            self._check_size(path, node, limit=limit)
            old = self._tree.get(path)
            freed = 0 if old is None or old.permissions[0].domid != node.permissions[0].domid else cost(path, old)
            self._afford(node.permissions[0].domid, cost(path, node) - freed, limit=limit)
            self._keeper.place(path, node)
            return node
        seen = self._change(transaction, path)
        try:
            self._check_size(path, node, limit=limit)
            self._charge(seen, cost(path, node), limit=limit)
        except Refused as refusal:
            transaction.failure = refusal.reason
            raise
        seen.node = node
        return node

    def make(self, path: str, value: bytes) -> Node:
        """Make a node at once. See `making`."""
        return finish_steps(self.making(path, value))

    def making(self, path: str, value: bytes) -> Steps[Node]:
        """Make a node that is not there, and those above it that are not. They inherit permissions.

        In the common tree they all come at one moment, in one piece. A transaction gets them in pieces.

        Raises:
            Refused: ENOSPC: a quota is reached. EIO: the domain has no memory left. Nothing was made then.
        """
        lacking: list[str] = []
        name, over = path, None
        while over is None:
            lacking.append(name)
            name = parent(name)
            over = self.find(name)
            if over is None and name == "/":
                raise Refused(errno.ENOENT)
        entries = over.permissions
        if self._session is not None and self.limited:
            entries = (entries[0]._replace(domid=self._session.domain.domid), *entries[1:])
        if self._transaction is None:
            return self._make_at_once(lacking, entries, value, over.with_child(last(lacking[-1])))
        self._transaction.created = True
        made: list[str] = []
        try:
            for name, node in zip(lacking, _chain(lacking, 0, entries, value), strict=True):  # from the last one up
                self._check_count(0)
                self.put(name, node)
                made.append(name)
                self._transaction.owned[entries[0].domid] += 1
                yield
                self._check_that_it_goes_on()
            self.put(parent(lacking[-1]), over.with_child(last(lacking[-1])))
        except Refused:
            self._unmake(self._transaction, made, entries[0].domid)
            raise
        return self._there(path)

    def _make_at_once(self, paths: list[str], entries: tuple[Entry, ...], value: bytes, over: Node) -> Node:
        """Make nodes in the common tree, from the last one up, and let `over` be the one that was there above them.

        Raises:
            Refused: as of `making`.
        """
        owner, generation = entries[0].domid, self._tree.advance()
        entries = self._domains.current(Node(generation, entries)).permissions
        nodes = _chain(paths, generation, entries, value)
        needed = sum(map(cost, paths, nodes))
        if self.limited:
            self._check_all(paths, nodes, needed)
        if self._domains.know(owner) is None:
            raise Refused(errno.ENOMEM)
        self._domains.charge(owner, needed)
        try:
            self.put(parent(paths[-1]), over)
        except Refused:
            self._domains.charge(owner, -needed)
            raise
        self._tree.grow(owner, dict(zip(paths, nodes, strict=True)))
        self._domains.count_node(owner, len(nodes))
        return nodes[0]

    def _check_all(self, paths: list[str], nodes: list[Node], needed: int) -> None:
        """Check that the asking domain may have these nodes, and that they have memory.

        Raises:
            Refused: as of `making`: the first of the reasons, from the first node on.
        """
        assert self._session is not None
        domain = self._session.domain
        largest = max(node.size for node in nodes)
        fit = domain.nodes + len(nodes) <= domain.quotas.nodes and largest < self._quotas.node_size
        if fit and domain.memory + needed < self._quotas.memory:
            return
        needed = 0
        for made, (path, node) in enumerate(zip(paths, nodes, strict=True)):
            self._check_count(made)
            self._check_size(path, node, limit=True)
            needed += cost(path, node)
            self._afford(domain.domid, needed, limit=True)

    def remove(self, path: str) -> None:
        """Remove a node at once. See `removing`."""
        finish_steps(self.removing(path))

    def removing(self, path: str) -> Steps[None]:
        """Remove a node that is there and is not /, and all below it. Watches are told of each.

        From the common tree they all go at one moment, in one piece; in a transaction they go in pieces.

        Raises:
            Refused: EIO: the transaction has seen too many nodes, or others have changed nodes meanwhile, so that its
                nodes do not fit together any more.
        """
        over = self.find(parent(path))
        if over is None:
            raise Refused(errno.EINVAL)
        if self._transaction is None:
            self._remove_at_once(path)
        else:
            try:
                yield from self._remove_below(self._transaction, path)
            except Refused as refusal:
                raise Refused(errno.EIO, refusal.reason) from None
        if last(path) not in over.children:
            raise Refused(errno.EIO, f"{path} was removed from outside of the transaction")
        self.put(parent(path), over.without_child(last(path)), free=True)

    def tell(self, path: str, node: Node, *, exactly: bool = False, before: tuple[Entry, ...] | None = None) -> None:
        """Let watches fire, now or when the transaction ends."""
        if self._transaction is not None:
            self._transaction.tell(path, exactly=exactly)
        else:
            self._watches.fire((self._watches.change(path, node, exactly=exactly, before=before),))

    def change_owner(self, node: Node, entries: tuple[Entry, ...]) -> Node:
        """Give the node other permissions, and count it among the nodes of its new owner."""
        self._count(node.permissions[0].domid, -1)
        self._count(entries[0].domid, 1)
        return node._replace(permissions=entries)

    # What the transaction remembers.

    def _meet(self, transaction: Transaction, path: str) -> Seen:
        if self.limited and len(transaction.seen) >= self._quotas.transaction_nodes:
            limit = self._quotas.transaction_nodes
            transaction.failure = f"transaction-nodes {limit}: it has seen {len(transaction.seen)}"
            raise Refused(errno.ENOSPC, transaction.failure)
        node = self._tree.get(path)
        seen = Seen(None if node is None else self._domains.current(node))
        transaction.seen[path] = seen
        return seen

    def _change(self, transaction: Transaction, path: str) -> Seen:
        seen = transaction.seen.get(path) or self._meet(transaction, path)
        seen.changed = True
        return seen

    # Removing and counting.

    def _remove_at_once(self, path: str) -> None:
        """Remove nodes of the common tree, children first, as the daemon does.

        Raises:
            Refused: EIO: a node that another one names is not there. Nothing was removed.
        """
        tree, watches = self._tree, self._watches
        going: list[tuple[str, Node]] = []
        pending = [path]
        while pending:
            name = pending.pop()
            node = tree.get(name)
            if node is None:
                raise Refused(errno.EIO, f"{name} is not there")
            going.append((name, node))
            pending += [f"{name}/{child}" for child in node.children]
        changes: list[Change] = []
        for name, node in reversed(going):
            if name == path or watches.is_watched(name):
                changes.append(watches.change(name, node, exactly=name != path))
        self._keeper.remove(going)
        watches.fire(changes)

    def _remove_below(self, transaction: Transaction, path: str) -> Steps[None]:
        """Remove nodes in a transaction, children first, as the daemon does: each is met, told of and uncounted.

        Raises:
            Refused: ENOSPC: the transaction has seen too many. ENOENT: another request removed a child that it sees.
                Nodes that were removed until then stay removed.
        """
        pending = [_Removal(path, self._there(path))]
        try:
            while pending:
                removal = pending[-1]
                if removal.gone < len(removal.node.children):
                    below = f"{removal.path}/{removal.node.children[removal.gone]}"
                    pending.append(_Removal(below, self._there(below)))
                    continue
                pending.pop()
                self._erase(transaction, removal.path)
                transaction.tell(removal.path, exactly=removal.path != path)
                transaction.owned[removal.node.permissions[0].domid] -= 1
                if pending:
                    pending[-1].gone += 1
                yield
                self._check_that_it_goes_on()
        except Refused:
            for removal in pending:
                if removal.gone:
                    self.put(removal.path, removal.node.without_first(removal.gone), free=True)
            raise

    def _there(self, path: str) -> Node:
        node = self.find(path)
        if node is None:
            raise Refused(errno.ENOENT)
        return node

    def _check_that_it_goes_on(self) -> None:
        """Check that nobody has ended the transaction since the last piece.

        Raises:
            Refused: ENOENT: its connection is gone, or was reset.
        """
        if self._transaction is not None and self._transaction.over:
            raise Refused(errno.ENOENT, "the transaction has ended")

    def _erase(self, transaction: Transaction, path: str) -> None:
        seen = self._change(transaction, path)
        self._charge(seen, 0, limit=False)
        seen.node = None

    def _unmake(self, transaction: Transaction, made: list[str], owner: int) -> None:
        for path in made:
            self._erase(transaction, path)
            transaction.owned[owner] -= 1
            transaction.failure = transaction.failure or f"{path} could not be made"

    def _count(self, domid: int, by: int) -> bool:
        if self._transaction is not None:
            self._transaction.owned[domid] += by
            return True
        return self._domains.count_node(domid, by)

    def _check_count(self, more: int) -> None:
        """Check that the asking domain may own one more node than it has, and `more`.

        Raises:
            Refused: ENOSPC: it may not.
        """
        if self._session is None or not self.limited:
            return
        domain = self._session.domain
        used = domain.nodes + more
        if used >= domain.quotas.nodes:
            raise Refused(errno.ENOSPC, f"nodes {domain.quotas.nodes}: domain {domain.domid} has {used}")

    def _check_size(self, path: str, node: Node, *, limit: bool) -> None:
        most = self._quotas.node_size
        if not limit or node.size < most:
            return
        part = f"the value has {len(node.value)} bytes"
        if node.names > len(node.value):
            part = f"the names of the children of {path} have {node.names} bytes"
        raise Refused(errno.ENOSPC, f"node-size {most}: {part}, and all of the node {node.size}")

    def _charge(self, seen: Seen, cost: int, *, limit: bool) -> None:
        """Charge the memory of a change in a transaction to the domain that makes it."""
        if self._session is None or (self._transaction is not None and self._transaction.over):
            return
        domain = self._session.domain
        self._afford(domain.domid, cost - seen.charged, limit=limit)
        domain.memory += cost - seen.charged
        seen.charged = cost

    def _afford(self, domid: int, more: int, *, limit: bool) -> None:
        domain = self._domains.get(domid)
        if limit and domain is not None and not domain.privileged and domain.memory + more >= self._quotas.memory:
            used = f"domain {domid} uses {domain.memory} bytes, and {more} more are asked for"
            raise Refused(errno.EIO, f"memory {self._quotas.memory}: {used}")


class _Removal:
    """Keep a node that is being removed, after `gone` of its children."""

    __slots__ = ("gone", "node", "path")

    def __init__(self, path: str, node: Node) -> None:
        self.path = path
        self.node = node
        self.gone = 0


def _chain(paths: list[str], generation: int, entries: tuple[Entry, ...], value: bytes) -> list[Node]:
    """Make nodes of which each is the one child of the next. The first has the value."""
    nodes = [Node(generation, entries, value)]
    for below in paths[:-1]:
        name = last(below)
        nodes.append(Node(generation, entries, b"", (name,), len(name) + 1))
    return nodes
