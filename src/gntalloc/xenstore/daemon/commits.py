"""End a transaction: put its changes into the common tree, or forget them."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from gntalloc.xenstore.daemon.limits import Refused

if TYPE_CHECKING:
    from gntalloc.xenstore.daemon.changes import Change
    from gntalloc.xenstore.daemon.keeper import Keeper
    from gntalloc.xenstore.daemon.session import Session
    from gntalloc.xenstore.daemon.transactions import Transaction

__all__ = ["commit", "forget"]


def commit(keeper: Keeper, transaction: Transaction, *, limited: bool) -> None:
    """Put a transaction's changes into the common tree, all at one moment.

    Raises:
        Refused: ENOMEM: it has failed before. ENOSPC: a domain would have too many nodes. EAGAIN: another request
            changed a node that it has seen. Nothing was done.
    """
    _check(keeper, transaction, limited=limited)
    tree, watches = keeper.tree, keeper.watches
    changes: list[Change] = []
    for path, seen in transaction.seen.items():
        if seen.changed:
            node = None if seen.node is None else seen.node.of(tree.advance())
            keeper.place(path, node)
            if seen.tells:
                changes.append(watches.change(path, node, exactly=seen.exactly, before=seen.permissions))
    for domid, more in transaction.owned.items():
        keeper.domains[domid].nodes += more
    watches.fire(changes)


def _check(keeper: Keeper, transaction: Transaction, *, limited: bool) -> None:
    if transaction.failure is not None:
        raise Refused(errno.ENOMEM, f"the transaction has failed before: {transaction.failure}")
    for domid, more in transaction.owned.items():
        owner = keeper.domains.know(domid)
        if owner is None:
            raise Refused(errno.ENOMEM)
        judged = transaction.created and limited and not owner.privileged
        if judged and max(0, owner.nodes + more) >= owner.quotas.nodes:
            used = f"domain {domid} has {owner.nodes}, and the transaction makes {more} more"
            raise Refused(errno.ENOSPC, f"nodes {owner.quotas.nodes}: {used}")
    for path, seen in transaction.seen.items():
        now = keeper.tree.get(path)
        if seen.generation != (None if now is None else now.generation):
            raise Refused(errno.EAGAIN)


def forget(session: Session, transaction: Transaction) -> None:
    """Forget a transaction that is over: nothing goes on in it, and its memory is free."""
    for seen in transaction.seen.values():
        session.domain.memory -= seen.charged
        seen.charged = 0
    transaction.over = True
