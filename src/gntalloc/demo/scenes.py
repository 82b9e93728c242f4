"""Play four short scenes: a peer attacks, lingers, is killed, is killed in silence. Each shows the kernel's answers."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.clock import now
from gntalloc.errors import DeviceError, TimedOut

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc.embed import Machine
    from gntalloc.guest.grant import Grant

__all__ = ["Line", "Scene", "grantee", "play"]

GRANTER, GRANTEE = 1, 2


class Line(NamedTuple):
    """Tell one step, the answer to it, and whether that is the right answer."""

    deed: str
    answer: str
    as_it_must_be: bool


class Scene(NamedTuple):
    """Hold a title and its lines."""

    title: str
    lines: list[Line]


def grantee(machine: Machine, part: str, text: str, *, silent: bool = False) -> subprocess.Popen[str]:
    """Start the other end, in domain 2. With `silent` no descriptor joins the two processes."""
    pipe = subprocess.DEVNULL if silent else subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "gntalloc.demo.grantee", part, text],
        env=machine.environ(GRANTEE),
        stdin=pipe,
        stdout=pipe,
        stderr=subprocess.DEVNULL if silent else None,
        text=True,
    )


def play(machine: Machine) -> Iterator[Scene]:
    """Play the scenes, one after the other."""
    yield Scene("the grantee attacks a read-only grant", _attack(machine))
    yield Scene("the grantee keeps a page after its granter released it", _keep(machine))
    yield Scene("the grantee is killed (SIGKILL)", _kill(machine, "hold"))
    yield Scene("the same, and it had cut every line to the machine before", _kill(machine, "hold-silently"))


def _attack(machine: Machine) -> list[Line]:
    alice = machine.domain(GRANTER)
    with alice.share(GRANTEE) as shared:
        shared.memory[:] = b"granter " * (len(shared.memory) // 8)
        with grantee(machine, "attack", str(shared.grant)) as process:
            assert process.stdout is not None
            answers: list[tuple[str, str]] = json.load(process.stdout)
        lines = [Line(deed, answer, answer != "it worked") for deed, answer in answers]
        intact = bytes(shared.memory) == b"granter " * (len(shared.memory) // 8)
        lines.append(Line("look at the page", "unchanged" if intact else "changed", intact))
        shared.memory[:7] = b"granter"
        lines.append(Line("the granter writes to it", "it worked", True))
    return lines


def _keep(machine: Machine) -> list[Line]:
    alice = machine.domain(GRANTER)
    before, alice.limit = alice.limit, 1
    lines = []
    try:
        shared = alice.share(GRANTEE)
        with _held(machine, "hold", shared.grant) as process:
            shared.close()
            who = ", ".join(map(str, shared.mapped_by))
            held = f"held: {shared.held}, mapped by domain {who or None}"
            lines.append(Line("the granter unmaps and frees the page; the limit is 1", held, shared.held))
            try:
                alice.share(GRANTEE).close()
            except DeviceError as error:
                lines.append(Line("it shares another one", f"ENOSPC: {error}", True))
            else:
                lines.append(Line("it shares another one", "it worked", False))
            process.communicate("go\n")
        shared.wait_released(timeout=5)
        alice.share(GRANTEE).close()
        lines.append(Line("the grantee unmaps; the granter shares another one", "it worked", True))
    finally:
        alice.limit = before
    return lines


def _kill(machine: Machine, part: str) -> list[Line]:
    alice = machine.domain(GRANTER)
    shared = alice.share(GRANTEE)
    with _held(machine, part, shared.grant) as process:
        shared.close()
        lines = []
        try:
            shared.wait_released(timeout=0.05)
            lines.append(Line("the granter waits for 50 ms", "released", False))
        except TimedOut:
            lines.append(Line("the granter waits for 50 ms", "TimedOut: still mapped", True))
        started = now()
        process.kill()
        shared.wait_released(timeout=5)
        milliseconds = (now() - started) * 1000
        lines.append(Line("kill -9, and wait_released", f"released after {milliseconds:.1f} ms", not shared.held))
    return lines


def _held(machine: Machine, part: str, grant: Grant) -> subprocess.Popen[str]:
    process = grantee(machine, part, str(grant))
    assert process.stdout is not None
    process.stdout.readline()
    return process
