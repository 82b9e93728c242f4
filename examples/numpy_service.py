"""A service that computes on arrays in place: they lie in granted pages, and only their names go through the channel.

    python examples/numpy_service.py                                         a machine of its own, and one client
    GNTALLOC_DOMAIN=default/1 python examples/numpy_service.py serve 2       for one client after another in domain 2

The client owns the pages and lends them for one request. It needs numpy.
"""

from __future__ import annotations

import multiprocessing
import sys
from typing import TYPE_CHECKING

import numpy as np

import gntalloc

if TYPE_CHECKING:
    from numpy.typing import NDArray

PATH = "cumulate"
LENGTH = 100_000


def serve(domain: gntalloc.Domain, peer: int, *, once: bool = False) -> None:
    """Cumulate each array that is named, where it lies."""
    with domain.listen(peer, PATH) as listener:
        while True:
            with listener.accept() as channel:
                for message in channel:
                    cumulate(domain, message.decode())
                    channel.send(b"done")
            if once:
                return


def cumulate(domain: gntalloc.Domain, name: str) -> None:
    """The peer chose that name: what is no grant, or not for us, is an error of `parse` or `map`, and nothing worse."""
    with domain.map(gntalloc.Grant.parse(name)) as mapped:
        array = np.frombuffer(mapped.memory, np.float64)
        np.cumsum(array, out=array)
        del array  # a view keeps the pages mapped


def ask(domain: gntalloc.Domain, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A client: lend, ask, take back."""
    with domain.connect(1, PATH, timeout=30) as channel, domain.share(1, size=values.nbytes, writable=True) as shared:
        array = np.frombuffer(shared.memory, np.float64, count=len(values))
        array[:] = values
        channel.send(str(shared.grant).encode())
        channel.recv(timeout=30)
        result = array.copy()
        del array
        shared.close()
        shared.wait_released(timeout=30)  # from here on the server cannot change it
        return result


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        serve(gntalloc.current_domain(), int(sys.argv[2]))
        return
    with gntalloc.Machine() as machine:
        domains = machine.domain(1), machine.domain(2)
        processes = multiprocessing.get_context("spawn")
        server = processes.Process(target=serve, args=(domains[0], 2), kwargs={"once": True})
        server.start()
        result = ask(domains[1], np.ones(LENGTH))
        server.join()
        print(f"{LENGTH} ones cumulated: {result[0]:.0f}, {result[1]:.0f}, ... {result[-1]:.0f}")
        for domain in domains:
            domain.close()


if __name__ == "__main__":
    main()
