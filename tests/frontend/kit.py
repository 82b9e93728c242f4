"""What any backend must do, ours, a kernel's or QEMU's: checks of a disk whose content is known.

Each takes an open BlockDevice and what is on it, and nothing else; so they run wherever there is one.
This file goes into the lab's guests alone, so it imports nothing of the tests.
"""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from gntalloc.frontend.blkif import Operation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gntalloc.frontend.blkfront import BlockDevice
    from gntalloc.frontend.requests import Flight
    from gntalloc.testing import Program

PATIENCE = 30.0
SIZE = 3 << 20  # of a disk's content, at most


def all_of_it_is_read(disk: BlockDevice, content: bytes) -> None:
    assert disk.size == len(content)
    assert disk.read(0, disk.size, timeout=PATIENCE) == content


def any_bytes_are_read(disk: BlockDevice, content: bytes) -> None:
    """At and around each boundary there is: sectors, pages, the largest request, the end."""
    marks = [0, 512, 4096, disk.largest, 2 * disk.largest, disk.size]
    for mark in marks:
        for before in (0, 1, 511, 513):
            for length in (0, 1, 512, 4095, 4097):
                offset = max(0, mark - before)
                length = min(length, disk.size - offset)  # noqa: PLW2901
                assert disk.read(offset, length, timeout=PATIENCE) == content[offset : offset + length]


def writes_of_each_size_arrive_and_touch_nothing_else(disk: BlockDevice, content: bytes) -> None:
    model = bytearray(content)
    chance = random.Random(3)
    unit = disk.sector_size
    sizes = [unit, 4096, 4096 + unit, disk.largest - unit, disk.largest, disk.largest + unit, 3 * disk.largest + 4096]
    for size in sizes:
        offset = chance.randrange(0, (disk.size - size) // unit) * unit
        data = chance.randbytes(size)
        assert disk.write(offset, data, timeout=PATIENCE) == size
        model[offset : offset + size] = data
    disk.flush(timeout=PATIENCE)
    assert disk.read(0, disk.size, timeout=PATIENCE) == model


def requests_in_flight_each_get_their_own_answer(disk: BlockDevice, content: bytes) -> None:
    """More than the ring holds, all submitted before one is waited for, waited for in another order."""
    chance = random.Random(4)
    flights: list[tuple[Flight, int, bytearray]] = []
    for _ in range(80):
        offset = chance.randrange(disk.size // 4096) * 4096
        buffer = bytearray(4096)
        while (flight := disk.submit(Operation.READ, offset, buffer)) is None:
            disk.complete(flights[chance.randrange(len(flights))][0], timeout=PATIENCE)
            waiting = [each for each, _, _ in flights if not each.done]
            if waiting:
                disk.complete(waiting[0], timeout=PATIENCE)
        flights.append((flight, offset, buffer))
    chance.shuffle(flights)
    for flight, offset, buffer in flights:
        disk.complete(flight, timeout=PATIENCE)
        assert buffer == content[offset : offset + 4096]


def many_are_told_of_and_waited_for_together(disk: BlockDevice, content: bytes) -> None:
    flights = []
    for number in range(20):
        buffer = bytearray(4096)
        if (flight := disk.submit(Operation.READ, number * 8192, buffer, more=True)) is None:
            break  # it has few pages
        flights.append((flight, number * 8192, buffer))
    assert flights
    disk.complete(*(flight for flight, _, _ in flights), timeout=PATIENCE)
    for _, offset, buffer in flights:
        assert buffer == content[offset : offset + 4096]


def one_that_needs_little_is_not_held_up_by_one_that_needs_much(disk: BlockDevice, content: bytes) -> None:
    """The thread that sleeps for both may have asked to be woken late."""
    with ThreadPoolExecutor(2) as threads:
        large = threads.submit(lambda: [disk.read(0, disk.size, timeout=PATIENCE) for _ in range(3)])
        for number in range(60):
            at = number * 4096
            assert disk.read(at, 512, timeout=PATIENCE) == content[at : at + 512]
        assert large.result() == [content] * 3


def threads_do_not_disturb_each_other(disk: BlockDevice, content: bytes) -> None:
    parts = 4
    share = disk.size // parts // disk.sector_size * disk.sector_size

    def work(part: int) -> bytes:
        chance = random.Random(part)
        base = part * share
        model = bytearray(content[base : base + share])
        for _ in range(20):
            length = chance.randrange(1, 40) * disk.sector_size
            at = chance.randrange((share - length) // disk.sector_size) * disk.sector_size
            if chance.random() < 0.5:
                model[at : at + length] = data = chance.randbytes(length)
                disk.write(base + at, data, timeout=PATIENCE)
            else:
                assert disk.read(base + at, length, timeout=PATIENCE) == model[at : at + length]
        return bytes(model)

    with ThreadPoolExecutor(parts) as threads:
        models = list(threads.map(work, range(parts)))
    assert disk.read(0, parts * share, timeout=PATIENCE) == b"".join(models)


CHECKS: list[Callable[[BlockDevice, bytes], None]] = [
    all_of_it_is_read,
    any_bytes_are_read,
    writes_of_each_size_arrive_and_touch_nothing_else,
    requests_in_flight_each_get_their_own_answer,
    many_are_told_of_and_waited_for_together,
    one_that_needs_little_is_not_held_up_by_one_that_needs_much,
    threads_do_not_disturb_each_other,
]


def read_for_ever(disk: BlockDevice) -> None:
    while True:
        disk.read(0, SIZE, timeout=PATIENCE)


def kill(program: Program) -> None:
    program.kill()
    program.wait(timeout=PATIENCE)
    program.last_words  # noqa: B018  it was killed on purpose


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * PATIENCE):
            await main()

    asyncio.run(bounded(), debug=True)
