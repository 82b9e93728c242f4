"""Looks end where they do harm, and go on where they do not. A wait asks how long to look, and says how it ended."""

from __future__ import annotations

import random
from typing import Any

import pytest
from looks import PATIENCE, WAYS, Recorder, long

from gntalloc import clock
from gntalloc.clock import Deadline
from gntalloc.demo.stream import _Waiter
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


class Peer:
    """What a wait takes: `alone` seconds with a look that sees nothing, or without one; `together` with a look."""

    def __init__(self, time: Time, seconds: float, *, alone: float, together: float | None = None) -> None:
        self.time, self.seconds, self.alone, self.together = time, seconds, alone, together
        self.look = Look(seconds)

    def turn(self, *, shared: bool) -> float:
        """Wait once, on one processor that both share or on two. How long that was looked for."""
        begin = self.time.at
        until = self.look.until(NEVER)
        looks = self.seconds if until else 0.0
        assert not until or until == begin + self.seconds
        if shared:  # the peer runs when the look is over
            self.time.at = begin + looks + self.alone
        elif looks and self.together is not None and self.together <= looks:
            self.time.at = begin + self.together
            self.look.paid()
            return self.together
        else:
            self.time.at = begin + max(looks, self.alone)
        self.look.woken()
        return looks


@pytest.mark.parametrize("seconds", [10e-6, 50e-6, 200e-6])
@pytest.mark.parametrize("alone", [2e-6, 7e-6, 40e-6])
def test_on_one_processor_looks_have_a_small_share_of_the_time(time: Time, seconds: float, alone: float) -> None:
    peer = Peer(time, seconds, alone=alone)
    for _ in range(1000):
        peer.turn(shared=True)
    begin = time.at
    looked = sum(peer.turn(shared=True) for _ in range(20_000))
    assert 0 < looked <= (time.at - begin) / 10


def test_on_one_processor_most_waits_are_without_a_look_soon(time: Time) -> None:
    peer = Peer(time, 50e-6, alone=7e-6)
    looked = [peer.turn(shared=True) > 0 for _ in range(300)]
    assert looked[0]
    assert sum(looked) < 20


@pytest.mark.parametrize("seed", range(10))
def test_other_processes_do_not_hide_that_looks_do_harm(time: Time, seed: int) -> None:
    """Half of the waits are longer, by up to a few looks, or by a slice of another process."""
    chance = random.Random(seed)
    peer = Peer(time, 50e-6, alone=7e-6)
    looked = 0
    for _ in range(3000):
        peer.alone = 7e-6 + chance.choice([0, 0, 0, chance.uniform(0, 150e-6), chance.uniform(0, 150e-6), 0.003])
        looked += peer.turn(shared=True) > 0
    assert looked < 1000


def test_on_two_processors_every_wait_looks(time: Time) -> None:
    peer = Peer(time, 50e-6, alone=20e-6, together=1e-6)
    assert all(peer.turn(shared=False) > 0 for _ in range(1000))


@pytest.mark.parametrize("alone", [51e-6, 80e-6, 300e-6, 0.01])
def test_a_slow_peer_on_another_processor_is_looked_for_as_ever(time: Time, alone: float) -> None:
    """A look costs nothing there, and the peer may be one that is quick as long as we look."""
    peer = Peer(time, 50e-6, alone=alone)
    for _ in range(1000):
        peer.turn(shared=False)
    looked = [peer.turn(shared=False) > 0 for _ in range(1000)]
    assert sum(looked) >= 950


@pytest.mark.parametrize("seconds", [50e-6, 200e-6, 0.005, 1.0, 1000.0])
def test_a_move_to_another_processor_is_noticed_soon(time: Time, seconds: float) -> None:
    peer = Peer(time, seconds, alone=7e-6, together=1e-6)
    for _ in range(1000):
        peer.turn(shared=True)
    begin = time.at
    while not peer.turn(shared=False):
        assert time.at - begin <= min(31 * seconds, 0.01) + 1e-3
    assert all(peer.turn(shared=False) > 0 for _ in range(1000))


def test_a_move_to_one_processor_is_noticed_however_long_looks_have_paid(time: Time) -> None:
    peer = Peer(time, 50e-6, alone=7e-6, together=1e-6)
    for _ in range(1000):
        peer.turn(shared=False)
    assert sum(peer.turn(shared=True) > 0 for _ in range(300)) < 20


def test_a_move_to_one_processor_is_noticed_however_slow_the_peer_was(time: Time) -> None:
    peer = Peer(time, 50e-6, alone=80e-6)
    for _ in range(1000):
        peer.turn(shared=False)
    peer.alone = 7e-6
    assert sum(peer.turn(shared=True) > 0 for _ in range(600)) < 150


def test_one_look_in_vain_alone_changes_nothing(time: Time) -> None:
    peer = Peer(time, 50e-6, alone=7e-6, together=1e-6)
    for _ in range(100):
        assert peer.turn(shared=True) > 0
        assert peer.turn(shared=False) > 0


def test_waits_that_were_long_tell_nothing(time: Time) -> None:
    """A channel on which nothing happened for long looks at once when something does."""
    peer = Peer(time, 50e-6, alone=0.01)
    assert all(peer.turn(shared=True) > 0 for _ in range(100))


def test_a_look_ends_with_the_deadline(time: Time) -> None:
    look = Look(50e-6)
    for _ in range(100):
        assert look.until(Deadline(0)) == time.at
        assert look.until(Deadline(10e-6)) == time.at + 10e-6
        time.at += 10e-6
    assert look.until(NEVER) == time.at + 50e-6


@pytest.mark.parametrize("answer", WAYS)
def test_the_demo_that_waits(answer: Any) -> None:
    waiter = _Waiter(PATIENCE, lambda: True, lambda: None)
    waiter._look = recorder = Recorder(answer)  # type: ignore[assignment]
    late = clock.now() + 0.02
    waiter.until(lambda: clock.now() > late, "come")
    assert recorder.heard == ["until", "woken"]


def test_the_demo_whose_other_side_comes_while_it_looks() -> None:
    waiter = _Waiter(PATIENCE, lambda: True, lambda: None)
    waiter._look = recorder = Recorder(long)  # type: ignore[assignment]
    answers = iter([False, False, True])
    waiter.until(lambda: next(answers), "come")
    assert recorder.heard == ["until", "paid"]
