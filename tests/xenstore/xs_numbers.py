"""What xenstored says of a number before a domain has it. For the lab's dom0: a new domain gets the next one."""

from __future__ import annotations

import errno
import json
import time

from idle import Ring, create

from gntalloc.xenstore.client import Store
from gntalloc.xenstore.errors import StoreError
from gntalloc.xenstore.wire import Decoder, Message, Type, encode, join

PATIENCE = 60.0


class Guest:
    """A domain that never runs: dom0 asks in its stead."""

    def __init__(self, domid: int) -> None:
        self._ring, self._decoder, self._socket = Ring(domid), Decoder(), Store()

    def ask(self, kind: int, body: bytes) -> str:
        """What xenstored answers."""
        data = encode(Message(kind, 0, 0, body))
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            data = data[self._ring.send(data) :]
            self._socket.exists("/")  # a question over the socket has the daemon look at all rings
            for message in self._decoder.feed(self._ring.receive()):
                return message.body.rstrip(b"\0").decode("latin-1")
        raise TimeoutError(f"xenstored answered nothing within {PATIENCE} s")


def main() -> None:
    """Print the answers."""
    one = create(["one"])["one"]
    coming = one + 1
    node = f"/local/domain/{one}/data/x"
    first, said = Guest(one), {}
    first.ask(Type.WRITE, join("data/x") + b"1")
    said["named before"] = first.ask(Type.SET_PERMS, join("data/x", f"n{one}", f"r{coming}"))
    try:
        Store().set_permissions(node, [f"n{coming}"])
    except StoreError as refusal:
        said["owner before"] = errno.errorcode[refusal.errno or 0]
    two = create(["two"])["two"]
    assert two == coming, (one, two)
    second = Guest(two)
    said["read"] = second.ask(Type.READ, join(node))
    first.ask(Type.SET_PERMS, join("data/x", f"n{one}", f"r{two}"))
    said["read after it was said again"] = second.ask(Type.READ, join(node))
    print(json.dumps(said))


if __name__ == "__main__":
    main()
