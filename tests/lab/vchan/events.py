"""domain.events between two domains of a real Xen.

python3 events.py bind PEER           binds a port, and tells its number in its own data/events
python3 events.py connect PEER        connects to it; the program that did is killed, and another one connects
"""

from __future__ import annotations

import os
import select
import signal
import sys
from typing import TYPE_CHECKING

import gntalloc

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.xenstore.client import Store

PATIENCE = 60.0


def main() -> None:
    peer = int(sys.argv[2])
    {"bind": bind, "connect": connect}[sys.argv[1]](gntalloc.current_domain(), peer)
    print("done")


def bind(domain: gntalloc.Domain, peer: int) -> None:
    store = domain.store
    with domain.events.bind(peer) as port:
        raises(gntalloc.TimedOut, lambda: port.wait(timeout=0.05))
        store.write("data/events/port", str(port.number))
        port.wait(timeout=PATIENCE)
        port.notify()
        await_value(store, "data/events/killed")
        port.notify()  # nobody is there: no error
        store.write("data/events/told", "1")
        port.wait(timeout=PATIENCE)  # the second program's: the port was free again
        # Masked until it is re-armed: what comes meanwhile comes then.
        store.write("data/events/heard", "1")
        await_value(store, "data/events/again")
        assert not port.take()
        port.rearm()
        assert select.select([port], [], [], PATIENCE)[0]
        assert port.take()
        port.rearm()
        port.notify()
        await_value(store, "data/events/over")
    store.remove("data/events")


def connect(domain: gntalloc.Domain, peer: int) -> None:
    store = domain.store
    data = f"/local/domain/{peer}/data/events"
    number = int(await_value(store, f"{data}/port"))
    child = os.fork()
    if not child:
        with gntalloc.current_domain().events.connect(peer, number) as port:
            port.wait(timeout=PATIENCE)  # it has one from the start
            raises(gntalloc.TimedOut, lambda: port.wait(timeout=0.05))
            raises(gntalloc.DeviceError, lambda: domain.events.connect(peer, number))  # it is taken
            port.notify()
            port.wait(timeout=PATIENCE)
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    store.write(f"{data}/killed", "1")
    await_value(store, f"{data}/told")
    with domain.events.connect(peer, number) as port:
        port.wait(timeout=PATIENCE)
        raises(gntalloc.TimedOut, lambda: port.wait(timeout=0.05))  # what was sent to nobody is lost
        port.notify()
        await_value(store, f"{data}/heard")
        for _ in range(3):
            port.notify()
        store.write(f"{data}/again", "1")
        port.wait(timeout=PATIENCE)
        store.write(f"{data}/over", "1")


def await_value(store: Store, path: str) -> bytes:
    with store.watch(path) as watch:
        while not store.exists(path):
            watch.wait(timeout=PATIENCE)
    return store.read(path)


def raises(kind: type[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    main()
