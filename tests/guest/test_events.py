"""domain.events: on the machine, through the same seam as on real Xen."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from limits import Limited

from gntalloc import Busy, Closed, DeviceError, EventsLost, MachineGone, TimedOut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc import Domain, Machine
    from gntalloc.guest.events import Port

PATIENCE = 20.0


@pytest.fixture
def ports(alice: Domain, bob: Domain) -> Iterator[tuple[Port, Port]]:
    """A channel whose second end has had its first event, which comes by itself."""
    with alice.events.bind(2) as first, bob.events.connect(1, first.number) as second:
        second.wait(timeout=PATIENCE)
        yield first, second


def test_an_event_each_way(ports: tuple[Port, Port]) -> None:
    first, second = ports
    for _ in range(100):
        first.notify()
        second.wait(timeout=PATIENCE)
        second.notify()
        first.wait(timeout=PATIENCE)


def test_an_event_that_is_told_comes_too(ports: tuple[Port, Port]) -> None:
    first, second = ports
    for _ in range(100):
        first.notify_soon()
        second.wait(timeout=PATIENCE)
        for _ in range(3):
            second.notify_soon()
        first.wait(timeout=PATIENCE)
    second.close()
    first.notify_soon()  # nobody is there: no error
    first.notify()


def test_events_that_nobody_took_are_one(ports: tuple[Port, Port]) -> None:
    first, second = ports
    second.rearm()
    for _ in range(5):
        first.notify()
    second.wait(timeout=PATIENCE)
    second.wait(timeout=PATIENCE)  # the first masked it, so the other four were one, which came after
    with pytest.raises(TimedOut, match=r"no event came to <Port \d+, of domain 1> within 0.05 s"):
        second.wait(timeout=0.05)


def test_an_event_during_the_work_is_not_lost(ports: tuple[Port, Port]) -> None:
    first, second = ports
    first.notify()
    second.wait(timeout=PATIENCE)
    first.notify()  # while second works
    second.wait(timeout=PATIENCE)


def test_select_take_rearm(ports: tuple[Port, Port]) -> None:
    first, second = ports
    second.rearm()
    assert not second.take()
    for _ in range(3):
        first.notify()
        assert select.select([second], [], [], PATIENCE)[0]
        assert second.take()
        assert not second.take()
        second.rearm()


def test_a_timeout_of_nothing_does_not_wait(ports: tuple[Port, Port]) -> None:
    with pytest.raises(TimedOut):
        ports[0].wait(timeout=0)


def test_one_waiter_a_port(ports: tuple[Port, Port]) -> None:
    first, second = ports
    outcome: list[str] = []

    def wait() -> None:
        try:
            second.wait(timeout=PATIENCE)
            outcome.append("event")
        except Busy:
            outcome.append("busy")
            first.notify()

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(outcome) == ["busy", "event"]


def test_any_thread_may_notify(ports: tuple[Port, Port]) -> None:
    first, second = ports

    def notify() -> None:
        for _ in range(50):
            first.notify()

    threads = [threading.Thread(target=notify) for _ in range(4)]
    for thread in threads:
        thread.start()
    second.wait(timeout=PATIENCE)
    for thread in threads:
        thread.join(PATIENCE)


def test_closing_wakes_the_waiter(alice: Domain) -> None:
    port = alice.events.bind(2)
    got: list[type[BaseException]] = []
    started = threading.Event()

    def wait() -> None:
        started.set()
        try:
            port.wait(timeout=PATIENCE)
        except Closed as error:
            got.append(type(error))

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait(PATIENCE)
    port.close()
    port.close()
    thread.join(PATIENCE)
    assert got == [Closed]
    with pytest.raises(Closed):
        port.wait(timeout=0)
    with pytest.raises(Closed):
        port.notify()


def test_lost_events_are_named_and_the_port_goes_on(ports: tuple[Port, Port]) -> None:
    first, second = ports
    for _ in range(70):
        first.notify()
        second.rearm()
    with pytest.raises(EventsLost, match="re-armed without taking"):
        second.wait(timeout=PATIENCE)
    first.notify()
    second.wait(timeout=PATIENCE)


def test_refusals_are_the_drivers(alice: Domain, bob: Domain) -> None:
    with pytest.raises(DeviceError) as caught:
        bob.events.connect(9, 5)
    assert caught.value.errno == errno.ESRCH
    with alice.events.bind(3) as port, pytest.raises(DeviceError) as caught:
        bob.events.connect(1, port.number)
    assert caught.value.errno == errno.EINVAL


def test_a_peer_that_left_is_no_error_and_may_come_back(alice: Domain, bob: Domain) -> None:
    with alice.events.bind(2) as first:
        for _ in range(2):
            with bob.events.connect(1, first.number) as second:
                second.notify()
                first.wait(timeout=PATIENCE)
            first.notify()


def test_between_processes_and_after_sigkill(machine: Machine, alice: Domain) -> None:
    program = (
        "import gntalloc, sys\n"
        "with gntalloc.current_domain().events.connect(1, int(sys.argv[1])) as port:\n"
        "    port.wait(); port.notify()\n"
        "    while True: port.wait(); port.notify()\n"
    )
    with alice.events.bind(2) as port:
        for _ in range(2):
            command = [sys.executable, "-c", program, str(port.number)]
            with Limited(command, env=machine.environ(2)) as child:
                for _ in range(20):
                    port.wait(timeout=PATIENCE)
                    port.notify()
                os.kill(child.pid, signal.SIGKILL)


def test_the_end_of_the_machine_ends_a_wait(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    domain = machine.domain(1)
    with domain.events.bind(2) as port:
        ended: list[type[BaseException]] = []

        def wait() -> None:
            try:
                port.wait(timeout=PATIENCE)
            except MachineGone as error:
                ended.append(type(error))

        thread = threading.Thread(target=wait)
        thread.start()
        machine.close()
        thread.join(PATIENCE)
        assert ended == [MachineGone]
    domain.close()
    domain.devices.close()


def test_a_forgotten_port_warns(alice: Domain) -> None:
    port = alice.events.bind(2)
    with pytest.warns(ResourceWarning, match="was never closed"):
        del port
