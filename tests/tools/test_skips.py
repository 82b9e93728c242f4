"""A test that lacks a package: skipped, with the package's name; in CI, where all of them shall be, it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("ci", "status", "said"), [("", 0, "1 skipped"), ("true", 1, "in CI no test is left out")])
def test_a_package_that_lacks(tmp_path: Path, ci: str, status: int, said: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/abi/test_headers.py",
        "-k",
        "xen_header",
    ]
    environment = {**os.environ, "PATH": str(tmp_path), "CI": ci}  # a PATH without a compiler
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, said in done.stdout) == (status, True), done.stdout
