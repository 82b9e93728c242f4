"""What it costs C programs with Xen's own libraries to run under `gntalloc run`, beside what it costs at least.

    python bench/run.py [--json FILE] [--rounds N]

Calls: the median of 15 batches of N, in each of three passes; the middle pass. vchan: libxenvchan of Xen at both ends,
in two domains; a round trip of 64 bytes, and one way in pieces of 64 KiB through rings of 1 MiB, beside the same
between two processes with a ring of as much in shared memory and futexes; passes take turns, so that what else the
computer does falls on both. Python's start-up: in turn under a run and without.

"the least" is `least.py`: the same calls served by hardly any Python, so that one can tell the computer's part from
ours. Its vchan is no vchan: nothing but NOTIFY there and back, and the ring in shared memory with NOTIFY for futexes.
The study's figures are those that gntalloc was begun with, of another computer, or of a better day of this one.

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

SOURCE, LEAST = Path(__file__).with_name("run.c"), Path(__file__).with_name("least.py")
PASSES = 3
RING, CHUNK, PIECES = 1 << 20, 65536, 8192
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

    def least(self, *command: str) -> dict[str, float]:
        """The same figures with the least Python there can be."""
        return lines([sys.executable, str(LEAST), self.program, *command])

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

    def turn(self, rounds: int) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """The calls once each way."""
        return self.calls(rounds), self.least("calls", str(rounds), "1", "8"), self.opens(rounds)

    def bulk(self) -> tuple[float, float, float]:
        """Megabytes a second, once each way."""
        bells = self.least("bells", str(RING), str(PIECES), str(CHUNK))["MB/s"]
        return self.vchan("drain", "pour", PIECES, CHUNK), bells, self.plain(PIECES)

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


def row(name: str, *figures: float | None) -> None:
    """One line of the table: under run, the least, their ratio, and the rest."""
    under, least, *rest = ["" if figure is None else f"{figure:.{0 if figure > 2000 else 2}f}" for figure in figures]
    ratio = f"{figures[0] / figures[1]:.2f}" if figures[0] and figures[1] else ""
    print(f"{name:36}{under:>12}{least:>12}{ratio:>8}" + "".join(f"{figure:>12}" for figure in rest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--rounds", type=int, default=200, metavar="N", help="calls in a batch (200)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder)
        started = time.monotonic()
        turns = [bench.turn(options.rounds) for _ in range(PASSES)]
        under, least, without = (middle(list(each)) for each in zip(*turns, strict=True))
        trips = [(bench.vchan("echo", "ask", 5000, 64), bench.least("bounce", "5000")["us"]) for _ in range(PASSES)]
        bulk = [bench.bulk() for _ in range(2 * PASSES - 1)]
        start = tuple(statistics.median(each) for each in bench.starts(25))
        load = os.getloadavg()[0]
    trip, bounce = (statistics.median(each) for each in zip(*trips, strict=True))
    through, bells, plain = (statistics.median(each) for each in zip(*bulk, strict=True))
    print(f"{'':36}{'under run':>12}{'the least':>12}{'ratio':>8}{'without':>12}{'the study':>12}")
    for name, figure in under.items():
        row(name + ", µs", figure, least.get(name), without.get(name), STUDY.get(name))
    row("vchan, 64 bytes there and back, µs", trip, bounce, None, 20)
    row("bulk, rings of 1 MiB, MB/s", through, bells, plain, 9400)
    row("start-up of Python, ms", start[0], None, start[1], None)
    print(f"\nbulk is {through / plain:.2f} of shared memory, start-up {start[0] / start[1]:.3f} of that without a run")
    took, python = time.monotonic() - started, sys.version.split()[0]
    print(f"{took:.0f} s; load {load:.1f} on {os.cpu_count()} processors; Python {python}")
    if options.json:
        figures = {"under": under, "least": least, "without": without, "trips": trips, "bulk": bulk, "start": start}
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
