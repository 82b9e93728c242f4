"""Define quotas and refusals.

Sources: Xen 4.17, tools/xenstore (the defaults and their names), docs/misc/xenstore.txt.
"""

from __future__ import annotations

__all__ = ["Quotas", "Refused"]


class Refused(Exception):
    """The daemon answers a request with this errno. `reason` says more than the errno; it may be empty.

    The reason names a quota that was reached, its value, and what is in use or was asked for.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class Quotas:
    """Limit an unprivileged domain. Domain 0 has no limits.

    Some quotas are tested before the thing is counted and some after. So 129 watches and 11 transactions fit, and 1000
    nodes.
    """

    nodes: int = 1000
    watches: int = 128
    transactions: int = 10
    outstanding: int = 20
    """Answers that a connection may leave unread before the daemon stops listening to it."""
    transaction_nodes: int = 1024
    memory: int = (2 << 20) + (512 << 10)
    """Bytes of nodes, changes in transactions, watches and unread messages together."""
    node_size: int = 2048
    """Bytes of a node: 24, its value, 8 for each permission, its children's names with a zero each."""
    path_max: int = 2048
    """Bytes of a path. A path below a domain's own /local/domain/N/ counts from there."""
    permissions: int = 5

    def __init__(self, **others: int) -> None:
        unknown = others.keys() - set(_NAMES)
        if unknown:
            raise TypeError(f"there is no quota {', '.join(sorted(unknown))}")
        vars(self).update(others)

    def all(self) -> dict[str, int]:
        """Give the quotas by name."""
        return {name: getattr(self, name) for name in _NAMES}

    def but(self, **others: int) -> Quotas:
        """Give quotas like these, but for `others`."""
        return Quotas(**{**self.all(), **others})


_NAMES = tuple(Quotas.__annotations__)
