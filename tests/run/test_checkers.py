"""What people put around C programs in their tests, under `gntalloc run`: sanitizers, valgrind, fakeroot, bwrap."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import gntalloc
from gntalloc.places import domain_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from runs import Runs

    Build = Callable[..., str]

PATIENCE = 50
NODE = "/local/domain/1/data/vchan/pair/event-channel"


def wrapped(name: str, *options: str) -> list[str]:
    if shutil.which(name) is None:
        package = {"bwrap": "bubblewrap"}.get(name, name)
        pytest.skip(f"there is no {name} (apt install {package})")
    return [name, *options]


def suppressions() -> str:
    command = [sys.executable, "-m", "gntalloc", "run", "--valgrind-suppressions"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout.strip()


def pair(runs: Runs, program: str, around: list[str]) -> None:
    """A libxenvchan server and its client, both with `around` in front: 20 messages there and back, both end well."""
    end = [*around, program]
    server = runs.start(1, *end, "server", "2", "data/vchan/pair", "4096", "echo", stderr=subprocess.PIPE)
    deadline = time.monotonic() + PATIENCE
    while not _waits(runs):
        assert server.poll() is None, server.communicate(timeout=PATIENCE)
        assert time.monotonic() < deadline, "the server has not come so far"
        time.sleep(0.05)
    client = runs(2, *end, "client", "1", "/local/domain/1/data/vchan/pair", "4096", "ask", "20", "64")
    _, said = server.communicate(timeout=PATIENCE)
    assert (client.returncode, server.returncode) == (0, 0), (client.stderr, said)
    assert "a round trip" in client.stdout


def _waits(runs: Runs) -> bool:
    try:
        domain = gntalloc.current_domain(domain_path(runs.folder, 1))
    except gntalloc.NoMachine:
        return False
    try:
        return domain.store.exists(NODE)
    finally:
        domain.close()
        domain.devices.close()


@pytest.mark.parametrize("kind", ["address", "undefined", "leak", "thread"])
def test_sanitizers(runs: Runs, build: Build, kind: str) -> None:
    pair(runs, build("vchan", "-g", f"-fsanitize={kind}"), [])


def test_a_leak_of_the_program_is_found(runs: Runs, tmp_path: Path) -> None:
    """So the sanitizer works, and is not only silent: it stops the program by ptrace, of which a thread has one."""
    source = tmp_path / "leak.c"
    source.write_text("#include <stdlib.h>\nint main(void) { return malloc(7) == (void *)1; }\n")
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc (apt install gcc)")
    subprocess.run(
        ["gcc", "-O0", "-fsanitize=address", str(source), "-o", str(tmp_path / "leak")], check=True, timeout=PATIENCE
    )
    done = runs(1, str(tmp_path / "leak"))
    assert done.returncode != 0
    assert "7 byte(s) leaked" in done.stderr


def test_valgrind_has_nothing_to_complain_of(runs: Runs, build: Build) -> None:
    around = wrapped("valgrind", "-q", "--error-exitcode=9", "--leak-check=full", f"--suppressions={suppressions()}")
    pair(runs, build("vchan", "-g"), around)


def test_valgrind_finds_what_is_wrong_with_the_program(runs: Runs, tmp_path: Path) -> None:
    """The suppressions are for Xen's libraries alone."""
    around = wrapped("valgrind", "-q", "--error-exitcode=9", f"--suppressions={suppressions()}")
    source = tmp_path / "wrong.c"
    source.write_text("#include <stdlib.h>\nint main(void) { int *a = malloc(4); return *a ? 0 : 1; }\n")
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc (apt install gcc)")
    subprocess.run(["gcc", "-O0", str(source), "-o", str(tmp_path / "wrong")], check=True, timeout=PATIENCE)
    done = runs(1, *around, str(tmp_path / "wrong"))
    assert done.returncode == 9
    assert "uninitialised" in done.stderr


@pytest.mark.parametrize(
    "around",
    [
        ["fakeroot"],
        ["bwrap", "--dev-bind", "/", "/"],
        ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"],
    ],
    ids=["fakeroot", "bwrap", "bwrap with all namespaces"],
)
def test_what_is_put_around_a_program(runs: Runs, build: Build, around: list[str]) -> None:
    command = wrapped(*around)
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False, timeout=PATIENCE)
    if tried.returncode:
        pytest.skip(f"{around[0]} does not work here: {tried.stderr}")
    pair(runs, build("vchan"), command)


def test_a_run_within_them(runs: Runs, build: Build) -> None:
    around = [*wrapped("bwrap"), "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    around += ["--bind", "/tmp", "/tmp", "--tmpfs", "/run"]
    for each in ([*wrapped("fakeroot")], around):
        if subprocess.run([*each, "true"], capture_output=True, check=False, timeout=PATIENCE).returncode:
            pytest.skip(f"{each[0]} does not work here")
        command = [*each, *runs.command(1, build("share"), "2", "1", "1", "x")]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")
