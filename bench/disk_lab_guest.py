"""Reads a disk through our frontend, for bench/disk_lab.py: what disk_lab.c does through the kernel's.

python3 disk_lab_guest.py NUMBER BLOCK DEPTH COUNT sequential|random [FILE]

Prints the seconds, the processor seconds of this process, and a sum over the first word of each block. FILE gets a
profile.
"""

from __future__ import annotations

import cProfile
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

import gntalloc
from gntalloc.frontend.blkfront import BlockDevice
from gntalloc.frontend.blkif import Operation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc.frontend.requests import Flight


def places(blocks: int, count: int, order: str) -> Iterator[int]:
    state = 1
    for number in range(count):
        state = state * 48271 % 2147483647
        yield (state if order == "random" else number) % blocks


def read(disk: BlockDevice, block: int, depth: int, count: int, order: str) -> int:
    """As many requests in flight as there is room for, `depth` at most; the older half is waited for together."""
    buffers = [bytearray(block) for _ in range(depth)]
    words = [memoryview(buffer)[:4].cast("I") for buffer in buffers]
    free = list(range(depth))
    flying: deque[tuple[Flight, int]] = deque()
    sum_ = 0

    def land(number: int) -> int:
        landing = [flying.popleft() for _ in range(number)]
        disk.complete(*(flight for flight, _ in landing), timeout=60)
        free.extend(slot for _, slot in landing)
        return sum(words[slot][0] for _, slot in landing)

    for place in places(disk.size // block, count, order):
        while not free or (flight := disk.submit(Operation.READ, place * block, buffers[free[-1]], more=True)) is None:
            sum_ += land((len(flying) + 1) // 2)
        flying.append((flight, free.pop()))
    return sum_ + land(len(flying))


def main() -> None:
    number, block, depth, count = map(int, sys.argv[1:5])
    with BlockDevice(gntalloc.current_domain(), number, timeout=60) as disk:
        profile = cProfile.Profile()
        if sys.argv[6:]:
            profile.enable()
        began, busy = time.perf_counter(), time.process_time()
        sum_ = read(disk, block, depth, count, sys.argv[5])
        took, used = time.perf_counter() - began, time.process_time() - busy
        profile.disable()
    print(f"{took:.6f} {used:.6f} {sum_}")
    if sys.argv[6:]:
        profile.dump_stats(sys.argv[6])


main()
