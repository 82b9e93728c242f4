"""Programs of `gntalloc disk`, and how tests begin and end them."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

    from gntalloc import Machine


SIZE = 3 << 20
CONTENT = random.Random(9).randbytes(SIZE)
PATIENCE = 30.0


class Shell:
    """Runs `gntalloc disk` in domains of a machine."""

    def __init__(self, machine: Machine, folder: Path, stack: ExitStack) -> None:
        self.machine, self.folder, self._stack = machine, folder, stack
        self.image = folder / "disk.img"
        self.image.write_bytes(CONTENT)
        for domid in (0, 1):
            machine.environ(domid)

    def __call__(
        self, *words: str, domid: int = 1, stdin: bytes = b"", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """To its end."""
        return subprocess.run(
            [sys.executable, "-m", "gntalloc", "disk", *words],
            env=env or self.machine.environ(domid),
            input=stdin,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
            cwd=self.folder,
        )

    def start(self, *words: str, domid: int = 1) -> subprocess.Popen[str]:
        """Until its first line, which tells that it is ready."""
        process = subprocess.Popen(
            [sys.executable, "-m", "gntalloc", "disk", *words],
            env=self.machine.environ(domid),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )
        self._stack.callback(process.communicate)
        self._stack.callback(process.kill)
        return process

    def served(self, *words: str) -> subprocess.Popen[str]:
        process = self.start("serve", "--for", "1", *words, str(self.image), domid=0)
        assert "as" in ready(process)
        return process

    def exported(self, *words: str) -> str:
        """Its address."""
        process = self.start("nbd", "--timeout", "20", *words)
        return ready(process).split(" is at ")[1].split(";")[0]


def ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate(timeout=20)[1]
    return line


def end(process: subprocess.Popen[str], number: int) -> int:
    process.send_signal(number)
    return process.wait(PATIENCE)


def client(disk: Shell, *words: str) -> bytes:
    """A client's output."""
    if shutil.which(words[0]) is None:
        pytest.skip(f"there is no {words[0]} (apt install qemu-utils libnbd-bin)")
    return subprocess.run(words, capture_output=True, timeout=PATIENCE, check=True, cwd=disk.folder).stdout
