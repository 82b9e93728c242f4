"""Hold a request as its handlers see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from gntalloc.xenstore.daemon.tree import home

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.steps import Steps
    from gntalloc.xenstore.daemon.session import Session
    from gntalloc.xenstore.daemon.transactions import Transaction
    from gntalloc.xenstore.daemon.view import View

__all__ = ["Handler", "Request"]

Handler: TypeAlias = "Callable[[Request], bytes | Steps[bytes]]"
"""Serve a request and return the answer, at once or in pieces."""


class Request(NamedTuple):
    """Hold one request, its session and its transaction."""

    session: Session
    transaction: Transaction | None
    view: View
    body: bytes

    def whole(self, name: bytes) -> str:
        """Make a path whole: the domain's home goes in front, if it is relative."""
        text = name.decode("latin-1")
        return text if text[:1] in ("/", "@") else f"{home(self.session.domain.domid)}/{text}"
