from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from gntalloc.cli import doctor
from gntalloc.cli.probe import Finding

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GOOD = Finding("seals", ok=True, required=True, found="work", purpose="pages", advice="")
BAD = Finding("leases", ok=False, required=True, found="refused", purpose="knowing", advice="newer kernel")
SPARE = Finding("QEMU", ok=False, required=False, found="not there", purpose="the lab", advice="apt install it")
RUN = Finding("ptrace", ok=False, required=False, found="refused", purpose="run", advice="sysctl", of_run=True)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    def run(findings: list[Finding], *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(doctor, "look_at_everything", lambda: findings)
        result = CliRunner().invoke(doctor.command, arguments)
        return result.exit_code, result.output

    return run


@pytest.mark.parametrize(
    ("findings", "strict", "code"),
    [
        ([GOOD], False, 0),
        ([GOOD, SPARE], False, 0),
        ([GOOD, SPARE], True, 0),
        ([GOOD, SPARE, RUN], False, 0),
        ([GOOD, RUN], True, 1),
        ([GOOD], True, 0),
        ([GOOD, BAD], False, 1),
        ([BAD], True, 1),
    ],
)
def test_exit_status(ask: Callable[..., tuple[int, str]], findings: list[Finding], strict: bool, code: int) -> None:
    assert ask(findings, *(["--strict"] if strict else []))[0] == code
    assert ask(findings, "--json", *(["--strict"] if strict else []))[0] == code


def test_plain_text(ask: Callable[..., tuple[int, str]]) -> None:
    _, text = ask([GOOD, BAD, SPARE])
    assert text.splitlines() == [
        "          what    found",
        "ok        seals   work",
        "MISSING   leases  refused",
        "optional  QEMU    not there",
        "",
        "lacking  good for  what to do",
        "leases   knowing   newer kernel",
        "QEMU     the lab   apt install it",
        "",
        "A machine cannot run here.",
    ]
    assert ask([GOOD])[1].splitlines()[-2:] == [
        "A machine can run here, without Xen.",
        "So can unmodified programs, with `gntalloc run`.",
    ]
    lines = ask([GOOD, RUN])[1].splitlines()
    assert lines[2] == "not run  ptrace  refused"
    assert lines[-1] == "Unmodified programs cannot: `gntalloc run` would not work."


def test_json(ask: Callable[..., tuple[int, str]]) -> None:
    report = json.loads(ask([GOOD, SPARE], "--json")[1])
    assert report["ok"] is True
    assert report["findings"][1] == {
        "name": "QEMU",
        "ok": False,
        "required": False,
        "found": "not there",
        "purpose": "the lab",
        "advice": "apt install it",
        "of_run": False,
    }


def test_for_real() -> None:
    command = [sys.executable, "-m", "gntalloc", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["ok"]


REFUSING = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, int(sys.argv[1])), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
code = b''.join(struct.pack('=HBBI', *line) for line in lines)
program = struct.pack('=H6xQ', len(lines), ctypes.cast(ctypes.c_char_p(code), ctypes.c_void_p).value)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program) == 0
os.execv(sys.executable, [sys.executable, '-m', 'gntalloc', 'doctor', '--json', '--strict'])
"""


@pytest.mark.parametrize(
    ("call", "lacking", "strictly"),
    [
        (317, {"seccomp notification", "a child's memory", "ptrace", "user namespaces"}, True),
        (310, {"a child's memory", "ptrace", "user namespaces"}, True),
        (101, {"ptrace"}, True),
        (272, {"user namespaces"}, False),
    ],
    ids=["seccomp", "process_vm_readv", "ptrace", "unshare"],
)
def test_under_a_sandbox_that_refuses_a_call(call: int, lacking: set[str], strictly: bool) -> None:
    """As containers do: EPERM, from a seccomp filter around the doctor."""
    command = [sys.executable, "-c", REFUSING, str(call)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    of_run = {"seccomp notification", "a child's memory", "ptrace", "user namespaces"}
    assert {name for name in of_run if not findings[name]["ok"]} == lacking
    assert all(findings[name]["found"].startswith("Operation not permitted") for name in lacking)
    assert done.returncode == strictly


def test_within_a_run(tmp_path: Path) -> None:
    ours = [sys.executable, "-m", "gntalloc"]
    command = [*ours, "run", "--domid", "1", "--machine", str(tmp_path / "machine"), "--", *ours, "doctor", "--strict"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 1
    assert "outside of `gntalloc run`" in done.stdout


@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare (apt install util-linux)")
def test_where_there_may_be_no_more_user_namespaces() -> None:
    script = 'echo 0 >/proc/sys/user/max_user_namespaces; exec "$@"'
    command = ["unshare", "-Ur", "sh", "-c", script, "sh", sys.executable, "-m", "gntalloc", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["user namespaces"]["found"] == "No space left on device"
    assert "user.max_user_namespaces" in findings["user namespaces"]["advice"]
    assert findings["ptrace"]["ok"]


@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare (apt install util-linux)")
@pytest.mark.parametrize(
    ("options", "before", "lacking"),
    [
        ("-Ur", "true", set()),
        ("-Urn", "true", set()),
        ("-Urpf --mount-proc", "true", set()),
        ("-Urpf", "true", {"/proc"}),
        ("-Urm", "mount -t tmpfs none /proc", {"/proc"}),
        ("-Urm", "mount -t tmpfs none /dev", {"/dev/null"}),
        ("-Urm", "mount -t tmpfs none /sys", set()),
        ("-Urm", "mount -t tmpfs none $folder && mount -o remount,ro $folder", {"a folder for machines"}),
        ("-Ur unshare -Ur unshare -Urm", "true", set()),
    ],
)
def test_in_other_namespaces(tmp_path: Path, options: str, before: str, lacking: set[str]) -> None:
    """What is required and lacks there is named; nothing else is said to be lacking for its own sake."""
    command = ["unshare", *options.split(), "sh", "-c", f'{before} && exec "$@"', "sh"]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "folder": str(tmp_path)}
    tried = subprocess.run([*command, "true"], env=environment, capture_output=True, text=True, check=False, timeout=50)
    if tried.returncode:
        pytest.skip(f"such namespaces cannot be had here: {tried.stderr}")
    command += [sys.executable, "-m", "gntalloc", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=50)
    assert done.stderr == ""
    missing = [each for each in json.loads(done.stdout)["findings"] if each["required"] and not each["ok"]]
    assert done.returncode == bool(lacking)
    assert lacking <= {each["name"] for each in missing} if lacking else not missing
    for each in missing:
        assert each["name"] in lacking or "/proc is not mounted" in each["found"], each
        assert each["advice"]
