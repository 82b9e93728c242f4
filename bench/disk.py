"""What a disk carries without Xen: our frontend, and three backends: ours in two ways, and a stock QEMU.

    python bench/disk.py [--json FILE] [--qemu PROGRAM] [--only NAME] [--mib N]

The image is in the page cache. Sequential: one call for all of it, so as many requests are in flight as the ring holds
(32). Random: 4096 bytes each, 32 in flight, through `submit` and `complete`; and the same by 32 tasks of asyncio. The
median of the passes. Beside them pread(2) of the same file, in pieces of 128 KiB.

Below, for the sequential read: how long each process was on a processor, in microseconds per request.

QEMU is Debian's qemu-system-xen, under `gntalloc run`; where there is none it is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gntalloc
from gntalloc import aio
from gntalloc.frontend.blkfront import BlockDevice
from gntalloc.frontend.blkif import Operation
from gntalloc.frontend.nodes import Device, attach, detach

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PASSES = 5
DEPTH = 32
BLOCK = 4096
QEMU = ("/usr/libexec/xen-qemu-system-i386", "build/qemu-system-xen/usr/libexec/xen-qemu-system-i386")
OPTIONS = "-machine xenpv -xen-attach -xen-domid 1 -nodefaults -display none -serial none -monitor none"
OURS = """
import sys, gntalloc
from gntalloc.frontend.blkback import Backend
from gntalloc.frontend.nodes import Device
with Backend(gntalloc.current_domain(), Device("vbd", 51712, 1, 0), sys.argv[1], way=sys.argv[2]) as backend:
    backend.serve()
"""


class Bench:
    """A machine, an image, and one backend at a time."""

    def __init__(self, machine: gntalloc.Machine, image: Path, qemu: str | None) -> None:
        self.machine, self.image, self.qemu = machine, image, qemu
        self.dom0, self.guest = machine.domain(0), machine.domain(1)

    def backends(self) -> dict[str, Callable[[], tuple[Device, dict[str, str], list[str]]]]:
        """Each: the device, its nodes, and the command that serves it."""
        ours = [sys.executable, "-c", OURS, str(self.image)]
        plain = Device("vbd", 51712, 1, 0)
        folder = os.path.dirname(self.machine.environ(0)["GNTALLOC_DOMAIN"])
        run = [sys.executable, "-m", "gntalloc", "run", "--machine", folder, "--domid", "0", "--"]
        nodes = {
            "type": "qdisk",
            "params": f"aio:{self.image}",
            "dev": "xvda",
            "device-type": "disk",
            "removable": "0",
            "discard-enable": "1",
            "direct-io-safe": "0",
        }
        found: dict[str, Callable[[], tuple[Device, dict[str, str], list[str]]]] = {
            "ours, kept mapped": lambda: (plain, {}, [*ours, "map"]),
            "ours, copied": lambda: (plain, {}, [*ours, "copy"]),
        }
        if self.qemu:
            program = self.qemu
            found["QEMU"] = lambda: (plain._replace(served_as="qdisk"), nodes, [*run, program, *OPTIONS.split()])
        return found

    @contextmanager
    def served(self, name: str) -> Iterator[int]:
        """By one of them; its pid."""
        device, nodes, command = self.backends()[name]()
        front = {"virtual-device": "51712", "device-type": "disk"}
        attach(self.dom0.store, device, front, {"mode": "w", **nodes})
        process = subprocess.Popen(
            command, env=self.machine.environ(0), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        try:
            yield process.pid
        finally:
            process.terminate()
            process.communicate(timeout=20)
            detach(self.dom0.store, device)


def sequential(disk: BlockDevice, operation: Operation, buffer: bytearray) -> float:
    """Megabytes a second."""
    start = time.perf_counter()
    if operation == Operation.READ:
        disk.readinto(0, buffer, timeout=300)
    else:
        disk.write(0, buffer, timeout=300)
    return len(buffer) / (time.perf_counter() - start) / 1e6


def scattered(disk: BlockDevice, operation: Operation, count: int) -> float:
    """Requests a second."""
    chance = random.Random(1)
    places = [chance.randrange(disk.size // BLOCK) * BLOCK for _ in range(count)]
    buffers = [bytearray(BLOCK) for _ in range(DEPTH)]
    flights: list[Any] = []
    start = time.perf_counter()
    for number, place in enumerate(places):
        if len(flights) == DEPTH:
            disk.complete(flights.pop(0), timeout=60)
        flights.append(disk.submit(operation, place, buffers[number % DEPTH]))
    for flight in flights:
        disk.complete(flight, timeout=60)
    return count / (time.perf_counter() - start)


async def by_tasks(domain: gntalloc.Domain, count: int) -> float:
    """The same reads, requests a second."""
    async with await aio.disk(domain) as disk:
        chance = random.Random(1)
        places = iter([chance.randrange(disk.size // BLOCK) * BLOCK for _ in range(count)])

        async def work() -> None:
            buffer = bytearray(BLOCK)
            for place in places:
                await disk.readinto(place, buffer)

        start = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(DEPTH)))
        return count / (time.perf_counter() - start)


def plain(image: Path) -> float:
    """Megabytes a second of pread(2)."""
    buffer = bytearray(128 << 10)
    file = os.open(image, os.O_RDONLY)
    start, at = time.perf_counter(), 0
    while count := os.preadv(file, [buffer], at):
        at += count
    took = time.perf_counter() - start
    os.close(file)
    return at / took / 1e6


def family(pid: int) -> dict[int, str]:
    """A process and its descendants: what they are called."""
    found = {pid: " ".join(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").split()[:3])}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found |= family(int(child))
    return found


def on_processor(pid: int) -> float:
    """Seconds, of all its threads."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


def shares(bench: Bench, backend: int, disk: BlockDevice, buffer: bytearray) -> list[tuple[str, float]]:
    """Who was on a processor in a sequential read, microseconds per request."""
    who = {**family(backend), bench.machine.pid: "the machine", os.getpid(): "this frontend"}
    before = {pid: on_processor(pid) for pid in who}
    sequential(disk, Operation.READ, buffer)
    requests = len(buffer) / disk.largest
    return [(name, (on_processor(pid) - before[pid]) * 1e6 / requests) for pid, name in who.items()]


def measure(bench: Bench, name: str, mib: int) -> dict[str, Any]:
    """All figures of one backend."""
    with bench.served(name) as pid:
        with BlockDevice(bench.guest, timeout=30) as disk:
            buffer = bytearray(mib << 20)
            sequential(disk, Operation.READ, buffer)  # pages are mapped, and the file is in the cache
            first = scattered(disk, Operation.READ, 200)
            count = max(200, min(20_000, int(first)))
            figures: dict[str, Any] = {"request": disk.largest}
            for operation in (Operation.READ, Operation.WRITE):
                mbs = [sequential(disk, operation, buffer) for _ in range(PASSES)]
                each = [scattered(disk, operation, count) for _ in range(PASSES)]
                figures[f"sequential {operation.name}"] = mbs
                figures[f"random {operation.name}"] = each
            figures["shares"] = shares(bench, pid, disk, buffer)
        figures["random READ, tasks"] = [asyncio.run(by_tasks(bench.guest, count)) for _ in range(3)]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--qemu", metavar="PROGRAM", help="QEMU for Xen, if it is not where Debian has it")
    parser.add_argument("--only", metavar="NAME", help="the backends whose name begins so")
    parser.add_argument("--mib", type=int, default=64, help="size of the image (64)")
    options = parser.parse_args()
    qemu = options.qemu or next((os.path.abspath(path) for path in QEMU if os.path.exists(path)), None)
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        image = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "disk.img"
        image.write_bytes(random.Random(1).randbytes(options.mib << 20))
        bench = Bench(stack.enter_context(gntalloc.Machine()), image, qemu)
        for name in bench.backends():
            if not options.only or name.startswith(options.only):
                results[name] = measure(bench, name, options.mib)
        alone = statistics.median(plain(image) for _ in range(PASSES))
    load = os.getloadavg()[0]
    rows = ["sequential READ", "sequential WRITE", "random READ", "random WRITE", "random READ, tasks"]
    print(f"{'':32}" + "".join(f"{name:>20}" for name in results))
    for row in rows:
        unit = "MB/s" if row.startswith("seq") else "requests/s"
        print(
            f"{row + ', ' + unit:28}" + "".join(f"{statistics.median(each[row]):20,.0f}" for each in results.values())
        )
    print(f"\npread(2) of the file: {alone:,.0f} MB/s")
    for name, each in results.items():
        print(f"\n{name}: on a processor per request of {each['request'] >> 10} KiB, µs")
        for who, took in each["shares"]:
            print(f"  {took:8.1f}  {who}")
    print(f"\nload {load:.1f} on {os.cpu_count()} processors")
    if options.json:
        Path(options.json).write_text(json.dumps({"results": results, "pread": alone, "load": load}, indent=1) + "\n")


if __name__ == "__main__":
    main()
