"""What the shell sees of a run is the program: streams, folder, environment, signals, stops, exit status."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runs import said, tell, wait_for

if TYPE_CHECKING:
    from runs import Runs


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", code)


def test_streams_folder_arguments_and_environment(runs: Runs, tmp_path: Path) -> None:
    script = 'cat; pwd; echo "$0 $1"; echo $MINE; echo oops >&2; env | grep -c LC_CTYPE'
    environment = {"PATH": os.environ["PATH"], "MINE": "a b", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = runs(1, "sh", "-c", script, "zero", "--one", input="in\n", stdin=None, cwd=tmp_path, env=environment)
    assert done.stdout == f"in\n{tmp_path}\nzero --one\na b\n0\n"
    assert done.stderr == "oops\n"


def test_xenstore_and_the_domain_are_in_the_environment(runs: Runs) -> None:
    done = runs(3, "sh", "-c", "echo $XENSTORED_PATH $GNTALLOC_DOMAIN")
    assert done.stdout == f"{runs.folder}/3.store {runs.folder}/3\n"


@pytest.mark.parametrize("status", [0, 1, 77])
def test_exit_status(runs: Runs, status: int) -> None:
    assert runs(1, "sh", "-c", f"exit {status}").returncode == status


def test_a_program_that_is_not_there_or_is_none(runs: Runs, tmp_path: Path) -> None:
    assert runs(1, "no-such-program").returncode == 127
    script = tmp_path / "script"
    script.write_text("neither ELF nor #!\n")
    script.chmod(0o755)
    done = runs(1, str(script))
    assert done.returncode == 126
    assert "Exec format error" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_it_ends_by_the_signal_that_ended_the_program(runs: Runs, number: int) -> None:
    assert runs(1, "sh", "-c", f"kill -{int(number)} $$").returncode == -number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_it_reaches_the_program(runs: Runs, number: int) -> None:
    process = runs.start(
        1, "sh", "-c", f"trap 'echo got it; exit 3' {int(number)}; echo ready; while :; do read x; done"
    )
    assert said(process) == "ready"
    process.send_signal(number)
    tell(process, "wake up")
    assert said(process) == "got it"
    assert process.wait(20) == 3


def test_killing_it_kills_the_program(runs: Runs) -> None:
    process = runs.start(1, "sh", "-c", "echo $$; exec sleep 1000")
    program = int(said(process))
    process.kill()
    process.wait(20)
    wait_for(lambda: not os.path.exists(f"/proc/{program}"), "the program lives on")


def test_ignored_and_blocked_signals_are_the_callers(runs: Runs) -> None:
    show = "grep -E 'SigBlk|SigIgn' /proc/self/status"
    for_it = subprocess.run(["sh", "-c", show], capture_output=True, text=True, check=True).stdout
    assert runs(1, "sh", "-c", show).stdout == for_it


def test_it_has_no_descriptor_of_ours(runs: Runs) -> None:
    done = runs(1, *python("import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])"))
    assert done.stdout == "[0, 1, 2]\n"


def test_it_stops_and_goes_on_with_the_program(runs: Runs) -> None:
    process = runs.start(1, "sh", "-c", "echo $$; read x; echo $x")
    program = int(said(process))
    os.kill(program, signal.SIGSTOP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(signal.SIGCONT)
    tell(process, "on")
    assert said(process) == "on"
    assert process.wait(20) == 0


def test_job_control_in_a_shell(runs: Runs) -> None:
    """Ctrl-Z stops the job, fg goes on with it, Ctrl-C ends it: in a terminal, as typed."""
    shell, terminal = pty.fork()
    if not shell:
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(terminal, 4096)
        seen = seen.split(text, 1)[1]

    try:
        os.write(terminal, b"stty -echo; PS1='prompt> '; PS2=\n")
        until(b"prompt> ")
        command = " ".join(runs.command(1, "sh", "-c", "'echo up; exec cat'"))
        os.write(terminal, command.encode() + b"\n")
        until(b"up\r\n")
        os.write(terminal, b"one\n")
        until(b"one\r\n")
        os.write(terminal, b"\x1a")
        until(b"Stopped")
        until(b"prompt> ")
        os.write(terminal, b"fg\n")
        until(b"gntalloc run")
        os.write(terminal, b"two\n")
        until(b"two\r\n")
        os.write(terminal, b"\x03")
        until(b"prompt> ")
        os.write(terminal, b"echo status $?\n")
        until(b"status 130")
    finally:
        os.kill(shell, signal.SIGKILL)
        os.close(terminal)
        os.waitpid(shell, 0)


def test_what_the_program_leaves_behind_is_served_on(runs: Runs) -> None:
    opens = "import os, sys; sys.stdin.readline(); os.open('/dev/xen/gntdev', os.O_RDWR); print('opened', flush=True)"
    process = runs.start(
        1, "sh", "-c", '"$@" <&3 & exit 5', "sh", *python(opens), preexec_fn=lambda: os.dup2(0, 3), pass_fds=(3,)
    )
    assert process.wait(20) == 5
    assert not runs.over()
    tell(process, "go")
    assert said(process) == "opened"


def test_a_run_in_a_run_is_refused_with_the_reason(runs: Runs) -> None:
    done = runs(1, *runs.command(2, "true"))
    assert done.returncode == 1
    assert "under `gntalloc run` already" in done.stderr
