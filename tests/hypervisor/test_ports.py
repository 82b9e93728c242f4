"""Event channel ports: the table of states, cell by cell, and the rules that hold whatever happens."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gntalloc.abi.grants import DOMID_SELF
from gntalloc.hypervisor.ports import LAST_PORT, EventChannels, PortRefused, Ports, State
from gntalloc.machine.disturbed import DisturbedPorts

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def refused(code: int, reason: str = "") -> Iterator[None]:
    with pytest.raises(PortRefused) as caught:
        yield
    assert caught.value.code == code
    assert reason in caught.value.why


class World:
    """Domains 1, 2 and 3; what their kernels were told."""

    def __init__(self, kind: type[Ports] = Ports) -> None:
        self.kind = kind
        self.channels = EventChannels()
        self.told: list[tuple[int, int]] = []
        self.one, self.two, self.three = (self.domain(domid) for domid in (1, 2, 3))

    def domain(self, domid: int) -> Ports:
        ports = self.channels.create(domid, self.kind)
        ports.upcall = lambda number: self.told.append((domid, number))
        return ports

    def pair(self) -> tuple[int, int]:
        """Two ends, in domains 1 and 2, nothing pending."""
        first = self.one.bind_unbound(2)
        second = self.two.bind_interdomain(1, first)
        self.two.take_pending(second)
        self.told.clear()
        return first, second


@pytest.fixture(params=[Ports, DisturbedPorts])
def world(request: pytest.FixtureRequest) -> World:
    """What can be disturbed, and is not, does the same."""
    return World(request.param)


def state(ports: Ports, number: int) -> tuple[State, int, int] | None:
    port = ports.get(number)
    return None if port is None else (port.state, port.peer, port.remote)


# Numbers.


def test_port_0_is_never_given_out_and_the_lowest_free_one_is(world: World) -> None:
    assert [world.one.bind_unbound(2) for _ in range(4)] == [1, 2, 3, 4]
    for number in (3, 1):
        world.one.close(number)
    assert [world.one.bind_unbound(2) for _ in range(3)] == [1, 3, 5]


def test_a_domain_has_1023_ports(world: World) -> None:
    assert [world.one.bind_unbound(2) for _ in range(LAST_PORT)][-1] == 1023
    other = world.two.bind_unbound(1)
    with refused(errno.ENOSPC, "1023"):
        world.one.bind_unbound(2)
    with refused(errno.ENOSPC):
        world.one.bind_interdomain(2, other)
    with refused(errno.ENOSPC):
        world.one.bind_interdomain(2, 999)  # a free port is looked for first
    with refused(errno.ENOSPC):
        world.one.bind_virq(5)
    assert state(world.two, other) == (State.UNBOUND, 1, 0)
    world.one.close(500)
    assert world.one.bind_interdomain(2, other) == 500


# Free.


def test_free_send_is_refused(world: World) -> None:
    for number in (0, 1, LAST_PORT, 1 << 32):
        with refused(errno.EINVAL):
            world.one.send(number)


def test_free_close_is_refused(world: World) -> None:
    with refused(errno.EINVAL):
        world.one.close(1)


def test_free_cannot_be_bound_to(world: World) -> None:
    with refused(errno.EINVAL, "free"):
        world.two.bind_interdomain(1, 1)
    assert world.two.bind_unbound(1) == 1  # no port was used up


# Unbound.


def test_unbound_for_a_domain_that_is_not_there(world: World) -> None:
    number = world.one.bind_unbound(99)
    assert state(world.one, number) == (State.UNBOUND, 99, 0)


def test_unbound_send_is_dropped(world: World) -> None:
    world.one.send(world.one.bind_unbound(2))
    assert world.told == []


def test_unbound_close(world: World) -> None:
    number = world.one.bind_unbound(2)
    world.one.close(number)
    assert state(world.one, number) is None


def test_unbound_is_bound_to_and_the_binders_end_is_pending(world: World) -> None:
    world.one.bind_unbound(3)
    first = world.one.bind_unbound(2)
    second = world.two.bind_interdomain(1, first)
    assert (first, second) == (2, 1)
    assert state(world.one, first) == (State.INTERDOMAIN, 2, 1)
    assert state(world.two, second) == (State.INTERDOMAIN, 1, 2)
    assert world.told == [(2, second)]
    assert world.two.take_pending(second)
    assert not world.one.take_pending(first)


def test_unbound_is_for_one_domain_only(world: World) -> None:
    number = world.one.bind_unbound(2)
    with refused(errno.EINVAL, "unbound, for domain 2"):
        world.three.bind_interdomain(1, number)


def test_binding_to_no_domain(world: World) -> None:
    with refused(errno.ESRCH, "no domain 99"):
        world.one.bind_interdomain(99, 1)


@pytest.mark.parametrize("self", [1, DOMID_SELF])
def test_loopback(world: World, self: int) -> None:
    first = world.one.bind_unbound(self)
    second = world.one.bind_interdomain(self, first)
    assert state(world.one, first) == (State.INTERDOMAIN, 1, second)
    world.one.take_pending(second)
    world.one.send(first)
    world.one.send(second)
    assert (world.one.take_pending(first), world.one.take_pending(second)) == (True, True)
    world.one.close(first)
    assert state(world.one, second) == (State.UNBOUND, 1, 0)


# Interdomain.


def test_interdomain_send(world: World) -> None:
    first, second = world.pair()
    world.one.send(first)
    assert world.told == [(2, second)]
    world.two.send(second)
    assert world.told == [(2, second), (1, first)]


def test_interdomain_sends_collapse_until_the_event_is_taken(world: World) -> None:
    first, second = world.pair()
    for _ in range(3):
        world.one.send(first)
    assert world.told == [(2, second)]
    assert (world.two.take_pending(second), world.two.take_pending(second)) == (True, False)
    world.one.send(first)
    assert world.told == [(2, second)] * 2


def test_interdomain_cannot_be_bound_to(world: World) -> None:
    first, _ = world.pair()
    with refused(errno.EINVAL, "interdomain"):
        world.two.bind_interdomain(1, first)


def test_interdomain_close_leaves_the_other_end_for_the_same_domain(world: World) -> None:
    first, second = world.pair()
    world.two.close(second)
    assert state(world.two, second) is None
    assert state(world.one, first) == (State.UNBOUND, 2, 0)
    world.one.send(first)  # dropped
    assert world.told == []
    with refused(errno.EINVAL):
        world.three.bind_interdomain(1, first)
    assert world.two.bind_interdomain(1, first) == second


def test_interdomain_when_the_other_domain_dies(world: World) -> None:
    first, _ = world.pair()
    world.channels.destroy(2)
    assert state(world.one, first) == (State.UNBOUND, 2, 0)
    world.one.send(first)
    again = world.domain(2)
    assert again.bind_interdomain(1, first) == 1


def test_a_dead_domains_ports_are_no_ones(world: World) -> None:
    """Its drivers may still have things to undo; a new domain of that number has nothing to do with it."""
    first, second = world.pair()
    world.channels.destroy(2)
    again = world.domain(2)
    again.bind_interdomain(1, first)
    world.told.clear()
    with refused(errno.EINVAL):
        world.two.send(second)
    with refused(errno.EINVAL):
        world.two.close(second)
    assert world.told == []


def test_a_domain_dies_with_a_loopback(world: World) -> None:
    world.one.bind_interdomain(1, world.one.bind_unbound(1))
    world.channels.destroy(1)
    with refused(errno.ESRCH):
        world.two.bind_interdomain(1, 1)


# Virtual interrupts.


def test_virq(world: World) -> None:
    number = world.one.bind_virq(23)
    with refused(errno.EEXIST):
        world.one.bind_virq(23)
    with refused(errno.EINVAL):
        world.one.send(number)
    with refused(errno.EINVAL):
        world.two.bind_interdomain(1, number)
    assert world.two.bind_virq(23) == 1  # each domain has its own
    world.one.close(number)
    assert world.one.bind_virq(23) == number


@given(st.one_of(st.integers(max_value=-1), st.integers(min_value=24)))
def test_virq_there_is_none_of(virq: int) -> None:
    with refused(errno.EINVAL):
        World().one.bind_virq(virq)


# Whatever happens.


class Anything(RuleBasedStateMachine):
    """Three domains do anything to each other; ends always agree."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.domains = {1: self.world.one, 2: self.world.two, 3: self.world.three}

    domids = st.sampled_from([1, 2, 3])
    numbers = st.integers(0, 6)

    @rule(domid=domids, peer=domids, number=numbers, what=st.sampled_from(["unbound", "bind", "virq", "send", "close"]))
    def act(self, domid: int, peer: int, number: int, what: str) -> None:
        ports = self.domains[domid]
        try:
            match what:
                case "unbound":
                    ports.bind_unbound(peer)
                case "bind":
                    ports.bind_interdomain(peer, number)
                case "virq":
                    ports.bind_virq(number)
                case "send":
                    ports.send(number)
                case _:
                    ports.close(number)
        except PortRefused:
            pass

    @rule(domid=domids)
    def die(self, domid: int) -> None:
        self.world.channels.destroy(domid)
        self.domains[domid] = self.world.domain(domid)

    @invariant()
    def ends_agree(self) -> None:
        for domid, ports in self.domains.items():
            for number, port in ports._ports.items():
                assert number
                if port.state is State.INTERDOMAIN:
                    other = self.domains[port.peer].get(port.remote)
                    assert other is not None
                    assert (other.state, other.peer, other.remote) == (State.INTERDOMAIN, domid, number)


TestAnything = Anything.TestCase
