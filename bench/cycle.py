"""Share, map, touch, unmap, free: one page between two processes, beside multiprocessing.shared_memory's cycle.

    python bench/cycle.py [--json FILE]

Everything on one processor. A cycle: the first process makes a page and tells the second, which attaches it, reads a
byte, lets go and answers; the first frees it. `messages` is the floor: the messages of a cycle with nothing behind them
(a call answered at once for each call, a note about nothing for each note), and the same telling and answering. Medians
of rounds, taken in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING

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
    if not os.fork():
        os.close(line.here[1])
        line.serve(serve())
        os._exit(0)
    os.close(line.here[0])
    return line


def attach_segment(name: str) -> None:
    segment = SharedMemory(name=name)
    # Python before 3.13 lets every attacher's tracker remove it; that is not to be measured.
    resource_tracker.unregister(segment._name, "shared_memory")  # noqa: SLF001
    assert segment.buf[0] == 7
    segment.close()


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


def many_pages(domain: Domain) -> None:
    with domain.share(2, PAGES) as shared:
        for page in range(PAGES):
            shared.memory[page * 4096] = 7


def microseconds(cycle: Callable[[], None], cycles: int) -> float:
    started = time.perf_counter()
    for _ in range(cycles):
        cycle()
    return (time.perf_counter() - started) / cycles * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # children inherit it, the machine too
    with gntalloc.Machine() as machine:
        alice, bob = machine.domain(1), machine.domain(2).address
        granted = beside(lambda: attach_grant(gntalloc.current_domain(bob)))
        called = beside(lambda: messages_server(gntalloc.current_domain(bob)))
        named = beside(lambda: attach_segment)
        what = {
            "SharedMemory": (lambda: segment_cycle(named), CYCLES),
            "messages": (lambda: messages_cycle(alice, called), CYCLES),
            "grant, writable": (lambda: grant_cycle(alice, granted, 1, writable=True), CYCLES),
            "grant, read-only": (lambda: grant_cycle(alice, granted, 1, writable=False), CYCLES),
            f"{PAGES} SharedMemory": (many_segments, 10),
            f"{PAGES} pages in one call": (lambda: many_pages(alice), 50),
        }
        rounds: dict[str, list[float]] = {name: [] for name in what}
        for turn in range(ROUNDS + 1):
            for name, (cycle, cycles) in what.items():
                took = microseconds(cycle, cycles)
                if turn:  # the first warms up
                    rounds[name].append(took)
    medians = {name: statistics.median(each) for name, each in rounds.items()}
    for name, median in medians.items():
        print(f"{name:22} {median:9.1f} µs")
    base = medians["SharedMemory"]
    print(f"read-only grant / SharedMemory: {medians['grant, read-only'] / base:.2f}")
    print(f"the messages alone / SharedMemory: {medians['messages'] / base:.2f}")
    per_page = medians[f"{PAGES} SharedMemory"] / medians[f"{PAGES} pages in one call"]
    print(f"{PAGES} pages in one call are {per_page:.1f} times cheaper than {PAGES} segments")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({name: round(median, 1) for name, median in medians.items()}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
