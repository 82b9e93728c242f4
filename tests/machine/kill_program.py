"""python3 kill_program.py ALICE BOB GRANT KILLS SEED: children that grant, map, fork and hold, and are killed.

It is a process of its own because a small one forks quickly. ALICE and BOB are addresses of domains 1 and 2; GRANT is
one that lasts. At the end it prints what the children had got done, as JSON.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import signal
import sys
import time
from struct import Struct
from typing import TYPE_CHECKING

from gntalloc import DeviceError, Domain, Grant, TimedOut, current_domain

if TYPE_CHECKING:
    from collections.abc import Callable

PR_SET_CHILD_SUBREAPER = 36
AT_ONCE = 4
LONGEST_LIFE = 0.004  # seconds between two kills, at most
KEPT = 6  # things a child holds at once
WORD = Struct("=Q")


class Board:
    """Memory that all children share: how often each deed was done, and references that were granted lately."""

    def __init__(self, deeds: list[str]) -> None:
        self._names = deeds
        self._words = mmap.mmap(-1, 4096)

    def done(self, name: str) -> None:
        """About: two children may count at the same time."""
        at = self._names.index(name) * WORD.size
        WORD.pack_into(self._words, at, WORD.unpack_from(self._words, at)[0] + 1)

    def counts(self) -> dict[str, int]:
        return {name: WORD.unpack_from(self._words, at * WORD.size)[0] for at, name in enumerate(self._names)}

    def tell(self, slot: int, ref: int) -> None:
        WORD.pack_into(self._words, 2048 + slot * WORD.size, ref)

    def hear(self, slot: int) -> int:
        ref: int = WORD.unpack_from(self._words, 2048 + slot * WORD.size)[0]
        return ref


class Child:
    """One life: random deeds until it is killed."""

    def __init__(self, alice: Domain, bob: Domain, grant: Grant, board: Board, chance: random.Random) -> None:
        self._alice, self._bob, self._grant = alice, bob, grant
        self._board = board
        self._chance = chance
        self._kept: list[object] = []
        self._may_fork = True

    def live(self) -> None:
        while True:
            name = self._chance.choice(DEEDS)
            deed: Callable[[], object] = getattr(self, name)
            try:
                kept = deed()
            except (DeviceError, TimedOut):  # the limit, a stranger's reference that is gone, ...
                continue
            self._board.done(name)
            self._kept.append(kept)
            while len(self._kept) > KEPT:
                gone = self._kept.pop(self._chance.randrange(len(self._kept)))
                if hasattr(gone, "close"):
                    gone.close()

    def grant(self) -> object:
        shared = self._alice.share(2, self._chance.randrange(1, 4), writable=True)
        shared.memory[0] = 1
        self._board.tell(self._chance.randrange(AT_ONCE), shared.refs[-1])
        return shared

    def map(self) -> object:
        return self._bob.map(self._grant)

    def map_a_strangers(self) -> object:
        mapped = self._bob.map(1, self._board.hear(self._chance.randrange(AT_ONCE)), writable=True)
        mapped.memory[1] = 1
        return mapped

    def fork(self) -> None:
        """The grandchild has all that the child has, and goes on for itself."""
        if self._may_fork:
            self._may_fork = False
            if not os.fork():
                self._chance.seed(os.getpid())

    def hold(self) -> None:
        time.sleep(self._chance.random() * LONGEST_LIFE)


DEEDS = ["grant", "map", "map_a_strangers", "fork", "hold"]


def born(make: Callable[[], Child]) -> int:
    """A child in a process group of its own, so that its children are killed with it."""
    pid = os.fork()
    if not pid:
        try:
            os.setpgid(0, 0)
            make().live()
        finally:
            os._exit(1)  # it never ends by itself
    os.setpgid(pid, pid)
    return pid


def kill(group: int) -> None:
    os.killpg(group, signal.SIGKILL)
    try:
        while True:
            _pid, status = os.waitpid(-group, 0)
            if status != signal.SIGKILL:
                raise SystemExit(f"a child ended by itself, with status {status}")
    except ChildProcessError:
        pass  # nobody is left of it


def main() -> None:
    alice, bob = current_domain(sys.argv[1]), current_domain(sys.argv[2])
    grant, kills, seed = Grant.parse(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    chance = random.Random(seed)
    board = Board(DEEDS)
    groups: list[int] = []
    for _ in range(kills):
        while len(groups) < AT_ONCE:
            number = chance.random()
            groups.append(born(lambda: Child(alice, bob, grant, board, random.Random(number))))  # noqa: B023  at once
        time.sleep(chance.random() * LONGEST_LIFE)
        kill(groups.pop(chance.randrange(AT_ONCE)))
    for group in groups:
        kill(group)
    print(json.dumps(board.counts()))


if __name__ == "__main__":
    main()
