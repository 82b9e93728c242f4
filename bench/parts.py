"""Where the machine's time of a cycle goes: its parts in one process, without messages.

    python bench/parts.py [--pages N] [--writable] [--json FILE]

The drivers are called directly, as SHARE and ATTACH call them, and the two programs' maps are made here. Processor time
of the thread, medians; one processor. What the kernel needs of it tells bench/promises.c.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import time
from typing import TYPE_CHECKING

from gntalloc.abi.gntalloc import AllocGref
from gntalloc.abi.gntdev import grant_refs
from gntalloc.descriptions import lock_place
from gntalloc.machine.machine import Machine
from gntalloc.maps import PAGE_SIZE, Mapping
from gntalloc.steps import finish

if TYPE_CHECKING:
    from gntalloc.drivers.chardev import Plan

CYCLES = 2000
RW = mmap.PROT_READ | mmap.PROT_WRITE


class Clock:
    """Microseconds of each part, by name."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}
        self.last = 0.0

    def start(self) -> None:
        self.last = time.thread_time()

    def lap(self, name: str) -> None:
        now = time.thread_time()
        self.parts.setdefault(name, []).append((now - self.last) * 1e6)
        self.last = time.thread_time()


class Cycle:
    """Share, map, unmap, free, as the machine and two programs do it."""

    def __init__(self, pages: int, *, writable: bool) -> None:
        self.machine = Machine(limit=pages)
        self.granter, self.peer = self.machine.create(1, uid=0), self.machine.create(2, uid=0)
        self.grants = self.machine.open(self.granter, "gntalloc", os.O_RDWR, opener=1)
        self.maps = self.machine.open(self.peer, "gntdev", os.O_RDWR, opener=2)
        self.length = pages * PAGE_SIZE
        self.asked = AllocGref(2, int(writable), pages, 0)
        self.prot = RW if writable else mmap.PROT_READ

    def once(self, clock: Clock) -> None:
        clock.start()
        index, refs = finish(self.granter.gntalloc.allocate(self.grants, self.asked))
        clock.lap("ALLOC")
        plan = self.grants.mmap(index, self.length, prot=RW, shared=True)
        descriptions = self._describe(plan)
        clock.lap("granter's mmap, in the machine")
        shared = self._place(plan, descriptions, RW)
        clock.lap("the programs' maps")
        entry = self.peer.gntdev.note(self.maps, grant_refs(1, refs))
        clock.lap("MAP")
        plan = self.maps.mmap(entry.first * PAGE_SIZE, self.length, prot=self.prot, shared=True)
        descriptions = self._describe(plan)
        clock.lap("peer's mmap, in the machine")
        mapped = self._place(plan, descriptions, self.prot)
        mapped.close()
        clock.lap("the programs' maps")
        self.machine.settle()
        clock.lap("the peer's munmap, in the machine")
        shared.close()
        clock.lap("the programs' maps")
        self.machine.settle()
        clock.lap("the granter's munmap, in the machine")

    def _describe(self, plan: Plan) -> list[int]:
        plan.record.ends = True
        plan.record.place(0)
        return [loan.descriptor for loan in finish(self.machine.carry_out(plan))]

    def _place(self, plan: Plan, descriptors: list[int], prot: int) -> Mapping:
        mapping = Mapping(self.length, prot=prot)
        mapping.place(0, self.length, descriptors[0], plan.pieces[0].offset)
        if plan.locks:
            lock_place(descriptors[0], plan.record.mark, mapping.address, mapping.length)
        for descriptor in descriptors:
            os.close(descriptor)
        return mapping


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=1)
    parser.add_argument("--writable", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cycle, clock = Cycle(options.pages, writable=options.writable), Clock()
    for _ in range(CYCLES):
        cycle.once(clock)
    # A part that comes several times a cycle counts as often.
    medians = {name: statistics.median(each) * len(each) / CYCLES for name, each in clock.parts.items()}
    for name, median in medians.items():
        print(f"{name:40} {median:7.1f} µs")
    machine = sum(median for name, median in medians.items() if name != "the programs' maps")
    print(f"{'all of the machine':40} {machine:7.1f} µs")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({name: round(median, 1) for name, median in medians.items()}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
