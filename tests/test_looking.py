"""Looks that are in vain have a small share of the time. Whoever waits asks whether to look, and says how it went."""

from __future__ import annotations

from typing import Any

import pytest
from looks import PATIENCE, WAYS, Recorder, long

from gntalloc.clock import Deadline
from gntalloc.demo.stream import _Waiter
from gntalloc.errors import TimedOut
from gntalloc.looking import Look

NEVER = Deadline(None)


class Time:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr("gntalloc.looking.now", made)
    monkeypatch.setattr("gntalloc.clock.now", made)
    return made


def wait_in_vain(look: Look, time: Time, sleep: float) -> float:
    """Wait once, for a peer that comes by a wake-up only. How long that was looked for."""
    until = look.until(NEVER)
    looked = max(0.0, until - time.at)
    if until:
        time.at = until
        look.in_vain(NEVER)
    time.at += sleep
    return looked


@pytest.mark.parametrize("seconds", [1e-6, 10e-6, 50e-6, 200e-6])
@pytest.mark.parametrize("sleep", [1e-6, 13e-6, 50e-6])
def test_looks_in_vain_have_a_small_share_of_the_time(time: Time, seconds: float, sleep: float) -> None:
    look = Look(seconds)
    for _ in range(1000):
        wait_in_vain(look, time, sleep)
    begin = time.at
    looked = sum(wait_in_vain(look, time, sleep) for _ in range(20_000))
    assert 0 < looked <= (time.at - begin) / 16


def test_most_waits_are_without_a_look_soon(time: Time) -> None:
    look = Look(50e-6)
    looked = [wait_in_vain(look, time, 13e-6) > 0 for _ in range(200)]
    assert looked[0]
    assert sum(looked) < 20


def test_one_look_in_vain_alone_changes_nothing(time: Time) -> None:
    look = Look(50e-6)
    for _ in range(100):
        assert wait_in_vain(look, time, 0) > 0
        assert look.until(NEVER) > time.at
        look.paid()


@pytest.mark.parametrize("seconds", [50e-6, 200e-6, 0.005, 1.0, 1000.0])
def test_it_is_noticed_soon_that_looks_pay_again(time: Time, seconds: float) -> None:
    look = Look(seconds)
    for _ in range(10_000):
        wait_in_vain(look, time, 13e-6)
    time.at += min(32 * seconds, 0.01)
    assert look.until(NEVER) > time.at
    look.paid()
    for _ in range(100):
        assert look.until(NEVER) == time.at + seconds
        time.at += 1e-6
        look.paid()


def test_a_wait_after_a_long_time_begins_with_a_look(time: Time) -> None:
    look = Look(50e-6)
    for _ in range(100):
        assert wait_in_vain(look, time, 0.01) > 0


def test_a_look_ends_with_the_deadline_and_tells_nothing_then(time: Time) -> None:
    look = Look(50e-6)
    for _ in range(100):
        assert look.until(Deadline(0)) == time.at
        look.in_vain(Deadline(0))
        deadline = Deadline(10e-6)
        assert look.until(deadline) == time.at + 10e-6
        time.at += 10e-6
        look.in_vain(deadline)
    assert look.until(NEVER) == time.at + 50e-6


@pytest.mark.parametrize(("answer", "heard"), WAYS)
def test_the_demo_that_waits_in_vain(answer: Any, heard: list[str]) -> None:
    waiter = _Waiter(0.01, lambda: True, lambda: None)
    waiter._look = recorder = Recorder(answer)  # type: ignore[assignment]
    with pytest.raises(TimedOut):
        waiter.until(lambda: False, "come")
    assert recorder.heard == heard


def test_the_demo_whose_other_side_comes_while_it_looks() -> None:
    waiter = _Waiter(PATIENCE, lambda: True, lambda: None)
    waiter._look = recorder = Recorder(long)  # type: ignore[assignment]
    answers = iter([False, False, True])
    waiter.until(lambda: next(answers), "come")
    assert recorder.heard == ["until", "paid"]
