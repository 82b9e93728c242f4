"""libxenvchan of Xen on both sides, in two runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from runs import said, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from runs import Runs

    from gntalloc import Domain, Machine

    Build = Callable[..., str]

PATH = "data/vchan/test"
ECHO = """
import multiprocessing, sys
import gntalloc

def echo(channel):
    for _ in range(100):
        message = b""
        while len(message) < 700:
            message += channel.read(700 - len(message), timeout=20)
        channel.write(message, timeout=20)
    print(100, end=" ", flush=True)

def go_on(ticket, method, more):
    with gntalloc.adopt(ticket) as channel:
        echo(channel)
        if more:
            hand_over(channel, method, more - 1)
        else:
            assert channel.read(1, timeout=20) == b""  # the program closes when it has all
            print()

def hand_over(channel, method, more):
    with channel.detach() as ticket:
        process = multiprocessing.get_context(method).Process(target=go_on, args=(ticket, method, more))
        process.start()
    process.join()

if __name__ == "__main__":
    _, path, how, method = sys.argv
    domain = gntalloc.current_domain()
    if how == "connect":
        channel = domain.connect(1, path, timeout=20)
    else:
        with domain.listen(2, path, size=4096) as listener:
            channel = listener.accept(timeout=20)
    echo(channel)
    hand_over(channel, method, 1)
    domain.close()
"""
RINGS = [1000, 2000, 4096, 65536, 1 << 20]  # in the page beside each other, a page of its own, and many


def serve(runs: Runs, build: Build, ring: int, *task: str) -> subprocess.Popen[str]:
    server = runs.start(1, build("vchan", "-O2"), "server", "2", PATH, str(ring), *task)
    assert said(server) == "listening"
    return server


def client(build: Build, *task: str) -> list[str]:
    return [build("vchan", "-O2"), "client", "1", f"/local/domain/1/{PATH}", "0", *task]


@pytest.mark.parametrize("ring", RINGS)
def test_echo(runs: Runs, build: Build, ring: int) -> None:
    server = serve(runs, build, ring, "echo")
    done = runs(2, *client(build, "ask", "100", "700"))
    assert (done.returncode, done.stderr) == (0, "")
    assert server.wait(20) == 0


@pytest.mark.parametrize("ring", RINGS)
def test_bulk(runs: Runs, build: Build, ring: int) -> None:
    server = serve(runs, build, ring, "drain", str(1 << 20), "512")
    done = runs(2, *client(build, "pour", str(1 << 20), "512"))
    assert (done.returncode, done.stderr) == (0, "")
    assert said(server).endswith("MB/s")
    assert server.wait(20) == 0


@pytest.mark.parametrize("late", [False, True], ids=["the input ends at once", "the input ends after the peer"])
@pytest.mark.parametrize("role", ["server", "client"])
def test_cat_and_a_program_that_drains_and_closes(
    machine: Machine, alice: Domain, build: Build, role: str, *, late: bool
) -> None:
    """Each byte arrives, and the answer: both sides say so, whenever the program closes."""
    data = bytes(((at + place) * 31 + (at >> 12)) & 0xFF for at in range(0, 1 << 16, 512) for place in range(512))
    path, ours = "/local/domain/1/data/vchan/cat", [sys.executable, "-m", "gntalloc"]
    program = [build("vchan", "-O2"), role, "2" if role == "server" else "1", path, "4096"]
    domid = 1 if role == "server" else 2
    run = [*ours, "run", "--machine", os.path.basename(machine.folder), "--domid", str(domid), "--", *program]
    cat = [*ours, "cat", *(["1"] if role == "server" else ["-l", "2", "--size", "4096"]), path]

    def start(command: list[str], domid: int) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=machine.environ(domid), stdin=pipe, stdout=pipe, stderr=pipe)
        stack.callback(process.communicate)
        stack.callback(process.kill)
        return process

    for _ in range(3):
        with ExitStack() as stack:
            both = [([*run, "drain", str(len(data)), "512"], domid), (cat, 3 - domid)]
            first = start(*both[role == "client"])
            wait_for(lambda: alice.store.exists(f"{path}/event-channel"), "no server waits")
            second = start(*both[role == "server"])
            sends, receives = (second, first) if role == "server" else (first, second)
            assert sends.stdin is not None
            sends.stdin.write(data)
            sends.stdin.flush()
            if late:
                receives.wait(50)
            out, errors = sends.communicate(timeout=50)
            assert (sends.returncode, out, errors) == (0, b"!", b"")
            said_by_it = receives.communicate(timeout=50)
            assert receives.returncode == 0, said_by_it
            if alice.store.exists(path):  # a C server leaves its nodes
                alice.store.remove(path)


@pytest.mark.parametrize("role", ["server", "client"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_program_whose_peer_is_handed_to_a_child(
    machine: Machine, alice: Domain, build: Build, role: str, method: str, tmp_path: Path
) -> None:
    """Of ours, in the middle of the conversation, twice: the program's messages all come back."""
    path = "/local/domain/1/data/vchan/handed"
    ours = 2 if role == "server" else 1
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    program = [build("vchan", "-O2"), role, str(ours), path, "4096", "ask", "300", "700"]
    run = [sys.executable, "-m", "gntalloc", "run", "--machine", os.path.basename(machine.folder)]
    commands = {
        3 - ours: [*run, "--domid", str(3 - ours), "--", *program],
        ours: [sys.executable, "-W", "error", str(script), path, "connect" if role == "server" else "listen", method],
    }
    with ExitStack() as stack:
        processes = {}
        for domid in (1, 2):
            pipe = subprocess.PIPE
            process = subprocess.Popen(commands[domid], env=machine.environ(domid), stdout=pipe, stderr=pipe, text=True)
            stack.callback(process.communicate)
            stack.callback(process.kill)
            processes[domid] = process
            if domid == 1:
                wait_for(lambda: alice.store.exists(f"{path}/event-channel"), "no server waits")
        out, errors = processes[3 - ours].communicate(timeout=50)
        assert (processes[3 - ours].returncode, errors) == (0, ""), out
        assert processes[ours].communicate(timeout=50) == ("100 100 100 \n", "")
    if alice.store.exists(path):
        alice.store.remove(path)


def test_a_peer_that_is_killed_is_seen(runs: Runs, build: Build) -> None:
    server = serve(runs, build, 4096, "wait")
    other = runs.start(2, "sh", "-c", 'echo $$; exec "$@"', "sh", *client(build, "wait"))
    program = int(said(other))
    assert said(other) == said(server) == "both are there"
    os.kill(program, signal.SIGKILL)
    assert said(server) == "open: 0"
    assert server.wait(20) == 0
