"""Orders to a machine, for its owner: listing, limits, making and ending domains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gntalloc.errors import MachineBroke
from gntalloc.guest.connection import MachineConnection
from gntalloc.places import control_path
from gntalloc.wire.messages import Control

if TYPE_CHECKING:
    from gntalloc.waits import Socket

__all__ = ["ControlClient"]

MOST_ANSWERED = 256 << 20  # bytes of one answer: a list of a million pages


class ControlClient:
    """The control channel of the machine in `folder`, or at the other end of `sock`."""

    def __init__(self, folder: str, *, sock: Socket | None = None) -> None:
        self._channel = MachineConnection(control_path(folder), sock=sock, hello=False)

    def order(self, name: str, **arguments: int | None) -> Any:
        """Give one order and return what it answers.

        Raises:
            DeviceError: it was refused; the text says why.
            MachineGone: there is nobody to ask any more.
            NoMachine: there never was.
            MachineBroke: what came is no answer, or more than MOST_ANSWERED bytes.
        """
        import json  # a program in a domain that gives no orders need not wait for it

        order = {"do": name} | {key: value for key, value in arguments.items() if value is not None}
        body = self._channel.call_in_parts(Control(json.dumps(order).encode()), MOST_ANSWERED)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise MachineBroke(
                f"the machine's answer to {name} is no JSON ({error}); use one gntalloc for both"
            ) from None

    def close(self) -> None:
        """Hang up."""
        self._channel.close()
