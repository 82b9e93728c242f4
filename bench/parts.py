"""Where the time of a cycle goes: its parts in one process, without messages, and the system calls among them alone.

    python bench/parts.py [--pages N] [--writable] [--json FILE]

The drivers are called directly, the two programs' maps are made here. Processor time, medians; one processor. "system
calls" repeats only what the kernel has to do for it (a memory file and its descriptions, locks, seals, watches, maps).
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import mmap
import os
import statistics
import time
from struct import Struct

from gntalloc.abi.gntalloc import ALLOC_GREF, DEALLOC_GREF, AllocGref, DeallocGref
from gntalloc.abi.gntdev import MAP_GRANT_REF, UNMAP_GRANT_REF, GrantRef, MapGrantRef, UnmapGrantRef
from gntalloc.machine.machine import Machine
from gntalloc.maps import PAGE_SIZE, Mapping
from gntalloc.wire.memory import MessageCaller, Region

CYCLES = 2000
ADDRESS = 0x10000
FUTURE_WRITE = 0x10
PUNCH_HOLE = 3
IN_CLOSE_ONESHOT = 0x18 | 0x80000000
FLOCK = Struct("=hh4xqqi4x")

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong


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
        granter, peer = self.machine.create(1, uid=0), self.machine.create(2, uid=0)
        self.grants = self.machine.open(granter, "gntalloc", os.O_RDWR, opener=1)
        self.maps = self.machine.open(peer, "gntdev", os.O_RDWR, opener=2)
        self.length = pages * PAGE_SIZE
        self.pages = pages
        self.prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.alloc = AllocGref(2, int(writable), pages, 0).pack() + bytes(max(8, 4 * pages))

    def once(self, clock: Clock) -> None:
        clock.start()
        argument = self._call(self.grants, ALLOC_GREF, self.alloc)
        index = AllocGref.unpack_from(argument).index
        refs = memoryview(argument)[AllocGref.REFS_OFFSET :].cast("I")[: self.pages]
        clock.lap("ALLOC")
        plan = self.grants.mmap(index, self.length, prot=mmap.PROT_READ | mmap.PROT_WRITE, shared=True)
        loans = self.machine.carry_out(plan)
        clock.lap("granter's mmap, in the machine")
        shared = self._place(loans, mmap.PROT_READ | mmap.PROT_WRITE)
        clock.lap("the programs' maps")
        for loan in loans:
            loan.close()
        self.grants.driver.placed(plan.record)
        clock.lap("PLACED")
        argument = MapGrantRef(self.pages, 0).pack() + b"".join(GrantRef(1, ref).pack() for ref in refs)
        index_there = MapGrantRef.unpack_from(self._call(self.maps, MAP_GRANT_REF, argument)).index
        clock.lap("MAP")
        loans = self.machine.carry_out(self.maps.mmap(index_there, self.length, prot=self.prot, shared=True))
        clock.lap("peer's mmap, in the machine")
        mapped = self._place(loans, self.prot)
        for loan in loans:
            loan.close()
        clock.lap("the programs' maps")
        mapped.close()
        clock.lap("the programs' maps")
        self.machine.settle()
        clock.lap("munmap seen")
        self._call(self.maps, UNMAP_GRANT_REF, UnmapGrantRef(index_there, self.pages).pack())
        clock.lap("UNMAP")
        shared.close()
        clock.lap("the programs' maps")
        self.machine.settle()
        clock.lap("munmap seen")
        self._call(self.grants, DEALLOC_GREF, DeallocGref(index, self.pages).pack())
        clock.lap("DEALLOC")

    def _call(self, file, request: int, argument: bytes) -> bytearray:
        data = bytearray(argument)
        file.ioctl(request, ADDRESS, MessageCaller([Region(ADDRESS, data, writable=True)]))
        return data

    def _place(self, loans, prot: int) -> Mapping:
        mapping = Mapping(self.length, prot=prot)
        mapping.place(0, self.length, loans[0].descriptor, 0)
        return mapping


def system_calls(inotify: int, length: int, *, writable: bool) -> None:
    """What the kernel has to do for one cycle."""
    first = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.posix_fallocate(first, 0, length)
    fcntl.fcntl(first, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    path = f"/proc/self/fd/{first}"
    master = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    watches = []
    window = None
    maps = []
    for byte, flags in enumerate((os.O_RDWR, os.O_RDWR if writable else os.O_RDONLY)):
        if byte and not writable:
            window = Mapping(length)
            window.place(0, length, master, 0)
            fcntl.fcntl(master, fcntl.F_ADD_SEALS, FUTURE_WRITE | fcntl.F_SEAL_SEAL)
        watches.append(libc.inotify_add_watch(inotify, path.encode(), IN_CLOSE_ONESHOT))
        loan = os.open(path, flags | os.O_CLOEXEC)
        fcntl.fcntl(loan, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if flags == os.O_RDWR else 0)
        maps.append(Mapping(length, prot=prot))
        maps[-1].place(0, length, loan, 0)
        os.close(loan)
    os.close(first)
    for byte, mapping in enumerate(reversed(maps)):
        mapping.close()
        try:
            os.read(inotify, 4096)
        except BlockingIOError:
            pass
        fcntl.fcntl(master, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    fcntl.fcntl(master, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    fcntl.fcntl(master, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    libc.fallocate(master, PUNCH_HOLE, 0, length)
    if window is not None:
        window.memory[:] = bytes(length)
        window.close()
    os.close(master)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=1)
    parser.add_argument("--writable", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cycle, clock = Cycle(options.pages, writable=options.writable), Clock()
    inotify = libc.inotify_init1(os.O_NONBLOCK)
    for turn in range(CYCLES):
        if turn == CYCLES // 10:
            clock.parts.clear()  # warm now
        cycle.once(clock)
        clock.start()
        system_calls(inotify, options.pages * PAGE_SIZE, writable=options.writable)
        clock.lap("system calls")
    alone = statistics.median(clock.parts.pop("system calls"))
    times = {name: len(laps) for name, laps in clock.parts.items()}
    fewest = min(times.values())
    parts = {name: statistics.median(laps) * times[name] / fewest for name, laps in clock.parts.items()}
    for name, value in parts.items():
        print(f"{name:32} {value:8.1f} µs")
    print(f"{'all of it':32} {sum(parts.values()):8.1f} µs")
    print(f"{'the system calls alone':32} {alone:8.1f} µs")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {**{name: round(value, 1) for name, value in parts.items()}, "system calls": alone}, file, indent=1
            )
            file.write("\n")


if __name__ == "__main__":
    main()
