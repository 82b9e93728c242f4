"""Folders and locks of machines that were killed go, by their locks, and nothing else does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import gntalloc
from gntalloc import claims
from gntalloc.places import control_path

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 50.0
GNTALLOC = [sys.executable, "-m", "gntalloc"]
# A program with a machine of its own, in which a run has been.
PROGRAM = """
import gntalloc, os, subprocess, sys
machine = gntalloc.Machine()
run = [sys.executable, "-m", "gntalloc", "run", "--domid", "1", "true"]
subprocess.run(run, env={**os.environ, "GNTALLOC_MACHINE": machine.folder}, check=True)
print(machine.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of machines, of this test alone."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "gntalloc").mkdir()
    return tmp_path / "gntalloc"


@pytest.fixture
def processes() -> Iterator[ExitStack]:
    """Ends what a test has started."""
    with ExitStack() as stack:
        yield stack


def names(top: Path) -> list[str]:
    return sorted(os.listdir(top))


def start(processes: ExitStack, *command: str) -> tuple[subprocess.Popen[str], str]:
    """A program, and its first line."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes.callback(process.communicate, timeout=PATIENCE)
    processes.callback(process.kill)
    assert process.stdout is not None
    return process, process.stdout.readline()


def until_ended(pid: int) -> None:
    """A zombie has no locks any more."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state in "ZX":
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)


def leave(top: Path, processes: ExitStack) -> list[str]:
    """Kill a program and its machine at once."""
    process, line = start(processes, sys.executable, "-W", "ignore", "-c", PROGRAM)
    machine = int(line)
    os.kill(machine, signal.SIGSTOP)  # so that it cannot tidy up
    process.kill()
    process.wait(PATIENCE)
    os.kill(machine, signal.SIGKILL)
    until_ended(machine)
    left = [name for name in names(top) if name.startswith(f"of-{process.pid}-")]
    assert left == [f"of-{process.pid}-1", f"of-{process.pid}-1.lock"]
    return left


def test_the_next_machine_takes_away_what_is_nobodys(top: Path, processes: ExitStack) -> None:
    for _ in range(3):
        leave(top, processes)
        with gntalloc.Machine() as machine:
            assert names(top) == [os.path.basename(machine.folder)]
        assert names(top) == []


@pytest.mark.parametrize(
    "command", [["doctor"], ["run", "--machine", "other", "--domid", "1", "true"], ["machine", "--", "true"]]
)
def test_so_does_each_command_that_has_to_do_with_machines(top: Path, processes: ExitStack, command: list[str]) -> None:
    leave(top, processes)
    done = subprocess.run([*GNTALLOC, *command], check=False, timeout=PATIENCE, capture_output=True, text=True)
    deadline = time.monotonic() + PATIENCE
    while names(top):
        assert time.monotonic() < deadline, (names(top), done)
        time.sleep(0.01)
    assert command != ["doctor"] or "killed machines had left 2 names there" in " ".join(done.stdout.split())


def test_machines_with_a_name_and_those_of_runs(top: Path, processes: ExitStack) -> None:
    named, _ = start(processes, *GNTALLOC, "machine", "--name", "m")
    run, line = start(processes, *GNTALLOC, "run", "--machine", "r", "--domid", "1", "sh", "-c", "echo $$; read x")
    listed = subprocess.run(
        [*GNTALLOC, "list", "r", "--json"], check=True, timeout=PATIENCE, capture_output=True, text=True
    )
    assert claims.sweep() == []
    assert names(top) == ["m", "r", "r.lock"]
    pid = int(listed.stdout.partition('"pid": ')[2].split(",")[0])
    for each in (named.pid, pid, run.pid, int(line)):
        os.kill(each, signal.SIGSTOP)
    assert claims.sweep() == []  # they are slow, and not dead
    for each in (named.pid, pid, run.pid, int(line)):
        with contextlib.suppress(ProcessLookupError):  # one's end may have ended another
            os.kill(each, signal.SIGKILL)
    named.wait(PATIENCE)
    run.wait(PATIENCE)
    until_ended(pid)
    deadline = time.monotonic() + PATIENCE
    gone: list[str] = []
    while names(top):
        gone += claims.sweep()
        assert time.monotonic() < deadline, (names(top), gone)
        time.sleep(0.01)
    assert "m" in gone  # the supervisor of the run may have taken r away


def test_a_machine_that_is_just_starting_is_not_nobodys(top: Path) -> None:
    """Others sweep all the time, and see folders at every moment of their lives."""
    done = threading.Event()
    gone: list[str] = []

    def sweep() -> None:
        while not done.is_set():
            gone.extend(claims.sweep())

    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    for sweeper in sweepers:
        sweeper.start()
    try:
        for _ in range(20):
            with gntalloc.Machine() as machine:
                assert os.path.exists(control_path(machine.folder))
                assert machine.domain(1).domid == 1
    finally:
        done.set()
        for sweeper in sweepers:
            sweeper.join(PATIENCE)


def test_a_folder_taken_away_before_it_is_locked_is_made_again(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, times = os.mkdir, 3

    def mkdir(path: str, mode: int) -> None:
        nonlocal times
        real(path, mode)
        if times:
            times -= 1
            assert claims.take_away(path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    claimed = claims.claim(str(top / "x"))
    assert times == 0
    assert not claims.take_away(str(top / "x"))
    with pytest.raises(FileExistsError):
        claims.claim(str(top / "x"))
    os.close(claimed)
    assert claims.take_away(str(top / "x"))
    assert names(top) == []


def test_what_is_no_machines_stays(top: Path, tmp_path: Path) -> None:
    (top / "file").write_text("")
    (top / "folder").mkdir()
    (top / "folder" / "mine").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (top / "link").symlink_to(tmp_path / "elsewhere")
    (top / "link.lock").symlink_to(tmp_path / "elsewhere" / "lock")
    (top / "full.lock").write_text("mine")
    (top / "folder.lock").write_text("")
    (top / "held.lock").write_text("")
    os.mkfifo(top / "fifo.lock")
    with open(top / "held.lock") as held, socket.socket(socket.AF_UNIX) as listener:
        fcntl.flock(held, fcntl.LOCK_EX)
        (top / "old").mkdir()  # of a version that locks nothing
        listener.bind(control_path(str(top / "old")))
        listener.listen()
        before = names(top)
        assert claims.sweep() == []
        assert names(top) == before
    assert sorted(claims.sweep()) == ["held.lock", "old"]
    assert (tmp_path / "elsewhere").exists()


# Beside a path, where others may write.


def run_at(path: Path) -> subprocess.CompletedProcess[str]:
    command = [*GNTALLOC, "run", "--machine", str(path), "--domid", "1", "true"]
    return subprocess.run(command, check=False, timeout=PATIENCE, capture_output=True, text=True)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "m.lock").symlink_to(tmp_path / "victim")
    done = run_at(tmp_path / "m")
    assert (done.returncode, "m.lock cannot be locked" in done.stderr) == (125, True), done
    assert sorted(os.listdir(tmp_path)) == ["m.lock"]


def test_a_lock_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.lock")
    done = run_at(tmp_path / "m")
    assert (done.returncode, "m.lock is no lock of yours" in done.stderr) == (125, True), done


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_lock_of_another_users_is_refused(tmp_path: Path) -> None:
    """It would hold it for ever."""
    (tmp_path / "m.lock").write_text("")
    os.chown(tmp_path / "m.lock", 65534, 65534)
    with open(tmp_path / "m.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = run_at(tmp_path / "m")
    assert (done.returncode, "m.lock is no lock of yours" in done.stderr) == (125, True), done
