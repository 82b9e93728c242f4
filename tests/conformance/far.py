"""Seats in another domain, driven over xenstore: a guest serves, dom0 asks.

    python3 far.py serve                  in the guest, until it is told to end
    Far.connect(domid)                    in dom0

One node each way, under the guest's own data/: `ask` and `answer`, each value a number and a JSON text. The number says
which question an answer is to. Slow, and enough: a few hundred steps.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from driving import Local, Program, Rig

from gntalloc.xenstore.client import Store
from gntalloc.xenstore.errors import NoNode

ASK, ANSWER = "data/seat/ask", "data/seat/answer"
PATIENCE = 60.0
NAP = 0.003
AGAIN = 3.0


def serve() -> None:
    """In the guest: start seats, pass steps on, until "end"."""
    seats: dict[str, Local] = {}
    with Store() as store:
        store.write(ASK, "0 null")
        store.write(ANSWER, f"0 {json.dumps(store.domid)}")
        store.set_permissions(ASK, [f"b{store.domid}"])
        done = 0
        while True:
            number, _, text = store.read_text(ASK).partition(" ")
            if int(number) == done:
                time.sleep(NAP)
                continue
            done = int(number)
            what, name, line = json.loads(text)
            answer: Any = None
            if what == "start":
                seats[name] = Local("kernel", {})
            elif what == "ask":
                answer = seats[name].ask(line)
            elif what == "kill":
                seats.pop(name).kill()
            elif what == "close":
                seats.pop(name).close()
            store.write(ANSWER, f"{done} {json.dumps(answer)}")
            if what == "end":
                return


class Far:
    """The line to a guest that serves."""

    def __init__(self, domid: int) -> None:
        self.domid = domid
        self._store = Store()
        self._number = 0
        self._base = f"/local/domain/{domid}/"

    @classmethod
    def wait_for(cls, domid: int, timeout: float = PATIENCE) -> Far:
        """Wait until the guest serves."""
        far = cls(domid)
        deadline = time.monotonic() + timeout
        while True:
            try:
                far._store.read(far._base + ANSWER)
            except NoNode:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                return far

    def say(self, what: str, name: str = "", line: str = "") -> Any:
        """One question, its answer."""
        self._number += 1
        question = f"{self._number} {json.dumps([what, name, line])}"
        deadline = time.monotonic() + PATIENCE
        asked = 0.0
        while (now := time.monotonic()) < deadline:
            if now - asked > AGAIN:  # a guest that only begins to serve wipes what was asked before; twice does no harm
                self._store.write(self._base + ASK, question)
                asked = now
            number, _, text = self._store.read_text(self._base + ANSWER).partition(" ")
            if int(number) == self._number:
                return json.loads(text)
            time.sleep(NAP)
        raise TimeoutError(f"the guest did not answer {what} {name} {line}")

    def program(self, name: str) -> Program:
        """A seat in the guest."""
        self.say("start", name)
        return Program(_FarSeat(self, name), self.domid)


class _FarSeat:
    """One seat over there, as a Transport."""

    def __init__(self, far: Far, name: str) -> None:
        self._far = far
        self._name = name
        self._open = True

    def ask(self, line: str) -> str:
        """See Transport."""
        answer: str = self._far.say("ask", self._name, line)
        return answer

    def kill(self) -> None:
        """See Transport."""
        self._far.say("kill", self._name)
        self._open = False

    def close(self) -> None:
        """See Transport."""
        if self._open:
            self._far.say("close", self._name)
            self._open = False


def out_of(far: Far) -> Rig:
    """The granter and its like in the guest, the grantee here, in dom0."""

    def start(name: str) -> Program:
        return Program(Local("kernel", {}), 0) if name == "grantee" else far.program(name)

    return Rig(start)


def into(far: Far) -> Rig:
    """The granter and its like here, in dom0, the grantee in the guest."""

    def start(name: str) -> Program:
        return far.program(name) if name == "grantee" else Program(Local("kernel", {}), 0)

    return Rig(start)


if __name__ == "__main__":
    assert sys.argv[1:] == ["serve"], sys.argv
    serve()
