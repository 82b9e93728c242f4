"""What one ALLOC and DEALLOC of a page cost while other grants are live: 0 to 30,000, made in ALLOCs of 200.

    python bench/growth.py                      on a machine of our own; then with 10,000 of them held by a peer, and
                                                with as many ALLOCs of a single page as the machine has descriptors for
    python bench/growth.py --many               with 300,000 and a million as well, if there are 5 GB of memory
    python bench/growth.py --kernel             on /dev/xen: run it in the lab
    … --json FILE                               write what was measured there as well

The real driver's curve, recorded in docs/data:

    gntalloc lab run --file bench/growth.py --fetch out.json -- python3 growth.py --kernel --json out.json

Each point is the median of rounds; only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from typing import TYPE_CHECKING

import gntalloc
from gntalloc.abi.gntalloc import ALLOC_GREF, DEALLOC_GREF, AllocGref, DeallocGref

if TYPE_CHECKING:
    from gntalloc.guest.devices import DeviceFile, Devices

HELD = 10000
LIVE = (0, 10, 100, 1000, 5000, 10000, 20000, 30000)
VERY_MANY = (300_000, 1_000_000)
CHUNK = 200
ROUNDS = 9


def alloc(file: DeviceFile, count: int) -> int:
    argument = bytearray(AllocGref(0, 1, count, 0).pack() + bytes(max(8, 4 * count)))
    file.ioctl(ALLOC_GREF, argument)
    return AllocGref.unpack_from(argument).index


def dealloc(file: DeviceFile, index: int, count: int = 1) -> None:
    file.ioctl(DEALLOC_GREF, DeallocGref(index, count).pack())


def one_round(file: DeviceFile, cycles: int) -> float:
    """Microseconds a cycle."""
    started = time.perf_counter()
    for _ in range(cycles):
        dealloc(file, alloc(file, 1))
    return (time.perf_counter() - started) / cycles * 1e6


def measure(devices: Devices, cycles: int, live_counts: tuple[int, ...] = LIVE) -> list[dict[str, float]]:
    devices.limit = live_counts[-1] + 1000
    bulk, file = devices.open("gntalloc"), devices.open("gntalloc")
    points = []
    live = 0
    for target in live_counts:
        while live < target:
            count = min(CHUNK, target - live)
            alloc(bulk, count)
            live += count
        one_round(file, cycles)
        rounds = [one_round(file, cycles) for _ in range(ROUNDS)]
        points.append({"live": live, "microseconds": round(statistics.median(rounds), 1)})
        print(f"{live:7} live  {points[-1]['microseconds']:8.1f} µs", flush=True)
    bulk.close()
    file.close()
    for point in points[-3:] if live_counts is not LIVE else points[-1:]:
        print(f"with {point['live']} live / with none: {point['microseconds'] / points[0]['microseconds']:.2f}")
    return points


def in_turn(loaded: DeviceFile, cycles: int) -> tuple[float, float]:
    """Microseconds a cycle of a file of a machine where nothing else is live, and of `loaded`: rounds taken in turn."""
    with gntalloc.Machine() as machine:
        empty = machine.domain(1).devices.open("gntalloc")
        rounds = [(one_round(empty, cycles), one_round(loaded, cycles)) for _ in range(ROUNDS + 1)][1:]
        empty.close()
    none, many = (round(statistics.median(each), 1) for each in zip(*rounds, strict=True))
    return none, many


def measure_held(machine: gntalloc.Machine, cycles: int) -> dict[str, float]:
    """With 30,000 live as above, of which a peer maps 10,000."""
    granter, peer = machine.domain(3, limit=LIVE[-1] + 1000), machine.domain(4)
    file = granter.devices.open("gntalloc")
    shares = [granter.share(peer, CHUNK, writable=True) for _ in range(LIVE[-1] // CHUNK)]
    maps = [peer.map(shared.grant) for shared in shares[: HELD // CHUNK]]
    none, held = in_turn(file, cycles)
    for pages in (*maps, *shares):
        pages.close()
    file.close()
    print(f"{LIVE[-1]} live, {HELD} of them mapped by a peer: {held:.1f} µs, with none {none:.1f}: {held / none:.2f}")
    return {"none": none, "held": held}


def measure_single(machine: gntalloc.Machine, cycles: int) -> dict[str, float]:
    """With as many ALLOCs of one page as there can be: each is a memory file, and so a descriptor of the machine."""
    domain = machine.domain(5, limit=1 << 20)
    bulk, file = domain.devices.open("gntalloc"), domain.devices.open("gntalloc")
    live = 0
    try:
        while True:
            alloc(bulk, 1)
            live += 1
    except gntalloc.DeviceError as error:
        print(f"{live} ALLOCs of one page, then: {error}")
    dealloc(bulk, 0)
    none, single = in_turn(file, cycles)
    print(f"with {live - 1} ALLOCs of a single page live: {single:.1f} µs, with none {none:.1f}: {single / none:.2f}")
    bulk.close()
    file.close()
    return {"none": none, "live": live - 1, "single": single}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", action="store_true")
    parser.add_argument("--many", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.kernel:
        points = measure(gntalloc.current_domain("/dev/xen").devices, 40)
        more = {}
        what = f"Linux {platform.release()}"
    else:
        if len(os.sched_getaffinity(0)) > 1:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the machine inherits it: one processor for both
        with gntalloc.Machine(table_frames=2048 if options.many else 64) as machine:
            points = measure(machine.domain(1).devices, 200, (*LIVE, *VERY_MANY) if options.many else LIVE)
            held = measure_held(machine, 200)
            single = measure_single(machine, 200)
        more = {"held": held, "single": single}
        what = f"gntalloc on Python {platform.python_version()}"
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"what": what, "points": points, **more}, file, indent=1)
            file.write("\n")
    sys.exit(0)


if __name__ == "__main__":
    main()
