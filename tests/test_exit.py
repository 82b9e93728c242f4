"""Programs that close nothing: everything lives until the interpreter ends, and nothing is complained of there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from gntalloc.places import lock_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EVERYTHING = """
import contextlib, os, sys, threading
import gntalloc
from gntalloc.frontend.blkback import Backend
from gntalloc.frontend.blkfront import BlockDevice
from gntalloc.frontend.nodes import Device, attach
from gntalloc.testing import channel_pair, two_domains

def everything(disk):
    machine = gntalloc.Machine()
    print(machine.folder, flush=True)
    dom0, alice, bob = (machine.domain(number) for number in (0, 1, 2))
    shared = alice.share(bob, writable=True)
    mapped = bob.map(shared.grant)
    port = alice.events.bind(2)
    view = mapped.memory[:8]
    watch = alice.store.watch("data")
    transaction = bob.store.transaction()
    transaction.__enter__()
    listener = alice.listen(bob, "data/it")
    accepted = []
    accepting = threading.Thread(target=lambda: accepted.append(listener.accept(timeout=20)))
    accepting.start()
    channel = bob.connect(alice, "data/it", timeout=20)
    accepting.join()
    ticket = accepted[0].detach()
    channel.write(b"unread")
    waiting = alice.listen(bob, "data/waits")
    device = Device("vbd", 51712, 1, 0)
    attach(dom0.store, device, {"virtual-device": "51712", "device-type": "disk"}, {"mode": "w"})
    backend = Backend(dom0, device, disk)
    threading.Thread(target=backend.serve, daemon=True).start()
    front = BlockDevice(alice, timeout=20)
    front.write(0, b"x" * 4096, timeout=20)
    pair = channel_pair()
    pair.__enter__()
    pages = two_domains()
    return [pages.__enter__(), *(each for each in locals().values())]
"""

WAYS = {
    "the program's names": "kept = everything(disk)",
    "a module's names": "gntalloc.kept = everything(disk)",
    "a module that outlives others": "import builtins; builtins.kept = everything(disk); sys.kept = builtins.kept",
    "a cycle": "kept = everything(disk); kept.append(kept); del kept",
    "a cycle of a module": "import types; kept = types.ModuleType('kept'); kept.all = everything(disk); kept.me = kept",
    "a thread's frame": """
ready = threading.Event()
def hold():
    kept = everything(disk); ready.set(); threading.Event().wait()
threading.Thread(target=hold, daemon=True).start(); ready.wait(50)""",
    "a cache": "import functools; cached = functools.cache(everything); cached(disk)",
    "an exception": "try:\n    kept = everything(disk); 1 / 0\nexcept ZeroDivisionError as error: sys.last = error",
    "sys.exit": "kept = everything(disk); sys.exit(0)",
}


def wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def run(program: str, disk: Path, *options: str) -> subprocess.CompletedProcess[str]:
    disk.write_bytes(bytes(1 << 20))
    program = f"{EVERYTHING}\ndisk = {str(disk)!r}\n{program}\n"
    return subprocess.run(
        [sys.executable, *options, "-c", program], capture_output=True, text=True, timeout=55, check=False
    )


@pytest.mark.parametrize("way", WAYS)
def test_what_lives_until_exit_is_no_error(tmp_path: Path, way: str) -> None:
    done = run(WAYS[way], tmp_path / "disk")
    assert (done.stderr, done.returncode) == ("", 0)


@pytest.mark.parametrize("way", WAYS)
def test_with_warnings_shown_there_is_nothing_else(tmp_path: Path, way: str) -> None:
    """As Python names its own files that nobody closed. It does not reach all: a thread's frame may just be left."""
    done = run(WAYS[way], tmp_path / "disk", "-W", "always::ResourceWarning")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("  ")]
    assert ([line for line in lines if "ResourceWarning: " not in line], done.returncode) == ([], 0)
    if way == "the program's names":
        for each in ("Machine", "SharedPages", "MappedPages", "Port", "Channel", "Ticket"):
            assert any(each in line and "was never closed; use it in a `with`" in line for line in lines), each


def test_the_machine_ends_with_its_program_and_leaves_nothing(tmp_path: Path) -> None:
    done = run(WAYS["a module that outlives others"], tmp_path / "disk")
    folder = done.stdout.strip()
    wait_for(lambda: not os.path.exists(folder) and not os.path.exists(lock_path(folder)), f"{folder} is left")
