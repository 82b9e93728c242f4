"""A server with a process for each client: the parent accepts, and hands each channel to a child.

    python examples/forking_server.py                   a machine of its own, two domains, four clients
    GNTALLOC_DOMAIN=lab/1 python examples/forking_server.py serve 2      for clients in domain 2, for ever

A child that crashes takes one client with it: that client gets PeerDied, the others notice nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import TYPE_CHECKING

import gntalloc

if TYPE_CHECKING:
    from gntalloc.vchan.ticket import Ticket

PATH = "upper"


def serve_one(ticket: Ticket) -> None:
    """In the child: the channel is this process's from here on."""
    with gntalloc.adopt(ticket) as channel:
        for message in channel:
            if message == b"crash":
                os._exit(1)  # as a crash would
            channel.send(message.upper())


def serve(domain: gntalloc.Domain, peer: int, clients: int | None = None) -> None:
    """In the parent: accept, hand over, go on. Ends after so many clients."""
    children: list[multiprocessing.Process] = []
    with domain.listen(peer, PATH) as listener:
        while clients is None or len(children) < clients:
            with listener.accept().detach() as ticket:  # afterwards nothing of the channel is left here
                child = multiprocessing.Process(target=serve_one, args=(ticket,))
                child.start()
                children.append(child)
    for child in children:
        child.join()


def ask(domain: gntalloc.Domain, message: bytes) -> str:
    """A client."""
    with domain.connect(1, PATH, timeout=30) as channel:
        channel.send(message)
        try:
            return channel.recv(timeout=30).decode()
        except gntalloc.PeerDied:
            return f"the server of {message.decode()!r} died"


def main() -> None:
    multiprocessing.set_start_method(os.environ.get("METHOD", "spawn"))  # or fork, or forkserver
    if sys.argv[1:2] == ["serve"]:
        serve(gntalloc.current_domain(), int(sys.argv[2]))
        return
    messages = [b"hello", b"crash", b"grant", b"map"]
    with gntalloc.Machine() as machine:
        server = multiprocessing.Process(target=serve, args=(machine.domain(1), 2, len(messages)))
        client = machine.domain(2)
        server.start()
        for message in messages:
            print(ask(client, message))
        server.join()
        client.close()


if __name__ == "__main__":
    main()
