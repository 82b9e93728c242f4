"""The judges: the real drivers of a booted lab, and which episodes each of them can be given.

    dom0, pv          a kernel alone, which grants to itself and maps its own grants
    pv to dom0, …     one domain grants, the other maps

A PVH guest is never alone: mapping its own grants spoils its memory.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from found import FOUND
from generate import generate
from replay import read_lines, write_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from world import Episode

    from gntalloc.lab import Lab, Outcome, Session

__all__ = ["JUDGES", "Judge", "ask", "boot", "episodes_for"]

HERE = Path(__file__).parent
CONFORMANCE = HERE.parent / "conformance"
FILES = [HERE / "replay.py", HERE / "world.py", *(CONFORMANCE / f"{name}.py" for name in ("seat", "driving", "far"))]
TIMEOUT = 3000.0


class Judge(NamedTuple):
    """Who grants to whom."""

    guest: str  # the guest that takes part, or dom0 if none does
    way: str  # see replay.py
    pv: bool  # whether gntdev is a PV guest's (dom0 is one)

    @property
    def alone(self) -> bool:
        """Whether granter and peer are one domain."""
        return self.way == "alone"


JUDGES = {
    "dom0": Judge("dom0", "alone", pv=True),
    "pv": Judge("pv", "alone", pv=True),
    "pv to dom0": Judge("pv", "out-of", pv=True),
    "dom0 to pv": Judge("pv", "into", pv=True),
    "pvh to dom0": Judge("pvh", "out-of", pv=True),
    "dom0 to pvh": Judge("pvh", "into", pv=False),
}

Answers = dict[int, list[Any]]


def episodes_for(judge: Judge, seed: int, operations: int, length: int = 100) -> dict[int, Episode]:
    """What was found before, and as many episodes from this seed on as it takes for so many operations."""
    episodes = {-number: episode for number, episode in enumerate(FOUND.values(), 1)}
    count = 0
    while count < operations:
        episodes[seed] = generate(seed, length, pv=judge.pv)
        count += len(episodes[seed])
        seed += 1
    return episodes


def boot(lab: Lab) -> Session:
    """A lab with all the judges."""
    return lab.boot(("pv", "pvh"), files=FILES, timeout=TIMEOUT)


def ask(session: Session, work: Mapping[str, dict[int, Episode]]) -> dict[str, Answers]:
    """What judges answer to their episodes."""
    answers: dict[str, Answers] = {}
    for guest in ("dom0", "pv", "pvh"):
        alone = [name for name in work if JUDGES[name].guest == guest and JUDGES[name].alone]
        answers.update(_run(session, guest, alone, work))
        across = [name for name in work if JUDGES[name].guest == guest and not JUDGES[name].alone]
        answers.update(_run(session, "dom0", across, work, server=guest))
    return answers


def _run(
    session: Session, domain: str, names: Sequence[str], work: Mapping[str, dict[int, Episode]], server: str = ""
) -> dict[str, Answers]:
    if not names:
        return {}
    command = ["python3", "replay.py"]
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name in names:
            base = name.replace(" ", "-")
            files.append(Path(folder, f"{base}.in"))
            files[-1].write_text(write_lines(work[name]))
            command += [JUDGES[name].way, files[-1].name, f"{base}.out"]
        session.put(files, domain)
    outs = [part for part in command if part.endswith(".out")]
    commands = {domain: command} | ({server: ["python3", "replay.py", "serve"]} if server else {})
    outcomes = session.run_together(commands, fetch={domain: outs}, timeout=TIMEOUT, on_output=_show)
    for outcome in outcomes.values():
        assert outcome.exit_status == 0, outcome.output + outcome.errors
    return {name: _answers(outcomes[domain], out) for name, out in zip(names, outs, strict=True)}


def _answers(outcome: Outcome, name: str) -> Answers:
    (raw,) = (content for path, content in outcome.files.items() if path.endswith(name))
    return {
        number: [line["answer"] for line in lines] for number, lines in read_lines(raw.decode().splitlines()).items()
    }


def _show(domain: str, stream: int, data: bytes) -> None:
    print(f"[{domain}] {data.decode(errors='replace').rstrip()}", file=sys.stderr, flush=True)
