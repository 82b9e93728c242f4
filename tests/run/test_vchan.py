"""libxenvchan of Xen on both sides, in two runs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runs import said

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from runs import Runs

    Build = Callable[..., str]

PATH = "data/vchan/test"
RINGS = [1000, 2000, 4096, 65536, 1 << 20]  # in the page beside each other, a page of its own, and many


def serve(runs: Runs, build: Build, ring: int, *task: str) -> subprocess.Popen[str]:
    server = runs.start(1, build("vchan", "-O2"), "server", "2", PATH, str(ring), *task)
    assert said(server) == "listening"
    return server


def client(build: Build, *task: str) -> list[str]:
    return [build("vchan", "-O2"), "client", "1", f"/local/domain/1/{PATH}", "0", *task]


@pytest.mark.parametrize("ring", RINGS)
def test_echo(runs: Runs, build: Build, ring: int) -> None:
    server = serve(runs, build, ring, "echo")
    done = runs(2, *client(build, "ask", "100", "700"))
    assert (done.returncode, done.stderr) == (0, "")
    assert server.wait(20) == 0


@pytest.mark.parametrize("ring", RINGS)
def test_bulk(runs: Runs, build: Build, ring: int) -> None:
    server = serve(runs, build, ring, "drain", str(1 << 20), "512")
    done = runs(2, *client(build, "pour", str(1 << 20), "512"))
    assert (done.returncode, done.stderr) == (0, "")
    assert said(server).endswith("MB/s")
    assert server.wait(20) == 0


def test_a_peer_that_is_killed_is_seen(runs: Runs, build: Build) -> None:
    server = serve(runs, build, 4096, "wait")
    other = runs.start(2, "sh", "-c", 'echo $$; exec "$@"', "sh", *client(build, "wait"))
    program = int(said(other))
    assert said(other) == said(server) == "both are there"
    os.kill(program, signal.SIGKILL)
    assert said(server) == "open: 0"
    assert server.wait(20) == 0
