"""Random requests of four connections to a xenstore: s and t of domain 0, and a and b, one of each of two guests.

A step is one of

    {"do": "ask", "who", "type", "body", "in": a transaction's name or nothing, "as": the name of one it starts}
    {"do": "reconnect", "who": s or t}
    {"do": "introduce", "who": a or b}        by domain 0, after a RELEASE
    {"do": "nodes", "who": a or b, "more"}    by domain 0: a quota of the nodes that the guest has, and some

The same seed gives the same episode. Requests are well formed, but ask for what cannot be had too: paths that are none,
nodes of others, transactions that have ended.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from xs_replay import (
    CONTROL,
    DIRECTORY,
    END,
    ERROR,
    EVENT,
    GET_PERMS,
    GUESTS,
    INTRODUCE,
    MKDIR,
    PART,
    READ,
    RELEASE,
    RESET,
    RM,
    SET_PERMS,
    SOCKETS,
    START,
    UNWATCH,
    WATCH,
    WRITE,
)

if TYPE_CHECKING:
    from xs_replay import Episode, Step

__all__ = ["generate"]

PATH, INTRODUCED, RESUME, TARGET = 10, 17, 18, 19

_KINDS: dict[int, float] = {
    WRITE: 22,
    READ: 10,
    MKDIR: 6,
    RM: 9,
    DIRECTORY: 7,
    PART: 2,
    GET_PERMS: 6,
    SET_PERMS: 11,
    WATCH: 9,
    UNWATCH: 4,
    START: 5,
    END: 5,
    PATH: 1,
    INTRODUCED: 1,
    RESUME: 1,
    RESET: 1,
    CONTROL: 1,
    INTRODUCE: 1,
    99: 1,
}
_SPOILED = ["", "//", "/test/", "/test//x", "/test/a b", "/test/\xe4", "data/", "x//y", "test/!"]
_SPOILED += ["/" + "y" * 3100, "z" * 2100]
_ELSEWHERE = ["/", "/tool/xenstored", "/local/domain/{a}", "/local/domain/77/data"]
_TOKENS = ["1", "2", "token", ""]
_NUMBERS = ["0", "{a}", "{b}", "77", "32752", "x", ""]
_QUOTAS = {
    "watches": (1, 3),
    "transactions": (1, 3),
    "transaction-nodes": (2, 12),
    "node-size": (40, 200),
    "permissions": (1, 4),
    "path-max": (5, 30),
}


def generate(seed: int, length: int) -> Episode:
    """An episode: how it begins, and `length` steps."""
    return _Writer(random.Random(seed)).write(length)


class _Writer:
    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._open: dict[str, list[str]] = {who: [] for who in (*SOCKETS, *GUESTS)}
        self._started = 0
        self._watched: list[tuple[str, str, str]] = []
        self._away: set[str] = set()
        self._planned: list[Step] = []
        # What an episode is about, so that not every one has a bit of everything.
        self._with_quotas = dice.random() < 0.3
        self._with_releases = dice.random() < 0.25
        self._with_target = not self._with_releases and dice.random() < 0.2
        self._kinds = dict(_KINDS)
        if self._with_quotas:
            self._kinds |= {WATCH: 25, RESET: 0.3}
        self._in_transactions = dice.choice([0.2, 0.5, 0.8])
        self._guests_ask = dice.choice([0.5, 0.7, 0.9])
        names = ["x", "y", "z"]
        self._paths = ["/test", "/test/open", "/test/a", "/test/ab", "/test/seen"]
        self._paths += [f"{base}/{name}" for base in self._paths[1:] for name in names]
        self._paths = dice.sample(self._paths, 6) * 3 + self._paths  # conflicts are of few nodes
        self._paths += ["/test/open/x/y", "/test/open/x/y/z", "/test/a/x/y", "/test/ab/x/y/z", "/test/no/such/node"]
        homes = ["/local/domain/{a}/data", "/local/domain/{b}/data", "data"]
        self._paths += homes + [f"{base}/{name}" for base in homes for name in names] + ["data/x/y/z"]

    def write(self, length: int) -> Episode:
        steps = self._beginning()
        while len(steps) < length:
            steps.append(self._step())
        return steps

    def _beginning(self) -> Episode:
        made = {
            "open": ["b0"],
            "a": ["n{a}"],
            "ab": ["n{a}", "b{b}"],
            "seen": ["r0", "w{b}"],
        }
        steps = [_ask("s", SET_PERMS, *_strings(f"/test/{name}", *entries)) for name, entries in made.items()]
        return [
            step for name, step in zip(made, steps, strict=True) for step in (_ask("s", MKDIR, f"/test/{name}\0"), step)
        ]

    def _step(self) -> Step:
        dice = self._dice
        if self._planned:
            return self._planned.pop()
        chance = dice.random()
        if self._away:
            if chance < 0.15:
                guest = self._away.pop()
                return {"do": "introduce", "who": guest}
        elif self._with_releases and chance < 0.05:
            guest = dice.choice(GUESTS)
            self._away.add(guest)
            self._open[guest].clear()
            self._watched = [watch for watch in self._watched if watch[0] != guest]
            return _ask("s", RELEASE, f"{{{guest}}}\0")
        if self._with_target and chance < 0.04:
            return _ask("s", TARGET, *_strings("{a}", dice.choice(["{b}", "{b}", "77"])))
        if self._with_quotas and chance < 0.12:
            if chance < 0.03:
                return {"do": "nodes", "who": dice.choice(GUESTS), "more": dice.randrange(6)}
            name = dice.choice(list(_QUOTAS))
            return _ask("s", CONTROL, *_strings("quota", "set", name, str(dice.randint(*_QUOTAS[name]))))
        who = self._who()
        if who in SOCKETS and chance > 0.995:
            self._open[who].clear()
            return {"do": "reconnect", "who": who}
        if chance < 0.22 and not self._away:
            self._plan_a_race(who)
            return self._planned.pop()
        return self._request(who)

    def _plan_a_race(self, who: str) -> None:
        """A transaction, in the middle of which somebody else does something."""
        dice = self._dice
        self._started += 1
        name = f"{who}{self._started}"
        path = self._path()
        inside = [self._at(who, path) for _ in range(dice.choice([1, 2, 3]))]
        for step in inside:
            step["in"] = name
        near = [path, path, f"{path}/x", path.rpartition("/")[0] or path, self._path()]
        for step in inside[1:]:
            if dice.random() < 0.3:
                step["body"] = step["body"].replace(path, dice.choice(near), 1)
        outside = self._at(self._who(), dice.choice(near))
        begin: Step = {**_ask(who, START, "\0"), "as": name}
        end: Step = {**_ask(who, END, "T\0"), "in": name}
        steps = [begin, *inside]
        steps.insert(dice.randint(1, len(steps)), outside)
        self._planned = [end, *reversed(steps)]

    def _at(self, who: str, path: str) -> Step:
        dice = self._dice
        kind = dice.choice([READ, WRITE, WRITE, MKDIR, RM, DIRECTORY, SET_PERMS])
        if kind == WRITE:
            return _ask(who, kind, f"{path}\0", self._value(who))
        if kind == SET_PERMS:
            return _ask(who, kind, *_strings(path, *self._entries()))
        return _ask(who, kind, *_strings(path))

    def _who(self) -> str:
        there = [guest for guest in GUESTS if guest not in self._away]
        return self._dice.choice(there if there and self._dice.random() < self._guests_ask else SOCKETS)

    def _request(self, who: str) -> Step:
        dice = self._dice
        mine = self._open[who]
        kind = dice.choices(list(self._kinds), list(self._kinds.values()))[0]
        if kind == END and not mine and dice.random() < 0.9:
            kind = START
        step = _ask(who, kind, *self._body(who, kind))
        if kind == START and dice.random() < 0.97:
            self._started += 1
            step["as"] = f"{who}{self._started}"
            mine.append(step["as"])
        elif kind == START:
            step["as"] = "nested"
            if mine:
                step["in"] = dice.choice(mine)
        elif kind == END:
            if mine and dice.random() < 0.95:
                step["in"] = mine.pop(dice.randrange(len(mine)))
            elif dice.random() < 0.5:
                step["in"] = "ended"
        elif mine and dice.random() < self._in_transactions:
            step["in"] = dice.choice(mine)
        elif dice.random() < 0.01:
            step["in"] = "ended"
        return step

    def _body(self, who: str, kind: int) -> tuple[str, ...]:
        dice = self._dice
        match kind:
            case x if x in (READ, GET_PERMS):
                if dice.random() < 0.05:
                    return _strings(dice.choice(_ELSEWHERE))
                return _strings(self._path())
            case x if x in (MKDIR, DIRECTORY):
                return _strings(self._path())
            case x if x == RM:
                return _strings(dice.choice(["/", *[self._path()] * 20]))
            case x if x == PART:
                return _strings(self._path(), str(dice.choice([0, 0, 0, 2, 4, 100])))
            case x if x == WRITE:
                return (f"{self._path()}\0", self._value(who))
            case x if x == SET_PERMS:
                # Not where it is refused: the daemon answers that with the errno of whatever came before, or ends.
                if who in SOCKETS and dice.random() < 0.08:
                    return _strings(dice.choice(["@introduceDomain", "@releaseDomain"]), *self._entries())
                return _strings(self._path(), *self._entries())
            case x if x == WATCH:
                mine = [watch for watch in self._watched if watch[0] == who]
                if mine and dice.random() < 0.1:
                    return _strings(*dice.choice(mine)[1:])
                path = dice.choice(_ELSEWHERE) if dice.random() < 0.05 else self._path(special=True)
                token = dice.choice(_TOKENS)
                self._watched.append((who, path, token))
                return _strings(path, token)
            case x if x == UNWATCH:
                mine = [watch for watch in self._watched if watch[0] == who]
                if mine and dice.random() < 0.8:
                    return _strings(*dice.choice(mine)[1:])
                return _strings(self._path(special=True), dice.choice(_TOKENS))
            case x if x == END:
                return _strings(dice.choice(["T", "T", "T", "T", "F", "X"] if dice.random() < 0.2 else ["T", "T", "F"]))
            case x if x in (PATH, INTRODUCED):
                return _strings(dice.choice(_NUMBERS))
            case x if x == RESUME:
                return _strings(dice.choice(["0", "{b}", "77"]))
            case x if x == INTRODUCE:
                return dice.choice([_strings("77", "0"), _strings("77", "0", "0"), _strings("77")])
            case x if x == CONTROL:
                return dice.choice(
                    [
                        _strings("print", "text"),
                        _strings("print"),
                        _strings("check"),
                        _strings("no-such-thing"),
                        _strings("quota", "set", "nonsense", "1"),
                        _strings("quota", "set", "nodes", "0"),
                        _strings("quota", "77"),
                        _strings("quota-soft", "set", "memory", "1000000"),
                        _strings("quota-soft", "set", "nodes", "1000000"),
                        _strings("log"),
                    ]
                )
            case _:
                return _strings("")

    def _path(self, *, special: bool = False) -> str:
        chance = self._dice.random()
        if chance < 0.03:
            return self._dice.choice(_SPOILED)
        if special and chance < 0.1:
            return self._dice.choice(["@introduceDomain", "@releaseDomain", "@releaseDomain", "@other"])
        return self._dice.choice(self._paths)

    def _value(self, who: str) -> str:
        dice = self._dice
        chance = dice.random()
        if chance < 0.85:
            return dice.choice(["", "1", "value", "\0", "\xff\0\xfe", "v" * 50])
        if chance < 0.97:
            return "w" * dice.choice([100, 1000, 1990, 1991, 2000, 2016, 2024, 2047, 2048, 2100])
        return "x" * dice.randrange(2000, 4000) if who in SOCKETS else "x" * 1500

    def _entries(self) -> list[str]:
        dice = self._dice
        if dice.random() < 0.05:
            return [dice.choice(["x0", "r", "n", "", "r0x", "0", "b 0", "r-1", "b0x1"])]
        whose = ["0", "{a}", "{a}", "{b}", "{b}", "77"]
        count = dice.choice([1, 1, 1, 2, 2, 3, 4, 6, 7])
        return [f"{dice.choice('nrwb')}{dice.choice(whose)}" for _ in range(count)]


def _ask(who: str, kind: int, *parts: str) -> Step:
    if kind == 99:
        kind = random.Random(len(parts[0])).choice([20, 23, EVENT, ERROR, 99])
    return {"do": "ask", "who": who, "type": kind, "body": "".join(parts)}


def _strings(*texts: str) -> tuple[str, ...]:
    return tuple(f"{text}\0" for text in texts)
