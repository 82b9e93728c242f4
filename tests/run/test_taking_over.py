"""Threads whose calls the machine had taken when it found that it must leave them to the supervisor: none is forgotten.

It finds that out at the first call into a program's memory or the first map, and with many threads there are others
that it has taken by then. Yama (ptrace_scope=1), a debugger around the program, a machine that may not look into it.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import rawwire as wire
from held import PATIENCE, Held, ask_to_serve
from runs import Runs, order, python, refusing_machine, said, tell

from gntalloc import waits
from gntalloc.errors import MachineGone
from gntalloc.guest.connection import MachineConnection
from gntalloc.syscalls.listener import CallerGone
from gntalloc.wire.messages import Open

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc import Machine

    Build = Callable[..., str]

AROUND = {
    "machine": (),  # one that may not look into programs
    "strace": ("strace", "-f", "-o", "/dev/null"),
    "gdb": ("gdb", "-nx", "-q", "-batch", "-ex", "set debuginfod enabled off", "-ex", "run", "--args"),
}
THREADS, TIMES = 8, 3
WORK = """
import threading
def work(times):
    for _ in range(times):
        f = device('gntalloc'); i, r = alloc(f, 2); m = place(f, i); m[:2] = b'ok'; m.close(); os.close(f)
def all_of_them(count, times):
    threads = [threading.Thread(target=work, args=(times,)) for _ in range(count)]
    for each in threads: each.start()
    for each in threads: each.join()
"""


@pytest.fixture(params=AROUND)
def around(request: pytest.FixtureRequest) -> str:
    """What makes the machine leave a program to the supervisor."""
    name: str = request.param
    if AROUND[name] and shutil.which(name) is None:
        pytest.skip(f"there is no {name} (apt install {name})")
    return name


@pytest.fixture
def where(around: str, runs: Runs, tmp_path: Path) -> Iterator[Runs]:
    """Runs that share a machine, which may look into them or not."""
    if around != "machine":
        yield runs
        return
    with refusing_machine(tmp_path) as theirs:
        yield theirs


@pytest.mark.parametrize("language", ["python", "c"])
def test_no_thread_waits_for_ever(where: Runs, build: Build, around: str, language: str) -> None:
    program: tuple[str, ...] = (build("threads", "-pthread"), str(THREADS), str(TIMES)) if language == "c" else ()
    if language == "python":
        _, *rest = python(WORK + f"all_of_them({THREADS}, {TIMES}); say('0 wrong')")
        program = (os.path.realpath(sys.executable), *rest)  # gdb wants the program itself
    for _ in range(3):
        done = where(1, *AROUND[around], *program)
        assert done.stdout.count("0 wrong\n") == 1, done


@pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace (apt install strace)")
def test_two_programs_of_one_run(runs: Runs, build: Build, tmp_path: Path) -> None:
    """One of them is traced, and the other's calls are left to the supervisor with it."""
    script = tmp_path / "both"
    threads = f"{build('threads', '-pthread')} {THREADS} 25"
    script.write_text(f"{threads} &\nstrace -f -o /dev/null {threads}; wait\n")
    for _ in range(3):
        done = runs(1, "sh", str(script))
        assert done.stdout == "0 wrong\n" * 2, done


KILLS = """
threading.excepthook = lambda what: None
threads = [threading.Thread(target=work, args=(1000000,)) for _ in range(8)]
for each in threads: each.start()
say('works'); input()
for each in threads: each.join()
"""


@pytest.mark.parametrize("around", ["machine", "strace"], indirect=True)  # gdb waits for a program's threads itself
@pytest.mark.parametrize("who", ["machine", "supervisor"])
def test_one_of_those_who_serve_is_killed(around: str, where: Runs, who: str) -> None:
    """Every call fails that could not be served any more, and nobody waits for an answer."""
    _, *rest = python(WORK + KILLS)
    process = where.start(1, *AROUND[around], os.path.realpath(sys.executable), *rest)
    assert said(process) == "works"
    if who == "machine":
        victim = order(where, "statistics")["pid"]
    else:
        (victim,) = children_of(process.pid)
    os.kill(victim, signal.SIGKILL)
    tell(process, "")
    process.communicate(timeout=40)


def children_of(pid: int) -> list[int]:
    """Of its first thread."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


OPENS = """
import errno, os, sys, threading
def opens():
    while not over:
        try: os.close(os.open('/dev/null', os.O_RDWR))
        except OSError as error: assert error.errno == errno.EIO, error
over = False
threads = [threading.Thread(target=opens) for _ in range(8)]
for each in threads: each.start()
print('opens', flush=True); sys.stdin.readline(); over = True
for each in threads: each.join()
print('over', flush=True)
"""


def test_a_supervisor_that_the_machine_hears_no_more(machine: Machine) -> None:
    """It lives, so the kernel goes on bringing it calls; those that the machine had taken must not be forgotten."""
    for _ in range(5):
        held = Held(sys.executable, "-I", "-S", "-c", OPENS)
        supervisor = MachineConnection(machine.environ(1)["GNTALLOC_DOMAIN"])
        try:
            assert ask_to_serve(supervisor, held.listener.fileno()).result == 1
            assert held.said() == "opens"
            supervisor.close()
            held.tell("")
            assert let_all_go_on(held) == "over"
        finally:
            supervisor.close()
            held.end()


def let_all_go_on(held: Held) -> str:
    """Until the program says something: that."""
    poll = select.poll()
    for each in (held.listener, held.output):
        poll.register(each, select.POLLIN)
    while ready := {descriptor for descriptor, _ in poll.poll(PATIENCE * 1000)}:
        if held.output.fileno() in ready:
            return held.said()
        call = held.listener.receive()
        if call is not None:
            with suppress(CallerGone):
                held.listener.go_on(call)
    pytest.fail("a call was never answered")


# What of it is the channel's.


def unasked(text: bytes, descriptors: int = 0) -> bytes:
    """A message that answers nothing."""
    return wire.encode(wire.BROUGHT, 0xFFFFFFFF, text, descriptors)


@contextmanager
def answering(*before: bytes, then: bytes = b"") -> Iterator[MachineConnection]:
    """A channel to a machine that says all of this before it answers one call, with a descriptor for each."""
    near, theirs = socket.socketpair()
    ours = waits.Socket(fileno=near.detach())

    def answer() -> None:
        *_, number = wire.HEADER.unpack(theirs.recv(4096)[: wire.HEADER.size])
        for each in before:
            socket.send_fds(theirs, [unasked(each, 1)], [theirs.fileno()])
        theirs.sendall(wire.encode_reply(wire.OPEN, number, result=7) + then)

    machine = threading.Thread(target=answer)
    machine.start()
    channel = MachineConnection("nowhere", sock=ours, hello=False)
    try:
        yield channel
    finally:
        machine.join(20)
        channel.close()
        theirs.close()


def heard(channel: MachineConnection) -> list[tuple[bytes, int]]:
    """All that there is: the texts, and with how many descriptors."""
    found = []
    while (each := channel.hear(channel.generation)) is not None:
        found.append((each[0].payload, len(each[1])))
    return found


def test_what_comes_before_an_answer_is_kept() -> None:
    with answering(b"one", b"two", then=unasked(b"three")) as channel:
        channel.hears = True
        assert not channel.has_heard(channel.generation)
        assert channel.call(Open(0, "")).result == 7
        assert channel.has_heard(channel.generation)
        assert heard(channel) == [(b"one", 1), (b"two", 1), (b"three", 0)]
        assert not channel.has_heard(channel.generation)


def test_who_does_not_hear_keeps_nothing() -> None:
    """A machine may be another user's, and say what it likes."""
    with answering(b"one", b"two") as channel:
        assert channel.call(Open(0, "")).result == 7
        assert heard(channel) == []


def test_what_was_said_is_heard_before_the_end_is() -> None:
    with answering(b"one", then=unasked(b"two") + unasked(b"cut off")[:-1]) as channel:
        channel.hears = True
        generation = channel.generation
        channel.call(Open(0, ""))
        channel.close()
        assert channel.has_heard(generation)
        for text in (b"one", b"two"):
            there = channel.hear(generation)
            assert there is not None
            assert there[0].payload == text
        with pytest.raises(MachineGone):
            channel.hear(generation)
