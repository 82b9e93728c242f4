"""What one machine serves: four programs at once, on two processors; and what a neighbour of a flood has to wait.

    python bench/throughput.py [--json FILE]

Four processes, in domains of their own, allocate and free for a while. Then one process measures each of its calls
while another floods the machine with requests and never waits for an answer before the next, and a third has been
stopped in the middle of a flood, its answers unread. Figures of rounds: the median.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import time
from typing import TYPE_CHECKING

import gntalloc
from gntalloc.abi.gntalloc import ALLOC_GREF, DEALLOC_GREF, AllocGref, DeallocGref
from gntalloc.wire.memory import Region
from gntalloc.wire.messages import Ioctl, encode, kind_of
from gntalloc.wire.stream import encode as encode_frame

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from gntalloc import Domain
    from gntalloc.guest.devices import DeviceFile

CLIENTS = 4
SECONDS = 1.5
ROUNDS = 5
CALLS = 2000
MANY = 64
PROCESSORS = 2


def cycle(file: DeviceFile, pages: int) -> None:
    """Allocate, and free."""
    argument = bytearray(AllocGref(0, 1, pages, 0).pack() + bytes(max(8, 4 * pages)))
    file.ioctl(ALLOC_GREF, argument)
    file.ioctl(DEALLOC_GREF, DeallocGref(AllocGref.unpack_from(argument).index, pages).pack())


def work(address: str, line: Connection) -> None:
    """Cycles for a while, whenever told to, and say how many."""
    domain = gntalloc.current_domain(address)
    file = domain.devices.open("gntalloc")
    while (what := line.recv()) is not None:
        kind, pages = what
        end = time.perf_counter() + SECONDS
        done = 0
        while time.perf_counter() < end:
            if kind == "share":
                with domain.share(0, pages):
                    pass
            else:
                cycle(file, pages)
            done += 1
        line.send(done)


def flood(address: str, line: Connection) -> None:
    """Ask without ever waiting; answers are read only as far as there is no room for more."""
    domain = gntalloc.current_domain(address)
    file = domain.devices.open("gntalloc")
    channel = domain.devices._channel  # noqa: SLF001  a program that behaves so uses no library
    region = Region(0x10000, bytearray(AllocGref(0, 1, 1 << 31, 0).pack() + bytes(8)), writable=True)
    asked = Ioctl(file._handle, ALLOC_GREF, 0x10000, [region])  # noqa: SLF001
    messages = memoryview(encode_frame(kind_of(Ioctl), 1, encode(asked)) * 50)
    sock = channel._sock  # noqa: SLF001
    sock.setblocking(False)
    line.send("flooding")
    left = messages
    while True:
        try:
            left = left[sock.send(left) :] or messages
        except BlockingIOError:
            pass
        try:
            while sock.recv(1 << 20):
                pass
        except BlockingIOError:
            pass


def processes(machine: gntalloc.Machine, target, first: int, count: int) -> list[tuple]:
    spawn = multiprocessing.get_context("spawn")
    started = []
    for domid in range(first, first + count):
        here, there = spawn.Pipe()
        process = spawn.Process(target=target, args=(machine.domain(domid).address, there), daemon=True)
        process.start()
        there.close()
        started.append((process, here))
    return started


def throughput(lines: list[Connection], kind: str, pages: int) -> float:
    """Cycles a second, of all together."""
    rounds = []
    for _ in range(ROUNDS):
        for line in lines:
            line.send((kind, pages))
        rounds.append(sum(line.recv() for line in lines) / SECONDS)
    return statistics.median(rounds)


def latencies(domain: Domain) -> tuple[float, float, float]:
    """Milliseconds that an ALLOC takes: median, 99th percentile, worst."""
    file = domain.devices.open("gntalloc")
    took = []
    for _ in range(CALLS):
        argument = bytearray(AllocGref(0, 1, 1, 0).pack() + bytes(8))
        started = time.perf_counter()
        file.ioctl(ALLOC_GREF, argument)
        took.append((time.perf_counter() - started) * 1e3)
        file.ioctl(DEALLOC_GREF, DeallocGref(AllocGref.unpack_from(argument).index, 1).pack())
    file.close()
    took.sort()
    return statistics.median(took), took[len(took) * 99 // 100], took[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:PROCESSORS])
    found: dict[str, float] = {}
    with gntalloc.Machine(limit=100_000) as machine:
        workers = processes(machine, work, 1, CLIENTS)
        lines = [line for _, line in workers]
        found["single-page cycles a second"] = throughput(lines, "cycle", 1)
        found[f"pages a second, in ALLOCs of {MANY}"] = MANY * throughput(lines, "cycle", MANY)
        found["share() and close() a second, one page, mapped"] = throughput(lines, "share", 1)
        for process, line in workers:
            line.send(None)
            process.join()
        alone = latencies(machine.domain(9))
        floods = processes(machine, flood, 11, 2)
        for _, line in floods:
            line.recv()
        os.kill(floods[1][0].pid, signal.SIGSTOP)
        time.sleep(0.2)
        beside = latencies(machine.domain(9))
        alive = floods[0][0].is_alive()
        for process, _ in floods:
            process.kill()
            process.join()
    for name, three in (("alone", alone), ("beside a flood and a stopped program", beside)):
        for what, value in zip(("median", "99th percentile", "worst"), three, strict=True):
            found[f"an ALLOC {name}, {what}, ms"] = value
    for name, value in found.items():
        print(f"{name:60} {value:12,.2f}" if "ms" in name else f"{name:60} {value:12,.0f}")
    if not alive:
        print("the flood had ended before the end")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({name: round(value, 3) for name, value in found.items()}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
