"""The judge: the xenstored of a booted lab, to which episodes are given and which answers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from xs_replay import Ours, replay

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xs_replay import Answer, Episode, Step

    from gntalloc.lab import Session

__all__ = ["FILES", "Difference", "ask", "compare", "read_lines", "write_lines"]

HERE = Path(__file__).parent
FILES = [HERE / "xs_replay.py", HERE / "idle.py"]
"""What dom0 needs."""


class Difference(NamedTuple):
    """One reply that is not the same."""

    episode: int
    place: int
    step: Step
    theirs: Answer
    ours: Answer

    def __str__(self) -> str:
        return f"episode {self.episode}, step {self.place}: {self.step}\n    real: {self.theirs}\n    ours: {self.ours}"


def ask(session: Session, episodes: Mapping[int, Episode], *, timeout: float = 300.0) -> dict[int, list[Answer]]:
    """What the real daemon answers. Once a boot: it makes domains that stay."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "episodes.jsonl")
        source.write_text(write_lines(episodes, "steps"))
        session.put([*FILES, source], "dom0")
    command = ["python3", "xs_replay.py", "episodes.jsonl", "answers.jsonl"]
    outcome = session.run(command, "dom0", fetch=["answers.jsonl"], timeout=timeout)
    assert outcome.exit_status == 0, outcome.output + outcome.errors
    return read_lines(outcome.files["answers.jsonl"].decode(), "answers")


def compare(
    episodes: Mapping[int, Episode], theirs: Mapping[int, list[Answer]], domids: dict[str, int] | None = None
) -> list[Difference]:
    """Every reply of ours that is not the real one's."""
    return [
        Difference(number, place, step, real, answer)
        for number, answers in replay(Ours(domids or {"a": 1, "b": 2}), episodes)
        for place, (step, real, answer) in enumerate(zip(episodes[number], theirs[number], answers, strict=True))
        if real != answer
    ]


def write_lines(entries: Mapping[int, list[dict[str, object]]] | Mapping[int, list[Answer]], what: str) -> str:
    """Episodes or answers as JSON lines."""
    return "".join(json.dumps({"number": number, what: entry}) + "\n" for number, entry in entries.items())


def read_lines(text: str, what: str) -> dict[int, list[Answer]]:
    """The other way round."""
    return {entry["number"]: entry[what] for entry in map(json.loads, text.splitlines())}
