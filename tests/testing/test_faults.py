"""Each fault: a naive program fails under it, a careful one does not, and afterwards all is as before."""

from __future__ import annotations

import errno
import os
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from gntalloc import DeviceError, GntallocError, MachineGone, NotKnownHere, PeerDied, PeerGone, TimedOut, current_domain
from gntalloc.guest.control import ControlClient
from gntalloc.testing import Program, ProgramFailed, Snapshot, assert_cleaned_up, cleanup, faults
from gntalloc.xenstore.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc import Domain, Machine
    from gntalloc.guest.events import Port
    from gntalloc.guest.pages import SharedPages
    from gntalloc.testing import Channels, Domains
    from gntalloc.vchan.channel import Channel

PATIENCE = 30.0


# Pages.


def attach_naively(domain: Domain, rings: list[SharedPages]) -> None:
    rings.append(domain.share(2, pages=2))
    rings.append(domain.share(2, pages=2))


def attach(domain: Domain, rings: list[SharedPages]) -> None:
    with ExitStack() as undo:
        first = undo.enter_context(domain.share(2, pages=2))
        second = undo.enter_context(domain.share(2, pages=2))
        undo.pop_all()
    rings += [first, second]


def test_pages_run_out(gntalloc_machine: Machine, gntalloc_domains: Domains, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleanup, "_PATIENCE_WITH_ONESELF", 0.01)
    alice = gntalloc_domains.alice
    alice.share(2).close()  # opens the file
    before = Snapshot.of(gntalloc_machine)
    left: list[SharedPages] = []
    with faults.pages(alice, 3):
        with pytest.raises(DeviceError, match="limit") as caught:
            attach_naively(alice, left)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(AssertionError, match=r"domain 1, this process: 2 pages granted to domain 2"):
            assert_cleaned_up(gntalloc_machine, before)
        left.pop().close()
        with pytest.raises(DeviceError, match="limit"):
            attach(alice, left)
        assert_cleaned_up(gntalloc_machine, before)
    left.clear()
    attach(alice, left)
    for ring in left:
        ring.close()
    assert alice.limit == 1024


def test_pages_are_counted_from_now(gntalloc_domains: Domains) -> None:
    alice, bob = gntalloc_domains
    with alice.share(bob, 5), faults.pages(alice, 2):
        alice.share(bob, 2).close()
        with alice.share(bob, 1), faults.pages(alice, 0), pytest.raises(DeviceError):
            alice.share(bob, 1)
        bob.share(alice, 9).close()  # nobody else's


# The peer dies.


def write_messages(domain: Domain, size: int) -> str:
    with domain.connect(1, "faults", timeout=PATIENCE) as channel:
        for number in range(10):
            channel.send(bytes([number]) * size, timeout=PATIENCE)
    return "all of them"


def write_bytes(domain: Domain, size: int) -> None:
    with domain.connect(1, "faults", timeout=PATIENCE) as channel:
        channel.write(bytes(size), timeout=PATIENCE)


def read_all(domain: Domain, how: str) -> None:
    with domain.connect(1, "faults", timeout=PATIENCE) as channel:
        buffer = bytearray(10_000)
        while True:
            if how == "peek":
                with channel.peek(timeout=PATIENCE):
                    pass
                channel.release()
            elif how == "readinto":
                channel.readinto(buffer, timeout=PATIENCE)
            elif how == "recv_into":
                channel.recv_into(buffer, timeout=PATIENCE)
            else:
                getattr(channel, how)(timeout=PATIENCE)


def receive_naively(channel: Channel) -> bytes:
    got = b""
    try:
        while piece := channel.read(timeout=PATIENCE):
            got += piece
    except PeerGone:
        pass  # that was all, then
    return got


def receive(channel: Channel) -> bytes:
    got = b""
    while piece := channel.read(timeout=PATIENCE):
        got += piece
    return got


def send_for_ever(channel: Channel) -> None:
    while True:
        channel.send(bytes(596), timeout=PATIENCE)


@pytest.mark.parametrize("at", [0, 1, 3, 4, 700, 65536 + 5])
def test_a_writer_dies_at_its_byte(gntalloc_domains: Domains, at: int) -> None:
    alice, bob = gntalloc_domains
    with alice.listen(bob, "faults", size=4096) as listener:
        with faults.peer_dies(bob, write_bytes, 100_000, at=at), listener.accept(timeout=PATIENCE) as channel:
            assert len(receive_naively(channel)) == at  # and it has not noticed
        with (
            faults.peer_dies(bob, write_bytes, 100_000, at=at),
            listener.accept(timeout=PATIENCE) as channel,
            pytest.raises(PeerDied),
        ):
            receive(channel)


@pytest.mark.parametrize("at", [3, 4, 2 * 604 + 1, 2 * 604 + 300])
def test_a_writer_of_messages_dies_at_its_byte(gntalloc_domains: Domains, at: int) -> None:
    alice, bob = gntalloc_domains
    with (
        alice.listen(bob, "faults", size=4096) as listener,
        faults.peer_dies(bob, write_messages, 600, at=at),
        listener.accept(timeout=PATIENCE) as channel,
    ):
        for number in range(at // 604):
            assert channel.recv(timeout=PATIENCE) == bytes([number]) * 600
        with pytest.raises(PeerDied):
            channel.recv(timeout=PATIENCE)
        assert channel.ready == at % 604


@pytest.mark.parametrize("how", ["read", "readinto", "peek", "recv", "recv_into"])
def test_a_reader_dies_at_its_byte(gntalloc_domains: Domains, how: str) -> None:
    """What it has not read is in the ring, so the writer knows how far it came."""
    alice, bob = gntalloc_domains
    with (
        alice.listen(bob, "faults", size=4096) as listener,
        faults.peer_dies(bob, read_all, how, at=1001, moved="read"),
        listener.accept(timeout=PATIENCE) as channel,
    ):
        with pytest.raises(PeerDied):
            send_for_ever(channel)
        with channel._end.pages.memory[:16].cast("I") as indexes:
            assert indexes[2] == 1001  # right_cons


def test_a_fault_that_never_comes_is_told(gntalloc_domains: Domains) -> None:
    alice, bob = gntalloc_domains
    with alice.listen(bob, "faults") as listener:
        with (
            pytest.raises(ProgramFailed, match=r"was to die when it had written 99999 bytes.*status 0 before"),
            faults.peer_dies(bob, write_bytes, 10, at=99_999),
            listener.accept(timeout=PATIENCE) as channel,
        ):
            receive(channel)
        with (
            pytest.raises(ProgramFailed, match="was killed by SIGKILL before"),
            faults.peer_dies(bob, write_bytes, 10, at=99_999) as program,
            listener.accept(timeout=PATIENCE) as channel,
        ):
            program.kill()
    with pytest.raises(TypeError, match="argument"), faults.peer_dies(bob, write_bytes, at=1):
        pass  # what it raised there
    with pytest.raises(ValueError, match="at=-1"), faults.peer_dies(bob, write_bytes, at=-1):
        pass


# Events.


def test_events_come_late(gntalloc_domains: Domains) -> None:
    alice, bob = gntalloc_domains
    with alice.events.bind(2) as bell, bob.events.connect(1, bell.number) as port:
        port.wait(timeout=PATIENCE)  # the one that each port has from the start

        def naively() -> None:
            port.rearm()
            bell.notify()
            assert port.take()  # it was sent, so it must be here

        def careful() -> None:
            bell.notify()
            port.wait(timeout=PATIENCE)

        naively()
        with faults.events(bob, delay=0.1):
            with pytest.raises(AssertionError):
                naively()
            port.wait(timeout=PATIENCE)
            careful()
        naively()


def test_what_is_late_comes_when_the_fault_ends(gntalloc_domains: Domains) -> None:
    alice, bob = gntalloc_domains
    with alice.events.bind(2) as bell, bob.events.connect(1, bell.number) as port:
        port.wait(timeout=PATIENCE)
        with faults.events(bob, delay=3000):
            for _ in range(3):
                bell.notify()
            with pytest.raises(TimedOut):
                port.wait(timeout=0)
            port.notify()
            bell.wait(timeout=PATIENCE)  # nobody else's are late
        port.wait(timeout=0)
        with pytest.raises(TimedOut):
            port.wait(timeout=0)  # they were one event
        with faults.events(bob, delay=3000):
            bell.notify()
            port.close()


def test_a_late_event_of_a_port_that_was_closed_is_nobodys(gntalloc_domains: Domains) -> None:
    alice, bob = gntalloc_domains
    with faults.events(bob, delay=3000):
        with alice.events.bind(2) as bell:
            bob.events.connect(1, bell.number).close()
        port = bob.events.bind(1)  # it has the same number
    with port, pytest.raises(TimedOut):
        port.wait(timeout=0)


def another(machine: Machine, port: Port) -> bool:
    """Whether an event comes as soon as the port is re-armed."""
    port.rearm()
    machine.statistics()  # when it answers, it has seen that
    return port.take()


def test_events_come_again(gntalloc_machine: Machine, gntalloc_domains: Domains) -> None:
    alice, bob = gntalloc_domains
    with (
        alice.events.bind(2) as bell,
        bob.events.connect(1, bell.number) as port,
        alice.share(bob) as shared,
        bob.map(shared.grant) as mapped,
    ):
        port.wait(timeout=PATIENCE)

        def send() -> None:
            shared.memory[0] += 1
            bell.notify()

        def naively(count: int) -> int:
            """One event is one item."""
            for _ in range(count):
                send()
                port.wait(timeout=PATIENCE)
            more = 0
            while another(gntalloc_machine, port):
                more += 1
            return more

        def careful(seen: int) -> int:
            """What is in the page is the truth."""
            port.wait(timeout=PATIENCE)
            return mapped.memory[0] - seen

        assert naively(3) == 0
        with faults.events(bob, repeat=2):
            assert naively(1) == 2  # two items that there never were
            seen = mapped.memory[0]
            send()
            assert [careful(seen), careful(seen + 1), careful(seen + 1)] == [1, 0, 0]
        assert naively(1) == 0


def test_late_and_repeated_and_one_in_the_other(gntalloc_machine: Machine, gntalloc_domains: Domains) -> None:
    alice, bob = gntalloc_domains
    with alice.events.bind(2) as bell, bob.events.connect(1, bell.number) as port:
        port.wait(timeout=PATIENCE)
        with faults.events(bob, repeat=5):
            with faults.events(bob, delay=0.05, repeat=1):
                bell.notify()
                for _ in range(6):
                    port.wait(timeout=PATIENCE)
            bell.notify()
            port.wait(timeout=PATIENCE)
        assert not another(gntalloc_machine, port)  # with the fault it ends that it comes again
        with faults.events(bob, repeat=5):
            bell.notify()
            assert port.take()
            assert another(gntalloc_machine, port)
            bell.notify()
        assert another(gntalloc_machine, port)  # but nothing that was sent is lost
        assert not another(gntalloc_machine, port)


@pytest.mark.gntalloc(extensions=False, size=4096)
def test_our_channels_bear_both(gntalloc_domains: Domains, gntalloc_channels: Channels) -> None:
    server, client = gntalloc_channels
    data = os.urandom(50_000)
    with faults.events(gntalloc_domains.alice, delay=0.002, repeat=2), faults.events(gntalloc_domains.bob, repeat=3):
        from threading import Thread

        writer = Thread(target=server.write, args=(data,), kwargs={"timeout": PATIENCE})
        writer.start()
        got = b""
        while len(got) < len(data):
            got += client.read(timeout=PATIENCE)
        writer.join(PATIENCE)
    assert got == data


def disturb_and_die(domain: Domain) -> None:
    with faults.events(domain, delay=3000), faults.store(domain, nodes=0):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_fault_ends_with_who_ordered_it(gntalloc_domains: Domains) -> None:
    alice, bob = gntalloc_domains
    with Program(bob, disturb_and_die) as program:
        assert program.wait(timeout=PATIENCE) == -signal.SIGKILL
    with alice.events.bind(2) as bell, bob.events.connect(1, bell.number) as port:
        port.wait(timeout=PATIENCE)
    bob.store.write("data/new", "x")


# xenstore.


def publish_naively(domain: Domain) -> None:
    domain.store.write("data/dev/ring-ref", "8")
    domain.store.write("data/dev/event-channel", "5")


def publish(domain: Domain) -> None:
    with domain.store.transaction() as transaction:
        transaction.write("data/dev/ring-ref", "8")
        transaction.write("data/dev/event-channel", "5")


def test_nodes_run_out(gntalloc_domains: Domains) -> None:
    alice, bob = gntalloc_domains
    with faults.store(alice, nodes=2):
        with pytest.raises(StoreError) as caught:
            publish_naively(alice)
        assert caught.value.errno == errno.ENOSPC
        assert alice.store.list("data/dev") == ("ring-ref",)  # half of it is there, for anybody to stumble over
        alice.store.remove("data/dev")
    with faults.store(alice, nodes=2):
        with pytest.raises(StoreError) as caught:
            publish(alice)
        assert caught.value.errno == errno.ENOSPC
        assert not alice.store.exists("data/dev")
        publish_naively(bob)
    publish(alice)


QUOTAS: dict[str, tuple[Callable[[Domain], Any], int]] = {
    "watches": (lambda domain: domain.store.watch("data"), errno.E2BIG),
    "transactions": (lambda domain: domain.store.transaction(), errno.ENOSPC),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_watches_and_transactions_run_out(gntalloc_domains: Domains, name: str) -> None:
    alice, bob = gntalloc_domains
    begin, code = QUOTAS[name]
    with begin(alice), faults.store(alice, **{name: 1}):
        with begin(alice), pytest.raises(StoreError) as caught, begin(alice):
            pass
        assert caught.value.errno == code
        with begin(bob), begin(bob):
            pass
    with begin(alice), begin(alice), begin(alice):
        pass


def test_what_faults_refuse(gntalloc_machine: Machine, gntalloc_domains: Domains) -> None:
    control = ControlClient(gntalloc_machine.folder)
    for how in ({"delay": -1}, {"nodes": -1}, {"repeats": -2}, {"delay": 1 << 40}, {"nothing": 1}):
        with pytest.raises(GntallocError) as caught:
            control.order("disturb", domid=1, **how)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(GntallocError, match="no domain 9"):
        control.order("disturb", domid=9, delay=1)
    control.order("disturb", domid=2, delay=1)
    gntalloc_domains.bob.destroy()
    control.order("calm")
    control.close()
    with pytest.raises(ValueError, match="domain 0"), faults.store(gntalloc_machine.domain(0), nodes=1):
        pass
    with pytest.raises(NotKnownHere, match="real Xen"), faults.pages(current_domain("/dev/xen"), 1):
        pass


# The machine.


def share_naively(domain: Domain) -> str:
    try:
        domain.share(2).close()
    except DeviceError:
        return "no room"
    return "shared"


def share(domain: Domain) -> str:
    try:
        domain.share(2).close()
    except DeviceError:
        return "no room"
    except MachineGone:
        return "no machine"
    return "shared"


def test_the_machine_dies(gntalloc_machine: Machine, gntalloc_domains: Domains) -> None:
    alice = gntalloc_domains.alice
    assert share_naively(alice) == share(alice) == "shared"
    with alice.share(2) as shared, faults.pages(alice, 1), faults.events(alice, repeat=1):
        faults.machine_dies(gntalloc_machine)
        with pytest.raises(MachineGone):
            share_naively(alice)
        assert share(alice) == "no machine"
        shared.memory[0] = 1  # it stays mapped


def test_the_machine_dies_under_a_program(gntalloc_machine: Machine, gntalloc_domains: Domains) -> None:
    with Program(gntalloc_domains.bob, wait_for_an_event) as program:
        with gntalloc_domains.bob.store.watch("data/ready") as watch:
            while not gntalloc_domains.bob.store.exists("data/ready"):
                watch.wait(timeout=PATIENCE)
        faults.machine_dies(gntalloc_machine)
        assert program.result(timeout=PATIENCE) == "MachineGone"


def wait_for_an_event(domain: Domain) -> str:
    with domain.events.bind(1) as port:
        domain.store.write("data/ready", "")
        try:
            port.wait(timeout=PATIENCE)
        except MachineGone as error:
            return type(error).__name__
    return "an event"
