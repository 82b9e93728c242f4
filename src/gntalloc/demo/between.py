"""The demo's stream between two domains of a real Xen: they find each other through xenstore.

    python3 -m gntalloc.demo.between send PEER FILE      grants the pages, tells under its own data/
    python3 -m gntalloc.demo.between receive PEER        waits for that, and maps

PEER is a domid. Both end with the SHA-256 of what they saw. A guest may write under its own data/ only, and dom0
anywhere; so the sender writes and the receiver reads.
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

_PATIENCE = 60.0  # seconds for the other to appear: its domain may only be booting


def send(peer: int, path: str) -> None:
    """Grant, tell, send."""
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
    """Wait to be told, map, receive."""
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
        except (NoNode, Denied):  # where nobody may list, a node that is not there is denied
            if deadline.expired:
                raise TimedOut(f"nobody has put grants into {node} within {_PATIENCE:.0f} s") from None
        time.sleep(0.05)


def main(arguments: list[str]) -> None:
    """Send or receive."""
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
