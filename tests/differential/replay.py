"""Carry episodes out: on the kernel's devices in the lab, or on a machine. The answers are what is compared.

    python3 replay.py serve                       in a guest: carry out what dom0 says
    python3 replay.py play                        under `gntalloc run`: carry out what standard input says
    python3 replay.py WAY IN OUT [WAY IN OUT…]     in the lab: IN and OUT are JSON lines, one operation a line
    WAY is alone, out-of (the guest grants, dom0 maps) or into (dom0 grants, the guest maps)

Each process of an episode is an `Actor`, a seat of the conformance suite. A `Player` has those of one side, and knows
what names stand for. Between domains operations travel in batches: as many as follow each other on one side.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from itertools import groupby
from struct import iter_unpack, pack
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from driving import PAGE, Program
from seat import Seat, carry_out, make
from world import Episode, Operation, side_of

from gntalloc.abi.evtchn import BIND_INTERDOMAIN, BIND_UNBOUND_PORT, NOTIFY, UNBIND
from gntalloc.abi.gntdev import (
    COPY_DEST_GREF,
    COPY_SOURCE_GREF,
    GET_OFFSET_FOR_VADDR,
    GRANT_COPY,
    ForeignPage,
    GetOffsetForVaddr,
    GrantCopy,
    GrantCopySegment,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from far import Far

__all__ = ["Player", "replay", "replay_on_machine", "replay_under_run"]

NOBODY = 12345  # no domain has this number
NO_PORT = 9999
NO_STATUS = 77  # what a segment's status is before


class Actor:
    """A process that is a seat, and can be forked and killed. A `Transport` of the conformance suite."""

    _ours: ClassVar[set[int]] = set()  # our ends of all lines: a child must not keep another's open

    def __init__(self, pid: int, ask: int | str, answers: int | str) -> None:
        self._process = os.pidfd_open(pid)  # a number may be another's by the time it is killed
        self._questions = open(ask, "w")  # noqa: SIM115  closed in close
        self._answers = open(answers)  # noqa: SIM115
        self._ours.update((self._questions.fileno(), self._answers.fileno()))

    @classmethod
    def start(cls, kind: str, environment: dict[str, str]) -> Actor:
        """A new process. Made by fork: under emulation starting Python takes a second."""
        questions, ask = os.pipe()
        answer, answers = os.pipe()
        pid = os.fork()
        if not pid:
            for descriptor in (ask, answer, *cls._ours):
                os.close(descriptor)
            os.environ.update(environment)
            _act(lambda: make(kind), questions, answers)
        os.close(questions)
        os.close(answers)
        return cls(pid, ask, answer)

    def fork(self) -> Actor:
        """Its child, which has its files and maps."""
        with tempfile.TemporaryDirectory() as folder:
            ways = [os.path.join(folder, name) for name in ("ask", "answer")]
            for way in ways:
                os.mkfifo(way)
            pid = json.loads(self.ask(json.dumps(["fork", *ways])))["ok"]
            return Actor(pid, *ways)

    def ask(self, line: str) -> str:
        """See Transport."""
        self._questions.write(line + "\n")
        self._questions.flush()
        return self._answers.readline()

    def kill(self) -> None:
        """SIGKILL it, and wait until the kernel has closed and unmapped what it had."""
        signal.pidfd_send_signal(self._process, signal.SIGKILL)
        select.select([self._process], [], [])
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._ours.difference_update((self._questions.fileno(), self._answers.fileno()))
        self._questions.close()
        self._answers.close()
        os.close(self._process)


def _act(make_seat: Callable[[], Seat], *lines: int | str) -> None:
    """The life of an actor, and of the children it is told to fork. Never returns."""
    try:
        seat = make_seat()
        while lines:
            lines = _serve(seat, *lines)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _serve(seat: Seat, questions: int | str, answers: int | str) -> tuple[str, ...]:
    """Answer until there is no more to answer. In a child: go on with the lines returned."""
    with open(questions) as steps, open(answers, "w") as out:
        for line in steps:
            step, *arguments = json.loads(line)
            if step != "fork":
                answer = carry_out(seat, step, arguments)
            elif child := os.fork():
                answer = {"ok": child}
            else:
                return tuple(arguments)
            print(json.dumps(answer), file=out, flush=True)
    return ()


class Side(Protocol):
    """Where the operations of one side are carried out."""

    def begin(self, seats: list[str], domid: int, peer: int) -> None:
        """A new episode, with these processes."""

    def play(self, operations: Episode, news: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Answers, and what names stand for that the other side may ask about. `news` is what it has told."""

    def end(self) -> None:
        """The end of all its processes."""


class Player:
    """A side in this domain.

    Args:
        kind: of its seats, kernel or machine.
        environment: what seats need to find their domain.
    """

    def __init__(self, kind: str, environment: dict[str, str]) -> None:
        self._kind = kind
        self._environment = environment
        self._actors: dict[str, Actor] = {}
        self._programs: dict[str, Program] = {}
        self._values: dict[str, Any] = {}  # what names stand for
        self._ports: dict[int, str] = {}
        self._scratch: dict[str, str] = {}  # a process's page of memory for what arguments point to
        self._domid = self._peer = 0
        self._limit_before: int | None = None

    def begin(self, seats: list[str], domid: int, peer: int) -> None:
        """See Side."""
        self._domid, self._peer = domid, peer
        self._values.clear()
        self._ports.clear()
        self._scratch.clear()
        for name in seats:
            self._add(name, Actor.start(self._kind, self._environment))

    def end(self) -> None:
        """See Side. The limit is put back."""
        if self._limit_before is not None:
            next(iter(self._programs.values())).must("set_limit", self._limit_before)
            self._limit_before = None
        for actor in self._actors.values():
            actor.kill()
        self._actors.clear()
        self._programs.clear()

    def play(self, operations: Episode, news: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """See Side."""
        self._values.update(news)
        before = set(self._values)
        answers = [self._one(operation) for operation in operations]
        return answers, {name: self._values[name] for name in set(self._values) - before if name[0] in "ac"}

    def _add(self, name: str, actor: Actor) -> None:
        self._actors[name] = actor
        self._programs[name] = Program(actor, self._domid)

    def _one(self, operation: Operation) -> Any:
        """The value, or the name of an errno, or which name stands for nothing because something failed before."""
        program = self._programs.get(operation["seat"])
        if program is None:
            return {"missing": operation["seat"]}
        try:
            return getattr(self, "_" + operation["do"])(program, operation)
        except KeyError as missing:
            return {"missing": missing.args[0]}

    # Processes and files.

    def _fork(self, program: Program, operation: Operation) -> Any:
        self._add(operation["as"], self._actors[operation["seat"]].fork())
        if operation["seat"] in self._scratch:
            self._scratch[operation["as"]] = self._scratch[operation["seat"]]
        return "done"

    def _kill(self, program: Program, operation: Operation) -> Any:
        self._actors.pop(operation["seat"]).kill()
        del self._programs[operation["seat"]]
        return "done"

    def _open(self, program: Program, operation: Operation) -> Any:
        flags = os.O_RDWR if operation["writable"] else os.O_RDONLY
        if operation["device"] == "evtchn":
            flags |= os.O_NONBLOCK
        name = program.step("open", operation["device"], flags)
        self._values[operation["as"]] = name
        return "done" if name.startswith("f") else name

    def _close(self, program: Program, operation: Operation) -> Any:
        return program.step("close", self._values[operation["file"]])

    # gntalloc.

    def _limit(self, program: Program, operation: Operation) -> Any:
        if self._limit_before is None:
            self._limit_before = program.must("get_limit")
        return program.step("set_limit", operation["pages"])

    def _alloc(self, program: Program, operation: Operation) -> Any:
        domid = self._peer if operation["for_peer"] else NOBODY
        file, count = self._values[operation["file"]], operation["count"]
        made = program.alloc(file, count, domid=domid, flags=int(operation["writable"]))
        if made.result != 0:
            return made.result
        self._values[operation["as"]] = made.index, made.refs
        return {"index": made.index, "refs": made.refs}

    def _dealloc(self, program: Program, operation: Operation) -> Any:
        return program.dealloc(self._values[operation["file"]], self._index(operation), operation["count"])

    def _index(self, operation: Operation) -> int:
        """Of an ALLOC or a MAP_GRANT_REF, and a page or a byte from there on."""
        value = self._values[operation["of"]]
        index = value if isinstance(value, int) else value[0]
        return int(index + operation.get("page", 0) * PAGE + operation.get("at", 0))

    # gntdev.

    def _reserve(self, program: Program, operation: Operation) -> Any:
        refs = [(self._peer, self._values[name][1][page]) for name, page in operation["refs"]]
        result, index = program.reserve(self._values[operation["file"]], refs)
        if result != 0:
            return result
        self._values[operation["as"]] = index
        return {"index": index}

    def _unreserve(self, program: Program, operation: Operation) -> Any:
        return program.unreserve(self._values[operation["file"]], self._index(operation), operation["count"])

    def _copy(self, program: Program, operation: Operation) -> Any:
        """Of one segment: its status, and what its local side has afterwards, where `data` was. They lie together."""
        memory = self._scratch.get(operation["seat"]) or program.must("scratch")
        self._scratch[operation["seat"]] = memory
        address = program.must("address", memory)
        places = (operation["source"], operation["dest"])
        source, dest = (address + GrantCopySegment.SIZE if place is None else self._word(*place) for place in places)
        flags = COPY_SOURCE_GREF * (places[0] is not None) | COPY_DEST_GREF * (places[1] is not None)
        local = bytes.fromhex(operation["data"])
        segment = GrantCopySegment(source, dest, len(local), flags, NO_STATUS).pack()
        program.must("poke", memory, 0, (segment + local).hex())
        result, _ = program.ioctl(self._values[operation["file"]], GRANT_COPY, GrantCopy(1, address).pack())
        after = bytes.fromhex(program.must("peek", memory, 0, len(segment) + len(local)))
        status = GrantCopySegment.unpack_from(after).status
        return {"result": result, "status": status, "local": after[len(segment) :].hex()}

    def _word(self, name: str, page: int, at: int) -> int:
        return ForeignPage(self._values[name][1][page], at, self._peer).to_word()

    def _offset(self, program: Program, operation: Operation) -> Any:
        address = program.step("address", self._values[operation["map"]]) + operation["at"]
        argument = GetOffsetForVaddr(address, 0, 0).pack()
        result, after = program.ioctl(self._values[operation["file"]], GET_OFFSET_FOR_VADDR, argument)
        if result != 0:
            return result
        answer = GetOffsetForVaddr.unpack_from(after)
        return {"offset": answer.offset, "count": answer.count}

    # Both.

    def _notify(self, program: Program, operation: Operation) -> Any:
        port = NO_PORT if operation["port"] is None else self._values[operation["port"]]
        return program.notify(self._values[operation["file"]], self._index(operation), operation["action"], port)

    def _mmap(self, program: Program, operation: Operation) -> Any:
        length = operation["pages"] * PAGE
        name = program.mmap(self._values[operation["file"]], self._index(operation), length, operation["prot"])
        if not name.startswith("m"):
            return name
        self._values[operation["as"]] = name
        return "done"

    def _munmap(self, program: Program, operation: Operation) -> Any:
        start, length = operation["page"] * PAGE, operation["pages"] * PAGE
        return program.step("munmap", self._values[operation["map"]], start, length)

    def _peek(self, program: Program, operation: Operation) -> Any:
        self._settle(program)
        return program.step("peek", self._values[operation["map"]], operation["at"], 8)

    def _settle(self, program: Program) -> None:
        """Let what was done have its effect on what only looks at memory, or at a ring.

        A kernel clears bytes and sends events within munmap, kill and write. A machine hears of them a moment later,
        and surely before it answers anybody anything.
        """
        if self._kind == "machine":
            program.must("get_limit")

    def _poke(self, program: Program, operation: Operation) -> Any:
        return program.step("poke", self._values[operation["map"]], operation["at"], operation["data"])

    # evtchn.

    def _bound(self, operation: Operation, port: Any) -> Any:
        if not isinstance(port, int):
            return port
        self._values[operation["as"]] = port
        self._ports[port] = operation["as"]
        return {"port": port}

    def _bind(self, program: Program, operation: Operation) -> Any:
        file = self._values[operation["file"]]
        return self._bound(operation, program.ioctl(file, BIND_UNBOUND_PORT, pack("=I", self._peer))[0])

    def _connect(self, program: Program, operation: Operation) -> Any:
        argument = pack("=II", self._peer, self._values[operation["to"]])
        return self._bound(operation, program.ioctl(self._values[operation["file"]], BIND_INTERDOMAIN, argument)[0])

    def _on_port(self, program: Program, operation: Operation, request: int) -> Any:
        argument = pack("=I", self._values[operation["port"]])
        return program.ioctl(self._values[operation["file"]], request, argument)[0]

    def _send(self, program: Program, operation: Operation) -> Any:
        return self._on_port(program, operation, NOTIFY)

    def _unbind(self, program: Program, operation: Operation) -> Any:
        return self._on_port(program, operation, UNBIND)

    def _rearm(self, program: Program, operation: Operation) -> Any:
        data = pack("=I", self._values[operation["port"]])
        return program.step("write", self._values[operation["file"]], data.hex())

    def _events(self, program: Program, operation: Operation) -> Any:
        self._settle(program)
        data = program.step("read", self._values[operation["file"]], 256)
        if data.startswith("E"):
            return data
        return {"ports": [self._ports.get(port, "?") for (port,) in iter_unpack("=I", bytes.fromhex(data))]}


class FarSide:
    """A side in a guest that serves."""

    _ROOM = 2800  # bytes of operations: a value in xenstore is at most a page

    def __init__(self, far: Far) -> None:
        self._far = far

    def begin(self, seats: list[str], domid: int, peer: int) -> None:
        """See Side."""
        self._far.say("begin", "", json.dumps([seats, domid, peer]))

    def play(self, operations: Episode, news: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """See Side."""
        answers: list[Any] = []
        learned: dict[str, Any] = {}
        for batch in _batches(operations, self._ROOM):
            text = json.dumps(batch)
            needed = {name: value for name, value in news.items() if f'"{name}"' in text}
            more, values = self._far.say("play", "", json.dumps([batch, needed]))
            answers += more
            learned.update(values)
        return answers, learned

    def end(self) -> None:
        """See Side."""
        self._far.say("finish")


def _batches(operations: Episode, room: int) -> Iterator[Episode]:
    batch: Episode = []
    size = 0
    for operation in operations:
        length = len(json.dumps(json.dumps(operation)))  # quoted twice, as it travels
        if batch and size + length > room:
            yield batch
            batch, size = [], 0
        batch.append(operation)
        size += length
    if batch:
        yield batch


def serve() -> None:
    """In the guest: what dom0 says, over the two nodes of the conformance suite's far.py."""
    from far import ANSWER, ASK, NAP

    from gntalloc.xenstore.client import Store

    player = Player("kernel", {})
    with Store() as store:
        store.write(ASK, "0 null")
        store.write(ANSWER, f"0 {json.dumps(store.domid)}")
        store.set_permissions(ASK, [f"b{store.domid}"])
        done, what = 0, ""
        while what != "end":
            number, _, text = store.read_text(ASK).partition(" ")
            if int(number) == done:
                time.sleep(NAP)
                continue
            done = int(number)
            what, _, line = json.loads(text)
            answer: Any = None
            if what == "begin":
                player.begin(*json.loads(line))
            elif what == "play":
                answer = player.play(*json.loads(line))
            elif what == "finish":
                player.end()
            store.write(ANSWER, f"{done} {json.dumps(answer)}")


def replay(episode: Episode, sides: dict[str, Side], domids: dict[str, int]) -> list[Any]:
    """The answers to an episode's operations. `sides` and `domids` are those of g and p."""
    learned: dict[str, Any] = {}
    answers: list[Any] = []
    for name, side in sides.items():
        (other,) = set(domids) - {name}
        side.begin([f"{name}1", f"{name}2"], domids[name], domids[other])
    try:
        for name, operations in groupby(episode, key=lambda operation: side_of(operation["seat"])):
            more, values = sides[name].play(list(operations), learned)
            answers += more
            learned.update(values)
    finally:
        for name in ("p", "g"):  # the peer lets go first: no page has to wait for a timer
            sides[name].end()
    return answers


def replay_on_machine(episodes: Iterable[Episode], behaviour: str = "linux", *, alone: bool = False) -> list[list[Any]]:
    """The answers of a machine of ours. `alone` is one domain that grants to itself, as a kernel alone has to."""
    import gntalloc

    domids = {"g": 1, "p": 1 if alone else 2}
    with gntalloc.Machine(behaviour=behaviour) as machine:
        sides: dict[str, Side] = {
            side: Player("machine", {"GNTALLOC_DOMAIN": machine.domain(domid).address})
            for side, domid in domids.items()
        }
        return [replay(episode, sides, domids) for episode in episodes]


class RunSide:
    """A side under `gntalloc run`, in domain `domid` of the machine in `folder`."""

    def __init__(self, folder: str, domid: int) -> None:
        run = [sys.executable, "-m", "gntalloc", "run", "--all-opens", "--machine", folder, "--domid", str(domid)]
        command = [*run, "--", sys.executable, os.path.abspath(__file__), "play"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def begin(self, seats: list[str], domid: int, peer: int) -> None:
        """See Side."""
        self._ask("begin", seats, domid, peer)

    def play(self, operations: Episode, news: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """See Side."""
        answers, values = self._ask("play", operations, news)
        return answers, values

    def end(self) -> None:
        """See Side."""
        self._ask("end")

    def close(self) -> None:
        """End the run."""
        self._process.communicate(timeout=20)

    def _ask(self, what: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([what, arguments]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def play_lines() -> None:
    """What `RunSide` asks, in its domain."""
    player = Player("run", {})
    for line in sys.stdin:
        what, arguments = json.loads(line)
        print(json.dumps(getattr(player, what)(*arguments)), flush=True)


def replay_under_run(episodes: Iterable[Episode], *, alone: bool = False) -> list[list[Any]]:
    """The same by system calls on what `gntalloc run` serves, of a machine that does as Linux."""
    import gntalloc

    domids = {"g": 1, "p": 1 if alone else 2}
    with gntalloc.Machine(behaviour="linux") as machine:
        for domid in domids.values():
            machine.domain(domid)
        runs = {name: RunSide(machine.folder, domid) for name, domid in domids.items()}
        try:
            return [replay(episode, dict(runs), domids) for episode in episodes]
        finally:
            for each in runs.values():
                each.close()


def read_lines(lines: Iterable[str]) -> dict[int, Episode]:
    """Episodes by number, from JSON lines."""
    operations = map(json.loads, filter(None, map(str.strip, lines)))
    return {number: list(group) for number, group in groupby(operations, key=lambda line: line.pop("episode"))}


def write_lines(episodes: dict[int, Episode]) -> str:
    """JSON lines: an operation a line."""
    return "".join(
        json.dumps({"episode": number, **operation}, separators=(",", ":")) + "\n"
        for number, episode in episodes.items()
        for operation in episode
    )


def main(arguments: list[str]) -> None:
    """See the top."""
    if arguments in (["serve"], ["play"]):
        (serve if arguments == ["serve"] else play_lines)()
        return
    from far import ANSWER, Far

    from gntalloc.guest.devices.kernel import KernelDevices
    from gntalloc.xenstore.client import Store

    here = KernelDevices().domid
    far = None
    while arguments:
        way, source, target, *arguments = arguments
        domids = {"g": here, "p": here}
        sides: dict[str, Side] = {"g": Player("kernel", {}), "p": Player("kernel", {})}
        if way != "alone":
            if far is None:
                far = Far.wait_for(int(os.environ["PEER_DOMID"]))
            away = {"out-of": "g", "into": "p"}[way]
            sides[away], domids[away] = FarSide(far), far.domid
        with open(source) as lines:
            episodes = read_lines(lines)
        started, count = time.monotonic(), 0
        with open(target, "w") as out:
            for number, episode in episodes.items():
                for operation, answer in zip(episode, replay(episode, sides, domids), strict=True):
                    print(json.dumps({"episode": number, **operation, "answer": answer}), file=out)
                count += len(episode)
        print(f"{way}: {count} operations in {time.monotonic() - started:.0f} s", flush=True)
    if far is not None:
        far.say("end")
        with Store() as store:  # or the next who waits for the guest would find the old answer
            store.remove(f"/local/domain/{far.domid}/{ANSWER}")


if __name__ == "__main__":
    main(sys.argv[1:])
