"""A timetable gives each thing when its time has come, and nothing that was taken off or put off since."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gntalloc import clock
from gntalloc.timetable import Timetable

if TYPE_CHECKING:
    from collections.abc import Callable

INTERVALS = 1.0, 4.0, 16.0


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let so many seconds pass, by a clock that stands still otherwise."""
    moment = 100.0
    monkeypatch.setattr(clock, "now", lambda: moment)

    def pass_by(seconds: float) -> None:
        nonlocal moment
        moment += seconds

    return pass_by


def test_a_thing_comes_once_after_each_interval(wait: Callable[[float], None]) -> None:
    table = Timetable[str](INTERVALS, 0)
    for so_far, interval in enumerate(INTERVALS):
        table.plan("page", so_far)
        assert table.due == clock.now() + interval
        wait(interval - 0.5)
        assert table.take() == {}
        wait(0.5)
        assert table.take() == {"page": so_far + 1}
        assert not table
        assert table.due is None


def test_what_was_taken_off_does_not_come(wait: Callable[[float], None]) -> None:
    table = Timetable[str](INTERVALS, 0)
    table.plan("page", 0)
    table.plan("other", 1)
    table.discard("page")
    wait(3.0)
    assert table.take() == {}
    wait(1.0)
    assert table.take() == {"other": 2}


def test_what_was_planned_anew_comes_at_its_new_time_alone(wait: Callable[[float], None]) -> None:
    table = Timetable[str](INTERVALS, 0)
    table.plan("page", 0)
    table.plan("page", 1)
    wait(3.0)
    assert table.take() == {}
    assert list(table) == ["page"]
    wait(1.0)
    assert table.take() == {"page": 2}


def test_the_same_look_keeps_its_time(wait: Callable[[float], None]) -> None:
    table = Timetable[str](INTERVALS, 0)
    table.plan("page", 1)
    wait(3.0)
    table.plan("page", 1)
    wait(1.0)
    assert table.take() == {"page": 2}


def test_an_eager_look_comes_with_every_take_and_counts_when_it_is_due(wait: Callable[[float], None]) -> None:
    table = Timetable[str](INTERVALS, 1)
    table.plan("page", 0)
    assert table.take() == {"page": 0}
    assert table.take() == {"page": 0}
    wait(1.0)
    assert table.take() == {"page": 1}
    table.plan("page", 1)
    assert table.take() == {}
    assert not table.eager
