"""`gntalloc machine … -- COMMAND` and `gntalloc run --pair`: two domains for a test, and nobody left afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

GNTALLOC = [sys.executable, "-m", "gntalloc"]
LIMIT = 50.0

SERVER = """
import sys, gntalloc
with gntalloc.current_domain().listen(2, "x") as listener, listener.accept(timeout=30) as channel:
    print("server:", channel.recv(timeout=30).decode(), flush=True)
    channel.send(b"pong")
    channel.drain(timeout=30)
sys.exit({status})
"""
CLIENT = """
import gntalloc
with gntalloc.current_domain().connect(1, "x", timeout=0) as channel:  # it does not try again
    channel.send(b"ping")
    print("client:", channel.recv(timeout=30).decode(), flush=True)
"""
LOOP = """
import gntalloc
with gntalloc.current_domain().listen(2, "x") as listener:
    for channel in listener:
        with channel:
            channel.send(channel.recv(timeout=30))
"""


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No machine's folder and no lock is left by what a test has started."""
    runtime = tmp_path_factory.mktemp("r")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    yield
    deadline = time.monotonic() + LIMIT
    while left := [str(path) for path in (runtime / "gntalloc").glob("*")]:  # a machine may be on its way out
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def gntalloc(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    settings = {"capture_output": True, "text": True, "timeout": LIMIT, "stdin": subprocess.DEVNULL, **how}
    return subprocess.run([*GNTALLOC, *arguments], check=False, **settings)


def python(code: str) -> str:
    return f"{sys.executable} -c {json.dumps(code)}".replace("\\n", "\n")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Around a command.


def test_runs_inside_join_the_machine(tmp_path: Path) -> None:
    script = tmp_path / "test.sh"
    run = " ".join([*GNTALLOC, "run", "--domid"])
    script.write_text(f"""
        set -e
        test -S "$GNTALLOC_MACHINE/1"
        test -S "$GNTALLOC_MACHINE/7"
        {run} 1 -- sh -c 'echo "$GNTALLOC_DOMAIN"'
        {run} 7 -- sh -c 'echo "$GNTALLOC_DOMAIN"'
        test -S "$GNTALLOC_MACHINE/7"        # it lives on without a program in it
        {" ".join(GNTALLOC)} list "$GNTALLOC_MACHINE" >list
    """)
    done = gntalloc("machine", "--domain", "1", "--domain", "7", "--", "sh", str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, seven = done.stdout.splitlines()
    assert os.path.dirname(one) == os.path.dirname(seven)
    assert not os.path.exists(os.path.dirname(one))
    assert "domain" in (tmp_path / "list").read_text()


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -TERM $$"], -signal.SIGTERM),
        (["/nowhere/at-all"], 127),
        (["/"], 126),
    ],
)
def test_the_status_is_the_commands(command: list[str], status: int) -> None:
    assert gntalloc("machine", "--", *command).returncode == status


def test_a_time_limit() -> None:
    done = gntalloc("machine", "--timeout", "0.2", "--", "sleep", "40")
    assert done.returncode == 124
    assert "sleep did not end within 0.2 s" in done.stderr


def test_whatever_is_left_is_ended(tmp_path: Path) -> None:
    """A server in the background, one in a session of its own, one that ignores SIGTERM; with and without a domain."""
    run = " ".join([*GNTALLOC, "run", "--domid", "1", "--"])
    script = tmp_path / "test.sh"
    script.write_text(f"""
        {run} sh -c 'echo $$ >one; exec sleep 1000' &
        setsid sleep 1000 & echo $! >two
        (trap "" TERM; echo $BASHPID >three; while :; do sleep 1; done) &
        until test -s one && test -s two && test -s three; do sleep 0.01; done
        exit 3
    """)
    done = gntalloc("machine", "--", "bash", str(script), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    for name in ("one", "two", "three"):
        assert not alive(int((tmp_path / name).read_text())), name


def test_signals_are_handed_on(tmp_path: Path) -> None:
    there = tmp_path / "there"
    command = ["sh", "-c", f"trap 'exit 5' TERM; touch {there}; while :; do sleep 0.01; done"]
    process = subprocess.Popen([*GNTALLOC, "machine", "--", *command])
    try:
        deadline = time.monotonic() + LIMIT
        while not there.exists():
            assert time.monotonic() < deadline, "the command did not start"
            time.sleep(0.01)
        process.terminate()
        assert process.wait(LIMIT) == 5
    finally:
        process.kill()
        process.wait(LIMIT)


def test_why_requests_fail_is_said() -> None:
    code = "import gntalloc, os; gntalloc.current_domain(os.environ['GNTALLOC_MACHINE'] + '/1').share(2, pages=9)"
    done = gntalloc("machine", "--limit", "4", "-v", "--", sys.executable, "-c", code)
    assert done.returncode == 1
    assert "9 pages were asked for" in done.stderr.partition("Traceback")[0]


@pytest.mark.parametrize(
    "wrong", [["--name", "x", "--", "true"], ["--timeout", "1"], ["--domain", "-1", "--", "true"], ["--nothing"]]
)
def test_wrong_usage(wrong: list[str]) -> None:
    done = gntalloc("machine", *wrong)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


# Pairs.


def pair(*options: str, server: str, client: str) -> subprocess.CompletedProcess[str]:
    return gntalloc("run", "--pair", *options, "--in-1", server, "--in-2", client)


def test_a_client_that_does_not_try_again() -> None:
    done = pair(server=python(SERVER.format(status=0)), client=python(CLIENT))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["1 | server: ping", "2 | client: pong"]


def test_four_at_once() -> None:
    """Each has a machine of its own."""
    server, client = python(SERVER.format(status=0)), python(CLIENT)
    command = [*GNTALLOC, "run", "--pair", "--in-1", server, "--in-2", client]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        for process in started:
            output, errors = process.communicate(timeout=LIMIT)
            assert (process.returncode, sorted(output.splitlines())) == (
                0,
                ["1 | server: ping", "2 | client: pong"],
            ), errors
    finally:
        for process in started:
            process.kill()
            process.communicate(timeout=LIMIT)


def test_a_server_that_waits_for_more_is_ended() -> None:
    done = pair(server=python(LOOP), client=python(CLIENT))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 | client: ping\n"
    assert "the program in domain 1 still ran" in done.stderr


@pytest.mark.parametrize(
    ("server", "client", "status"),
    [
        (python(SERVER.format(status=9)), python(CLIENT), 9),
        ("sh -c 'exit 3'", "true", 3),
        (python(LOOP), "sh -c 'exit 4'", 4),
        (python(LOOP), "sh -c 'kill -SEGV $$'", 128 + signal.SIGSEGV),
        ("/nowhere/at-all", "true", 127),
    ],
)
def test_the_status_is_that_of_the_first_that_failed(server: str, client: str, status: int) -> None:
    done = pair("--patience", "20", server=server, client=client)
    assert done.returncode == status, done.stderr


def test_a_server_that_shows_nothing() -> None:
    done = pair("--patience", "0.1", server="sleep 40", client="echo here")
    assert done.returncode == 0
    assert done.stdout == "2 | here\n"
    assert "has shown no channel to domain 2 within 0.1 s" in done.stderr


def test_a_time_limit_of_a_pair() -> None:
    done = pair("--timeout", "1.5", "--patience", "0.1", server="sleep 40", client="sleep 40")
    assert done.returncode == 124
    assert "did not end within 1.5 s" in done.stderr


def test_as_json() -> None:
    done = pair("--json", server=python(SERVER.format(status=2)), client=python(CLIENT))
    assert done.returncode == 2
    result = json.loads(done.stdout)
    assert result["exit_status"] == 2
    assert result["programs"]["1"]["exit_status"] == 2
    assert result["programs"]["2"]["output"] == "client: pong\n"


@pytest.mark.parametrize(
    "wrong",
    [
        ["--pair"],
        ["--pair", "--in-1", "true"],
        ["--pair", "--in-1", "true", "--in-1", "true"],
        ["--pair", "--in-1", "'", "--in-2", "true"],
        ["--pair", "--in-1", "", "--in-2", "true"],
        ["--pair", "--in-99999", "true", "--in-2", "true"],
        ["--pair", "--domid", "1", "--in-1", "true", "--in-2", "true"],
        ["--in-1", "true", "--domid", "1", "--", "true"],
        ["--domid", "1"],
        ["--", "true"],
    ],
)
def test_wrong_usage_of_pairs(wrong: list[str]) -> None:
    done = gntalloc("run", *wrong)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


# run -v.

CALLS = """
import fcntl, mmap, os, struct
file = os.open("/dev/xen/gntalloc", os.O_RDWR)
for wrong in (
    lambda: fcntl.ioctl(file, 0x184705, bytearray(struct.pack("=HHIQ", 2, 1, 5000, 0) + bytes(20000)), True),
    lambda: mmap.mmap(file, 4096, mmap.MAP_SHARED, 3, offset=0),
    lambda: os.open("/dev/xen/gntdev", os.O_RDONLY),
    lambda: os.open("/dev/xen/nothing", os.O_RDWR),
):
    try:
        wrong()
    except OSError as error:
        print(error.errno)
"""


def test_run_says_why_calls_fail() -> None:
    done = gntalloc("machine", "--", *GNTALLOC, "run", "-v", "--domid", "1", "--", sys.executable, "-c", CALLS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["28", "2", "2", "2"]
    lines = done.stderr.splitlines()
    assert len(lines) == 4, done.stderr
    assert "ALLOC_GREF on gntalloc: ENOSPC: 5000 pages were asked for" in lines[0]
    assert "mmap of gntalloc: ENOENT: " in lines[1]
    assert "an open of gntdev is not served: " in lines[2]
    assert "an open of nothing is not served: there is no device 'nothing'" in lines[3]
