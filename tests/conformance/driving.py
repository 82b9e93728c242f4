"""Driving seats: start them, give them steps, and the words rows are written in."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import traceback
from struct import pack, unpack_from
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from seat import make, serve

from gntalloc.abi.evtchn import BIND_UNBOUND_PORT
from gntalloc.abi.gntalloc import ALLOC_GREF, DEALLOC_GREF, SET_UNMAP_NOTIFY
from gntalloc.abi.gntdev import MAP_GRANT_REF, UNMAP_GRANT_REF

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NotApplicable", "Program", "Rig", "Transport", "distant", "local"]

PAGE = 4096
RW = 3
READ = 1


class NotApplicable(Exception):
    """A seat cannot express a step of this row."""


class Refusal(Exception):
    """A step failed with an errno, and a row did not expect it."""


class Transport(Protocol):
    """The line to a seat, wherever it is."""

    def ask(self, line: str) -> str:
        """Send a step, return its answer."""

    def kill(self) -> None:
        """SIGKILL the seat."""

    def close(self) -> None:
        """Let it end."""


class Local:
    """A seat that is a child of this process, made by fork: under emulation starting Python takes a second."""

    _ours: ClassVar[set[int]] = set()  # our ends of all the pipes: a child must not keep another's line open

    def __init__(self, kind: str, environment: dict[str, str]) -> None:
        questions, ask = os.pipe()
        answer, answers = os.pipe()
        self._ours.update((ask, answer))
        self.pid = os.fork()
        if not self.pid:
            try:
                for descriptor in self._ours:
                    os.close(descriptor)
                os.environ.update(environment)
                with open(questions) as steps, open(answers, "w") as out:
                    serve(make(kind), steps, out)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(questions)
        os.close(answers)
        self._ask = open(ask, "w")  # noqa: SIM115  closed in close
        self._answers = open(answer)  # noqa: SIM115

    def ask(self, line: str) -> str:
        """See Transport."""
        self._ask.write(line + "\n")
        self._ask.flush()
        return self._answers.readline()

    def kill(self) -> None:
        """See Transport."""
        os.kill(self.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """See Transport."""
        if self.pid:
            self._ours.difference_update((self._ask.fileno(), self._answers.fileno()))
            self._ask.close()
            self._answers.close()
            os.waitpid(self.pid, 0)
            self.pid = 0


class Distant:
    """A seat that a `spawn.py` of another domain forked, which listens at `path`."""

    def __init__(self, path: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect(path)
        self._answers = self._sock.makefile("r")
        self.pid = int(self._answers.readline())
        self._process = os.pidfd_open(self.pid)

    def ask(self, line: str) -> str:
        """See Transport."""
        self._sock.sendall(line.encode() + b"\n")
        return self._answers.readline()

    def kill(self) -> None:
        """See Transport."""
        os.kill(self.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """See Transport."""
        if self.pid:
            self._sock.shutdown(socket.SHUT_WR)
            select.select([self._process], [], [])  # it has ended, memory and files and all
            os.close(self._process)
            self._answers.close()
            self._sock.close()
            self.pid = 0


class Program:
    """A seat as rows see it. Every step returns its value, or its errno's name as a string; see `must`."""

    def __init__(self, transport: Transport, domid: int) -> None:
        self.domid = domid
        self._transport = transport

    def step(self, name: str, *arguments: Any) -> Any:
        """One step: its value, or the name of its errno."""
        answer = json.loads(self._transport.ask(json.dumps([name, *arguments])) or '{"errno": "DEAD"}')
        if "cannot" in answer:
            raise NotApplicable(answer["cannot"])
        self.after = answer.get("after", "")
        return answer["errno"] if "errno" in answer else answer["ok"]

    def must(self, name: str, *arguments: Any) -> Any:
        """One step that has to work for the row to make sense."""
        answer = self.step(name, *arguments)
        if isinstance(answer, str) and answer.startswith("E") and answer.isupper():
            raise Refusal(f"{name}{arguments} answered {answer}")
        return answer

    def kill(self) -> None:
        """SIGKILL it."""
        self._transport.kill()

    def close(self) -> None:
        """Let it end."""
        self._transport.close()

    # Words.

    def open(self, device: str, flags: int = os.O_RDWR) -> str:
        """A device file."""
        name: str = self.must("open", device, flags)
        return name

    def ioctl(self, file: str, request: int, data: bytes, **spec: Any) -> tuple[Any, bytes]:
        """(result or errno, the buffer afterwards)."""
        answer = self.step("ioctl", file, request, {"data": data.hex(), **spec})
        if isinstance(answer, str):
            return answer, bytes.fromhex(self.after)
        return answer[0], bytes.fromhex(answer[1])

    def alloc(self, file: str, count: int = 1, *, domid: int = 0, flags: int = 1, **spec: Any) -> Alloc:
        """ALLOC_GREF."""
        data = pack("=HHIQ", domid, flags, count, 0) + bytes(max(8, 4 * count) if count < 70000 else 8)
        return Alloc(*self.ioctl(file, ALLOC_GREF, data, **spec), count)

    def grant(self, file: str, count: int = 1, *, domid: int = 0, flags: int = 1) -> Alloc:
        """ALLOC_GREF that must work."""
        made = self.alloc(file, count, domid=domid, flags=flags)
        if made.result != 0:
            raise Refusal(f"ALLOC of {count} answered {made.result}")
        return made

    def dealloc(self, file: str, index: int, count: int = 1) -> Any:
        """DEALLOC_GREF."""
        return self.ioctl(file, DEALLOC_GREF, pack("=QI4x", index, count))[0]

    def notify(self, file: str, index: int, action: int, port: int = 0) -> Any:
        """SET_UNMAP_NOTIFY, of either device."""
        return self.ioctl(file, SET_UNMAP_NOTIFY, pack("=QII", index, action, port))[0]

    def reserve(self, file: str, refs: list[tuple[int, int]]) -> tuple[Any, int]:
        """MAP_GRANT_REF: (result or errno, index)."""
        data = pack("=I4xQ", len(refs), 0) + b"".join(pack("=II", *ref) for ref in refs)
        result, after = self.ioctl(file, MAP_GRANT_REF, data.ljust(24, b"\0"))
        return result, unpack_from("=Q", after, 8)[0]

    def unreserve(self, file: str, index: int, count: int) -> Any:
        """UNMAP_GRANT_REF."""
        return self.ioctl(file, UNMAP_GRANT_REF, pack("=QI4x", index, count))[0]

    def mmap(self, file: str, offset: int, length: int = PAGE, prot: int = RW, *, shared: bool = True) -> str:
        """A map's name, or an errno's."""
        answer: str = self.step("mmap", file, offset, length, prot, shared)
        return answer

    def port(self) -> int:
        """A port of our own, unbound."""
        channel = self.open("evtchn")
        result, _ = self.ioctl(channel, BIND_UNBOUND_PORT, pack("=I", 0))
        assert isinstance(result, int)
        return result


class Alloc:
    """What ALLOC_GREF answered."""

    def __init__(self, result: Any, after: bytes, count: int) -> None:
        self.result = result
        self.after = after
        self.index: int = unpack_from("=Q", after, 8)[0]
        whole = len(after) >= 16 + 4 * count
        self.refs: list[int] = list(unpack_from(f"={count}I", after, 16)) if whole else []


class Rig:
    """Two programs, in domains that can grant each other pages, and a way to have more."""

    def __init__(self, start: Callable[[str], Program]) -> None:
        self._start = start
        self._programs: dict[str, Program] = {}

    @property
    def granter(self) -> Program:
        """Runs on the kernel under test."""
        return self.program("granter")

    @property
    def grantee(self) -> Program:
        """The other side."""
        return self.program("grantee")

    def program(self, name: str) -> Program:
        """Any other program of the granter's domain, or one of the two."""
        if name not in self._programs:
            self._programs[name] = self._start(name)
        return self._programs[name]

    def close(self) -> None:
        """Let them all end."""
        for program in self._programs.values():
            program.close()


def local(kind: str, domids: dict[str, int], environments: dict[str, dict[str, str]]) -> Rig:
    """Programs that are children of this process. `domids` and `environments` by name, `granter` for any other."""

    def start(name: str) -> Program:
        key = name if name in domids else "granter"
        return Program(Local(kind, environments.get(key, {})), domids[key])

    return Rig(start)


def distant(domids: dict[str, int], paths: dict[str, str]) -> Rig:
    """Programs in other domains. `paths`, by name, are where each domain's `spawn.py` listens."""

    def start(name: str) -> Program:
        key = name if name in domids else "granter"
        return Program(Distant(paths[key]), domids[key])

    return Rig(start)
