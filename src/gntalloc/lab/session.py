"""Use a booted lab: run commands in its domains, move files in and out."""

from __future__ import annotations

import math
import os
import select
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from gntalloc.clock import Deadline, now
from gntalloc.lab.errors import Crashed, LabBroke, LabError, LabTimedOut, explain
from gntalloc.lab.inside.messages import CHUNK, Message, Nonsense, StreamDecoder, to_stream
from gntalloc.lab.payload import files_below

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from gntalloc.lab.qemu import Qemu


__all__ = ["GUESTS", "OnOutput", "Outcome", "Session", "Terminal"]

GUESTS = ("pv", "pvh")

# Called with a domain's name, 1 for standard output or 2 for standard error, and the bytes as they come.
OnOutput = Callable[[str, int, bytes], None]

_READ = 256 * 1024
# A console that takes nothing for this long will never take anything.
_STUCK = 60.0

# Enough for a panic with its call trace.
_TAIL = 50


@dataclass(frozen=True)
class Outcome:
    """Tell how a command in the lab ended."""

    exit_status: int
    output: str
    errors: str
    files: dict[str, bytes]
    seconds: float
    versions: dict[str, str]
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Terminal:
    """Be the terminal on this side of a command: its input, its rows and its columns."""

    descriptor: int
    size: Callable[[], tuple[int, int]]


@dataclass
class _Job:
    """Keep a command under way, or files on their way out."""

    number: int
    domain: str
    on_output: OnOutput
    terminal: Terminal | None = None
    size: tuple[int, int] = (0, 0)
    started: float = field(default_factory=now)
    streams: dict[int, bytearray] = field(default_factory=lambda: {1: bytearray(), 2: bytearray()})
    files: dict[str, bytearray] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    status: int | None = None
    ended: float = math.inf


class Session:
    """Use a lab that is up, in one thread. It ends with `close`, or at the end of its `with`."""

    def __init__(self, qemu: Qemu, versions: dict[str, str], clean_up: Callable[[], None]) -> None:
        self.versions = versions
        self._qemu = qemu
        self._qemu.socket.settimeout(_STUCK)
        self._clean_up = clean_up
        self._decoder = StreamDecoder()
        self._up: dict[str, dict[str, Any]] = {}
        self._logs: dict[str, bytearray] = {}
        self._lost: dict[str, str] = {}
        self._jobs: dict[int, _Job] = {}
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Switch the lab off."""
        self._qemu.stop()
        self._clean_up()

    # Domains

    def wait_up(self, domain: str, deadline: Deadline) -> None:
        """Wait until a domain's agent has reported."""
        self._pump(f"boot {domain}", lambda: domain in self._up, deadline, [domain])

    def start_guest(self, kind: str, memory: int) -> None:
        """Create a guest; it is there after `wait_up`."""
        self._send({"do": "start", "name": kind, "memory": memory})

    def domid(self, domain: str) -> int:
        """Give the number that Xen has given a domain."""
        domid: int = self._up[domain].get("domid", 0)
        return domid

    def console(self, domain: str) -> str:
        """Give all that a domain's kernel has written so far (dom0's with the hypervisor's)."""
        if domain == "dom0":
            return self._qemu.log()
        return self._logs.get(domain, bytearray()).decode(errors="replace")

    # Files

    def put(self, paths: Iterable[str | Path], domain: str = "dom0") -> None:
        """Bring files and folders into a domain's working directory, under the names they have here.

        A guest gets them through its console, some 40 KB/s: large files belong into `Lab.boot(files=…)`.
        """
        self._check(domain)
        for source, name in files_below(paths):
            self._put(source, name, domain)

    def fetch(self, patterns: Sequence[str], domain: str = "dom0", *, timeout: float = 60) -> dict[str, bytes]:
        """Bring files out of a domain.

        Args:
            patterns: Paths, with * and ? if need be, from the working directory or from /. A folder brings
                all that is below it.
            domain: dom0, pv or pvh.
            timeout: Seconds.

        Raises:
            LabError: A pattern fits no file.
        """
        job = self._fetch(patterns, domain, Deadline(timeout))
        del self._jobs[job.number]
        if job.missing:
            raise LabError(
                explain(
                    f"fetch {', '.join(job.missing)} from {domain}",
                    "there is no such file",
                    "Check where the program writes it: paths start at its working directory",
                )
            )
        return {name: bytes(content) for name, content in job.files.items()}

    # Commands

    def run(
        self,
        command: Sequence[str],
        domain: str = "dom0",
        *,
        fetch: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        timeout: float = 300,
        on_output: OnOutput | None = None,
        terminal: Terminal | None = None,
    ) -> Outcome:
        """Run a command to its end in one domain.

        Args:
            command: Program and arguments, as for subprocess.
            domain: dom0, pv or pvh.
            fetch: Files to bring out afterwards; those that are not there are named in the outcome.
            environment: Added to the domain's.
            timeout: Seconds until LabTimedOut.
            on_output: Gets the output as it comes.
            terminal: For an interactive program.
        """
        commands = {domain: command}
        return self.run_together(
            commands,
            fetch={domain: fetch},
            environment=environment,
            timeout=timeout,
            on_output=on_output,
            terminal=terminal,
        )[domain]

    def run_together(
        self,
        commands: Mapping[str, Sequence[str]],
        *,
        fetch: Mapping[str, Sequence[str]] | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 300,
        on_output: OnOutput | None = None,
        terminal: Terminal | None = None,
    ) -> dict[str, Outcome]:
        """Run one command in each of several domains at the same time, until all have ended.

        The outcomes come in the order in which the commands ended. Of two commands, each finds the
        other's domain in its environment, as PEER_DOMID.
        """
        deadline = Deadline(timeout)
        jobs = {}
        for domain, command in commands.items():
            peers = [str(self.domid(other)) for other in commands if other != domain]
            surroundings = {"PEER_DOMID": peers[0]} if len(peers) == 1 else {}
            surroundings.update(environment or {})
            jobs[domain] = self._start(command, domain, surroundings, on_output or _ignore, terminal)
        asked = " and ".join(f"run {command[0]} in {domain}" for domain, command in commands.items())
        self._pump(asked, lambda: all(job.status is not None for job in jobs.values()), deadline, list(jobs))
        outcomes = {}
        for domain, job in sorted(jobs.items(), key=lambda item: item[1].ended):
            wanted = (fetch or {}).get(domain, ())
            fetched = self._fetch(wanted, domain, deadline) if wanted else job
            outcomes[domain] = self._outcome(job, fetched)
        return outcomes

    # Inside

    def _outcome(self, job: _Job, fetched: _Job) -> Outcome:
        assert job.status is not None
        for done in {job.number, fetched.number}:
            del self._jobs[done]
        return Outcome(
            exit_status=job.status,
            output=job.streams[1].decode(errors="replace"),
            errors=job.streams[2].decode(errors="replace"),
            files={name: bytes(content) for name, content in fetched.files.items()},
            seconds=job.ended - job.started,
            versions={**self.versions, **self._up[job.domain]["versions"]},
            missing=fetched.missing,
        )

    def _start(
        self,
        command: Sequence[str],
        domain: str,
        environment: Mapping[str, str],
        on_output: OnOutput,
        terminal: Terminal | None,
    ) -> _Job:
        job = self._new_job(domain, on_output, terminal)
        self._send(
            {
                "to": domain,
                "do": "run",
                "id": job.number,
                "command": list(command),
                "environment": dict(environment),
                "terminal": list(job.size) if terminal else None,
            }
        )
        return job

    def _put(self, source: Path, name: str, domain: str) -> None:
        with source.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            first = True
            while (data := file.read(CHUNK)) or first:
                self._send({"to": domain, "do": "put", "path": name, "mode": mode, "first": first}, data)
                first = False

    def _fetch(self, patterns: Sequence[str], domain: str, deadline: Deadline) -> _Job:
        job = self._new_job(domain, _ignore)
        self._send({"to": domain, "do": "get", "id": job.number, "paths": list(patterns)})
        self._pump(f"fetch files from {domain}", lambda: job.status is not None, deadline, [domain])
        return job

    def _new_job(self, domain: str, on_output: OnOutput, terminal: Terminal | None = None) -> _Job:
        self._check(domain)
        self._number += 1
        size = terminal.size() if terminal else (0, 0)
        self._jobs[self._number] = job = _Job(self._number, domain, on_output, terminal, size)
        return job

    def _check(self, domain: str) -> None:
        if domain in self._lost:
            raise self._guest_crashed(f"use domain {domain}", domain)
        if domain not in self._up:
            raise LabError(
                explain(
                    f"use domain {domain}",
                    f"this boot has only {', '.join(self._up)}",
                    f"Boot the lab with guests=[{domain!r}]",
                )
            )

    def _send(self, head: dict[str, Any], body: bytes = b"") -> None:
        try:
            self._qemu.socket.sendall(to_stream(Message(head, body)))
        except TimeoutError:
            raise self._timed_out("talk to the lab", [head.get("to", "dom0")]) from None
        except OSError:
            raise self._crashed("talk to the lab") from None

    def _pump(self, asked: str, done: Callable[[], bool], deadline: Deadline, domains: list[str]) -> None:
        """Take in the lab's messages until `done`, the deadline, or the end of a domain that is needed."""
        while not done():
            for domain in domains:
                if domain in self._lost:
                    raise self._guest_crashed(asked, domain)
            if deadline.expired:
                raise self._timed_out(asked, domains)
            typing = {
                job.terminal.descriptor: job
                for job in self._jobs.values()
                if job.terminal is not None and job.status is None
            }
            agent = self._qemu.socket.fileno()
            ready, _, _ = select.select([agent, *typing], [], [], deadline.within(1.0))
            if agent in ready:
                data = self._qemu.socket.recv(_READ)
                if not data:
                    raise self._crashed(asked)
                try:
                    messages = list(self._decoder.feed(data))
                except Nonsense as nonsense:
                    raise _broke(asked, str(nonsense)) from None
                for message in messages:
                    self._take(message)
            for descriptor, job in typing.items():
                self._type(job, descriptor in ready)

    def _type(self, job: _Job, ready: bool) -> None:
        assert job.terminal is not None
        if ready:
            typed = os.read(job.terminal.descriptor, CHUNK)
            self._send({"to": job.domain, "do": "input", "id": job.number}, typed)
        if (size := job.terminal.size()) != job.size:
            job.size = size
            self._send({"to": job.domain, "do": "resize", "id": job.number, "terminal": list(size)})

    def _take(self, message: Message) -> None:
        """Take in a message. What belongs to no job of this session is nobody's any more.

        Raises:
            LabBroke: a field is not there, or is of another kind.
            LabError: the domain could not do what it was asked.
        """
        head, domain = message.head, _field(message.head, "from", str)
        match head.get("is"):
            case "up":
                self._up[domain] = _checked_report(head)
            case "log":
                self._logs.setdefault(domain, bytearray()).extend(message.body)
            case "lost":
                self._lost[domain] = _field(head, "why", str)
            case "failed":
                asked, why = _field(head, "asked", str), _field(head, "why", str)
                raise LabError(explain(f"{asked} in {domain}", why, "Check the path, and the room in its memory"))
            case "output" | "file" | "ended" | "got" as what:
                job = self._jobs.get(_field(head, "id", int))
                if job is not None:
                    self._take_for(job, what, message)
            case other:
                raise _broke("hear from the lab", f"there is no message {str(other)[:40]!r}")

    def _take_for(self, job: _Job, what: str, message: Message) -> None:
        head = message.head
        if what == "output":
            stream = _field(head, "stream", int)
            if stream not in job.streams:
                raise _broke("hear from the lab", f"there is no stream {stream}")
            job.streams[stream] += message.body
            job.on_output(job.domain, stream, message.body)
        elif what == "file":
            content = job.files.setdefault(_field(head, "path", str), bytearray())
            content += message.body
        else:
            missing = _field(head, "missing", list, [])
            if not all(isinstance(name, str) for name in missing):
                raise _broke("hear from the lab", "names of files that are none")
            job.status, job.missing, job.ended = _field(head, "status", int, 0), missing, now()

    def _crashed(self, asked: str) -> Crashed:
        return Crashed(
            explain(
                asked,
                "Xen or dom0 went down",
                "Its last words are below; if they name no cause, try again with --timeout raised",
                log=_tail(self._qemu.log()),
            )
        )

    def _guest_crashed(self, asked: str, domain: str) -> Crashed:
        return Crashed(
            explain(
                asked,
                f"the guest {domain} is gone: {self._lost[domain]}",
                "The last words of its kernel are below",
                log=_tail(self.console(domain)),
            )
        )

    def _timed_out(self, asked: str, domains: list[str]) -> LabTimedOut:
        logs = "\n".join(
            f"console of {domain}:\n{_tail(self.console(domain))}" for domain in {"dom0": 0} | dict.fromkeys(domains, 0)
        )
        return LabTimedOut(
            explain(
                asked,
                "the time limit passed",
                "Raise it with --timeout, or look below for what hangs",
                log=logs,
            )
        )


def _field(head: Mapping[str, Any], name: str, kind: type, default: object = None) -> Any:
    """Take a value out of a message's head.

    Raises:
        LabBroke: it is not there, or is of another kind.
    """
    value = head.get(name, default)
    if type(value) is not kind:
        raise _broke("hear from the lab", f"{name!r} is {str(value)[:40]!r} in a message")
    return value


def _checked_report(head: dict[str, Any]) -> dict[str, Any]:
    versions = _field(head, "versions", dict)
    if not all(isinstance(version, str) for version in versions.values()):
        raise _broke("hear from the lab", "versions that are none")
    _field(head, "domid", int, 0)
    return head


def _broke(asked: str, why: str) -> LabBroke:
    return LabBroke(explain(asked, f"an agent in the lab sent what cannot be: {why}", "Boot the lab anew"))


def _tail(log: str) -> str:
    return "\n".join(log.splitlines()[-_TAIL:])


def _ignore(domain: str, stream: int, data: bytes) -> None:
    """Ignore output, for a caller that wants only the outcome."""
