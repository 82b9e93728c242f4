"""Programs that come again and again under the number of one that has died, or before anybody has that number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runs import said

from gntalloc.places import lock_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from runs import Runs

    Build = Callable[..., str]

PATH = "data/vchan/test"

LOOP = """
import gntalloc
with gntalloc.current_domain().listen(2, "/local/domain/1/data/vchan/test") as listener:
    print("listening", flush=True)
    for channel in listener:
        with channel:
            for data in iter(lambda: channel.read(700), b""):
                channel.write(data)
"""


def client(build: Build, *task: str) -> list[str]:
    return [build("vchan", "-O2"), "client", "1", f"/local/domain/1/{PATH}", "0", *task]


def test_a_server_that_stays_serves_each_run(runs: Runs, build: Build) -> None:
    server = runs.start(1, sys.executable, "-c", LOOP)
    assert said(server) == "listening"
    for _ in range(4):
        done = runs(2, *client(build, "ask", "10", "700"))
        assert (done.returncode, done.stderr) == (0, "")
    server.kill()


def test_a_c_server_that_published_while_another_domain_2_lived(runs: Runs, build: Build) -> None:
    older = runs.start(2, "cat")
    server = runs.start(1, build("vchan", "-O2"), "server", "2", PATH, "4096", "echo")
    assert said(server) == "listening"
    older.communicate(timeout=30)
    done = runs(2, *client(build, "ask", "10", "700"))
    assert (done.returncode, done.stderr) == (0, "")
    assert server.wait(30) == 0


def test_a_domain_of_a_machine_that_stays_and_a_run_that_comes_later(runs: Runs, build: Build) -> None:
    """`gntalloc machine --domain 1` and then `run --domain 1` and `run --domid 2`, each twice."""
    machine = subprocess.Popen(
        [sys.executable, "-m", "gntalloc", "machine", "--name", runs.machine, "--domain", "1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert machine.stdout is not None
        while runs.machine not in (line := machine.stdout.readline()):
            assert line, "the machine did not start"
        for _ in range(2):
            server = runs.start(1, build("vchan", "-O2"), "server", "2", PATH, "4096", "echo")
            assert said(server) == "listening"
            done = runs(2, *client(build, "ask", "10", "700"))
            assert (done.returncode, done.stderr) == (0, "")
            assert server.wait(30) == 0
    finally:
        machine.terminate()
        machine.communicate(timeout=30)
        Path(lock_path(runs.folder)).unlink(missing_ok=True)  # which the runs that joined it made
