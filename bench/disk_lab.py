"""A disk that dom0's kernel serves, on a real Xen in QEMU: read by our frontend, and by the guest kernel's own.

    python bench/disk_lab.py [--guest pv|pvh|both] [--rounds N] [--json FILE]

One boot. An image of 64 MiB in dom0's memory, behind its loop driver, is given to the guest twice: the kernel drives
one of the two disks, this project the other. Sequential reads of 128 KiB and random ones of 4 KiB, 32 in flight (ours
has pages for 10 of 128 KiB). On the kernel's side O_DIRECT and native asynchronous I/O from a C program; on ours
`submit` and `complete`. The same places in the same order, and a sum over what was read must agree. The two take turns;
medians of the rounds. Times in an emulator mean nothing, the ratio does.

Needs gcc and a static C library (Debian: gcc libc6-dev).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from gntalloc.lab import Lab

if TYPE_CHECKING:
    from gntalloc.lab import Session

HERE = Path(__file__).parent
IMAGE = 64 << 20
SOME = 1_000_003  # repeated, so that no two blocks are the same
READS = {"sequential, 128 KiB": (131072, 512, "sequential"), "random, 4 KiB": (4096, 4000, "random")}
DEPTH = 32
KERNELS, OURS = ("xvdh", 51824), ("xvdi", 51840)


def sh(session: Session, domain: str, *lines: str) -> str:
    outcome = session.run(["sh", "-ec", "\n".join(lines)], domain)
    if outcome.exit_status:
        raise SystemExit(f"{domain}: {outcome.output}{outcome.errors}")
    return outcome.output


def attach(session: Session, guest: str) -> None:
    """Both disks. The kernel's driver takes the first, and is told to leave the second alone."""
    for name, then in (
        (KERNELS[0], ["until [ -b /dev/xvdh ]; do sleep 0.1; done", "echo 0 >/sys/bus/xen/drivers_autoprobe"]),
        (OURS[0], []),
    ):
        where = f"vdev={name},access=ro,backendtype=phy,script=/lab/attach,target=/dev/loop6"
        sh(session, "dom0", f"xl block-attach {guest} format=raw,{where}")
        sh(session, guest, *then)


def read(session: Session, guest: str, program: str, what: tuple[int, int, str]) -> tuple[float, int]:
    """Seconds, and the sum."""
    block, count, order = what
    took, _, sum_ = sh(session, guest, f"{program} {block} {DEPTH} {count} {order}").split()
    return float(took), int(sum_)


def play(session: Session, guest: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by what is read and by whom."""
    attach(session, guest)
    programs = {"kernel": f"./disk_lab /dev/{KERNELS[0]}", "ours": f"python3 disk_lab_guest.py {OURS[1]}"}
    found: dict[str, dict[str, list[float]]] = {name: {who: [] for who in programs} for name in READS}
    for number in range(rounds):
        for name, what in READS.items():
            sums = set()
            for who, program in programs.items():
                if sys.stderr.isatty():
                    print(f"\r{guest}: round {number + 1} of {rounds} ", end="", file=sys.stderr, flush=True)
                seconds, sum_ = read(session, guest, program, what)
                found[name][who].append(seconds)
                sums.add(sum_)
            if len(sums) != 1:
                raise SystemExit(f"{guest}: the two have not read the same: {name}, {sums}")
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return found


def show(guest: str, found: dict[str, dict[str, list[float]]]) -> None:
    print(f"{guest:24}{'kernel':>14}{'ours':>14}{'ratio':>10}")
    for name, by in found.items():
        block, count, _ = READS[name]
        middle = {who: statistics.median(seconds) for who, seconds in by.items()}
        figures = [
            f"{count / seconds:.0f} /s" if block == 4096 else f"{block * count / seconds / 1e6:.0f} MB/s"
            for seconds in middle.values()
        ]
        print(f"{name:24}{figures[0]:>14}{figures[1]:>14}{middle['kernel'] / middle['ours']:>8.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guest", choices=["pv", "pvh", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    guests = ["pv", "pvh"] if options.guest == "both" else [options.guest]
    with tempfile.TemporaryDirectory() as folder:
        program, some = Path(folder) / "disk_lab", Path(folder) / "some"
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s"]
        subprocess.run(["gcc", *flags, "-o", str(program), str(HERE / "disk_lab.c")], check=True)
        some.write_bytes(os.urandom(SOME))
        with Lab.find().boot(guests, files=[program, some, HERE / "disk_lab_guest.py"], timeout=400) as session:
            fill = f"for each in $(seq {IMAGE // SOME + 1}); do cat some; done | head -c {IMAGE} >bench.img"
            sh(session, "dom0", fill, "losetup -r /dev/loop6 bench.img")
            found = {guest: play(session, guest, options.rounds) for guest in guests}
    print(f"dom0's xen-blkback, medians of {options.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    for guest, figures in found.items():
        show(guest, figures)
    if options.json:
        Path(options.json).write_text(json.dumps({"depth": DEPTH, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
