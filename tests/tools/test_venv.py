"""tools/venv, with little shell scripts as interpreters: what it looks for, says, leaves behind and redoes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Answers what tools/venv asks of a Python, by what its -c text is about, and notes every real deed.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
    "-c "*version_info*) exit {old} ;;
    "-c "*ensurepip*) exit {no_ensurepip} ;;
    "-V "*) echo Python fake ;;
    "-m venv") echo venv >>"$LOG"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip") for last; do :; done; echo "pip $last" >>"$LOG"; eval "$PIP" ;;
esac
"""


class Place:
    """A folder with tools/venv, a pyproject.toml, and a PATH of our own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.bin = folder / "path"
        self.bin.mkdir()
        (folder / "tools").mkdir()
        shutil.copy(ROOT / "tools" / "venv", folder / "tools" / "venv")
        (folder / "pyproject.toml").write_text("version 1\n")
        for tool in ("sh", "dirname", "basename", "cksum", "cat", "rm", "mkdir", "cp", "tr", "kill", "flock"):
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)

    def python(self, name: str, *, old: bool = False, no_ensurepip: bool = False) -> None:
        path = self.bin / name
        path.write_text(FAKE_PYTHON.format(old=int(old), no_ensurepip=int(no_ensurepip)))
        path.chmod(0o755)

    def run(self, kind: str = "run", *, pip: str = "true") -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "LOG": str(self.log), "PIP": pip}
        command = [str(self.folder / "tools" / "venv"), kind]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=50)

    def deeds(self) -> list[str]:
        """What was done since the last look."""
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return text.splitlines()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_set_up_is_done_once_for_each_need(place: Place) -> None:
    place.python("python3")
    for kind, deeds in [
        ("run", ["venv", "pip ."]),
        ("run", []),
        ("dev", ["pip .[dev]"]),
        ("dev", []),
        ("run", []),
    ]:
        assert place.run(kind).returncode == 0
        assert place.deeds() == deeds


def test_what_the_docs_need_is_enough_for_all(place: Place) -> None:
    place.python("python3")
    place.run("dev")
    place.deeds()
    place.run("docs")
    assert place.deeds() == ["pip .[dev,docs]"]
    for kind in ("docs", "dev", "run"):
        place.run(kind)
        assert place.deeds() == []


def test_another_pyproject_is_another_set_up(place: Place) -> None:
    place.python("python3")
    place.run("dev")
    place.deeds()
    os.utime(place.folder / "pyproject.toml")
    place.run("dev")
    assert place.deeds() == []
    (place.folder / "pyproject.toml").write_text("version 2\n")
    place.run("dev")
    assert place.deeds() == ["pip .[dev]"]


def test_no_python(place: Place) -> None:
    done = place.run()
    assert done.returncode == 1
    assert "no Python 3.11 or newer" in done.stderr
    assert not (place.folder / ".venv").exists()


def test_an_old_python3_is_passed_over(place: Place) -> None:
    place.python("python3", old=True)
    place.python("python3.12")
    done = place.run()
    assert done.returncode == 0
    assert "python3.12" in done.stderr


def test_a_python_without_ensurepip(place: Place) -> None:
    place.python("python3", no_ensurepip=True)
    done = place.run()
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr
    assert not (place.folder / ".venv").exists()


def test_a_failed_set_up_leaves_nothing(place: Place) -> None:
    place.python("python3")
    done = place.run(pip="false")
    assert done.returncode == 1
    assert "run make again" in done.stderr
    assert not (place.folder / ".venv").exists()


def test_a_killed_set_up_is_redone_from_nothing(place: Place) -> None:
    place.python("python3")
    killed = place.run(pip="kill -9 $PPID; sleep 1")
    assert killed.returncode == -9
    place.deeds()
    assert place.run().returncode == 0
    assert place.deeds() == ["venv", "pip ."]


def test_a_killed_update_is_redone_from_nothing(place: Place) -> None:
    place.python("python3")
    place.run()
    place.run("dev", pip="kill -9 $PPID; sleep 1")
    place.deeds()
    place.run("dev")
    assert place.deeds() == ["venv", "pip .[dev]"]


def test_a_failed_update_keeps_what_works(place: Place) -> None:
    place.python("python3")
    place.run()
    assert place.run("dev", pip="false").returncode == 1
    place.deeds()
    assert place.run().returncode == 0
    assert place.deeds() == []
    place.run("dev")
    assert place.deeds() == ["pip .[dev]"]


def test_a_moved_environment_is_made_anew(place: Place, tmp_path: Path) -> None:
    place.python("python3")
    place.run()
    record = tmp_path / ".venv" / ".made"
    record.write_text(record.read_text().replace(str(tmp_path), "/elsewhere"))
    place.deeds()
    place.run()
    assert place.deeds() == ["venv", "pip ."]


def test_an_environment_of_your_own_is_used(place: Place) -> None:
    place.python("python3")
    (place.folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(place.bin / "python3", place.folder / ".venv" / "bin" / "python")
    place.run("dev")
    assert place.deeds() == ["pip .[dev]"]
    place.run("dev")
    assert place.deeds() == []
