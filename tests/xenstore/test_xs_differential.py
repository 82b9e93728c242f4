"""Our xenstored against the real one, reply by reply: a recorded run, and with GNTALLOC_LAB=1 one in the lab."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xs_generate import generate
from xs_judge import compare
from xs_replay import END, ERROR, EVENT, SET_PERMS, WATCH, WRITE, Ours, replay

if TYPE_CHECKING:
    from xs_replay import Answer, Episode

RECORDED = Path(__file__).parent / "xs_recorded.json"


@pytest.fixture(scope="module")
def recorded() -> dict[int, tuple[Episode, list[Answer]]]:
    return {number: (episode, answers) for number, episode, answers in json.loads(RECORDED.read_text())}


def test_every_reply_is_the_real_daemons(recorded: dict[int, tuple[Episode, list[Answer]]]) -> None:
    episodes = {number: episode for number, (episode, _) in recorded.items()}
    differing = compare(episodes, {number: answers for number, (_, answers) in recorded.items()})
    assert not differing, "\n".join(map(str, differing[:5]))


def test_what_was_recorded_is_worth_replaying(recorded: dict[int, tuple[Episode, list[Answer]]]) -> None:
    """It has every refusal that can be had by well-formed requests, conflicts, and events to all four."""
    errors: Counter[tuple[int, str]] = Counter()
    events: Counter[str] = Counter()
    for episode, answers in recorded.values():
        for step, answer in zip(episode, answers, strict=True):
            if step["do"] == "ask" and answer[0] == ERROR:
                errors[step["type"], answer[1].rstrip("\0")] += 1
            if answer and isinstance(answer[-1], dict):
                events.update(answer[-1].keys())
    assert {name for _, name in errors} >= {
        "EACCES",
        "EINVAL",
        "ENOENT",
        "ENOSPC",
        "EEXIST",
        "E2BIG",
        "EAGAIN",
        "EPERM",
    }
    assert {(END, "EAGAIN"), (END, "ENOSPC"), (WRITE, "ENOSPC"), (SET_PERMS, "EPERM"), (WATCH, "E2BIG")} <= set(errors)
    assert set(events) == {"s", "t", "a", "b"}


def test_a_seed_is_an_episode() -> None:
    assert generate(3, 50) == generate(3, 50) != generate(4, 50)


def test_a_difference_is_found() -> None:
    episodes = {7: generate(7, 40)}
    answers = dict(replay(Ours({"a": 1, "b": 2}), episodes))
    assert compare(episodes, answers) == []
    answers[7][20] = [EVENT, "nonsense"]
    (found,) = compare(episodes, answers)
    assert (found.episode, found.place, found.theirs) == (7, 20, [EVENT, "nonsense"])


def test_numbers_of_domains_do_not_matter() -> None:
    episodes = {seed: generate(seed, 80) for seed in range(10)}
    assert compare(episodes, dict(replay(Ours({"a": 3, "b": 12}), episodes))) == []
