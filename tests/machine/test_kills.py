"""Kills: of programs, at any moment, two thousand times; and of the machine under its programs.

GNTALLOC_KILLS says how many, GNTALLOC_SEED where chance begins.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from limits import status_of

from gntalloc import Domain, MachineGone
from gntalloc.guest import connection as channel

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc import Machine

LIMIT = 64  # of the machine that the fixtures make
PROGRAM = Path(__file__).parent / "kill_program.py"


@pytest.mark.timeout(300)
def test_programs_killed_at_any_moment_leave_nothing(machine: Machine, alice: Domain, bob: Domain) -> None:
    kills = os.environ.get("GNTALLOC_KILLS") or "2000"
    seed = os.environ.get("GNTALLOC_SEED") or str(random.SystemRandom().randrange(1 << 32))
    with alice.share(bob, pages=2) as lasting:
        lasting.memory[:5] = b"still"
        command = [sys.executable, str(PROGRAM), alice.address, bob.address, str(lasting.grant), kills, seed]
        run = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert (run.returncode, run.stderr) == (0, ""), f"replay: GNTALLOC_SEED={seed} GNTALLOC_KILLS={kills}"
        done = json.loads(run.stdout)
        assert all(done.values()), done
        lasting.wait_released(timeout=20)
        assert bytes(lasting.memory[:5]) == b"still"
        assert {grant.ref for grant in machine.grants() if not grant.held} == set(lasting.refs)
    while machine.grants():  # what a killed granter's peer held goes with the peer: the kernel says when
        time.sleep(0.01)
    with alice.share(bob, pages=LIMIT, writable=True) as all_there_is, bob.map(all_there_is.grant):
        assert all_there_is.mapped_by == (2,)
    # And the fixture sees that no descriptor, extent, reference or port is left in the machine.


class Told:
    """A forked child that does something each time it is told to, and answers; an exception's name if it raises."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._line, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            try:
                self._line.close()
                for step in steps:
                    theirs.recv(1)
                    try:
                        answer = str(step())
                    except Exception as error:
                        answer = type(error).__name__
                    theirs.sendall(answer.encode())
            finally:
                os._exit(0)
        theirs.close()

    def tell(self) -> None:
        self._line.sendall(b"!")

    def answer(self) -> str:
        return self._line.recv(100).decode()

    def end(self) -> None:
        self._line.close()
        status_of(self.pid)


def test_the_machine_killed_under_its_programs(
    make_machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are told at once, whatever they do just then. Pages stay valid, for both sides, until they are unmapped."""
    monkeypatch.setattr(channel, "DEADLINE", 1000.0)  # nobody may owe the answer to a deadline
    machine = make_machine()
    alice, bob = machine.domain(1), machine.domain(2)
    shared = alice.share(bob, pages=2, writable=True)
    mapped: list[object] = []

    def map_it() -> str:
        mapped.append(bob.map(shared.grant))
        mapped[0].memory[:5] = b"first"  # type: ignore[attr-defined]
        return "mapped"

    def use_it() -> str:
        memory = mapped[0].memory  # type: ignore[attr-defined]
        seen = bytes(memory[4096:4100])
        memory[:5] = b"after"
        return seen.decode()

    def unmap_it() -> str:
        mapped[0].close()  # type: ignore[attr-defined]
        return "unmapped"

    def share_for_ever() -> None:
        while True:
            alice.share(2).close()

    grantee = Told(map_it, use_it, lambda: bob.map(shared.grant), unmap_it, lambda: bob.map(shared.grant))
    waiter = Told(lambda: shared.mapped_by, shared.wait_released)
    busy = Told(share_for_ever)
    for child, expected in ((grantee, "mapped"), (waiter, "(2,)")):
        child.tell()
        assert child.answer() == expected
    waiter.tell()
    busy.tell()
    shared.memory[4096:4100] = b"both"
    os.kill(machine.pid, signal.SIGKILL)
    machine._process.wait(20)
    assert waiter.answer() == busy.answer() == "MachineGone"
    for expected in ("both", "MachineGone", "unmapped", "MachineGone"):
        grantee.tell()
        assert grantee.answer() == expected
    assert bytes(shared.memory[:5]) == b"after"
    for call in (lambda: shared.held, lambda: alice.share(bob), machine.statistics):
        with pytest.raises(MachineGone):
            call()
    for child in (grantee, waiter, busy):
        child.end()
    shared.close()
    for domain in (alice, bob):
        domain.close()
        domain.devices.close()
