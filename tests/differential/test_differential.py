"""The generator, its model and the replays on a machine; and, with GNTALLOC_LAB=1, the real drivers against ours."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from differ import comparable, first_difference
from found import FOUND
from generate import KINDS, generate
from replay import Player, read_lines, replay, replay_on_machine, write_lines
from run import differences, read_record
from shrink import repaired, shrink
from world import RULES, Unfit, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from world import Episode

    from gntalloc import Machine

LAB = os.environ.get("GNTALLOC_LAB") == "1"
SEEDS = range(20)


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return [generate(seed, 80) for seed in SEEDS]


@pytest.fixture(scope="module")
def answers(episodes: list[Episode]) -> list[list[Any]]:
    """Of a machine that does as Linux."""
    return replay_on_machine(episodes)


def test_a_seed_is_an_episode(episodes: list[Episode]) -> None:
    assert [generate(seed, 80) for seed in SEEDS] == episodes
    assert len({write_lines({0: episode}) for episode in episodes}) == len(SEEDS)


def test_every_kind_of_operation_occurs(episodes: list[Episode]) -> None:
    occurring = Counter(operation["do"] for episode in episodes for operation in episode)
    assert set(occurring) == KINDS - {"attach"}


def test_json_lines_bring_episodes_back(episodes: list[Episode]) -> None:
    numbered = dict(enumerate(episodes, 7))
    there_and_back = read_lines(write_lines(numbered).splitlines())
    assert write_lines(there_and_back) == write_lines(numbered)


@pytest.mark.parametrize("pv", [True, False])
def test_what_is_generated_is_fit(pv: bool) -> None:
    for seed in SEEDS:
        episode = generate(seed, 80, pv=pv)
        assert repaired(episode, pv=pv) == episode


def test_the_model_knows_what_succeeds(episodes: list[Episode], answers: list[list[Any]]) -> None:
    """What it says is there, is there, and nothing else: so its rules are about what really happens."""
    for episode, given in zip(episodes, answers, strict=True):
        world = World(pv=True)
        for operation, answer in zip(episode, given, strict=True):
            world.step(operation)
            if operation["do"] in {"alloc", "mmap", "reserve", "bind", "connect"}:
                names = {**world.allocs, **world.entries, **world.ports, **world.seats[operation["seat"]].maps}
                succeeded = not (isinstance(answer, str) and answer.startswith("E"))
                assert (operation["as"] in names) == succeeded, (operation, answer)


@pytest.mark.parametrize(
    ("name", "expected"), list(zip(FOUND, ["00" * 8, {"ports": ["c2", "c2"]}, "0013" + "00" * 6], strict=True))
)
def test_what_was_found(name: str, expected: Any) -> None:
    """The end of it is as on the real drivers, whoever is faster."""
    assert [answers[-1] for answers in replay_on_machine([FOUND[name]] * 10)] == [expected] * 10


def test_ours_answers_as_the_real_drivers_did() -> None:
    """A few episodes of each judge of the long run; `run.py --again` has all 50,513 operations."""
    work, answers = read_record()
    for name, episodes in work.items():
        some = {number: episodes[number] for number in list(episodes)[::16]}
        assert differences(name, some, answers[name]) == {}, name


def test_system_calls_under_run_are_answered_as_the_real_drivers_did() -> None:
    """The same of fewer; `run.py --again --under-run` has all."""
    work, answers = read_record()
    for name, episodes in work.items():
        some = {number: episodes[number] for number in list(episodes)[::32]}
        assert differences(name, some, answers[name], under_run=True) == {}, name


def test_nothing_is_missing_and_references_are_new(episodes: list[Episode], answers: list[list[Any]]) -> None:
    for episode, given in zip(episodes, answers, strict=True):
        for operation, answer in zip(episode, comparable(episode, given), strict=True):
            assert "missing" not in str(answer), (operation, answer)
            assert "taken" not in str(answer), (operation, answer)


def test_one_domain_that_grants_to_itself_answers_as_two(episodes: list[Episode], answers: list[list[Any]]) -> None:
    alone = replay_on_machine(episodes, alone=True)
    for episode, two, one in zip(episodes, answers, alone, strict=True):
        assert first_difference(episode, two, one) is None


@pytest.mark.parametrize("behaviour", ["ours", "linux"])
def test_an_episode_leaves_nothing_behind(behaviour: str, make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(behaviour=behaviour)
    domains = {"g": machine.domain(1), "p": machine.domain(2)}
    for seed in SEEDS:
        sides = {name: Player("machine", {"GNTALLOC_DOMAIN": domain.address}) for name, domain in domains.items()}
        replay(generate(seed, 80), dict(sides), {"g": 1, "p": 2})
        for counted in machine.statistics().domains:
            assert (counted.pages_in_use, counted.references, counted.files) == (0, 0, 0), seed
        assert domains["g"].limit == 1024
    for domain in domains.values():
        domain.close()
        domain.devices.close()


def test_shrinking_keeps_what_matters_and_what_that_needs() -> None:
    episode = generate(3, 80)
    last = next(at for at in reversed(range(len(episode))) if episode[at]["do"] == "peek")
    culprit = episode[last]

    def differ(candidates: list[Episode]) -> list[bool]:
        return [culprit in candidate for candidate in candidates]

    short = shrink(episode, differ, pv=True)
    assert culprit in short
    assert len(short) < 12
    assert repaired(short, pv=True) == short


def test_a_difference_is_found_where_it_is() -> None:
    episode = generate(1, 30)
    answers = ["done"] * len(episode)
    assert first_difference(episode, answers, list(answers)) is None
    found = first_difference(episode, answers, [*answers[:9], "EINVAL", *answers[10:]])
    assert found is not None
    assert (found.step, found.theirs, found.ours) == (9, "done", "EINVAL")
    assert "step 9" in str(found)


# The rules, each by an episode that breaks it.

_A_FILE: dict[str, Any] = {"seat": "g1", "do": "open", "device": "gntalloc", "writable": True, "as": "f1"}
_ANOTHER = {**_A_FILE, "as": "f2"}
_PEERS = {"seat": "p1", "do": "open", "device": "gntdev", "writable": True, "as": "f3"}


def _alloc(name: str, *, file: str = "f1", count: int = 1, writable: bool = True) -> dict[str, Any]:
    asked = {"count": count, "writable": writable, "for_peer": True}
    return {"seat": "g1", "do": "alloc", "file": file, **asked, "as": name}


def _mmap(seat: str, file: str, of: str, name: str, *, pages: int = 1, prot: int = 3) -> dict[str, Any]:
    where = {"file": file, "of": of, "page": 0, "pages": pages, "prot": prot}
    return {"seat": seat, "do": "mmap", **where, "as": name}


def _attach(refs: list[tuple[str, int]], name: str, *, prot: int = 3) -> Episode:
    reserve = {"seat": "p1", "do": "reserve", "file": "f3", "refs": refs, "as": f"e{name}"}
    return [reserve, _mmap("p1", "f3", f"e{name}", name, pages=len(refs), prot=prot)]


def _dealloc(of: str) -> dict[str, Any]:
    return {"seat": "g1", "do": "dealloc", "file": "f1", "of": of, "page": 0, "count": 1}


def _clear(seat: str, file: str, of: str) -> dict[str, Any]:
    return {"seat": seat, "do": "notify", "file": file, "of": of, "at": 0, "action": 1, "port": None}


_MAPPED = [_A_FILE, _PEERS, _alloc("a1"), *_attach([("a1", 0)], "m1")]
_READONLY = [_A_FILE, _PEERS, _alloc("a1", writable=False)]

BREAKING: dict[str, Episode] = {
    "gone": [_A_FILE, {"seat": "g1", "do": "peek", "map": "m1", "at": 0}],
    "spanning": [
        *(_A_FILE, _ANOTHER, _alloc("a1"), _alloc("a2", file="f2"), _alloc("a3")),
        _mmap("g1", "f1", "a1", "m1", pages=2),
    ],
    "stale": [_A_FILE, _PEERS, _alloc("a1"), _dealloc("a1"), _alloc("a2"), *_attach([("a1", 0)], "m1")],
    "lingering": [*_MAPPED, _dealloc("a1"), *_attach([("a1", 0)], "m2")],
    "read-only early": [*_READONLY, *_attach([("a1", 0)], "m1", prot=1)],
    "read-only again": [
        *(*_READONLY, _mmap("g1", "f1", "a1", "m1"), *_attach([("a1", 0)], "m2", prot=1)),
        _mmap("g1", "f1", "a1", "m3"),
    ],
    "torn": [_A_FILE, _PEERS, _alloc("a1"), _alloc("a2"), _dealloc("a2"), *_attach([("a1", 0), ("a2", 0)], "m1")],
    "fork": [*_MAPPED, {"seat": "p1", "do": "fork", "as": "p9"}],
    "read-only clear": [
        *(*_MAPPED, {"seat": "p1", "do": "reserve", "file": "f3", "refs": [("a1", 0)], "as": "e2"}),
        *(_clear("p1", "f3", "e2"), _mmap("p1", "f3", "e2", "m2", prot=1)),
    ],
    "piecemeal clear": [
        *(*_MAPPED, _clear("p1", "f3", "em1")),
        {"seat": "p1", "do": "munmap", "map": "m1", "page": 0, "pages": 1},
    ],
    "another's map": [
        *(*_MAPPED, {**_PEERS, "as": "f4"}),
        {"seat": "p1", "do": "offset", "file": "f4", "map": "m1", "at": 0},
    ],
    "reader's ports": [
        {**_A_FILE, "device": "evtchn"},
        {"seat": "g1", "do": "bind", "file": "f1", "as": "c1"},
        {"seat": "g1", "do": "unbind", "file": "f1", "port": "c1"},
        {"seat": "g1", "do": "send", "file": "f1", "port": "c1"},
    ],
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_refuses_what_breaks_it_and_nothing_before(rule: str) -> None:
    world = World(pv=True)
    *before, last = BREAKING[rule]
    for operation in before:
        world.step(operation)
    with pytest.raises(Unfit, match=rule):
        world.step(last)


def test_a_real_difference_is_found() -> None:
    """G6: ours counts a page that its peer still holds."""
    limit: dict[str, Any] = {"seat": "g1", "do": "limit", "pages": 1}
    episode: Episode = [limit, *_MAPPED, _dealloc("a1"), _alloc("a2")]
    linux, ours = (replay_on_machine([episode], behaviour)[0] for behaviour in ("linux", "ours"))
    found = first_difference(episode, linux, ours)
    assert found is not None
    assert (found.step, found.ours) == (len(episode) - 1, "ENOSPC")


@pytest.mark.skipif(not LAB, reason="boots a real Xen: set GNTALLOC_LAB=1")
@pytest.mark.timeout(900)
def test_two_thousand_operations_in_the_lab_without_a_difference() -> None:
    from judges import JUDGES, ask, boot, episodes_for
    from run import differences

    from gntalloc.lab import Lab, NothingToRunOn

    try:
        lab = Lab.find()
    except NothingToRunOn as why:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(why))
    work = {name: episodes_for(judge, 1000, 2000 // len(JUDGES)) for name, judge in JUDGES.items()}
    with boot(lab) as session:
        theirs = ask(session, work)
    found = {name: differences(name, episodes, theirs[name]) for name, episodes in work.items()}
    assert {name: list(map(str, each.values())) for name, each in found.items() if each} == {}
