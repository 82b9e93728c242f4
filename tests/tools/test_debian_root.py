"""tools/debian-root where that Debian cannot be had; that it can, CI shows (.ci/run)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the script, an environment that is made, and programs that are looked for first."""
    for name in ("tools", "programs", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "debian-root", tmp_path / "tools")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    program(tmp_path / "tools" / "venv", "exit 0")
    program(tmp_path / ".venv" / "bin" / "python", f'exec {sys.executable} "$@"')
    program(tmp_path / "programs" / "sudo", 'case "$1" in -n) shift; esac; exec "$@"')
    return tmp_path


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run(place: Path) -> subprocess.CompletedProcess[str]:
    path = f"{place / 'programs'}:{os.environ['PATH']}"
    command = [str(place / "tools" / "debian-root"), "sid", "echo", "it ran"]
    return subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=50, check=False
    )


def test_a_mirror_that_cannot_be_reached_is_said_and_is_not_green(place: Path) -> None:
    program(place / "programs" / "debootstrap", 'echo "E: Failed getting release file"; exit 1')
    done = run(place)
    assert (done.returncode, done.stdout) == (69, "")
    assert "sid cannot be had: E: Failed getting release file" in done.stderr
    assert not (place / "build" / "root-sid" / ".made").exists()


def test_an_unpacked_root_is_kept_and_one_that_was_cut_off_is_not(place: Path) -> None:
    """The fake makes a root in which no Python is found, so the call fails after it, each time."""
    program(place / "programs" / "debootstrap", f'echo made >>"{place}/deeds"; eval "mkdir -p \\${{$(($# - 1))}}"')
    for deeds in (1, 1):
        assert run(place).returncode not in {0, 69}
        assert (place / "deeds").read_text() == "made\n" * deeds
    (place / "build" / "root-sid" / ".made").unlink()
    run(place)
    assert (place / "deeds").read_text() == "made\n" * 2


def test_without_root_it_says_what_it_needs(place: Path) -> None:
    program(place / "programs" / "id", "echo 1000")
    program(place / "programs" / "sudo", "exit 1")
    done = run(place)
    assert done.returncode == 69
    assert "needs root, or sudo that asks nothing" in done.stderr
