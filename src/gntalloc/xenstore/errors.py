"""Turn the daemon's error answers into OSErrors that say what was asked, why it was refused, and what to do."""

from __future__ import annotations

import errno

from gntalloc.errors import GntallocError

__all__ = ["Conflict", "Denied", "NoNode", "StoreError", "error_for"]


class StoreError(GntallocError):
    """The daemon of xenstore refused. `errno` is the daemon's; `operation` and `path` say what was asked."""

    code = errno.EIO
    operation: str = ""
    path: str | None = None


class NoNode(StoreError, FileNotFoundError):
    """There is no such node (ENOENT)."""

    code = errno.ENOENT


class Denied(StoreError, PermissionError):
    """The node's permissions, or this domain's rights, do not allow it (EACCES)."""

    code = errno.EACCES


class Conflict(StoreError):
    """Another request changed a node that the transaction had looked at. Nothing was done: run it again (EAGAIN)."""

    code = errno.EAGAIN


_CLASSES: dict[int, type[StoreError]] = {
    errno.ENOENT: NoNode,
    errno.EACCES: Denied,
    errno.EPERM: Denied,
    errno.EAGAIN: Conflict,
}

_REASONS = {
    errno.ENOENT: "there is no such node",
    errno.EACCES: "the node's permissions do not let this domain do that; its owner can change them",
    errno.EPERM: "only a privileged domain may ask that",
    errno.EAGAIN: "another request changed the same nodes meanwhile; run the transaction again",
    errno.ENOSPC: "a quota of this domain is used up: of nodes, a node's size, or open transactions",
    errno.E2BIG: "too much for one message or one node",
    errno.EINVAL: "xenstored does not accept it",
    errno.EEXIST: "it exists already",
    errno.ENOSYS: "this xenstored does not know the request",
    errno.EBUSY: "too many transactions are open",
}


def error_for(code: int, operation: str, path: str | None = None, reason: str | None = None) -> StoreError:
    """Make the exception for an answer.

    Args:
        code: the errno.
        operation: the operation, such as "read".
        path: the node's path, if the operation had one.
        reason: what stood in the way, if more is known than the errno says.
    """
    asked = f"xenstore {operation} {path}" if path is not None else f"xenstore {operation}"
    if code == errno.EACCES and path is None:
        reason = reason or _REASONS[errno.EPERM]
    why = reason or _REASONS.get(code, "xenstored refused")
    error = _CLASSES.get(code, StoreError)(code, f"{asked}: {why} ({errno.errorcode.get(code, code)})")
    error.operation = operation
    error.path = path
    return error
