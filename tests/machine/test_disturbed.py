"""Ports whose events come late or again: each event by itself. What programs see of it is in testing/test_faults.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gntalloc.hypervisor.ports import EventChannels
from gntalloc.machine.disturbed import DisturbedPorts

if TYPE_CHECKING:
    from gntalloc.hypervisor.ports import Port


class Pair:
    """A port of domain 1, bound to one of domain 2, which sends; nothing is pending."""

    def __init__(self) -> None:
        channels = EventChannels()
        self.ports = channels.create(1, DisturbedPorts)
        self.peer = channels.create(2, DisturbedPorts)
        self.told: list[int] = []
        self.ports.upcall = self.told.append
        self.number, self.remote = self.bind()

    def bind(self) -> tuple[int, int]:
        number = self.ports.bind_unbound(2)
        return number, self.peer.bind_interdomain(1, number)

    def send(self) -> None:
        self.peer.send(self.remote)

    def take_all(self, most: int = 10) -> int:
        """How often the event can be taken."""
        return next(taken for taken in range(most) if not self.ports.take_pending(self.number))


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_an_event_comes_again_so_often(pair: Pair) -> None:
    pair.ports.repeats = 3
    pair.send()
    assert pair.take_all() == 1 + 3
    assert pair.told == [pair.number]
    pair.send()
    assert pair.take_all() == 1 + 3


def test_a_new_event_begins_the_count_anew(pair: Pair) -> None:
    pair.ports.repeats = 2
    pair.send()
    assert [pair.ports.take_pending(pair.number) for _ in range(2)] == [True, True]
    pair.send()
    assert pair.take_all() == 1 + 2


def test_calm_ends_repetitions_and_no_event(pair: Pair) -> None:
    pair.ports.repeats = 2
    pair.send()
    pair.ports.calm()
    assert pair.take_all() == 1
    pair.ports.repeats = 2
    pair.send()
    assert pair.ports.take_pending(pair.number)
    pair.ports.calm()
    assert pair.take_all() == 0
    pair.ports.repeats = 2
    pair.send()
    assert pair.ports.take_pending(pair.number)
    pair.send()  # a real one, on top of the echo
    pair.ports.calm()
    assert pair.take_all() == 1


def test_a_port_of_the_same_number_inherits_nothing(pair: Pair) -> None:
    pair.ports.repeats = 2
    pair.send()
    assert pair.ports.take_pending(pair.number)
    pair.ports.close(pair.number)
    number, pair.remote = pair.bind()
    assert number == pair.number
    assert pair.take_all() == 0
    pair.ports.calm()
    pair.send()
    assert pair.take_all() == 1


def test_a_late_event_is_for_the_port_it_was_sent_to(pair: Pair) -> None:
    late: list[tuple[int, Port]] = []
    pair.ports.postpone = lambda number, port: late.append((number, port))
    pair.send()
    pair.send()
    assert (pair.take_all(), pair.told, len(late)) == (0, [], 2)
    for event in late:
        pair.ports.deliver(*event)
    assert (pair.take_all(), pair.told) == (1, [pair.number])
    pair.ports.close(pair.number)
    pair.ports.deliver(*late[0])
    pair.bind()
    pair.ports.deliver(*late[0])
    assert (pair.take_all(), pair.told) == (0, [pair.number])
