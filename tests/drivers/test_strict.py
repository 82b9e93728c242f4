"""strict=True: an ALLOC that Linux lets pass and nobody can have meant is refused. By default it passes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from fake_program import Program, refused
from limits import Limited

from gntalloc import DeviceError, current_domain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gntalloc.machine.machine import Machine as Core

SENSELESS = [
    pytest.param((2, 0, 1), "no pages", id="no pages"),
    pytest.param((2, 1, 2), "flags 0x2", id="an unknown flag"),
    pytest.param((2, 1, 0x8001), "flags 0x8001", id="an unknown flag besides writable"),
    pytest.param((1, 1, 1), "one's own", id="one's own domid"),
    pytest.param((0x7FF0, 1, 1), "no domain's", id="DOMID_SELF"),
    pytest.param((0xFFFF, 1, 1), "no domain's", id="the last domid"),
]


@pytest.mark.parametrize(("asked", "reason"), SENSELESS)
def test_refused_by_a_strict_machine(
    make_core: Callable[..., Core], behaviour: str, asked: tuple[int, int, int], reason: str
) -> None:
    program = Program(make_core(behaviour, strict=True), 1, "gntalloc")
    with refused(errno.EINVAL, reason):
        program.alloc(*asked)
    assert (program.in_use(), program.references()) == (0, 0)
    assert program.alloc(2).at == 0


@pytest.mark.parametrize(("asked", "reason"), SENSELESS)
def test_accepted_by_default(core: Core, asked: tuple[int, int, int], reason: str) -> None:
    program = Program(core, 1, "gntalloc")
    assert program.alloc(*asked).at == 0
    assert program.in_use() == asked[1]


@pytest.mark.parametrize("asked", [(0, 1, 0), (2, 1, 1), (0x7FEF, 3, 1)])
def test_what_makes_sense_is_accepted_by_a_strict_machine(
    make_core: Callable[..., Core], asked: tuple[int, int, int]
) -> None:
    program = Program(make_core(strict=True), 1, "gntalloc")
    assert len(program.alloc(*asked).refs) == asked[1]


def test_the_machine_of_a_program(make_machine: Callable[..., object]) -> None:
    from gntalloc import Machine

    for settings in ({"strict": True}, {}):
        machine = make_machine(**settings)
        assert isinstance(machine, Machine)
        alice = machine.domain(1)
        if settings:
            with pytest.raises(DeviceError, match="one's own") as caught:
                alice.share(1)
            assert caught.value.errno == errno.EINVAL
        else:
            alice.share(1).close()
        alice.close()
        alice.devices.close()


def test_the_machine_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    command = [sys.executable, "-m", "gntalloc", "machine", "--name", "strict", "--strict"]
    with Limited(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            while not process.stdout.readline().startswith("machine"):
                assert process.poll() is None
            alice = current_domain("strict/1")
            with pytest.raises(DeviceError, match="no domain's"):
                alice.share(0xFFFF)
            alice.share(2).close()
            alice.close()
            alice.devices.close()
        finally:
            os.kill(process.pid, signal.SIGTERM)
