"""Replays episodes against a xenstore: the real daemon, from dom0 of the lab, or ours.

    python3 xs_replay.py EPISODES ANSWERS        in dom0 of the lab: JSON lines in, JSON lines out

An episode is a list of steps (see xs_generate.py). Who asks is one of

    s, t     connections of domain 0 over the daemon's socket
    a, b     two guests, each over its one ring

Each step is answered by what came back and the events that this caused, wherever they went. In paths, permissions and
answers {a} and {b} are the guests' numbers. What must differ is left out: the numbers of transactions and generations.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Step = dict[str, Any]
Episode = list[Step]
Answer = list[Any]

HEADER = struct.Struct("=IIII")
(CONTROL, DIRECTORY, READ, GET_PERMS, WATCH, UNWATCH, START, END, INTRODUCE, RELEASE) = range(10)
WRITE, MKDIR, RM, SET_PERMS, EVENT, ERROR = range(11, 17)
RESET, PART = 21, 22

SOCKETS, GUESTS = ("s", "t"), ("a", "b")
DEFAULTS = {"nodes": 1000, "watches": 128, "transactions": 10, "transaction-nodes": 1024, "node-size": 2048}
DEFAULTS |= {"path-max": 2048, "permissions": 5}


class Daemon(Protocol):
    """A xenstore with these four connections."""

    domids: dict[str, int]

    def reconnect(self, who: str) -> None:
        """End a connection of domain 0 and make another."""

    def introduce(self, who: str) -> bytes:
        """The body of an INTRODUCE of this guest."""

    def ask(self, who: str, kind: int, tx_id: int, body: bytes) -> tuple[int, bytes]:
        """One request, and what is answered: the answer's type and body."""

    def events(self) -> dict[str, list[bytes]]:
        """The bodies of the events that have come since the last call, and all of them."""


class Player:
    """Carries out episodes."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._transactions: dict[str, int] = {}
        self._names = {name: str(number).encode() for name, number in daemon.domids.items()}

    def play(self, episode: Episode) -> list[Answer]:
        """The answers to an episode, which finds everything as each does."""
        self.set_back()
        answers: list[Answer] = []
        for step in episode:
            try:
                answers.append(self._step(step))
            except Exception as error:
                so_far = "\n".join(map(json.dumps, episode[: len(answers) + 1]))
                raise RuntimeError(f"the daemon was lost at the end of\n{so_far}") from error
        return answers

    def set_back(self) -> None:
        """Everything as an episode is to find it."""
        daemon = self._daemon
        for who in SOCKETS:
            daemon.reconnect(who)
        for name, value in DEFAULTS.items():
            self._quietly("s", CONTROL, "quota", "set", name, str(value))
        for who in GUESTS:  # released, a guest has neither nodes nor watches nor transactions nor a target
            self._quietly("s", RELEASE, f"{{{who}}}")
        self._quietly("s", RM, "/test")
        for who in GUESTS:
            daemon.ask("s", INTRODUCE, 0, daemon.introduce(who))
            home = f"/local/domain/{{{who}}}"
            self._quietly("s", RM, home)
            self._quietly("s", MKDIR, f"{home}/data")
            self._quietly("s", SET_PERMS, home, "n0", f"r{{{who}}}")
            self._quietly("s", SET_PERMS, f"{home}/data", f"n{{{who}}}")
        for name in ("@introduceDomain", "@releaseDomain"):
            self._quietly("s", SET_PERMS, name, "n0")
        self._transactions.clear()
        daemon.events()

    def _quietly(self, who: str, kind: int, *strings: str) -> tuple[int, bytes]:
        return self._daemon.ask(who, kind, 0, b"".join(self._filled(text) + b"\0" for text in strings))

    def _step(self, step: Step) -> Answer:
        who = step["who"]
        if step["do"] == "reconnect":
            self._daemon.reconnect(who)
            return self._with_events(["reconnected"])
        if step["do"] == "introduce":
            kind, answer = self._daemon.ask("s", INTRODUCE, 0, self._daemon.introduce(who))
            return self._with_events([kind, self._shown(answer)])
        if step["do"] == "nodes":  # a quota of as many nodes as this guest has, and some
            used = self._quietly("s", CONTROL, "quota", f"{{{who}}}")[1]
            found = re.search(rb"nodes *: *(\d+)", used)
            assert found is not None, used
            self._quietly("s", CONTROL, "quota", "set", "nodes", str(int(found[1]) + step["more"]))
            return []
        kind, body = step["type"], self._filled(step["body"])
        name = step.get("in")
        tx_id = self._transactions.get(name, 0x7FFFFFFF) if name else 0
        answered, answer = self._daemon.ask(who, kind, tx_id, body)
        if kind == START and answered == START:
            self._transactions[step["as"]] = int(answer.rstrip(b"\0"))
            answer = b""
        if kind == PART and answered == PART:
            answer = answer.partition(b"\0")[2]
        return self._with_events([answered, self._shown(answer)])

    def _with_events(self, answer: Answer) -> Answer:
        events = {
            who: [self._shown(body) for body in bodies] for who, bodies in self._daemon.events().items() if bodies
        }
        return [*answer, events] if events else answer

    def _filled(self, text: str) -> bytes:
        raw = text.encode("latin-1")
        for name, number in self._names.items():
            raw = raw.replace(b"{%s}" % name.encode(), number)
        return raw

    def _shown(self, body: bytes) -> str:
        """An answer, in which the guests' numbers are names: after /local/domain/ and in permissions."""
        for name, number in self._names.items():
            letter = name.encode()
            body = re.sub(rb"(?<=/local/domain/)%s(?![0-9])" % number, b"{%s}" % letter, body)
            body = re.sub(rb"(?<![^\0])([nrwb])%s(?=\0)" % number, rb"\1{%s}" % letter, body)
        return body.decode("latin-1")


def replay(daemon: Daemon, episodes: Mapping[int, Episode]) -> Iterable[tuple[int, list[Answer]]]:
    """The answers to all episodes."""
    player = Player(daemon)
    for number, episode in episodes.items():
        yield number, player.play(episode)
    player.set_back()  # the last one's quotas are everybody's


# Ours, as pure state.


class Ours:
    """Our server, without sockets."""

    def __init__(self, domids: dict[str, int]) -> None:
        from gntalloc.xenstore.daemon.server import Daemon

        self.domids = domids
        self._server = Daemon()
        for domid in domids.values():
            self._server.create(domid)
            self._server.introduce(domid)
        self._sessions = {who: self._server.connect(domids.get(who, 0)) for who in (*SOCKETS, *GUESTS)}
        self._events: dict[str, list[bytes]] = {}

    def reconnect(self, who: str) -> None:
        """See Daemon."""
        self._server.disconnect(self._sessions[who])
        self._sessions[who] = self._server.connect(0)

    def introduce(self, who: str) -> bytes:
        """See Daemon."""
        return b"%d\0000\0001\0" % self.domids[who]

    def ask(self, who: str, kind: int, tx_id: int, body: bytes) -> tuple[int, bytes]:
        """See Daemon."""
        from gntalloc.xenstore.wire import Message

        self._server.handle(self._sessions[who], Message(kind, 1, tx_id, body))
        found = [message for message in self._read(who) if message[0] != EVENT]
        if kind == INTRODUCE:
            for guest in GUESTS:
                domain = self._server.domains.get(self.domids[guest])
                if self._sessions[guest].closed and domain is not None and domain.introduced:
                    self._sessions[guest] = self._server.connect(self.domids[guest])
        assert len(found) == 1, found
        return found[0]

    def events(self) -> dict[str, list[bytes]]:
        """See Daemon."""
        for who in self._sessions:
            self._read(who)
        found, self._events = self._events, {}
        return {who: found[who] for who in sorted(found)}

    def _read(self, who: str) -> list[tuple[int, bytes]]:
        session = self._sessions[who]
        messages = []
        while session.outbox:
            data = session.take()
            kind, _req_id, _tx_id, length = HEADER.unpack_from(data)
            messages.append((kind, data[HEADER.size : HEADER.size + length]))
        self._events.setdefault(who, []).extend(body for kind, body in messages if kind == EVENT)
        return messages


# The real one.


class Real:
    """The daemon of this dom0, and two domains that do not run."""

    def __init__(self) -> None:
        import socket

        import idle

        self.domids = idle.create(list(GUESTS))
        self._socket = socket
        self._wires: dict[str, Any] = {who: self._connected() for who in SOCKETS}
        self._wires |= {who: idle.Ring(domid) for who, domid in self.domids.items()}
        self._bell = self._connected()
        self._came: dict[str, bytearray] = {who: bytearray() for who in self._wires}
        self._answers: list[tuple[int, bytes]] = []
        self._events: dict[str, list[bytes]] = {}
        self._last = 0
        self._ports = {who: self._read_port(domid) for who, domid in self.domids.items()}

    def reconnect(self, who: str) -> None:
        """See Daemon."""
        self._wires[who].close()
        self._wires[who] = self._connected()
        self._came[who].clear()

    def introduce(self, who: str) -> bytes:
        """See Daemon."""
        return b"%d\0000\000%d\0" % (self.domids[who], self._ports[who])

    def ask(self, who: str, kind: int, tx_id: int, body: bytes) -> tuple[int, bytes]:
        """See Daemon."""
        self._last += 1
        self._answers.clear()
        data = HEADER.pack(kind, self._last, tx_id, len(body)) + body
        while data:
            data = data[self._wires[who].send(data) :]
            self._look()
        for _ in range(10_000):
            if self._answers:
                return self._answers.pop()
            self._look()
        raise TimeoutError(f"{who}: {kind} {body!r} was not answered")

    def events(self) -> dict[str, list[bytes]]:
        """See Daemon."""
        while self._look() or any(self._came.values()):
            pass
        found, self._events = self._events, {}
        return {who: found[who] for who in sorted(found)}

    def _look(self) -> bool:
        """Let the daemon look at everything, take what it had to say. Whether it had anything."""
        ping = HEADER.pack(10, 0, 0, 2) + b"0\0"
        self._bell.sendall(ping * 3)  # it serves one message of each connection a round
        for _ in range(3):
            head = self._bell.recv(HEADER.size, self._socket.MSG_WAITALL)
            self._bell.recv(HEADER.unpack(head)[3], self._socket.MSG_WAITALL)
        before = sum(map(len, self._came.values()))
        some = False
        for who in self._wires:
            some |= self._take(who)
        return some or before != sum(map(len, self._came.values()))

    def _take(self, who: str) -> bool:
        came = self._came[who]
        if who in GUESTS:
            came += self._wires[who].receive()
        else:
            try:
                came += self._wires[who].recv(65536, self._socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass  # nothing
        some = False
        while len(came) >= HEADER.size:
            kind, number, _tx_id, length = HEADER.unpack_from(came)
            if len(came) < HEADER.size + length:
                break
            body = bytes(came[HEADER.size : HEADER.size + length])
            del came[: HEADER.size + length]
            some = True
            if kind == EVENT:
                self._events.setdefault(who, []).append(body)
            elif number == self._last:
                self._answers.append((kind, body))
        return some

    def _connected(self) -> Any:
        sock = self._socket.socket(self._socket.AF_UNIX)
        sock.connect("/run/xenstored/socket")
        return sock

    def _read_port(self, domid: int) -> int:
        kind, body = self.ask("s", READ, 0, b"/local/domain/%d/store/port\0" % domid)
        assert kind == READ, body
        return int(body)


def main(source: str, target: str) -> None:
    """See the top."""
    with open(source) as file:
        episodes = {entry["number"]: entry["steps"] for entry in map(json.loads, file)}
    with open(target, "w") as out:
        for number, answers in replay(Real(), episodes):
            print(json.dumps({"number": number, "answers": answers}), file=out)


if __name__ == "__main__":
    main(*sys.argv[1:])
