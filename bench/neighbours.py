"""What a quiet program waits for while another one attacks the machine.

    python bench/neighbours.py [--only NAME] [--calls N] [--times N] [--json FILE]

A neighbour in a domain of its own shares a page and closes it, again and again, with a pause in between. First it is
alone, then beside programs that only use the processors as an attack does, then beside each attack: bench/attacks.py.
Each attack has a machine of its own. Its memory is looked at before, and some seconds after. With --times the attack is
repeated on that machine before the last look: does the memory grow?
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import gntalloc
from gntalloc import GntallocError

ATTACKS = Path(__file__).parent / "attacks.py"
PAUSE = 0.002  # seconds
CALMS_DOWN = 3.0  # seconds
BAR, LONGEST = 10.0, 50.0  # milliseconds above what it is beside the same load
ROWS = (
    ("copy", 1),
    ("copy", 64),
    ("copy", 1000),
    ("refused copy", 64),
    ("refused copy", 1000),
    ("notes", 64),
    ("notes", 1000),
    ("allocations", 1),
    ("allocations", 1000),
    ("waits", 1000),
    ("chains", 1),
    ("chains", 50),
    ("chains", 1000),
    ("transactions", 1),
    ("maps", 1000),
    ("big maps", 30_000),
    ("locks", 40_000),
    ("knocks", 1),
    ("halves", 1000),
    ("listings", 10_000),
    ("closings", 500),
)


class Seen(NamedTuple):
    """Milliseconds of a share and close, and the machine's memory in MiB before and after."""

    median: float
    p99: float
    longest: float
    gone: bool  # whether the neighbour lost the machine
    before: float
    after: float


def memory(machine: gntalloc.Machine) -> float:
    """Give the machine's resident memory, without the pages that it shares out: MiB."""
    with open(f"/proc/{machine.pid}/status", encoding="ascii") as lines:
        kilobytes = sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile")))
    return kilobytes / 1024


def measure(machine: gntalloc.Machine, calls: int) -> tuple[list[float], bool]:
    """Let the neighbour do its work: how long each cycle took, and whether it lost the machine."""
    took: list[float] = []
    try:
        domain = machine.domain(1)
        for _ in range(calls):
            begun = time.perf_counter()
            domain.share(2).close()
            took.append((time.perf_counter() - begun) * 1e3)
            time.sleep(PAUSE)
    except GntallocError as error:
        print(f"the neighbour: {error}", file=sys.stderr)
        return took or [0.0], True
    return took, False


def beside(attacks: list[tuple[str, int]], calls: int, times: int = 1) -> Seen:
    """Measure the neighbour of these attacks, the last of so many times, on a machine of their own."""
    with gntalloc.Machine(limit=200_000) as machine:
        addresses = [machine.domain(3).address, machine.domain(4).address]
        machine.domain(2)
        measure(machine, 50)
        before = memory(machine)
        for _ in range(times):
            took, gone = attacked(machine, attacks, addresses, calls)
        after = memory(machine)
    took.sort()
    return Seen(statistics.median(took), took[len(took) * 99 // 100], took[-1], gone, before, after)


def attacked(
    machine: gntalloc.Machine, attacks: list[tuple[str, int]], addresses: list[str], calls: int
) -> tuple[list[float], bool]:
    """Measure the neighbour while these attacks go on, and let the machine calm down afterwards."""
    started = []
    for name, connections in attacks:
        command = [sys.executable, str(ATTACKS), name, str(connections), *addresses]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        if process.stdout.readline() != "begun\n":
            sys.exit(f"{name} did not begin")
    time.sleep(0.3)
    found = measure(machine, calls)
    for process in started:
        if process.poll() is not None:
            print(f"an attack has ended by itself: {process.args}", file=sys.stderr)
        process.kill()
        process.wait()
    time.sleep(CALMS_DOWN)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME")
    parser.add_argument("--calls", type=int, default=800)
    parser.add_argument("--times", type=int, default=1, metavar="N")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    found = {"alone": beside([], options.calls), "beside two busy loops": beside([("busy", 1)] * 2, options.calls)}
    base = found["beside two busy loops"]
    print(f"{'ms':28}{'median':>8}{'p99':>8}{'longest':>9}{'MiB':>8}{'after':>8}")
    for name, connections in (None, None), *ROWS:
        if name is not None and connections is not None and options.only in {None, name}:
            found[f"{name}, {connections:,}"] = beside([(name, connections)], options.calls, options.times)
        elif name is not None:
            continue
        for each in list(found)[-2 if name is None else -1 :]:
            seen = found[each]
            over = seen.p99 > base.p99 + BAR or seen.longest > base.longest + LONGEST or seen.gone
            grown = seen.after > seen.before * 1.2
            marks = " over the bar" * over + " memory kept" * grown + " MachineGone" * seen.gone
            figures = f"{seen.median:8.2f}{seen.p99:8.2f}{seen.longest:9.2f}{seen.before:8.1f}{seen.after:8.1f}"
            print(f"{each:28}{figures}{marks}", flush=True)
    if options.json:
        Path(options.json).write_text(
            json.dumps({name: seen._asdict() for name, seen in found.items()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
