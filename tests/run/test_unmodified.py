"""Programs that know nothing of us, in a user's test suite: Program(…, unmodified=True), the fixture gntalloc_run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from runs import python, wait_for

from gntalloc.testing import Program, ProgramFailed, Snapshot, assert_cleaned_up, cleanup, running_programs

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc import Machine
    from gntalloc.testing import Domains, Programs

TALKS: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


def line(program: Program) -> str:
    assert program.process.stdout is not None
    return str(program.process.stdout.readline()).rstrip("\n")


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_pair_in_c(gntalloc_run: Programs, build: Callable[..., str]) -> None:
    granter = gntalloc_run(1, [build("share"), "2", "2", "1", "page"], **TALKS)
    grantee = gntalloc_run(2, [build("map"), "1", "1", *line(granter).split()], **TALKS)
    assert grantee.result(timeout=40) is None
    assert [line(grantee), line(grantee)] == ["page 0", "page 1"]
    assert granter.process.communicate("look\n", timeout=40)[0] == "answer\n"
    assert granter.result(timeout=40) is None


def test_the_pid_is_the_program_s(gntalloc_domains: Domains) -> None:
    with Program(gntalloc_domains.alice, ["sh", "-c", "echo $$; read line"], unmodified=True, **TALKS) as program:
        assert int(line(program)) == program.pid
        assert program.pid != program.process.pid
        assert str(program.pid) in repr(program)
        program.kill(signal.SIGTERM)
        assert program.wait(timeout=40) == -signal.SIGTERM


def test_one_that_is_killed(gntalloc_machine: Machine, gntalloc_run: Programs, build: Callable[..., str]) -> None:
    """It is gone when `kill` returns, and its pages with it: the fixtures see to that."""
    granter = gntalloc_run(1, [build("share"), "2", "3", "1", "page"], **TALKS)
    line(granter)
    assert {grant.opener for grant in gntalloc_machine.grants()} == {granter.pid}
    granter.kill()
    assert not lives(granter.pid)
    assert (granter.running, granter.ending) == (False, "was killed by SIGKILL")
    wait_for(lambda: gntalloc_machine.grants() == [], "its pages are still there")


LEAVES = "sleep 1000 & echo $!; (setsid sleep 1000 & echo $!; wait) & read line"


@pytest.mark.parametrize("how", ["ends", "is killed", "runs", "is stopped"])
def test_all_that_it_has_left_ends_with_the_block(gntalloc_domains: Domains, how: str) -> None:
    with Program(gntalloc_domains.alice, ["sh", "-c", LEAVES], unmodified=True, **TALKS) as program:
        left = [int(line(program)) for _ in range(2)]
        if how == "ends":
            program.process.stdin.close()  # type: ignore[union-attr]
            program.wait(timeout=40)
        elif how == "is killed":
            program.kill()
        elif how == "is stopped":
            program.kill(signal.SIGSTOP)
        assert all(map(lives, left))
    assert not any(map(lives, [program.pid, program.process.pid, *left]))


def test_they_end_when_the_block_raises(build: Callable[..., str]) -> None:
    granter = None
    with suppress(KeyError), running_programs() as run:
        granter = run(1, [build("share"), "2", "1", "1", "page"], **TALKS)
        line(granter)
        raise KeyError
    assert granter is not None
    assert not lives(granter.pid)


def test_one_that_fails(gntalloc_domains: Domains) -> None:
    alice, _ = gntalloc_domains
    fails = Program(alice, ["sh", "-c", "exit 3"], unmodified=True)
    with pytest.raises(ProgramFailed, match=r"<Program sh pid \d+> ended with exit status 3"), fails:
        fails.process.wait(40)
    with Program(alice, ["sh", "-c", "exit 3"], unmodified=True) as program:
        assert program.wait(timeout=40) == 3


def test_what_cannot_be_started(gntalloc_domains: Domains, gntalloc_run: Programs, tmp_path: Path) -> None:
    alice, _ = gntalloc_domains
    (tmp_path / "text").write_text("no program")
    for command in ("nonesuch", "./nonesuch", str(tmp_path / "nonesuch")):
        with pytest.raises(FileNotFoundError, match=r"build it first.*nonesuch"):
            Program(alice, [command], unmodified=True)
    with pytest.raises(PermissionError):
        Program(alice, ["./text"], unmodified=True, cwd=tmp_path)
    with pytest.raises(TypeError, match="is for a command"):
        Program(alice, lives, unmodified=True)
    with pytest.raises(ValueError, match="domain 3 is none of these two"):
        gntalloc_run(3, ["true"])


def test_streams_environment_and_folder_are_the_program_s(gntalloc_domains: Domains, tmp_path: Path) -> None:
    (tmp_path / "here").touch()
    reading, writing = os.pipe()
    script = 'ls; echo "$WORD"; echo "$PYTHONHOME"; echo passed >/proc/self/fd/"$0"'
    command = ["sh", "-c", script, str(writing)]
    how = {"cwd": tmp_path, "env": {"WORD": "word", "PYTHONHOME": "/nowhere"}, "pass_fds": [writing], **TALKS}
    with os.fdopen(reading) as pipe, Program(gntalloc_domains.alice, command, unmodified=True, **how) as program:
        os.close(writing)
        assert program.process.communicate(timeout=40) == ("here\nword\n/nowhere\n", None)
        assert pipe.read() == "passed\n"


KEEPS = """
def ask(kind, *words, transaction=0):
    body = b''.join(word.encode() + b'\\0' for word in words)
    os.write(store, struct.pack('=IIII', kind, 0, transaction, len(body)) + body)
    while True:
        kind, _, _, length = struct.unpack('=IIII', os.read(store, 16))
        body = os.read(store, length)
        if kind != 15: return body.rstrip(b'\\0').decode()
if sys.argv[1] == 'device': store = device('xenbus')
else: s = socket.socket(socket.AF_UNIX); s.connect(os.environ['XENSTORED_PATH']); store = s.fileno()
ask(4, 'data', 'my token')
number = int(ask(6, ''))
ask(11, 'data/x', transaction=number)
say(number)
sys.stdin.readline()
"""


@pytest.mark.parametrize("way", ["device", "socket"])
def test_what_it_keeps_in_xenstore_is_said_and_whose_it_is(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(cleanup, "_PATIENCE", 0.05)
    domain = machine.domain(1)
    domain.devices.close()
    before = Snapshot.of(machine)
    with Program(domain, python(KEEPS, way), unmodified=True, **TALKS) as program:
        number = line(program)
        with pytest.raises(AssertionError) as caught:
            assert_cleaned_up(machine, before)
        program.kill()
    who = f"domain 1, pid {program.pid} (Program {sys.executable})"
    assert f"  {who}: watch of /local/domain/1/data kept in xenstore (token 'my token')" in str(caught.value)
    looked = f"transaction {number} open in xenstore, which has looked at /local/domain/1/data"
    assert f"  {who}: {looked}" in str(caught.value)
    assert "the machine:" not in str(caught.value)
    deadline = time.monotonic() + 20
    while Snapshot.of(machine).store:
        assert time.monotonic() < deadline
