"""The machine and real processes: fork, forkserver, spawn, SIGKILL, and programs that never say a word too many."""

from __future__ import annotations

import contextlib
import errno
import mmap
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from limits import Limited, status_of
from raw_client import RawClient

from gntalloc import DeviceError, Domain, Grant, MachineGone, current_domain
from gntalloc.guest import connection as channel
from gntalloc.guest.devices.machine import MachineFile
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from gntalloc import Machine


class Child:
    """A forked child: it does `work`, says so, and then waits for a byte before it exits by os._exit."""

    def __init__(self, work: Callable[[], object]) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(20)
        self._sock = ours
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                ours.close()
                kept = work()
                theirs.sendall(b"!")
                theirs.recv(1)
                code = 0
                del kept
            finally:
                os._exit(code)
        theirs.close()
        assert self._sock.recv(1) == b"!"

    def exit(self) -> None:
        self._sock.sendall(b"!")
        assert status_of(self.pid) == 0
        self._sock.close()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert status_of(self.pid) == signal.SIGKILL
        self._sock.close()


# The peer is another process, started in each of the ways.


def peer_work(domain: Domain, grant: Grant, line: Connection) -> None:
    """In the other process: add one to the first byte of each page, and say so while mapped."""
    with domain.map(grant) as mapped:
        for page in range(len(grant.refs)):
            mapped.memory[page * PAGE_SIZE] += 1
        line.send(domain.domid)
        line.recv()
    line.send("unmapped")


@contextlib.contextmanager
def started(method: str, *arguments: object) -> Iterator[Connection]:
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process that has threads
        process = context.Process(target=peer_work, args=(*arguments, theirs))
        process.start()
    theirs.close()
    try:
        yield ours
        process.join(20)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join(20)
        process.close()
        ours.close()


@pytest.fixture(scope="module", autouse=True)
def _no_servers_left() -> Iterator[None]:
    """multiprocessing starts helper processes once and keeps them: not what these tests look for."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gntalloc"])
    from multiprocessing import forkserver, resource_tracker

    resource_tracker.ensure_running()
    forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_peer_in_a_process(alice: Domain, bob: Domain, method: str) -> None:
    with alice.share(bob, pages=3, writable=True) as shared:
        with started(method, bob, shared.grant) as line:
            assert line.recv() == 2
            assert bytes(shared.memory[::PAGE_SIZE]) == b"\1\1\1"
            assert (shared.held, shared.mapped_by) == (True, (2,))
            line.send("go on")
            assert line.recv() == "unmapped"
        assert (shared.held, shared.mapped_by) == (False, ())


def test_a_program_finds_its_domain_in_the_environment(machine: Machine, alice: Domain, bob: Domain) -> None:
    import subprocess

    program = (
        "import sys, gntalloc\n"
        "with gntalloc.current_domain().map(gntalloc.Grant.parse(sys.argv[1])) as mapped:\n"
        "    mapped.memory[:5] = b'hello'\n"
    )
    with alice.share(bob, writable=True) as shared:
        command = [sys.executable, "-c", program, str(shared.grant)]
        subprocess.run(command, check=True, env=machine.environ(2), timeout=30)
        assert bytes(shared.memory[:5]) == b"hello"
        assert not shared.held


# With the grantee's messages suppressed: it maps, and from then on says nothing at all.


def map_in_silence(domain: Domain, grant: Grant) -> list[mmap.mmap]:
    """MAP_GRANT_REF and mmap by hand; the descriptor is closed, the connection is kept and never used again."""
    client = RawClient(domain)
    handle, _home = client.open("gntdev")
    index = client.map_refs(handle, grant.granter, grant.refs)
    answer = client.mmap(handle, index, len(grant.refs), 3 if grant.writable else 1)
    assert (answer.error, answer.why) == (0, "")
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if grant.writable else 0)
    mapped = [mmap.mmap(descriptor, len(grant.refs) * PAGE_SIZE, prot=prot) for descriptor in answer.descriptors]
    answer.close()
    globals()["_kept"] = client, _home
    return mapped


def close_all(maps: list[mmap.mmap]) -> None:
    for each in maps:
        each.close()


def map_as_the_library_does(domain: Domain, grant: Grant) -> object:
    return domain.map(grant)


SILENT = [pytest.param(map_in_silence, id="silent"), pytest.param(map_as_the_library_does, id="library")]


@pytest.mark.parametrize("writable", [True, False], ids=["rw", "ro"])
@pytest.mark.parametrize("how", SILENT)
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_the_end_of_a_peer_is_the_end_of_its_hold(
    alice: Domain, bob: Domain, how: Callable[[Domain, Grant], object], end: str, writable: bool
) -> None:
    with alice.share(bob, pages=2, writable=writable) as shared:
        child = Child(lambda: how(bob, shared.grant))
        assert (shared.held, shared.mapped_by) == (True, (2,))
        with pytest.raises(TimeoutError, match="still mapped by domain 2"):
            shared.wait_released(timeout=0)
        getattr(child, end)()
        shared.wait_released(timeout=20)
        assert (shared.held, shared.mapped_by) == (False, ())


@pytest.mark.parametrize("how", SILENT)
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_a_page_released_here_counts_until_the_peer_ends(
    machine: Machine, alice: Domain, bob: Domain, how: Callable[[Domain, Grant], object], end: str
) -> None:
    shared = alice.share(bob, pages=2, writable=True)

    def work() -> object:
        shared.close()  # the map it inherited is the granter's
        return how(bob, shared.grant)

    child = Child(work)
    shared.close()
    assert shared.held
    assert [(grant.users, grant.held) for grant in machine.grants()] == [(0, True)] * 2
    getattr(child, end)()
    shared.wait_released(timeout=20)
    assert machine.grants() == []


def test_a_late_munmap_without_a_word(alice: Domain, bob: Domain) -> None:
    shared = alice.share(bob, pages=2, writable=True)
    client = RawClient(bob)
    handle, home = client.open("gntdev")
    answer = client.mmap(handle, client.map_refs(handle, 1, shared.refs), 2)
    maps = [mmap.mmap(descriptor, 2 * PAGE_SIZE) for descriptor in answer.descriptors]
    answer.close()
    client.close()
    os.close(home)
    assert shared.held
    shared.close()
    assert shared.held
    close_all(maps)
    assert not shared.held  # at once: nobody had to be told


def test_a_peer_that_hides_its_map_is_still_waited_for(machine: Machine, alice: Domain, bob: Domain) -> None:
    """It opens the file a second time, and lets go of what the machine gave it."""
    shared = alice.share(bob, writable=True)
    with RawClient(bob) as client:
        handle, home = client.open("gntdev")
        answer = client.mmap(handle, client.map_refs(handle, 1, shared.refs))
        again = os.open(f"/proc/self/fd/{answer.descriptors[0]}", os.O_RDWR)
        answer.close()
        os.close(home)
    shared.close()
    assert (shared.held, shared.mapped_by) == (True, ())
    assert machine.statistics().pages == 1
    with pytest.raises(TimeoutError, match="hides"):
        shared.wait_released(timeout=0)
    os.close(again)
    shared.wait_released(timeout=20)
    assert machine.statistics().pages == 0


def test_held_is_told_also_while_a_map_of_the_granters_is_left(alice: Domain, bob: Domain) -> None:
    """Off the list, mapped by the granter's child, mapped by the peer: that is still held by the peer."""
    shared = alice.share(bob, writable=True)
    child = Child(lambda: None)
    mapped = bob.map(shared.grant)
    shared.close()
    assert (shared.held, shared.mapped_by) == (True, (2,))
    mapped.close()
    assert (shared.held, shared.mapped_by) == (False, ())
    child.exit()


# Files and fork.


def test_what_a_child_shares_dies_with_the_child(machine: Machine, alice: Domain, bob: Domain) -> None:
    with alice.share(bob) as before:
        child = Child(lambda: alice.share(bob, pages=3))
        assert len(machine.grants()) == 4
        child.kill()
        deadline = time.monotonic() + 20
        while len(machine.grants()) > 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert [grant.ref for grant in machine.grants()] == list(before.refs)


def test_a_child_goes_on_with_its_parents_file_and_both_answers_are_their_own(alice: Domain, bob: Domain) -> None:
    """One socket for both would give one the other's answers."""
    with alice.share(bob, writable=True) as shared:

        def work() -> None:
            for _ in range(200):
                assert shared._file.holders(0, 0).mapped_by == ()
                with alice.share(bob) as mine:
                    assert len(mine.refs) == 1

        child = Child(lambda: None)  # one that has the file open, and is never heard of
        other = threading.Thread(target=work)
        other.start()
        forked = Child(work)
        other.join(20)
        forked.exit()
        child.exit()


def test_a_map_that_a_child_inherited_holds_the_pages(alice: Domain, bob: Domain) -> None:
    with alice.share(bob, writable=True) as shared:
        mapped = bob.map(shared.grant)
        child = Child(lambda: mapped)
        mapped.close()
        assert shared.held
        child.exit()
        shared.wait_released(timeout=20)


def test_closing_in_a_child_gives_back_nothing_of_its_parents(machine: Machine, alice: Domain, bob: Domain) -> None:
    with alice.share(bob, writable=True) as shared:

        def work() -> None:
            shared.close()

        Child(work).exit()
        assert [grant.users for grant in machine.grants()] == [2]  # the file's list, and the map here
        with bob.map(shared.grant) as mapped:
            mapped.memory[0] = 4
            assert shared.memory[0] == 4


@pytest.mark.parametrize("method", ["dup", "scm_rights", "fork"])
def test_the_last_copy_of_a_file_is_its_release(machine: Machine, alice: Domain, method: str) -> None:
    file = alice.devices.open("gntalloc")
    assert isinstance(file, MachineFile)
    assert machine.statistics().domains[0].files == 1
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if method == "dup":
            copy = os.dup(file.fileno())
            close: Callable[[], object] = lambda: os.close(copy)  # noqa: E731
        elif method == "scm_rights":  # it is nowhere but on its way
            socket.send_fds(ours, [b"x"], [file.fileno()])
            close = lambda: theirs.recv(1)  # noqa: E731
        else:
            child = Child(lambda: None)
            close = child.kill
        file.close()
        assert machine.statistics().domains[0].files == 1
        close()


def test_a_file_that_was_passed_on_works_where_it_arrives(alice: Domain, bob: Domain) -> None:
    """By SCM_RIGHTS, to a connection of another process: the file is the same, its pages and its index."""
    with alice.share(bob, pages=2) as shared, RawClient(alice) as other:
        answer = other.show(shared._file.fileno())
        assert (answer.error, answer.body[4:]) == (0, b"gntalloc")
        assert other.alloc(answer.result, 2)[0] == 2 * PAGE_SIZE
        assert other.mmap(answer.result, 0, 2).close().error == 0
        assert other.show(shared._file.fileno()).result == answer.result


# Calls that do not come to their end.


class Interrupted(Exception):
    """What a signal handler raises, as Ctrl-C does."""


def test_an_interrupted_call_leaves_the_domain_usable(machine: Machine, alice: Domain, bob: Domain) -> None:
    with alice.share(bob, writable=True) as shared:

        def interrupt(_number: int, _frame: object) -> None:
            raise Interrupted

        before = signal.signal(signal.SIGALRM, interrupt)
        os.kill(machine.pid, signal.SIGSTOP)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Interrupted):
                _ = shared.held
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            os.kill(machine.pid, signal.SIGCONT)
        assert not shared.held
        with bob.map(shared.grant):
            assert shared.mapped_by == (2,)


def test_a_machine_that_does_not_answer_is_gone(
    machine: Machine, alice: Domain, bob: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "DEADLINE", 0.05)
    shared = alice.share(bob)  # over a channel of the old deadline
    os.kill(machine.pid, signal.SIGSTOP)
    try:
        alice.devices.close()
        with pytest.raises(MachineGone, match="did not answer"):
            _ = shared.held
    finally:
        os.kill(machine.pid, signal.SIGCONT)
    monkeypatch.undo()
    assert not shared.held
    shared.close()


def test_orders_have_a_deadline_too(make_machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "DEADLINE", 2.0)
    machine = make_machine()
    os.kill(machine.pid, signal.SIGSTOP)
    try:
        with pytest.raises(MachineGone):
            machine.statistics()
    finally:
        os.kill(machine.pid, signal.SIGCONT)


def test_the_machine_is_killed_maps_stay_calls_say_so(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    alice, bob = machine.domain(1), machine.domain(2)
    shared = alice.share(bob, writable=True)
    mapped = bob.map(shared.grant)
    os.kill(machine.pid, signal.SIGKILL)
    machine._process.wait(20)
    calls = (lambda: shared.held, lambda: alice.share(bob), machine.statistics, lambda: shared.wait_released(timeout=1))
    for call in calls:
        with pytest.raises(MachineGone) as caught:
            call()
        assert isinstance(caught.value, ConnectionError)
        assert caught.value.errno == errno.ECONNRESET
    shared.memory[:5] = b"still"
    assert bytes(mapped.memory[:5]) == b"still"
    shared.close()
    mapped.close()
    for domain in (alice, bob):
        domain.close()
        domain.devices.close()


def test_a_waiter_hears_of_the_machines_end(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    alice, bob = machine.domain(1), machine.domain(2)
    with alice.share(bob) as shared, bob.map(shared.grant):
        caught: list[BaseException] = []

        def wait() -> None:
            try:
                shared.wait_released()
            except MachineGone as gone:
                caught.append(gone)

        thread = threading.Thread(target=wait)
        thread.start()
        machine._process.kill()
        thread.join(20)
        assert len(caught) == 1
    for domain in (alice, bob):
        domain.close()
        domain.devices.close()


def test_a_program_without_descriptors_left_is_told_so_and_can_go_on(alice: Domain, bob: Domain) -> None:
    import resource

    shares = [alice.share(bob) for _ in range(8)]
    refs = [ref for share in shares for ref in share.refs]
    bob.map(1, refs).close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(4):
            os.close(taken.pop())
        with pytest.raises(DeviceError) as caught:
            bob.map(1, refs)
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    assert "RLIMIT_NOFILE" in str(caught.value)
    assert not any(share.held for share in shares)
    bob.map(1, refs).close()
    for share in shares:
        share.close()


def test_the_machine_ends_with_its_owner(tmp_path: Path) -> None:
    import subprocess

    program = "import gntalloc, os; m = gntalloc.Machine(); m.domain(1); print(m.pid, m.folder, flush=True); input()"
    with Limited([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid, folder = owner.stdout.readline().split()
        watch = os.pidfd_open(int(pid))
        owner.kill()
    import select

    assert select.select([watch], [], [], 20)[0] == [watch]
    os.close(watch)
    assert not Path(folder).exists()


def test_current_domain_without_any() -> None:
    from gntalloc import NoMachine

    with pytest.raises(NoMachine, match="no machine answers"):
        current_domain("/nowhere/at/all/1")
