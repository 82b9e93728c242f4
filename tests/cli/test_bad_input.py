"""Every command with all that can be wrong about it: no traceback, an exit status of the table, a short reason."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    Outcomes = dict[tuple[str, ...], subprocess.CompletedProcess[bytes]]

GNTALLOC = [sys.executable, "-m", "gntalloc"]
STATUSES = {0, 1, 2, 3, 124, 125, 126, 127, 130}
PATIENCE = 50

NOT_NUMBERS = ["²", "٤", "1_0", " 1", "+1", "-1", "1.5", "0x1", "", "9" * 5000, "99999999999999999999"]
NOT_SECONDS = ["nan", "inf", "-1", "1e5", "٤", "", "1_0", "99999999"]
NOT_DOMAINS = ["", "/", "m/", "/1", "m/²", "m/-1", "m/1/", "m/99999999999", "m/1 ", "m", "..", "\udcff"]
NAMES = ["", ".", "..", "x" * 200, "/proc/nothing/here", "/etc/passwd", "\udcff/x"]

WRONG_USAGE = [
    ["dance"],
    ["--nothing"],
    ["demo", "/nothing/there"],
    ["demo", "/"],
    ["demo", ""],
    *(["demo", "--pages", each] for each in NOT_NUMBERS),
    *(["limit", each] for each in NOT_DOMAINS),
    *(["limit", "m/1", each] for each in NOT_NUMBERS),
    *(["cat", each, "x"] for each in NOT_NUMBERS),
    *(["cat", "-w", each, "2", "x"] for each in NOT_SECONDS),
    *(["cat", "-l", "--size", each, "2", "x"] for each in NOT_NUMBERS),
    ["cat", "-d", "m/2", "2", "x"],
    ["cat", "-d", "m/1", "1", "x"],
    ["cat", "-d", "m/1", "-l", "1", "x" * 80],
    ["cat", "-d", "m/1", "-l", "2", "x" * 80],
    ["cat", "-d", "m/1", "-w", "1", "2", "x" * 80],
    ["cat", "2"],
    *(["disk", "info", "-w", each] for each in NOT_SECONDS),
    *(["disk", "nbd", "--port", "0", "--patience", each] for each in NOT_SECONDS),
    *(["disk", "nbd", "--port", each] for each in [*NOT_NUMBERS, "65536"]),
    *(["disk", "serve", "--for", each, "/etc/passwd"] for each in [*NOT_NUMBERS, "32752"]),
    *(["disk", "read", option, each] for option in ("--offset", "--length") for each in NOT_NUMBERS),
    *(["disk", "info", "--disk", each] for each in NOT_NUMBERS),
    *(["run", "--domid", each, "--", "true"] for each in NOT_NUMBERS),
    ["run", "--domid", "32752", "--", "true"],
    ["run", "--domid", "1"],
    ["run", "--", "true"],
    *(["run", "--machine", each, "--domid", "1", "--", "true"] for each in NAMES[:3]),
    *(["list", each] for each in NAMES[:3]),
    *(["machine", "--name", each] for each in NAMES[:3]),
    *(["machine", "--limit", each] for each in NOT_NUMBERS),
    *(
        ["machine", "--domain", each]
        for each in ["", "²", "1:", "1:uid=", "1:uid=²", "1:gid=0", "x", "1:uid=" + "9" * 30]
    ),
    ["machine", "--behaviour", "theirs"],
    ["doctor", "now"],
    ["lab", "run"],
    ["lab", "run", "--pair", "--in-guest", "'", "--in-dom0", "true"],
    *(["lab", "run", "--timeout", each, "true"] for each in NOT_SECONDS),
    *(["lab", "run", "--memory", each, "true"] for each in NOT_NUMBERS),
    ["lab", "run", "--guest", "vax", "true"],
    ["lab", "shell"],
]

FAILING = [
    (["list", "nothing"], 3),
    (["list", "/etc/passwd"], 3),
    (["list", "x" * 200], 1),
    (["limit", "nothing/1"], 3),
    (["limit", "m/9"], 1),
    (["cat", "-d", "nothing/1", "2", "x"], 3),
    (["cat", "-d", "m/9", "2", "x"], 3),
    *(
        (["cat", "-d", each, "2", "x"], 3)
        for each in ["/", "m/", "m/²", "m/99999999999", "m", "..", "/etc/passwd", "\udcff"]
    ),
    (["cat", "-d", "m/1", "-w", "0", "2", "x"], 124),
    (["cat", "-d", "m/1", "-w", "0.1", "-l", "2", "x"], 124),
    (["cat", "-d", "m/1", "-w", "0.1", "2", "two words"], 1),
    (["cat", "-d", "m/1", "-w", "0.1", "2", "ö"], 1),
    (["machine", "--name", "m"], 1),
    (["machine", "--name", "x" * 200], 1),
    (["machine", "--name", "/proc/nothing/here"], 1),
    (["machine", "--name", "/etc/passwd"], 1),
    (["machine", "--domain", "99999"], 1),
    (["machine", "--domain", "1", "--domain", "1"], 1),
    (["run", "--domid", "1", "--machine", "x" * 200, "--", "true"], 125),
    (["run", "--domid", "1", "--machine", "/proc/nothing/here", "--", "true"], 125),
    (["run", "--domid", "1", "--machine", "/etc/passwd", "--", "true"], 125),
    (["run", "--domid", "1", "--machine", "m", "--", "no-such-program"], 127),
    (["run", "--domid", "1", "--machine", "m", "--", "/no/such/program"], 127),
    (["run", "--domid", "1", "--machine", "m", "--", ""], 127),
    (["run", "--domid", "1", "--machine", "m", "--", "/"], 126),
    (["run", "--domid", "1", "--machine", "m", "--", "/etc/passwd"], 126),
    (["run", "--domid", "1", "--machine", "m", "--", "not-executable"], 126),
    (["run", "--domid", "1", "--machine", "m", "--", "sh", "-c", "exit 7"], 7),
]

# What people run every day; none of them waits for anybody.
EVERY = [
    ["--help"],
    ["-V"],
    ["demo", "--json", "/dev/null"],
    ["list"],
    ["list", "--json"],
    ["limit", "m/1"],
    ["cat", "-d", "m/1", "-w", "0", "2", "x"],
    ["run", "--domid", "1", "--machine", "m", "--", "echo", "hello"],
    ["disk", "info", "-d", "m/1", "-w", "0"],
    ["doctor"],
    ["lab", "info"],
    ["machine", "--name", "m"],
]
WRITING = [command for command in EVERY if command[0] not in {"cat", "disk", "lab", "machine", "run"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For XDG_RUNTIME_DIR: machine m, with domains 1 and 2, runs there."""
    runtime = tmp_path_factory.mktemp("r")
    command = [*GNTALLOC, "machine", "--name", "m"]
    process = subprocess.Popen(command, env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    while not process.stdout.readline().startswith(b"machine"):
        assert process.poll() is None
    (runtime / "not-executable").write_text("#!/bin/sh\n")
    yield runtime
    process.terminate()
    process.communicate(timeout=PATIENCE)


def usual_environment(folder: Path) -> dict[str, str]:
    without = {name: value for name, value in os.environ.items() if name not in {"GNTALLOC_DOMAIN", "XENSTORED_PATH"}}
    return without | {"XDG_RUNTIME_DIR": str(folder), "PATH": f"{os.environ['PATH']}:{folder}"}


def call(folder: Path, *words: str, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    environment = usual_environment(folder) | settings.pop("env", {})
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.run([*GNTALLOC, *words], env=environment, check=False, timeout=PATIENCE, **settings)


def look(done: subprocess.CompletedProcess[bytes], *statuses: int) -> str:
    """What it said on standard error. No traceback, one of these exit statuses, and a reason if it failed."""
    said = (done.stderr or b"").decode(errors="surrogateescape")
    assert b"Traceback" not in (done.stdout or b"") + (done.stderr or b""), said
    assert "a fault of gntalloc's" not in said
    assert "Exception ignored" not in said
    assert done.returncode in (set(statuses) or STATUSES), (done.returncode, said)
    assert len(said) < 1500
    return said


# One process that has imported everything forks for each call: a call takes milliseconds then, and there are hundreds.
MANY = """
import base64, json, os, sys, tempfile
from gntalloc import cli
import gntalloc.cli.cat, gntalloc.cli.demo, gntalloc.cli.disk, gntalloc.cli.doctor, gntalloc.cli.lab
import gntalloc.cli.limit, gntalloc.cli.list, gntalloc.cli.machine, gntalloc.cli.run
outcomes = []
for words, environment in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if not child:
            for number, file in enumerate((open(os.devnull), out, errors)):
                os.dup2(file.fileno(), number)
            os.environ.update(environment)
            sys.stdout = sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)
            try:
                cli.main([os.fsdecode(base64.b64decode(word)) for word in words])
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(end.code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = [(file.seek(0), base64.b64encode(file.read()).decode())[1] for file in (out, errors)]
        outcomes.append([status, *said])
json.dump(outcomes, sys.stdout)
"""


def call_all(
    folder: Path, calls: list[tuple[list[str], dict[str, str]]], **environment: str
) -> list[subprocess.CompletedProcess[bytes]]:
    """What comes of each of these words, each with additions to the environment."""
    asked = [([base64.b64encode(os.fsencode(word)).decode() for word in words], more) for words, more in calls]
    done = subprocess.run(
        [sys.executable, "-c", MANY],
        env=usual_environment(folder) | environment,
        input=json.dumps(asked),
        text=True,
        capture_output=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return [
        subprocess.CompletedProcess(words, status, base64.b64decode(out), base64.b64decode(errors))
        for (words, _), (status, out, errors) in zip(calls, json.loads(done.stdout), strict=True)
    ]


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Outcomes:
    """Of all that is wrong in itself."""
    every = [*WRONG_USAGE, *(words for words, _ in FAILING)]
    return {tuple(done.args): done for done in call_all(folder, [(words, {}) for words in every])}


@pytest.mark.parametrize("words", WRONG_USAGE, ids=lambda words: ascii(" ".join(words))[1:60])
def test_wrong_usage(outcomes: Outcomes, words: list[str]) -> None:
    assert look(outcomes[tuple(words)], 2).strip()


@pytest.mark.parametrize(
    ("words", "status"), FAILING, ids=lambda words: ascii(" ".join(words))[1:60] if isinstance(words, list) else ""
)
def test_what_cannot_be_done(outcomes: Outcomes, words: list[str], status: int) -> None:
    said = look(outcomes[tuple(words)], status)
    assert status == 7 or (said.startswith("gntalloc") and said.count("\n") == 1), said


@pytest.mark.parametrize("words", WRITING, ids=" ".join)
def test_output_that_cannot_be_written(folder: Path, words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        said = look(call(folder, *words, stdout=full), 1)
    assert "standard output cannot be written: No space left on device" in said


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
@pytest.mark.parametrize("closing", [">&-", "<&- >&- 2>&-"])
def test_closed_streams(folder: Path, words: list[str], closing: str) -> None:
    command = ["sh", "-c", f'exec "$@" {closing}', "sh", *GNTALLOC, *words]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
    environment.pop("GNTALLOC_DOMAIN", None)
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=PATIENCE)
    closed_echo = words[0] == "run" and ">&-" in closing and closing != "2>&-"  # echo says that it cannot write
    usual = {"cat": 124, "disk": 3, "machine": 1}.get(words[0], 0)
    here = {"doctor": {0, 1}, "lab": {0, 3}}  # as this computer is, and whether the lab has images
    look(done, *({0, 1} if closed_echo else here.get(words[0], {usual})))


def test_a_closed_stream_whose_number_a_library_has_taken() -> None:
    """As libffi does with CPython 3.14: a file is number 1 before the command line begins, if not one of ours."""
    begin = "import os; from gntalloc.cli import main; os.open('/dev/zero', 0); main(['--version'])"
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", begin]
    done = subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE)
    look(done, 0)


def test_a_reader_that_leaves(folder: Path) -> None:
    for words in WRITING:
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "wb") as broken:
            done = call(folder, *words, stdout=broken)
        assert look(done, 1) == ""


ENVIRONMENTS: dict[str, dict[str, str]] = {
    "no domain": {"GNTALLOC_DOMAIN": ""},
    "a domain that is none": {"GNTALLOC_DOMAIN": "²"},
    "a domain that is not there": {"GNTALLOC_DOMAIN": "m/9"},
    "a domain whose path is too long": {"GNTALLOC_DOMAIN": "/" + "x" * 300},
    "a domain of no machine": {"GNTALLOC_DOMAIN": "/dev/null"},
    "a long runtime folder": {"XDG_RUNTIME_DIR": "{long}"},
    "a runtime folder that is a file": {"XDG_RUNTIME_DIR": "/etc/passwd"},
    "a runtime folder that cannot be written": {"XDG_RUNTIME_DIR": "/proc"},
    "a relative runtime folder": {"XDG_RUNTIME_DIR": "."},
    "gntalloc is a file there": {"XDG_RUNTIME_DIR": "{file}"},
    "bytes that are no text": {"XDG_RUNTIME_DIR": "\udcff", "GNTALLOC_DOMAIN": "\udcff/1", "HOME": "\udcff"},
    "no xenstore": {"XENSTORED_PATH": "/" + "x" * 300},
    "no home": {"HOME": "/nowhere", "XDG_CACHE_HOME": "", "TMPDIR": "/nowhere"},
    "the lab nowhere": {"GNTALLOC_LAB_MIRROR": "x", "XDG_CACHE_HOME": "/proc"},
    "no PATH": {"PATH": ""},
    "ASCII": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "Latin-1": {"PYTHONIOENCODING": "latin-1"},
    "ASCII by order": {"PYTHONIOENCODING": "ascii"},
    "a locale that is not there": {"LC_ALL": "xx_XX.UTF-8"},
    "no colour, no terminal": {"NO_COLOR": "1", "TERM": "dumb"},
    "columns that are none": {"COLUMNS": "x", "LINES": "-1", "TERM": "nothing"},
    "one column": {"COLUMNS": "1"},
}


ENCODINGS = {"ASCII", "Latin-1", "ASCII by order", "a locale that is not there"}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_strange_environment(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / ("x" * 120)).mkdir()
    (tmp_path / "gntalloc").touch()
    environment = ENVIRONMENTS[name]
    places = {"{long}": str(tmp_path / ("x" * 120)), "{file}": str(tmp_path)}
    chosen = {name: places.get(value, value) for name, value in environment.items()}
    # A machine that could run would not end; one of domain 99999 does.
    commands = [["machine", "--name", "m", "--domain", "99999"] if each[0] == "machine" else each for each in EVERY]
    if "XDG_RUNTIME_DIR" in environment:  # there may be machines of others, which answer when they like
        commands = [["list", "m"] if each[0] == "list" else each for each in commands]
    if name in ENCODINGS:  # which Python settles when it starts
        for words in (["list"], ["doctor"], ["demo", "/dev/null"]):
            look(call(folder, *words, env=chosen), 0, 1)
    for done in call_all(folder, [(words, chosen) for words in commands]):
        look(done)


def test_a_long_runtime_folder_is_named(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    for words in (["demo"], ["list", "m"], ["run", "--domid", "1", "true"], ["cat", "-d", "m/1", "2", "x"]):
        said = look(call(long, *words), 1, 125)
        assert "set XDG_RUNTIME_DIR to a folder with a shorter path" in said


@pytest.mark.parametrize("kind", ["removed", "not to be read"])
def test_a_folder_that_is_no_more(folder: Path, tmp_path: Path, kind: str) -> None:
    here = tmp_path / "here"
    script = {"removed": 'rmdir "$PWD" && exec "$@"', "not to be read": 'chmod 0 . && exec "$@"'}[kind]
    for words in [
        *EVERY,
        ["list", "./m"],
        ["run", "--domid", "1", "--machine", "./m", "true"],
        ["cat", "-d", "./m/1", "2", "x"],
    ]:
        here.mkdir(exist_ok=True)
        command = ["sh", "-c", script, "sh", *GNTALLOC, *words]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
        environment.pop("GNTALLOC_DOMAIN", None)
        look(subprocess.run(command, env=environment, cwd=here, capture_output=True, check=False, timeout=PATIENCE))
        if here.exists():
            here.chmod(0o700)


def on_a_terminal(folder: Path, columns: int, *words: str, **environment: str) -> tuple[int, str]:
    """Exit status and screen of a command on a terminal of so many columns."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "GNTALLOC_DOMAIN"}}
    variables |= {"XDG_RUNTIME_DIR": str(folder), "TERM": "xterm", **environment}
    shown: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(ours, 65536):
                shown.append(piece)
        except OSError:
            pass  # its last writer has ended

    process = subprocess.Popen(
        [*GNTALLOC, *words], env=variables, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    reader = threading.Thread(target=read)
    reader.start()
    try:
        status = process.wait(PATIENCE)
    finally:
        process.kill()
        reader.join(PATIENCE)
        os.close(ours)
    return status, b"".join(shown).decode(errors="replace")


@pytest.mark.parametrize("columns", [20, 40, 48, 80])
@pytest.mark.parametrize(
    "words", [["list"], ["doctor"], ["demo", "/dev/null"], ["limit", "m/1"]], ids=lambda words: words[0]
)
def test_narrow_terminals(folder: Path, words: list[str], columns: int) -> None:
    import gntalloc

    domain = gntalloc.current_domain(str(folder / "gntalloc" / "m" / "1"))
    with domain.share(2, 3) as shared:
        status, screen = on_a_terminal(folder, columns, *words)
        assert shared.grant
    domain.close()
    assert (status, "Traceback" in screen) == (0, False), screen
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen)
    if words == ["list"] and columns >= 40:
        for word in ("pages in use", "references", "granted", str(shared.grant).split(":")[1]):  # in one line
            assert word in plain or columns == 80, (word, plain)
        if columns < 60:
            assert max(map(len, plain.split("\r\n"))) <= columns, plain


@pytest.mark.parametrize(
    "environment",
    [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=str,
)
def test_terminals_that_can_little(folder: Path, environment: dict[str, str]) -> None:
    for words in (["list"], ["doctor"], ["demo", "/dev/null"]):
        status, screen = on_a_terminal(folder, 80, *words, **environment)
        assert (status, "Traceback" in screen) == (0, False), screen


def test_no_such_domain_in_a_machine_that_answers(folder: Path) -> None:
    said = look(call(folder, "cat", "-d", "m/9", "2", "x"), 3)
    assert "machine m answers and has domains 1, 2; there is no domain 9" in said
    said = look(call(folder, "cat", "2", "x", env={"GNTALLOC_DOMAIN": str(folder / "gntalloc" / "m" / "9")}), 3)
    assert "machine m answers and has domains 1, 2; there is no domain 9" in said


def test_no_domain_at_all(folder: Path) -> None:
    for domain in ("", None):
        said = look(call(folder, "cat", "2", "x", env={} if domain is None else {"GNTALLOC_DOMAIN": domain}), 3)
        assert "this program is in no domain: $GNTALLOC_DOMAIN is not set" in said


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="there is no setpriv (apt install util-linux)")
def test_another_user_s(folder: Path) -> None:
    """Neither says that one should be started."""
    stranger = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    tried = subprocess.run([*stranger, *GNTALLOC, "-V"], capture_output=True, check=False, timeout=PATIENCE)
    if tried.returncode != 0:
        pytest.skip(f"nobody may not read this Python or this package: {tried.stderr.decode()}")
    machine = folder / "gntalloc" / "m"
    for words in (["cat", "-d", str(machine / "1"), "2", "x"], ["list", str(machine)], ["limit", f"{machine}/1"]):
        done = subprocess.run(
            [*stranger, *GNTALLOC, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=PATIENCE,
        )
        said = look(done, 3)
        assert "root's" in said
        assert "start one" not in said


def test_cat_says_what_it_cannot_write_or_read(folder: Path) -> None:
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
    for name, redirection, reason in (
        ("full", ">/dev/full", "No space left on device"),
        ("shut", "0>/dev/null", "Bad file descriptor"),
    ):
        command = f'exec "$@" {redirection}'
        server = subprocess.Popen(
            ["sh", "-c", command, "sh", *GNTALLOC, "cat", "-d", "m/1", "-w", "40", "-l", "2", name],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        client = call(folder, "cat", "-d", "m/2", "-w", "40", "1", name, stdin=None, input=b"x" * 100)
        look(client)
        try:
            _, said = server.communicate(timeout=PATIENCE)
        finally:
            server.kill()
        assert server.returncode == 1
        assert b"Traceback" not in said
        assert reason.encode() in said


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version(folder: Path, option: str) -> None:
    import gntalloc

    assert call(folder, option).stdout == f"gntalloc {gntalloc.__version__}\n".encode()


HELP = [[], *([name] for name in ("demo", "run", "machine", "list", "limit", "cat", "disk", "doctor", "lab"))]
HELP += [["disk", name] for name in ("info", "read", "write", "serve", "nbd")]
HELP += [["lab", name] for name in ("build", "info", "run", "shell")]


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_has_no_marks_of_its_maker(folder: Path, words: list[str]) -> None:
    text = call(folder, *words, "--help", env={"COLUMNS": "80"}).stdout.decode()
    assert "\\b" not in text
    assert "\b" not in text
    assert "Usage: gntalloc" in text


def complete(folder: Path, shell: str, *words: str) -> list[str]:
    """What the shell is offered for the last word."""
    line = " ".join(["gntalloc", *words])
    environment = {"_GNTALLOC_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    if shell == "fish":
        environment |= {"COMP_CWORD": words[-1]}
    done = call(folder, env=environment)
    look(done)
    return done.stdout.decode().split()


def test_completion(folder: Path) -> None:
    assert complete(folder, "bash", "lim") == ["plain,limit"]
    assert complete(folder, "bash", "list", "") == ["plain,m"]
    assert complete(folder, "bash", "limit", "m/") == ["plain,m/1", "plain,m/2"]
    assert complete(folder, "bash", "cat", "-d", "m/") == ["plain,m/1", "plain,m/2"]
    assert complete(folder, "bash", "disk", "info", "-d", "m/") == ["plain,m/1", "plain,m/2"]
    assert complete(folder, "bash", "cat", "-d", "m/1", "") == ["plain,1", "plain,2"]
    assert complete(folder, "bash", "run", "--machine", "m", "--domid", "") == ["plain,1", "plain,2"]
    assert complete(folder, "bash", "machine", "--name", "") == ["plain,m"]
    for shell in ("zsh", "fish"):
        assert any("m/2" in each for each in complete(folder, shell, "limit", "m/"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_of_the_shells(folder: Path, shell: str) -> None:
    script = call(folder, env={"_GNTALLOC_COMPLETE": f"{shell}_source"})
    if shell == "bash" and b"not supported" in script.stderr:
        pytest.skip("completion needs bash 4.4 or newer: click says so of this one")
    assert b"gntalloc" in script.stdout


def test_completion_where_nothing_can_be_seen(tmp_path: Path) -> None:
    (tmp_path / "gntalloc").touch()
    assert complete(tmp_path, "bash", "limit", "m") == []
    assert complete(tmp_path, "bash", "run", "--domid", "") == []
