"""How long programs take to start: the package, a machine, each command; beside multiprocessing.shared_memory.

    python bench/starting.py [--json FILE] [--rounds N]

Each row is a process of its own. A round starts each once, so that what else the computer does falls on all alike. The
figures are medians: milliseconds from start to end; the same without what an empty Python takes; processor time of the
process and of all that it has waited for; and times what `import multiprocessing.shared_memory` takes above an empty
Python. A round before those that count writes the compiled modules.
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

from gntalloc.cli import COMMANDS

ROUNDS = 15
_NO_MACHINE = 3  # exit status of `gntalloc list`
EMPTY, SHARED = "python -c pass", "import multiprocessing.shared_memory"
MACHINE = "from gntalloc import Machine"
PROGRAMS = {
    EMPTY: "pass",
    SHARED: SHARED,
    "import gntalloc": "import gntalloc",
    "from gntalloc import Domain": "from gntalloc import Domain",
    MACHINE: MACHINE,
    "Machine(), started and closed": f"{MACHINE}\nMachine().close()",
}
ARGUMENTS = [
    ["--version"],
    ["--help"],
    *([name, "--help"] for name in COMMANDS),
    ["list"],
    ["run", "--domid", "1", "--", "true"],
    ["machine", "--", "true"],
]
PYTHON = [sys.executable, "-c"]
GNTALLOC = [sys.executable, "-m", "gntalloc"]


def started(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Milliseconds from start to end, and of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, check=False)
    took = time.perf_counter() - begin
    if done.returncode not in {0, _NO_MACHINE}:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}: {done.stderr.decode()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return took * 1000, worked * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    commands = {name: [*PYTHON, program] for name, program in PROGRAMS.items()}
    commands |= {"gntalloc " + " ".join(each): [*GNTALLOC, *each] for each in ARGUMENTS}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    load = os.getloadavg()[0]
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for command in commands.values():
        started(command, environment)
    for _ in range(options.rounds):
        for name, command in commands.items():
            took[name].append(started(command, environment))
    figures = {name: tuple(map(statistics.median, zip(*each, strict=True))) for name, each in took.items()}
    empty = figures[EMPTY][0]
    shared = figures[SHARED][0] - empty
    print(f"load {load:.1f}; {options.rounds} rounds; Python {sys.version.split()[0]}")
    print(f"{'':38}{'ms':>8}{'above':>8}{'worked':>8}{'/ shared_memory':>18}")
    for name, (whole, worked) in figures.items():
        print(f"{name:38}{whole:8.1f}{whole - empty:8.1f}{worked:8.1f}{(whole - empty) / shared:16.2f} x")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"load": load, "ms, processor ms": figures}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
