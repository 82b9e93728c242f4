"""Take orders of the machine's owner over the control channel: JSON in and JSON out."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gntalloc.errors import GntallocError
from gntalloc.machine.speaker import Dropped
from gntalloc.machine.stream import MessageStream
from gntalloc.wire.messages import MORE, kind_of
from gntalloc.wire.messages import Control as ControlMessage

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Generator, Mapping

    from gntalloc.unasked import Disposal
    from gntalloc.wire.stream import Message

    Order = Callable[..., Any]

__all__ = ["Control", "Pending"]

log = logging.getLogger("gntalloc.machine")

_TEXTS_A_PART = 64
_LONG_PART = 65536  # bytes


class Pending:
    """Stand for work that an order has begun, and that is done in steps. The answer waits for it.

    Attributes:
        done: whether it is done.
    """

    def __init__(self) -> None:
        self.done = False


class Control(MessageStream):
    """Serve one control connection.

    Args:
        sock: the socket to the owner's program.
        orders: each order's function, which is called with this connection, and the order's fields by name.
        disposal: see `MessageStream`.
    """

    def __init__(self, sock: socket.socket, orders: Mapping[str, Order], disposal: Disposal) -> None:
        super().__init__(sock, disposal)
        self._orders = orders

    def serve(self, message: Message) -> Generator[None]:
        """Carry out one order: {"do": name, ...its arguments}. The answer comes in parts, as many as it needs."""
        if message.kind != kind_of(ControlMessage):
            raise Dropped(f"a control channel has no messages of kind {message.kind}")
        return self._serve(message)

    def _serve(self, message: Message) -> Generator[None]:
        try:
            last = b""
            answer = self._obey(json.loads(message.payload))
            if isinstance(answer, Pending):
                while not answer.done:
                    yield
                answer = None
            for part in _parts(_text(answer)):
                if last:
                    self.answer(message, result=MORE, body=last)
                    yield
                last = part
            self.answer(message, body=last)
        except Dropped:
            raise
        except GntallocError as error:
            self.answer(message, error=error.errno or errno.EIO, why=str(error))
        except (ValueError, RecursionError) as error:
            self.answer(message, error=errno.EINVAL, why=f"this is no order: {error}")
        except MemoryError:
            self.answer(message, error=errno.ENOMEM, why="the machine has no memory left for this order")
        except OSError as error:
            self.answer(message, error=error.errno or errno.EIO, why=f"the machine could not do it: {error.strerror}")
        except Exception:
            log.exception("an order could not be carried out")  # a fault of ours, and none of the owner's
            self.answer(message, error=errno.EIO, why="the machine failed; its log says how")

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


def _text(answer: object) -> Iterator[str]:
    """Write an answer as JSON, piece by piece. An iterator in it is a list whose rows are made only then."""
    if isinstance(answer, Iterator):
        yield "["
        for number, row in enumerate(answer):
            yield ("," if number else "") + json.dumps(row)
        yield "]"
    elif isinstance(answer, dict) and any(isinstance(value, Iterator) for value in answer.values()):
        yield "{"
        for number, (key, value) in enumerate(answer.items()):
            yield ("," if number else "") + json.dumps(key) + ":"
            yield from _text(value)
        yield "}"
    else:
        yield json.dumps(answer)


def _parts(texts: Iterator[str]) -> Iterator[bytes]:
    """Put texts together to parts that are quickly made and fit a message, each with something in it."""
    gathered: list[str] = []
    size = 0
    for text in texts:
        gathered.append(text)
        size += len(text)
        if size >= _LONG_PART or len(gathered) >= _TEXTS_A_PART:
            data = "".join(gathered).encode()
            yield from (data[start : start + _LONG_PART] for start in range(0, len(data), _LONG_PART))
            gathered, size = [], 0
    if gathered:
        yield "".join(gathered).encode()
