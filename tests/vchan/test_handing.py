"""A channel goes from one process to another: one of them has it, and the peer notices nothing."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from limits import status_of
from scarce import descriptors_left

import gntalloc
from gntalloc import Busy, Closed, GntallocError, MachineGone, NoMachine, PeerClosed, PeerDied, PeerGone, TimedOut, aio
from gntalloc.vchan.ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc import Domain, Machine
    from gntalloc.vchan.channel import Channel

    Pair = Callable[..., tuple[Channel, Channel]]

PATIENCE = 20.0
ROOT = Path(__file__).parents[2]
MODES: list[dict[str, Any]] = [{}, {"extensions": False}, {"size": 1 << 21}, {"size": (1024, 2048)}, {"spin": 0}]
both_sides = pytest.mark.parametrize("side", [0, 1], ids=["server", "client"])
each_mode = pytest.mark.parametrize("mode", MODES, ids=str)


@pytest.fixture
def roomy(make_machine: Callable[..., Machine]) -> Iterator[tuple[Domain, Domain]]:
    """Two domains with room for large rings."""
    machine = make_machine(limit=4000)
    domains = machine.domain(1), machine.domain(2)
    yield domains
    for domain in domains:
        domain.close()
        domain.devices.close()


@contextmanager
def ends(domains: tuple[Domain, Domain], side: int, **mode: Any) -> Iterator[tuple[Channel, Channel]]:
    """A channel; the end of that side first."""
    with domains[0].listen(2, "test", **{"size": 4096, **mode}) as listener:
        listener.offer()
        client = domains[1].connect(1, "test", timeout=PATIENCE)
        server = listener.accept(timeout=PATIENCE)
    with server, client:
        yield (server, client) if side == 0 else (client, server)


@contextmanager
def child(work: Callable[[], None]) -> Iterator[int]:
    """Work in a child made by fork; it has to end well, if it is not killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(50)
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        yield pid
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        status_of(pid)
        raise
    assert os.waitstatus_to_exitcode(status_of(pid)) in {0, -signal.SIGKILL}


def echo(ticket: Ticket) -> None:
    with gntalloc.adopt(ticket) as channel:
        while data := channel.read(timeout=PATIENCE):
            channel.write(data, timeout=PATIENCE)


def talk(channel: Channel, *, times: int = 3) -> None:
    """What is written comes back; more than any ring holds, too."""
    for size in (1, 1000, 300_000)[:times]:
        data = os.urandom(size)
        writer = threading.Thread(target=channel.write, args=(data,), kwargs={"timeout": PATIENCE})
        writer.start()
        got = b""
        while len(got) < size:
            got += channel.read(timeout=PATIENCE)
        writer.join(PATIENCE)
        assert got == data


@both_sides
@each_mode
def test_a_child_made_by_fork_has_it(roomy: tuple[Domain, Domain], side: int, mode: dict[str, Any]) -> None:
    with ends(roomy, side, **mode) as (ours, theirs):
        theirs.write(b"before")
        with ours.detach() as ticket, child(lambda: echo(ticket)):
            ticket.close()
            assert ours.closed
            with pytest.raises(Closed, match="given away"):
                ours.read()
            got = b""
            while len(got) < 6:
                got += theirs.read(timeout=PATIENCE)
            assert got == b"before"
            talk(theirs)
            theirs.close()


@both_sides
@each_mode
def test_it_goes_on_where_it_was(roomy: tuple[Domain, Domain], side: int, mode: dict[str, Any]) -> None:
    """In the same process, again and again: what lies in both rings is there, and no more comes of it."""
    with ends(roomy, side, **mode) as (first, second):
        talkers = [first, second]
        for turn in range(6):
            who = turn % 2
            talkers[0].send(b"from first")
            talkers[1].send(b"from second")
            with talkers[who].detach() as ticket:
                talkers[who] = roomy[side if who == 0 else 1 - side].adopt(ticket)
            assert talkers[1].recv(timeout=PATIENCE) == b"from first"
            assert talkers[0].recv(timeout=PATIENCE) == b"from second"
            assert (talkers[0].unread, talkers[1].unread, talkers[0].ready) == (0, 0, 0)
        if talkers[0].extended:
            talkers[0].finish(timeout=PATIENCE)
            talkers[0] = gntalloc.adopt(talkers[0].detach())
            with pytest.raises(Closed, match="finish"):
                talkers[0].write(b"x")
            assert talkers[1].read(timeout=PATIENCE) == b""
            talkers[1].write(b"last")
            assert talkers[0].read(timeout=PATIENCE) == b"last"
        talkers[0].close()
        with pytest.raises(PeerClosed):
            talkers[1].recv(timeout=PATIENCE)
        talkers[1].close()


RECEIVES = """
import gntalloc, socket, sys
from gntalloc.vchan.ticket import Ticket
with socket.socket(fileno=int(sys.argv[1])) as sock:
    ticket = Ticket.receive(sock)
    with gntalloc.adopt(ticket) as channel:
        sock.send(b"!")
        while data := channel.read(timeout=20):
            channel.write(data, timeout=20)
"""


@both_sides
@each_mode
@pytest.mark.parametrize("late", [False, True], ids=["it waits for it", "it comes later"])
def test_over_a_socket(roomy: tuple[Domain, Domain], side: int, mode: dict[str, Any], *, late: bool) -> None:
    """Whether this process closes its copy before the other has it, or after."""
    near, far = socket.socketpair()
    with near, ends(roomy, side, **mode) as (ours, theirs), ours.detach() as ticket:
        command = [sys.executable, "-W", "error", "-c", RECEIVES, str(far.fileno())]
        process = None if late else subprocess.Popen(command, pass_fds=[far.fileno()])
        ticket.send(near)
        if process is None:
            ticket.close()
            process = subprocess.Popen(command, pass_fds=[far.fileno()])
        far.close()
        near.settimeout(PATIENCE)
        try:
            assert near.recv(1) == b"!"
            ticket.close()
            talk(theirs)
            theirs.close()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
            process.wait(PATIENCE)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_the_forking_server_of_the_examples(method: str) -> None:
    program = ROOT / "examples" / "forking_server.py"
    environment = {**os.environ, "METHOD": method}
    command = [sys.executable, "-W", "error", str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert (done.stdout, done.stderr) == ("HELLO\nthe server of 'crash' died\nGRANT\nMAP\n", "")


def test_with_asyncio(roomy: tuple[Domain, Domain], monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with aio.listen(roomy[0], 2, "test", size=4096) as listener:
            client = await aio.connect(roomy[1], 1, "test")
            server = await listener.accept()
        rang, seen = server._rang, list[str]()

        def rings() -> None:
            rang()
            with pytest.raises(Busy, match="a task"):
                server.detach()
            seen.append("the task was woken, and had not gone on yet")

        monkeypatch.setattr(server, "_rang", rings)
        waiting = asyncio.create_task(server.recv())
        while not server._waiters:  # noqa: ASYNC110  no event tells of it
            await asyncio.sleep(0)
        with pytest.raises(Busy, match="a task"):
            server.detach()
        await client.send(b"one")
        assert await waiting == b"one"
        assert seen
        async with aio.adopt(roomy[0], server.detach()) as other, client:
            await client.send(b"two")
            assert await other.recv() == b"two"

    asyncio.run(asyncio.wait_for(work(), PATIENCE))


# Ends.


@both_sides
@pytest.mark.parametrize("mode", MODES[:2], ids=str)
def test_a_child_that_is_killed_is_a_peer_that_died(
    roomy: tuple[Domain, Domain], side: int, mode: dict[str, Any]
) -> None:
    def work() -> None:
        channel = gntalloc.adopt(ticket)
        channel.send(b"mine")
        time.sleep(60)

    with ends(roomy, side, **mode) as (ours, theirs):
        ticket = ours.detach()
        with child(work) as pid:
            ticket.close()
            assert theirs.recv(timeout=PATIENCE) == b"mine"
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(PeerClosed if mode else PeerDied):
                theirs.recv(timeout=PATIENCE)


@both_sides
@pytest.mark.parametrize("mode", MODES[:2], ids=str)
def test_a_ticket_that_nobody_adopts_is_a_death(roomy: tuple[Domain, Domain], side: int, mode: dict[str, Any]) -> None:
    with ends(roomy, side, **mode) as (ours, theirs):
        ours.detach().close()
        with pytest.raises(PeerClosed if mode else PeerDied):
            theirs.recv(timeout=PATIENCE)


def test_a_ticket_that_is_lost_on_the_way_is_a_death(roomy: tuple[Domain, Domain]) -> None:
    for side in (0, 1):
        near, far = socket.socketpair()
        with ends(roomy, side) as (ours, theirs):
            with near, far, ours.detach() as ticket:
                ticket.send(near)
            with pytest.raises(PeerDied):
                theirs.recv(timeout=PATIENCE)


@pytest.mark.parametrize("left", range(4))
def test_where_no_descriptors_are_left_the_channel_stays(roomy: tuple[Domain, Domain], left: int) -> None:
    with ends(roomy, 0) as (ours, theirs):
        before = os.listdir("/proc/self/fd")
        with descriptors_left(left), pytest.raises(OSError, match="Too many open files"):
            ours.detach()
        assert os.listdir("/proc/self/fd") == before
        ours.send(b"still here")
        assert theirs.recv(timeout=PATIENCE) == b"still here"


@both_sides
def test_who_keeps_a_copy_is_no_peer(roomy: tuple[Domain, Domain], side: int) -> None:
    """A child has copies of all its parent's channels. None of them is the channel, whatever becomes of them."""

    def work() -> None:
        for call in (ours.read, ours.detach, lambda: ours.send(b"x"), lambda: ours.write(b"x"), lambda: ours.ready):
            with pytest.raises(Closed, match="which forked this one"):
                call()
        assert ours.closed
        ours.close()

    with ends(roomy, side) as (ours, theirs):
        with child(work):
            pass
        with child(lambda: time.sleep(60)) as pid:  # and one that lives on holds nothing up
            ours.send(b"still here")
            assert theirs.recv(timeout=PATIENCE) == b"still here"
            with pytest.raises(TimedOut):
                theirs.recv(timeout=0.05)
            ours.close()
            with pytest.raises(PeerClosed):
                theirs.recv(timeout=PATIENCE)
            os.kill(pid, signal.SIGKILL)


def test_a_dead_parent_is_seen_though_its_child_lives(machine: Machine, alice: Domain) -> None:
    program = (
        "import gntalloc, os, time\n"
        "channel = gntalloc.current_domain().connect(1, 'test', timeout=20)\n"
        "pid = os.fork()\n"
        "if not pid: time.sleep(60)\n"
        "else: channel.send(str(pid).encode()); time.sleep(60)\n"
    )
    with alice.listen(2, "test", size=4096) as listener:
        process = subprocess.Popen([sys.executable, "-c", program], env=machine.environ(2))
        try:
            with listener.accept(timeout=PATIENCE) as channel:
                pid = int(channel.recv(timeout=PATIENCE))
                try:
                    process.kill()
                    with pytest.raises(PeerDied):
                        channel.recv(timeout=PATIENCE)
                finally:
                    os.kill(pid, signal.SIGKILL)
        finally:
            process.kill()
            process.wait(PATIENCE)


def test_a_listener_is_its_makers(alice: Domain, bob: Domain) -> None:
    def work() -> None:
        for call in (listener.accept, listener.offer):
            with pytest.raises(Closed, match="accept there"):
                call()
        listener.close()

    with alice.listen(2, "test", size=4096) as listener:
        with child(work):
            pass
        with bob.connect(1, "test", timeout=PATIENCE) as client, listener.accept(timeout=PATIENCE) as server:
            client.send(b"hello")
            assert server.recv(timeout=PATIENCE) == b"hello"


@both_sides
def test_what_a_peer_that_has_gone_had_sent_is_read(roomy: tuple[Domain, Domain], side: int) -> None:
    def work() -> None:
        with gntalloc.adopt(ticket) as channel:
            assert channel.recv(timeout=PATIENCE) == b"the last"
            with pytest.raises(PeerClosed):
                channel.recv(timeout=PATIENCE)

    with ends(roomy, side) as (ours, theirs):
        theirs.send(b"the last")
        theirs.close()
        near, far = socket.socketpair()
        with near, far, ours.detach() as ticket:
            ticket.send(near)
            with Ticket.receive(far) as other:
                assert not any(os.get_inheritable(number) for number in other.held if number >= 0)
                if side == 1:  # the server's pages have ended: they can be had no more where they are not mapped
                    with pytest.raises(PeerGone, match="it has ended"):
                        gntalloc.adopt(other)
            with child(work):
                pass


# What cannot be.


def test_one_adopts(roomy: tuple[Domain, Domain]) -> None:
    near, far = socket.socketpair()
    with near, far, ends(roomy, 0) as (ours, theirs), ours.detach() as ticket:
        ticket.send(near)
        with Ticket.receive(far) as copy, gntalloc.adopt(ticket) as channel:
            with pytest.raises(Busy, match="already"):
                gntalloc.adopt(copy)
            with pytest.raises(Closed, match="let go"):
                gntalloc.adopt(ticket)
            channel.send(b"one")
            assert theirs.recv(timeout=PATIENCE) == b"one"


def test_who_cannot_adopt_leaves_it_to_others(roomy: tuple[Domain, Domain], monkeypatch: pytest.MonkeyPatch) -> None:
    with ends(roomy, 1) as (ours, theirs), ours.detach() as ticket:
        monkeypatch.setattr("gntalloc.vchan.adopting.End", None)
        with pytest.raises(TypeError):
            roomy[1].adopt(ticket)
        monkeypatch.undo()
        with roomy[1].adopt(ticket) as channel:
            channel.send(b"at last")
            assert theirs.recv(timeout=PATIENCE) == b"at last"


def test_when_the_machine_has_gone(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    domains = machine.domain(1), machine.domain(2)
    near, far = socket.socketpair()
    with near, far, ends(domains, 1) as (ours, theirs), ours.detach() as ticket:
        ticket.send(near)
        machine.close()
        with Ticket.receive(far) as other, pytest.raises((MachineGone, NoMachine)):
            gntalloc.adopt(other)
        ticket.close()
        theirs.close()
    for domain in domains:
        domain.close()
        domain.devices.close()


def test_what_is_in_use_cannot_be_detached(roomy: tuple[Domain, Domain]) -> None:
    with roomy[0].listen(2, "test", size=4096) as listener, pytest.raises(Busy, match="nobody has come"):
        listener.offer().detach()
    with ends(roomy, 0) as (ours, theirs):
        theirs.write(b"theirs")
        for give_back in ours.commit, ours.release:
            view = ours.reserve(4) if give_back == ours.commit else ours.peek(4)
            with pytest.raises(Busy, match="given back"):
                ours.detach()
            give_back()
            del view
        assert ours.read(timeout=PATIENCE) == b"rs"
        outcome: list[BaseException] = []

        def wait() -> None:
            try:
                ours.read()
            except Closed as closed:
                outcome.append(closed)

        waiter = threading.Thread(target=wait)
        waiter.start()
        deadline = time.monotonic() + PATIENCE
        while not ours._core.reading.locked():
            assert time.monotonic() < deadline
        with pytest.raises(Busy, match="another thread"):
            ours.detach()
        ours.close()
        waiter.join(PATIENCE)
        assert len(outcome) == 1
        with pytest.raises(Closed):
            ours.detach()


@pytest.mark.parametrize("what", [b"", b"abc", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\2\0\0\0[]"])
def test_what_is_no_ticket(what: bytes) -> None:
    for descriptors in [], [0, 0, 0]:
        near, far = socket.socketpair()
        with near, far:
            if what:
                socket.send_fds(near, [what], descriptors)
            near.close()
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(GntallocError if what else PeerGone):
                Ticket.receive(far)
            assert len(os.listdir("/proc/self/fd")) == before


def test_a_ticket_that_is_dropped_warns(roomy: tuple[Domain, Domain]) -> None:
    with ends(roomy, 0) as (ours, theirs):
        ticket = ours.detach()
        assert "domain 2" in repr(ticket)
        with pytest.warns(ResourceWarning, match="Ticket"):
            del ticket
        with pytest.raises(PeerDied):
            theirs.recv(timeout=PATIENCE)
        ticket = gntalloc.adopt(theirs.detach()).detach()
        ticket.close()
        with pytest.raises(Closed):
            pickle.dumps(ticket)
