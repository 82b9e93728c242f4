"""The control channel: listing, limits, making and ending domains. JSON in, JSON out, for the machine's owner only."""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING, Any

from gntalloc import wire
from gntalloc.errors import GntallocError
from gntalloc.machine.channel import Channel, Dropped
from gntalloc.places import domain_path

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from gntalloc.machine.server import Server

__all__ = ["Control"]


class Control(Channel):
    """One control connection."""

    def __init__(self, sock: socket.socket, server: Server) -> None:
        super().__init__(sock)
        self.ends_the_machine = False
        self._server = server
        self._orders: dict[str, Callable[..., Any]] = {
            "create": self._create,
            "enter": self._enter,
            "destroy": server.destroy,
            "get_limit": self._get_limit,
            "set_limit": self._set_limit,
            "grants": server.machine.grants,
            "files": server.machine.files,
            "store_connections": server.store_connections,
            "disturb": self._disturb,
            "calm": self._calm,
            "statistics": server.machine.statistics,
        }

    def serve(self, message: wire.Message, descriptors: list[int]) -> None:
        """Carry out one order: {"do": name, ...its arguments}."""
        if message.kind != wire.CONTROL:
            raise Dropped(f"a control channel has no messages of kind {message.kind}")
        try:
            answer = self._obey(json.loads(message.payload))
        except GntallocError as error:
            reply = wire.encode_reply(message.kind, message.id, error=error.errno or errno.EIO, why=str(error))
        except (ValueError, RecursionError) as error:
            reply = wire.encode_reply(message.kind, message.id, error=errno.EINVAL, why=f"this is no order: {error}")
        else:
            reply = wire.encode_reply(message.kind, message.id, body=json.dumps(answer).encode())
        self.send(reply)

    def _obey(self, order: object) -> Any:
        if not isinstance(order, dict):
            raise GntallocError(errno.EINVAL, "an order is a JSON object with a field 'do'")
        name = order.pop("do", None)
        obey = self._orders.get(name) if isinstance(name, str) else None
        if obey is None:
            raise GntallocError(errno.EINVAL, f"there is no order {name!r}; there are {', '.join(self._orders)}")
        if not all(type(value) is int for value in order.values()):
            raise GntallocError(errno.EINVAL, f"the arguments of {name!r} are whole numbers")
        try:
            return obey(**order)
        except TypeError as error:
            raise GntallocError(errno.EINVAL, f"{name!r} does not take these arguments: {error}") from None

    def _create(self, *, domid: int, uid: int, limit: int | None = None) -> str:
        if limit is not None:
            _check_limit(limit)
        self._server.create(domid, uid=uid, limit=limit)
        return domain_path(self._server.folder, domid)

    def _enter(self, *, domid: int) -> None:
        self._server.visits.enter(self, domid)

    def _disturb(self, *, domid: int, **how: int) -> None:
        self._server.faults.disturb(self, domid, **how)

    def _calm(self) -> None:
        self._server.faults.calm(self)

    def close(self) -> None:
        """See `Channel`. A visitor leaves, and faults that were ordered here end."""
        super().close()
        self._server.faults.calm(self)
        self._server.visits.leave(self)

    def _get_limit(self, *, domid: int) -> int:
        return self._server.machine.guest(domid).gntalloc.limit

    def _set_limit(self, *, domid: int, limit: int) -> None:
        _check_limit(limit)
        self._server.machine.guest(domid).gntalloc.limit = limit


def _check_limit(limit: int) -> None:
    if limit < 0:
        raise GntallocError(errno.EINVAL, f"a limit of {limit} pages cannot be; it is 0 or more")
