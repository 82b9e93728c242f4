"""Share, map, touch, unmap, free: one page between two processes, beside multiprocessing.shared_memory's cycle.

    python bench/cycle.py [--rounds N] [--json FILE]

Everything on one processor. A cycle: the first process makes a page and tells the second, which attaches it, reads a
byte, lets go and answers; the first frees it. `two calls` is the floor: the machine's answers to as many questions that
do nothing, and the same telling and answering. The figures are processor time, of every process that takes part, as
the kernel counts it (/proc/PID/schedstat): on a shared computer the time of a clock says little. They are medians of
rounds, taken in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING, NamedTuple

import gntalloc
from gntalloc.wire.messages import VERSION, Hello

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc import Domain

ROUNDS = 7
CYCLES = 300
PAGES = 64


class Line:
    """Two pipes between two processes."""

    def __init__(self) -> None:
        self.here, self.there = os.pipe(), os.pipe()
        self.process = 0

    def ask(self, text: str) -> None:
        os.write(self.here[1], text.encode())
        os.read(self.there[0], 1)

    def serve(self, serve: Callable[[str], None]) -> None:
        while text := os.read(self.here[0], 65536).decode():
            serve(text)
            os.write(self.there[1], b".")


def beside(serve: Callable[[], Callable[[str], None]]) -> Line:
    """Another process that serves."""
    line = Line()
    line.process = os.fork()
    if not line.process:
        os.close(line.here[1])
        line.serve(serve())
        os._exit(0)
    os.close(line.here[0])
    return line


def attach_segments() -> Callable[[str], None]:
    # Python before 3.13 tells the tracker of every attacher too; that is not to be measured.
    resource_tracker.register = lambda *_: None

    def serve(name: str) -> None:
        segment = SharedMemory(name=name)
        assert segment.buf[0] == 7
        segment.close()

    return serve


def segment_cycle(line: Line) -> None:
    segment = SharedMemory(create=True, size=4096)
    segment.buf[0] = 7
    line.ask(segment.name)
    segment.close()
    segment.unlink()


def attach_grant(domain: Domain) -> Callable[[str], None]:
    def serve(text: str) -> None:
        with domain.map(gntalloc.Grant.parse(text)) as mapped:
            assert mapped.memory[0] == 7

    return serve


def grant_cycle(domain: Domain, line: Line, pages: int, *, writable: bool) -> None:
    with domain.share(2, pages, writable=writable) as shared:
        shared.memory[0] = 7
        line.ask(str(shared.grant))


def messages_server(domain: Domain) -> Callable[[str], None]:
    def serve(_text: str) -> None:
        domain.devices._channel.call(Hello(VERSION))  # noqa: SLF001  instead of ATTACH: the floor is below the API

    return serve


def messages_cycle(domain: Domain, line: Line) -> None:
    domain.devices._channel.call(Hello(VERSION))  # noqa: SLF001  instead of SHARE
    line.ask("1:8:ro")


def many_segments() -> None:
    segments = [SharedMemory(create=True, size=4096) for _ in range(PAGES)]
    for segment in segments:
        segment.buf[0] = 7
    for segment in segments:
        segment.close()
        segment.unlink()


def many_pages(domain: Domain, pages: int) -> None:
    with domain.share(2, pages) as shared:
        for page in range(pages):
            shared.memory[page * 4096] = 7


def processor_time(process: int) -> int:
    """Nanoseconds that a process has had a processor."""
    with open(f"/proc/{process}/schedstat") as file:
        return int(file.read().split()[0])


class Part(NamedTuple):
    """A cycle, how often it is done in a round, and the process at the other end of it."""

    cycle: Callable[[], None]
    cycles: int
    peer: int | None = None


def spent(part: Part, machine: int, tracker: int) -> dict[str, float]:
    """Microseconds of processor time of a cycle, by process."""
    processes = {"this": os.getpid(), "machine": machine, "peer": part.peer, "tracker": tracker}
    before = {name: processor_time(each) for name, each in processes.items() if each is not None}
    for _ in range(part.cycles):
        part.cycle()
    return {name: (processor_time(processes[name]) - then) / part.cycles / 1e3 for name, then in before.items()}


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Each part's processor time by process, and in all."""
    resource_tracker.ensure_running()
    tracker = resource_tracker._resource_tracker._pid  # noqa: SLF001
    with gntalloc.Machine() as machine:
        alice, bob = machine.domain(1), machine.domain(2).address
        granted = beside(lambda: attach_grant(gntalloc.current_domain(bob)))
        called = beside(lambda: messages_server(gntalloc.current_domain(bob)))
        named = beside(attach_segments)
        parts = {
            "SharedMemory": Part(lambda: segment_cycle(named), CYCLES, named.process),
            "two calls": Part(lambda: messages_cycle(alice, called), CYCLES, called.process),
            "grant, writable": Part(lambda: grant_cycle(alice, granted, 1, writable=True), CYCLES, granted.process),
            "grant, read-only": Part(lambda: grant_cycle(alice, granted, 1, writable=False), CYCLES, granted.process),
            "share and close, 1 page": Part(lambda: many_pages(alice, 1), CYCLES),
            f"share and close, {PAGES} pages": Part(lambda: many_pages(alice, PAGES), 50),
            f"{PAGES} SharedMemory": Part(many_segments, 10),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in parts}
        for turn in range(rounds + 1):
            for name, part in parts.items():
                took = spent(part, machine.pid, tracker)
                if turn:  # the first warms up
                    found[name].append({**took, "all": sum(took.values())})
    return {
        name: {process: statistics.median(each[process] for each in rounds) for process in rounds[0]}
        for name, rounds in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # children inherit it, the machine too
    found = measure(options.rounds)
    base = found["SharedMemory"]["all"]
    columns = ("all", "this", "machine", "peer", "tracker")
    print(f"{'processor time, µs':26}" + "".join(f"{name:>10}" for name in columns) + "  / SharedMemory")
    for name, took in found.items():
        cells = "".join(f"{took[process]:10.1f}" if process in took else f"{'':10}" for process in columns)
        print(f"{name:26}{cells}{took['all'] / base:16.2f}")
    per_page = found[f"{PAGES} SharedMemory"]["all"] / found[f"share and close, {PAGES} pages"]["all"]
    print(f"{PAGES} pages in one call are {per_page:.1f} times cheaper than {PAGES} segments")
    if options.json:
        with open(options.json, "w") as file:
            rounded = {name: {key: round(value, 1) for key, value in took.items()} for name, took in found.items()}
            json.dump(rounded, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
