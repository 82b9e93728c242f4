"""Run the demo's stream between two domains of a real Xen, which find each other through xenstore.

    python3 -m gntalloc.demo.between send PEER FILE      grants the pages, and writes the grants under its own data/
    python3 -m gntalloc.demo.between receive PEER        waits for that, and maps the pages

PEER is a domid. Both programs print the SHA-256 of the bytes at their end. A guest may write only under its own data/,
and dom0 anywhere. So the sender writes and the receiver reads.
"""

from __future__ import annotations

import hashlib
import sys
import time

from gntalloc.clock import Deadline
from gntalloc.demo.stream import Sender, receive
from gntalloc.domain import current_domain
from gntalloc.errors import GntallocError, TimedOut
from gntalloc.xenstore.client import Store
from gntalloc.xenstore.errors import Denied, NoNode

__all__ = ["main"]

_PATIENCE = 60.0  # seconds for the other program to appear: its domain may still be booting


def send(peer: int, path: str) -> None:
    """Grant pages, tell `peer` of them, and send the file."""
    domain = current_domain()
    with Store() as store, Sender(domain, peer, pages=64) as sender, open(path, "rb", buffering=0) as file:
        node = f"/local/domain/{domain.domid}/data/gntalloc-demo/{peer}"
        store.write(node, sender.text)
        store.set_permissions(node, [f"n{domain.domid}", f"r{peer}"])
        try:
            outcome = sender.send(lambda buffer: file.readinto(buffer) or 0)
        finally:
            store.remove(node)
    print(f"sent {outcome.moved} bytes, SHA-256 {outcome.sent}")
    if outcome.sent != outcome.received:
        raise GntallocError(f"the receiver saw something else: SHA-256 {outcome.received}")


def take(peer: int) -> None:
    """Wait until `peer` tells of its grants, map them, and receive."""
    domain = current_domain()
    with Store() as store:
        text = _told(store, f"/local/domain/{peer}/data/gntalloc-demo/{domain.domid}")
    digest = hashlib.sha256()
    moved = receive(domain, text, digest=digest)
    print(f"received {moved} bytes, SHA-256 {digest.hexdigest()}")


def _told(store: Store, node: str) -> str:
    deadline = Deadline(_PATIENCE)
    while True:
        try:
            return store.read_text(node)
        except (NoNode, Denied):  # where this domain may not list, a node that is not there is denied
            if deadline.expired:
                raise TimedOut(f"nobody has put grants into {node} within {_PATIENCE:.0f} s") from None
        time.sleep(0.05)


def main(arguments: list[str]) -> None:
    """Send or receive, as the arguments say."""
    if arguments[:1] == ["send"] and len(arguments) == 3:
        send(int(arguments[1]), arguments[2])
    elif arguments[:1] == ["receive"] and len(arguments) == 2:
        take(int(arguments[1]))
    else:
        print(__doc__, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except GntallocError as error:
        print(f"between: {error}", file=sys.stderr)
        sys.exit(1)
