"""`gntalloc machine`, `list` and `limit`, and a program that joins by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import gntalloc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GNTALLOC = [sys.executable, "-m", "gntalloc"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GNTALLOC, *arguments], capture_output=True, text=True, timeout=20, check=False)


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for machines of our own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def machine(runtime: Path) -> Iterator[subprocess.Popen[str]]:
    """`gntalloc machine --name lucy`, with domains 1 and 7."""
    process = subprocess.Popen(
        [*GNTALLOC, "machine", "--name", "lucy", "--domain", "1", "--domain", "7", "--limit", "20"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("machine"):
        assert process.poll() is None
    yield process
    if process.poll() is None:
        process.terminate()
    process.communicate(timeout=20)


@pytest.mark.usefixtures("machine")
def test_programs_join_by_name() -> None:
    one, seven = gntalloc.current_domain("lucy/1"), gntalloc.current_domain("lucy/7")
    assert (one.domid, seven.domid) == (1, 7)
    with one.share(7, 3) as shared, seven.map(shared.grant):
        text = run("list").stdout
        assert "machine lucy" in text
        assert text.splitlines()[-1].split() == ["1", "7", "8-10", "ro", str(os.getpid()), "7", "granted", "0", "s"]
        listed = json.loads(run("list", "--json").stdout)["lucy"]
        assert [grant["ref"] for grant in listed["grants"]] == [8, 9, 10]
        assert {tuple(grant["mapped_by"]) for grant in listed["grants"]} == {(7,)}
        assert listed["statistics"]["domains"][0]["pages_in_use"] == 3
    one.close()
    seven.close()


@pytest.mark.usefixtures("machine")
def test_the_limit_is_shown_and_set() -> None:
    assert run("limit", "lucy/1").stdout == "20\n"
    assert run("limit", "lucy/1", "2").stdout == "2\n"
    domain = gntalloc.current_domain("lucy/1")
    with pytest.raises(gntalloc.DeviceError, match="limit is 2"):
        domain.share(7, 3)
    domain.close()
    wrong = run("limit", "lucy/4")
    assert (wrong.returncode, wrong.stderr) == (1, "gntalloc: there is no domain 4 in this machine; it has 1, 7\n")
    assert run("limit", "lucy").returncode == 2


@pytest.mark.usefixtures("machine")
def test_two_machines_cannot_have_one_name() -> None:
    second = run("machine", "--name", "lucy")
    assert second.returncode == 1
    assert "runs already, as pid" in second.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_leaves_nothing(
    machine: subprocess.Popen[str], runtime: Path, number: signal.Signals, code: int
) -> None:
    machine.send_signal(number)
    machine.communicate(timeout=20)
    assert machine.returncode == code
    assert list((runtime / "gntalloc").iterdir()) == []


def test_the_folder_of_one_that_was_killed_is_taken_over(machine: subprocess.Popen[str], runtime: Path) -> None:
    machine.kill()
    machine.wait(20)
    assert (runtime / "gntalloc" / "lucy").exists()
    again = subprocess.Popen([*GNTALLOC, "machine", "--name", "lucy"], stdout=subprocess.PIPE, text=True)
    assert again.stdout is not None
    assert again.stdout.readline().startswith("domain 1, for uid")
    again.terminate()
    again.communicate(timeout=20)
    assert again.returncode == 0


@pytest.mark.usefixtures("runtime")
def test_with_no_machine_list_says_how_to_start_one() -> None:
    nothing = run("list")
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert "gntalloc machine" in nothing.stderr
    named = run("list", "lucy")
    assert named.returncode == 3
    assert "no machine answers" in named.stderr


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("domain", ["x", "2:bob", "2:uid=", "2:uid=no-such-user-here", "-1"])
def test_a_domain_that_cannot_be_is_an_error_of_usage(domain: str) -> None:
    wrong = run("machine", f"--domain={domain}")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


@pytest.mark.usefixtures("runtime")
def test_a_domain_number_beyond_all_is_refused_and_leaves_nothing(runtime: Path) -> None:
    wrong = run("machine", "--domain", "99999")
    assert wrong.returncode == 1
    assert "no domain's number" in wrong.stderr
    assert list((runtime / "gntalloc").iterdir()) == []


def test_help_imports_no_command() -> None:
    code = "import sys; sys.argv = ['gntalloc', '--help']\nimport atexit\n"
    code += "atexit.register(lambda: print(sorted(m for m in sys.modules if m.startswith('gntalloc.cli.'))))\n"
    code += "from gntalloc.cli import main; main()"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert shown.stdout.splitlines()[-1] == "[]"
    assert "demo" in shown.stdout


def test_an_unknown_command_is_an_error_of_usage() -> None:
    assert run("dance").returncode == 2
