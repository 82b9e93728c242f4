"""What it costs C programs with Xen's own libraries to run under `gntalloc run`, beside the same without it.

    python bench/run.py [--json FILE] [--rounds N]

Calls: the median of 15 batches of N, in each of three passes; the middle pass. vchan: libxenvchan of Xen at both ends,
in two domains; a round trip of 64 bytes, and one way in pieces of 64 KiB through rings of 1 MiB, beside the same
between two processes with a ring of as much in shared memory and futexes; passes take turns, so that what else the
computer does falls on both. Python's start-up: in turn under a run and without.

Needs gcc and libxen-dev.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(__file__).with_name("run.c")
PASSES = 3
RING, CHUNK = 1 << 20, 65536
PATH = "/local/domain/1/data/vchan/bench"
STARTS = """
import subprocess, sys, time
for line in sys.stdin:
    start = time.perf_counter(); subprocess.run([sys.executable, '-c', 'pass']); took = time.perf_counter() - start
    print(took, flush=True)
"""
STUDY = {"NOTIFY": 10, "open+close": 20, "share+unshare": 150, "map+unmap": 140, "open+close of a file, O_RDWR": 12}


class Bench:
    """The program, and a machine for its runs."""

    def __init__(self, folder: str) -> None:
        self.program = os.path.join(folder, "run")
        self.machine = os.path.join(folder, "machine")
        libraries = ["-lxengnttab", "-lxenevtchn", "-lxenvchan"]
        subprocess.run(["gcc", "-O2", str(SOURCE), "-o", self.program, *libraries], check=True)

    def run(self, domid: int, *command: str) -> list[str]:
        ours = [sys.executable, "-m", "gntalloc", "run", "--machine", self.machine, "--domid", str(domid)]
        return [*ours, "--", *command]

    @contextmanager
    def beside(self, command: list[str]) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            yield process
            process.communicate(timeout=60)

    def calls(self, rounds: int) -> dict[str, float]:
        """Microseconds under a run."""
        with self.beside(self.run(1, self.program, "share", "2")) as granter:
            assert granter.stdout is not None
            ref = granter.stdout.readline().strip()
            return lines(self.run(2, self.program, "calls", str(rounds), "1", ref))

    def opens(self, rounds: int) -> dict[str, float]:
        """Of what is not about /dev/xen, without a run."""
        return lines([self.program, "opens", str(rounds)])

    def vchan(self, server: str, client: str, count: int, size: int) -> float:
        """What the measuring end printed."""
        rest = [str(count), str(size)]
        with self.beside(self.run(1, self.program, "vchan", "server", "2", PATH, str(RING), server, *rest)) as process:
            assert process.stdout is not None
            process.stdout.readline()
            there = lines(self.run(2, self.program, "vchan", "client", "1", PATH, "0", client, *rest))
            here = dict(line.rsplit(" ", 1) for line in process.stdout.read().splitlines())
        (figure,) = {**there, **here}.values()
        return float(figure)

    def plain(self, count: int) -> float:
        """Megabytes a second without any of it."""
        return lines([self.program, "plain", str(RING), str(count), str(CHUNK)])["MB/s"]

    def starts(self, count: int) -> tuple[list[float], list[float]]:
        """Milliseconds of Python's start-ups, in turn under a run and without."""
        own = [sys.executable, "-c", STARTS]
        took: tuple[list[float], list[float]] = ([], [])
        with self.beside(self.run(1, *own)) as under, self.beside(own) as without:
            for number in range(2 * count):
                process = (under, without)[number % 2]
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                took[number % 2].append(float(process.stdout.readline()) * 1e3)
        return took


def lines(command: list[str]) -> dict[str, float]:
    """A name and a number each."""
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300).stdout
    return {name: float(number) for name, number in (line.rsplit(" ", 1) for line in said.splitlines())}


def middle(passes: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in passes) for name in passes[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--rounds", type=int, default=200, metavar="N", help="calls in a batch (200)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder)
        started = time.monotonic()
        pairs = [(bench.calls(options.rounds), bench.opens(options.rounds)) for _ in range(PASSES)]
        under, without = (middle(list(each)) for each in zip(*pairs, strict=True))
        trip = statistics.median(bench.vchan("echo", "ask", 5000, 64) for _ in range(PASSES))
        bulk = [(bench.vchan("drain", "pour", 8192, CHUNK), bench.plain(8192)) for _ in range(2 * PASSES - 1)]
        start = tuple(statistics.median(each) for each in bench.starts(25))
        load = os.getloadavg()[0]
    through, beside = (statistics.median(each) for each in zip(*bulk, strict=True))
    print(f"{'':34}{'under run':>12}{'without':>12}{'the study':>12}")
    for name, figure in under.items():
        other, study = (f"{one[name]:.2f}" if name in one else "" for one in (without, STUDY))
        print(f"{name + ', µs':34}{figure:12.2f}{other:>12}{study:>12}")
    print(f"{'vchan, 64 bytes there and back, µs':34}{trip:12.2f}{'':>12}{'20':>12}")
    print(f"{'bulk, rings of 1 MiB, MB/s':34}{through:12.0f}{beside:12.0f}")
    print(f"{'start-up of Python, ms':34}{start[0]:12.2f}{start[1]:12.2f}")
    print(
        f"\nbulk is {through / beside:.2f} of shared memory, start-up {start[0] / start[1]:.3f} of that without a run"
    )
    print(f"{time.monotonic() - started:.0f} s; load {load:.1f} on {os.cpu_count()} processors")
    if options.json:
        figures = {"under": under, "without": without, "trip": trip, "bulk": bulk, "start": start, "load": load}
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
