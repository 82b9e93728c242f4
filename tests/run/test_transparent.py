"""What the shell sees of a run is the program: streams, folder, environment, signals, stops, exit status."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from limits import Limited, status_of
from runs import said, tell, wait_for

if TYPE_CHECKING:
    from runs import Runs


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", code)


NO_PROCESS = """
import os, signal
from gntalloc import GntallocError
from gntalloc.run import launcher

def fork():
    raise BlockingIOError(11, "Resource temporarily unavailable")

os.fork, before = fork, os.listdir("/proc/self/fd")
try:
    launcher.run(["true"], domid=1)
except GntallocError as error:
    print(error)
assert os.listdir("/proc/self/fd") == before, os.listdir("/proc/self/fd")
assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
"""


def test_where_no_process_can_be_started_nothing_is_left() -> None:
    done = subprocess.run([sys.executable, "-c", NO_PROCESS], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stderr
    assert "ulimit -u" in done.stdout


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
    file = tmp_path / "file"
    assert runs(1, str(file)).returncode == 127
    file.write_text("#!/no/such/interpreter\n")
    done = runs(1, str(file))
    assert done.returncode == 126
    assert "Permission denied" in done.stderr
    file.chmod(0o755)
    done = runs(1, str(file))
    assert done.returncode == 127
    assert "first line" in done.stderr
    done = runs(1, str(tmp_path))
    assert done.returncode == 126
    assert "it is a folder" in done.stderr


def test_a_script_without_a_first_line_is_the_shell_s(runs: Runs, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$0" "$@"\n')
    script.chmod(0o755)
    assert runs(1, str(script), "a b", "c").stdout == f"{script} a b c\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(runs: Runs, tmp_path: Path, closed: str) -> None:
    """They are closed for the program, and no file of ours takes their numbers, where it could be lost."""
    code = (
        "import os, sys; os.open(sys.argv[1], 2); print(os.listdir('/proc/self/fd')[:-1], file=open(sys.argv[2], 'w'))"
    )
    run, bare = str(tmp_path / "run"), str(tmp_path / "bare")
    for command in (runs.command(1, *python(code), "/dev/xen/gntdev", run), [*python(code), os.devnull, bare]):
        done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command], check=False, timeout=50)
        assert done.returncode == 0
    assert Path(run).read_text() == Path(bare).read_text()


def test_limits_and_umask_are_the_program_s_alone(runs: Runs) -> None:
    """The machine lives longer than the run that starts it, and so under none of its soft limits, nor in its folder."""
    strict = 'umask 777; ulimit -Sn 12; ulimit -Sf 1; ulimit -St 77; exec "$@"'
    show = "umask; ulimit -Sn; ulimit -Sf; ulimit -St; head -1"
    first = subprocess.Popen(
        ["sh", "-c", strict, "sh", *runs.command(1, "sh", "-c", show)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    runs.started.append(first)
    assert [said(first) for _ in range(4)] == ["0777", "12", "1", "77"]
    files = "import os; print(len([os.open('/dev/xen/evtchn', 2) for _ in range(100)]))"
    assert runs(2, *python(files)).stdout == "100\n"
    tell(first, "on")
    assert first.wait(20) == 0


def test_hard_limits_that_no_machine_can_live_with(runs: Runs) -> None:
    for limit in ("-n 16", "-f 1"):
        done = subprocess.run(
            ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", *runs.command(1, "true")],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert done.returncode == 125
        assert f"ulimit -H{limit[1]}" in done.stderr
        assert runs.over()


def test_a_caller_that_ignores_the_end_of_children(runs: Runs) -> None:
    show = python("import signal, sys; sys.exit(signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN)")
    ignore = python(
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    done = subprocess.run([*ignore, *runs.command(1, *show)], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (1, "")


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
    with suppress(BrokenPipeError):  # it may have been woken by the signal alone
        tell(process, "wake up")
    assert said(process) == "got it"
    assert process.wait(20) == 3


def test_killing_it_kills_the_program(runs: Runs) -> None:
    process = runs.start(1, "sh", "-c", "echo $$; exec sleep 1000")
    program = int(said(process))
    process.kill()
    process.wait(20)
    wait_for(lambda: not os.path.exists(f"/proc/{program}"), "the program lives on")


def test_killing_a_supervisor_leaves_the_machine_to_others(runs: Runs) -> None:
    """The run that started the machine ends all that it had started, but for that."""
    first = runs.start(1, "sh", "-c", "echo $PPID; exec sleep 1000")
    supervisor = int(said(first))
    opens = "import os, sys; sys.stdin.readline(); os.open('/dev/xen/gntdev', os.O_RDWR); print('opened', flush=True)"
    second = runs.start(2, "sh", "-c", 'echo up; exec "$@"', "sh", *python(opens))
    assert said(second) == "up"
    os.kill(supervisor, signal.SIGKILL)
    assert first.wait(20) == -signal.SIGKILL
    tell(second, "go")
    assert said(second) == "opened"
    assert second.wait(20) == 0


def test_ignored_and_blocked_signals_are_the_callers(runs: Runs) -> None:
    """Those that there are: 32 and 33 are glibc's own, whose posix_spawn may leave them ignored (2.36 does)."""
    show = "grep -E 'SigBlk|SigIgn' /proc/self/status"

    def masks(text: str) -> dict[str, int]:
        fields = dict(line.split() for line in text.splitlines())
        return {name: int(mask, 16) & ~(0b11 << 31) for name, mask in fields.items()}

    for_it = subprocess.run(["sh", "-c", show], capture_output=True, text=True, check=True, timeout=50).stdout
    assert masks(runs(1, "sh", "-c", show).stdout) == masks(for_it)
    assert len(masks(for_it)) == 2


def test_it_has_no_descriptor_of_ours(runs: Runs) -> None:
    done = runs(1, *python("import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])"))
    assert done.stdout == "[0, 1, 2]\n"


def test_what_the_program_closes_is_closed(runs: Runs) -> None:
    """Its peer sees that, while the program runs: neither `run` nor the supervisor nor the machine hold it."""
    reading, writing = os.pipe()
    process = runs.start(1, "sh", "-c", f"exec {writing}>&- <&- >&-; kill -STOP $$", pass_fds=[writing])
    os.close(writing)
    assert process.stdin is not None
    assert process.stdout is not None
    output = process.stdout.fileno()
    wait_for(lambda: select.select([reading], [], [], 0)[0] != [], "somebody holds the pipe")
    wait_for(lambda: select.select([output], [], [], 0)[0] != [], "somebody holds the output")
    with pytest.raises(BrokenPipeError):
        os.write(process.stdin.fileno(), b"is anybody there?")
    assert process.stdout.read() == ""
    assert process.poll() is None
    os.close(reading)


def test_it_stops_and_goes_on_with_the_program(runs: Runs) -> None:
    process = runs.start(1, "sh", "-c", "echo $$; read x; echo $x")
    program = int(said(process))
    os.kill(program, signal.SIGSTOP)
    status = status_of(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(signal.SIGCONT)
    tell(process, "on")
    assert said(process) == "on"
    assert process.wait(20) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGCONT, 7), (signal.SIGKILL, -9)])
def test_it_goes_on_when_the_program_does_whoever_sees_to_that(runs: Runs, number: int, status: int) -> None:
    process = runs.start(1, "sh", "-c", "echo $$; read x; exit 7")
    program = int(said(process))
    os.kill(program, signal.SIGSTOP)
    how = status_of(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(how)
    os.kill(program, number)
    if number == signal.SIGCONT:
        tell(process, "on")
    assert process.wait(20) == status


def test_who_called_it_goes_on_when_a_stopped_program_is_killed(runs: Runs) -> None:
    """In CI a group has no tie to the rest of its session: nothing of ours may seem to be one."""
    command = runs.command(1, "sh", "-c", "echo $$; kill -STOP $$")
    script = ["sh", "-c", '"$@"; echo "$?"', "sh", *command]
    with Limited(script, stdout=subprocess.PIPE, text=True, start_new_session=True) as shell:
        program = int(said(shell))
        run = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().strip()
        wait_for(
            lambda: Path(f"/proc/{run}/stat").read_text().rpartition(")")[2].split()[0] == "T", "run does not stop"
        )
        os.kill(program, signal.SIGKILL)
        assert (said(shell), shell.wait(20)) == (str(128 + signal.SIGKILL), 0)


def test_stops_in_any_order(runs: Runs) -> None:
    process = runs.start(1, "sh", "-c", "echo $$; read x; exit 7")
    program = int(said(process))
    for _ in range(300):
        for whose, number in ((process.pid, signal.SIGSTOP), (program, signal.SIGSTOP), (process.pid, signal.SIGCONT)):
            os.kill(whose, number)
    os.kill(program, signal.SIGCONT)
    process.send_signal(signal.SIGCONT)
    tell(process, "on")
    assert process.wait(20) == 7


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
        status_of(shell)


def test_an_option_that_there_is_not_is_no_program(runs: Runs) -> None:
    done = runs(1, "true", options=("--user-namespace",))
    assert done.returncode == 2
    assert "No such option" in done.stderr
    assert runs(1, "echo", "--user-namespace").stdout == "--user-namespace\n"


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
    assert done.returncode == 125
    assert "under `gntalloc run` already" in done.stderr
