"""Take orders of the machine's owner over the control channel: JSON in and JSON out."""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING, Any

from gntalloc.errors import GntallocError
from gntalloc.machine.speaker import Dropped
from gntalloc.machine.stream import MessageStream
from gntalloc.wire.messages import Control as ControlMessage
from gntalloc.wire.messages import kind_of

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from gntalloc.wire.stream import Message

    Order = Callable[..., Any]

__all__ = ["Control"]


class Control(MessageStream):
    """Serve one control connection.

    Args:
        sock: the socket to the owner's program.
        orders: each order's function, which is called with this connection, and the order's fields by name.
    """

    def __init__(self, sock: socket.socket, orders: Mapping[str, Order]) -> None:
        super().__init__(sock)
        self._orders = orders

    def serve(self, message: Message, descriptors: list[int]) -> None:
        """Carry out one order: {"do": name, ...its arguments}."""
        if message.kind != kind_of(ControlMessage):
            raise Dropped(f"a control channel has no messages of kind {message.kind}")
        try:
            answer = self._obey(json.loads(message.payload))
        except GntallocError as error:
            self.answer(message, error=error.errno or errno.EIO, why=str(error))
        except (ValueError, RecursionError) as error:
            self.answer(message, error=errno.EINVAL, why=f"this is no order: {error}")
        else:
            self.answer(message, body=json.dumps(answer).encode())

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
            return obey(self, **order)
        except TypeError as error:
            raise GntallocError(errno.EINVAL, f"{name!r} does not take these arguments: {error}") from None
