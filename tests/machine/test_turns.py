"""Turns: what is served next, by what it has cost. The test counts the time: each message costs what it says."""

from __future__ import annotations

import socket
from collections import deque
from typing import TYPE_CHECKING

import pytest

from gntalloc import clock
from gntalloc.machine import turns as module
from gntalloc.machine.loop import READABLE, Loop
from gntalloc.machine.speaker import MESSAGES_A_TURN, RUNNABLE, Dropped
from gntalloc.machine.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc.machine.speaker import Speaker

MILLISECOND = 0.001
REQUEST, LONG, HALF = b"r", b"l", b"h"
STEPS = 10  # of a long request


class Clock:
    """A clock that stands still unless something is done."""

    def __init__(self) -> None:
        self.time = 1.0

    def __call__(self) -> float:
        return self.time


class Talker:
    """A speaker whose messages are one byte each. It writes down what was served."""

    companion: Speaker | None = None

    def __init__(self, name: str, house: House, cost: float) -> None:
        self.name = name
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.weight = 0
        self._house = house
        self._cost = cost
        self._inbox: deque[bytes] = deque()
        self._admitted = 0
        self._steps = 0

    def say(self, *messages: bytes) -> None:
        self.theirs.send(b"".join(messages))

    def fileno(self) -> int:
        return self.ours.fileno()

    @property
    def standing(self) -> int:
        return RUNNABLE if self._inbox or self._steps else READABLE

    def receive(self, _events: int) -> None:
        data = self.ours.recv(4096)
        if not data:
            raise Dropped("it went away")
        for each in data:
            if each == HALF[0]:
                self.weight += 1 << 20
            else:
                self.weight = 0
                self._inbox.append(bytes([each]))

    def flush(self) -> None:
        raise AssertionError("nothing is ever sent")

    def admit(self) -> None:
        self._admitted = len(self._inbox)

    def take_turn(self, until: float) -> None:
        for _ in range(min(max(self._admitted, 1), MESSAGES_A_TURN)):
            if not (self._inbox or self._steps):
                break
            self._serve()
            if self._house.clock() >= until:
                break

    def _serve(self) -> None:
        self._house.clock.time += self._cost
        if self._steps:
            self._steps -= 1
        else:
            self._admitted -= 1
            if self._inbox.popleft() == LONG:
                self._steps = STEPS - 1
        self._house.served.append(self.name)

    def stalled(self, now: float) -> bool:
        return False

    def close(self) -> None:
        self.ours.close()


class House:
    """Turns with nothing behind them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.loop = Loop()
        self.served: list[str] = []
        self.talkers: list[Talker] = []
        self.turns = Turns(self.loop, lambda: None)

    def talker(self, name: str, domain: int | str, cost: float = 0.0004) -> Talker:
        talker = Talker(name, self, cost)
        self.talkers.append(talker)
        self.turns.add(talker, domain)
        return talker

    def round(self) -> list[str]:
        """Serve one round: what was served in it."""
        before = len(self.served)
        self.loop.hear(0)
        self.turns.serve()
        return self.served[before:]

    def until(self, name: str, most: int = 1000) -> int:
        """Serve until a message of this speaker is served: how many of others were served before."""
        before = len(self.served)
        for _ in range(most):
            if name in self.round():
                return self.served.index(name, before) - before
        raise AssertionError(f"{name} was not served in {most} rounds; {len(self.served) - before} messages were")


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    made = House()
    monkeypatch.setattr(clock, "now", made.clock)
    monkeypatch.setattr(clock, "processor_time", made.clock)
    made.turns._charged = made.clock()
    yield made
    made.turns.close()
    made.loop.close()
    for talker in made.talkers:
        talker.theirs.close()


@pytest.mark.parametrize("connections", [1, 4, 64, 300])
def test_a_domain_has_one_share_however_many_connections_it_has(house: House, connections: int) -> None:
    house.turns.open_account(1, uid=1)
    house.turns.open_account(2, uid=1)
    many = [house.talker("many", 1) for _ in range(connections)]
    quiet = house.talker("quiet", 2)
    for each in many:
        each.say(*[REQUEST] * 50)
    house.round()
    for _ in range(20):
        quiet.say(REQUEST)
        waited = house.until("quiet")
        assert waited <= 12, f"{waited} messages of the other domain came first"  # a round, and a slice


@pytest.mark.parametrize("domains", [1, 8, 40])
def test_the_domains_of_one_user_have_a_bound_together(house: House, domains: int) -> None:
    talkers = []
    for number in range(domains):
        house.turns.open_account(number, uid=1)
        talkers.append(house.talker("many", number))
    house.turns.open_account("other", uid=2)
    talkers.append(house.talker("other", "other"))
    for each in talkers:
        each.say(*[REQUEST] * 4000)
    while len(house.served) < 2000:
        house.round()
    share = house.served.count("other") / len(house.served)
    assert 0.4 < share < 0.6, f"the user of one domain had {share:.2f} of it, beside one with {domains}"


def test_a_domain_that_was_idle_has_saved_nothing_up(house: House) -> None:
    for domain in (1, 2):
        house.turns.open_account(domain, uid=1)
    busy, idle = house.talker("busy", 1), house.talker("idle", 2)
    busy.say(*[REQUEST] * 4000)
    while len(house.served) < 1000:
        house.round()
    idle.say(*[REQUEST] * 1000)
    seen = len(house.served)
    while len(house.served) < seen + 200:
        house.round()
    share = house.served[seen:].count("idle") / (len(house.served) - seen)
    assert 0.4 < share < 0.6


def test_what_a_message_cost_is_charged(house: House) -> None:
    """Few dear messages against many cheap ones: both have had as much time."""
    for domain in (1, 2):
        house.turns.open_account(domain, uid=1)
    dear, cheap = house.talker("dear", 1, cost=MILLISECOND), house.talker("cheap", 2, cost=MILLISECOND / 10)
    dear.say(*[REQUEST] * 1000)
    cheap.say(*[REQUEST] * 4000)
    while len(house.served) < 1100:
        house.round()
    assert 80 <= house.served.count("dear") <= 125


def test_others_are_served_between_the_pieces_of_a_long_message(house: House) -> None:
    for domain in (1, 2):
        house.turns.open_account(domain, uid=1)
    slow, quick = house.talker("slow", 1, cost=MILLISECOND), house.talker("quick", 2)
    slow.say(LONG)
    quick.say(*[REQUEST] * 100)
    while house.served.count("slow") < STEPS:
        house.round()
    first, last = house.served.index("slow"), len(house.served) - 1 - house.served[::-1].index("slow")
    assert house.served[first:last].count("quick") >= STEPS - 2


def test_chores_come_before_messages_and_outlive_their_domain(house: House) -> None:
    def chore(pieces: int) -> Iterator[None]:
        for _ in range(pieces):
            house.clock.time += MILLISECOND
            house.served.append("chore")
            yield

    house.turns.open_account(1, uid=1)
    house.talker("one", 1).say(REQUEST)
    house.turns.do(1, chore(5))
    assert house.served == ["chore"]  # a slice of it at once
    while "one" not in house.round():
        pass
    assert house.served == ["chore"] * 5 + ["one"]
    house.turns.do(1, chore(5))
    house.turns.close_account(1)
    house.turns.do(1, chore(5))  # nothing of that domain is left: the machine does it all the same
    for _ in range(20):
        house.round()
    assert house.served.count("chore") == 15
    assert house.turns.patience() is None


def test_a_fault_in_a_chore_ends_that_chore_alone(house: House, caplog: pytest.LogCaptureFixture) -> None:
    def chore() -> Iterator[None]:
        for _ in range(1 // 0):
            yield

    house.turns.open_account(1, uid=1)
    house.turns.do(1, chore())
    assert "a piece of work could not be done" in caplog.text
    talker = house.talker("one", 1)
    talker.say(REQUEST)
    assert house.until("one") == 0


@pytest.mark.parametrize("connections", [3, 30])
def test_a_domain_of_heavy_messages_is_heard_one_after_the_other(
    house: House, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HEAVY_DOMAIN", 2 << 20)
    for domain in (1, 2):
        house.turns.open_account(domain, uid=1)
    talkers = [house.talker(str(number), 1) for number in range(connections)]
    light = house.talker("light", 2)
    for _ in range(5):
        for each in talkers:
            each.say(HALF)
        for _ in range(4):
            house.round()
    weights = sorted(each.weight >> 20 for each in talkers)
    assert sum(weights[:-1]) <= 3, f"beside one they weigh {weights[:-1]} MiB"
    light.say(REQUEST)
    assert house.until("light") == 0
    for each in talkers:  # each gets its message to the end, in the end
        each.say(REQUEST)
    for _ in range(100 * connections):
        house.round()
    assert {each.name for each in talkers} <= set(house.served)
    assert house.turns.patience() is None


def test_a_heavy_domain_goes_on_when_the_one_that_was_heard_goes_away(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HEAVY_DOMAIN", 1 << 20)
    house.turns.open_account(1, uid=1)
    first, second, third = (house.talker(name, 1) for name in ("first", "second", "third"))
    for each in (first, second):
        each.say(HALF)
        house.round()
    first.say(HALF)
    house.round()
    third.say(REQUEST)
    for each in (first, second):
        house.turns.drop(each, "the test says so")
    assert house.until("third") == 0
