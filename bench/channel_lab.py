"""A vchan between a guest and dom0 of a real Xen in QEMU: our end and the stock C library's, in every combination.

    python bench/channel_lab.py [--guest pv|pvh] [--rounds N] [--json FILE]

One boot. The stream: chunks of 64 KiB through a ring of 1 MiB, from the first write until the reader says that it has
it all, copied out into a buffer of its own at either end. The round trip: 64 bytes there and back. Medians of rounds
taken in turn. Times in an emulator mean nothing, the ratios do: the last column of each is how many times as fast as C
at both ends. No end spins: the emulator's one processor is the peer's too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import runpy
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from gntalloc.lab import Lab

if TYPE_CHECKING:
    from gntalloc.lab import Session

VCHAN = Path(__file__).parent.parent / "tests" / "lab" / "vchan"
RING = 1 << 20
AMOUNT = 64 << 20
TRIPS = 300
PROGRAMS = {"C": ["./peer"], "ours": ["python3", "peer.py"]}
WAYS = {
    "guest to dom0": ("stream", AMOUNT, "server"),
    "dom0 to guest": ("stream", AMOUNT, "client"),
    "round trip": ("trips", TRIPS, "client"),
}
_paths = itertools.count()


def play(session: Session, guest: str, in_guest: str, in_dom0: str, rounds: int) -> dict[str, list[float]]:
    """Seconds each way, each round. The server is in the guest."""
    domid = str(session.domid(guest))
    ways = list(WAYS.items()) * rounds
    cases = [
        f"/local/domain/{domid}/data/vchan/0/b{next(_paths)},{RING},{RING},{mode},{amount},{who}"
        for _, (mode, amount, who) in ways
    ]
    commands = {
        guest: [*PROGRAMS[in_guest], "data", "0", *(f"server,{case}" for case in cases)],
        "dom0": [*PROGRAMS[in_dom0], "data", domid, *(f"client,{case}" for case in cases)],
    }
    outcomes = session.run_together(commands, environment={"SPIN": "0"}, timeout=600)
    for domain, outcome in outcomes.items():
        if outcome.exit_status:
            raise SystemExit(f"{domain}: {outcome.output}{outcome.errors}")
    printed = {"server": outcomes[guest].output.splitlines(), "client": outcomes["dom0"].output.splitlines()}
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for name, (_, _, who) in ways:
        found[name].append(float(printed[who].pop(0).split()[1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guest", choices=["pv", "pvh"], default="pvh")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    pairs = list(itertools.product(PROGRAMS, PROGRAMS))
    took: dict[tuple[str, str], dict[str, list[float]]] = {pair: {name: [] for name in WAYS} for pair in pairs}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.write_bytes(os.urandom(3_000_017))
        with Lab.find().boot([options.guest], files=[VCHAN / "peer.py", data], timeout=400) as session:
            program = runpy.run_path(str(VCHAN / "compiled.py"))["peer"](session, Path(folder))
            for domain in (options.guest, "dom0"):
                session.put([program], domain)
            for number, pair in itertools.product(range(options.rounds), pairs):
                print(f"\rround {number + 1} of {options.rounds} ", end="", file=sys.stderr, flush=True)
                for name, seconds in play(session, options.guest, *pair, rounds=1).items():
                    took[pair][name] += seconds
    print(file=sys.stderr)
    medians = {pair: {name: statistics.median(each) for name, each in ways.items()} for pair, ways in took.items()}
    print(f"dom0 and a {options.guest} guest, medians of {options.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    print(f"{'in the guest, in dom0':24}" + "".join(f"{name:>24}" for name in WAYS))
    for pair in pairs:
        cells = []
        for name, (mode, amount, _) in WAYS.items():
            seconds = medians[pair][name]
            figure = f"{seconds / amount * 1e6:.0f} µs" if mode == "trips" else f"{amount / seconds / 1e6:.0f} MB/s"
            cells.append(f"{figure:>14} {medians['C', 'C'][name] / seconds:6.2f} x")
        print(f"{', '.join(pair):24}" + "".join(f"{cell:>24}" for cell in cells))
    if options.json:
        found = {", ".join(pair): ways for pair, ways in took.items()}
        Path(options.json).write_text(json.dumps({"guest": options.guest, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
