"""A driver for a device that nobody has: a dice. Its frontend, its backend, and what they say to each other.

    python examples/dice_driver.py                  a machine of its own; the backend is a process in domain 0

A request is an id and a number of sides, a response the same id and what was thrown; 0: there is no such dice. Both go
through one ring, in one page that the frontend grants. docs/frontends.md says how such a pair finds itself, and ends.
"""

from __future__ import annotations

import multiprocessing
import random
import select
import struct
from typing import Self

import gntalloc
from gntalloc.atomics import atomics
from gntalloc.clock import Deadline
from gntalloc.frontend.link import Link, part, recover
from gntalloc.frontend.nodes import Device, attach
from gntalloc.frontend.ring import Back
from gntalloc.frontend.xenbus import BACK, FRONT, End, State

DEVICE = Device("dice", 0, frontend=1, backend=0)
MESSAGE = struct.Struct("=II")  # id, and sides or what was thrown
SLOT = 8  # bytes
MOST_SIDES = 100
PATIENCE = 30.0


class Dice:
    """The frontend, in domain 1."""

    def __init__(self, domain: gntalloc.Domain) -> None:
        deadline = Deadline(PATIENCE)
        self._end = End(domain.store, FRONT, DEVICE.front, DEVICE.back)
        recover(self._end, deadline)  # whatever one that was killed has left
        self._link = Link(domain, DEVICE, self._end, SLOT, {}, deadline)
        self.most_sides = self._end.number("most-sides", default=6)
        self._end.go(State.CONNECTED)

    def throw(self, sides: int, times: int = 1) -> list[int]:
        """All at once, as far as the ring has room."""
        thrown: dict[int, int] = {}
        asked = 0
        while len(thrown) < times:
            while asked < times and self._link.ring.room:
                self._link.ring.put(MESSAGE.pack(asked, sides))
                asked += 1
            if self._link.ring.show():  # the backend sleeps, or will
                self._link.notify()
            for _ in range(self._wait()):
                number, value = MESSAGE.unpack(self._link.ring.take(SLOT))
                if number >= asked or number in thrown or value > sides:  # a backend is not believed
                    raise gntalloc.PeerBroke(f"the backend answers {value} to request {number}, which is impossible")
                thrown[number] = value
        return [thrown[number] for number in range(times)]

    def _wait(self) -> int:
        """Until there are responses: how many."""
        while not (there := self._link.ring.ask()):  # from here on the backend wakes us
            if self._link.sleep(timeout=PATIENCE) and (gone := self._link.verdict()):
                raise gone
        return there

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        part(self._end, timeout=PATIENCE)
        self._link.close()


def serve(domain: gntalloc.Domain) -> None:
    """Be the backend, in domain 0, for one frontend."""
    end = End(domain.store, BACK, DEVICE.back, DEVICE.front)
    end.go(State.INIT_WAIT)
    end.wait({State.INITIALISED}, timeout=PATIENCE)
    with (
        domain.map(DEVICE.frontend, end.number("ring-ref"), writable=True) as page,
        domain.events.connect(DEVICE.frontend, end.number("event-channel")) as port,
        domain.store.watch(f"{DEVICE.front}/state") as watch,
    ):
        ring = Back(page.memory, SLOT, atomics())
        end.go(State.CONNECTED, {"most-sides": MOST_SIDES})
        poll = select.poll()
        poll.register(port.fileno(), select.POLLIN)
        poll.register(watch.fileno(), select.POLLIN)
        while end.peer in {State.INITIALISED, State.CONNECTED}:
            watch.poll()
            port.take()
            while waiting := ring.ask():  # a frontend that counts wrong is PeerBroke
                for _ in range(waiting):
                    ring.put(answer(ring.take(SLOT)))
                if ring.show():
                    port.notify()
            port.rearm()
            poll.poll()
        end.go(State.CLOSING)  # before the page goes, or it would look as if this end had died
        ring.release()
    end.go(State.CLOSED)
    domain.close()


def answer(request: bytes) -> bytes:
    """`request` is a copy: the frontend cannot change it any more."""
    number, sides = MESSAGE.unpack(request)
    return MESSAGE.pack(number, random.randint(1, sides) if 0 < sides <= MOST_SIDES else 0)


def main() -> None:
    with gntalloc.Machine() as machine:
        dom0, guest = machine.domain(0), machine.domain(1)
        attach(dom0.store, DEVICE)  # as a toolstack does
        backend = multiprocessing.get_context("spawn").Process(target=serve, args=(dom0,))
        backend.start()
        with Dice(guest) as dice:
            thrown = dice.throw(6, times=1000)
            print(f"1000 throws, from {min(thrown)} to {max(thrown)}; {dice.most_sides} sides at most")
            print(f"of a dice with 101 sides: {dice.throw(101)[0]}")
        backend.join()
        for domain in (dom0, guest):
            domain.close()


if __name__ == "__main__":
    main()
