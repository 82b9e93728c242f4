"""asyncio's face of a disk: many tasks, cancelled ones, and a backend that goes and comes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.frontend.conftest import DEVICE, PATIENCE
from tests.frontend.kit import SIZE, kill, run

from gntalloc import Closed, DeviceError, GntallocError, PeerClosed, PeerDied, TimedOut, aio
from gntalloc.frontend.xenbus import State

if TYPE_CHECKING:
    from tests.frontend.conftest import Setting

    from gntalloc.frontend.aio import Disk


@pytest.fixture
def attached(setting: Setting) -> Setting:
    setting.attach()
    return setting


async def opened(setting: Setting, **settings: Any) -> Disk:
    return await aio.disk(setting.guest, **{"timeout": PATIENCE, **settings})


async def read_for_ever(disk: Disk) -> None:
    while True:
        await disk.read(0, SIZE)


@pytest.mark.parametrize("pages", [352, 33, 2])
def test_tasks_do_not_disturb_each_other(attached: Setting, pages: int) -> None:
    """Each has a part of the disk, and a model of it; sizes from a sector to more than the ring holds."""
    attached.backend()
    tasks = 8
    share = SIZE // tasks // 512 * 512
    rounds, largest = (12, 200) if pages > 2 else (3, 8)

    async def work(disk: Disk, part: int) -> bytes:
        chance = random.Random(part)
        model = bytearray(attached.content[part * share : (part + 1) * share])
        for _ in range(rounds):
            length = chance.randrange(1, largest) * 512
            at = chance.randrange((share - length) // 512) * 512
            if chance.random() < 0.5:
                model[at : at + length] = data = chance.randbytes(length)
                assert await disk.write(part * share + at, data) == length
            else:
                inside = chance.randrange(512)
                got = await disk.read(part * share + at + inside, length - inside)
                assert got == model[at + inside : at + length]
        return bytes(model)

    async def main() -> None:
        async with await opened(attached, pages=pages) as disk:
            models = await asyncio.gather(*(work(disk, part) for part in range(tasks)))
            await disk.flush()
            await disk.discard(0, 4096)
            expected = bytearray(b"".join(models))
            expected[:4096] = bytes(4096)
            if pages > 2:
                assert await disk.read(0, len(expected)) == expected
        assert attached.now()[: len(expected)] == expected

    run(main)


def test_what_is_wrong_is_refused(attached: Setting) -> None:
    attached.backend(read_only=True)

    async def main() -> None:
        disk = await opened(attached)
        with pytest.raises(ValueError, match="bytes at"):
            await disk.read(SIZE, 1)
        with pytest.raises(DeviceError, match="read-only"):
            await disk.write(0, bytes(512))
        assert await disk.read(SIZE, 0) == b""
        await disk.close()
        await disk.close()
        with pytest.raises(Closed):
            await disk.read(0, 1)

    run(main)


def test_the_loop_is_free_while_a_backend_takes_its_time(attached: Setting) -> None:
    backend = attached.backend()

    async def main() -> None:
        async with await opened(attached) as disk:
            backend.process.send_signal(signal.SIGSTOP)
            reading = asyncio.create_task(disk.read(0, SIZE))
            for _ in range(100):
                await asyncio.sleep(0)
            assert not reading.done()
            backend.process.send_signal(signal.SIGCONT)
            assert await reading == attached.content

    run(main)


def test_who_is_cancelled_has_its_buffer_back_and_the_others_go_on(attached: Setting) -> None:
    """Cancelled in flight, waiting for room, and by a deadline: afterwards all room is there again."""
    backend = attached.backend()

    async def main() -> None:
        async with await opened(attached, pages=64) as disk:
            backend.process.send_signal(signal.SIGSTOP)
            cancelled, kept = bytearray(b"x" * (16 << 12)), bytearray(16 << 12)
            first = asyncio.create_task(disk.readinto(0, cancelled))
            second = asyncio.create_task(disk.readinto(4096, kept))
            queued = asyncio.create_task(disk.readinto(0, bytearray(SIZE)))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await disk.flush()
            for task in (first, queued):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            backend.process.send_signal(signal.SIGCONT)
            await second
            assert kept == attached.content[4096 : 17 << 12]
            assert await disk.read(0, SIZE) == attached.content
            assert cancelled == b"x" * (16 << 12)

    run(main)


def test_cancelled_at_any_time(attached: Setting) -> None:
    """Each task is cancelled after a number of steps of the loop of its own; the disk is as good as before."""
    attached.backend()

    async def main() -> None:
        chance = random.Random(5)
        async with await opened(attached, pages=40) as disk:

            async def bother(part: int) -> None:
                at = part * (SIZE // 8)
                work = [
                    disk.write(at, attached.content[at : at + 60_000 // 512 * 512]),
                    disk.read(at + 7, 50_001),
                    disk.flush(),
                ]
                task = asyncio.ensure_future(work.pop(chance.randrange(3)))
                for other in work:
                    other.close()
                for _ in range(chance.randrange(40)):
                    await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

            for _ in range(15):
                await asyncio.gather(*(bother(part) for part in range(8)))
            assert await disk.read(0, SIZE) == attached.content

    run(main)


def test_who_waits_is_told_when_nobody_can_look_after_the_backend(attached: Setting) -> None:
    """For want of descriptors, say: an OSError that is none of ours."""
    backend = attached.backend()

    def no_descriptor() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def main() -> None:
        async with await opened(attached) as disk:
            assert disk._session.link is not None
            disk._session.link.verdict = no_descriptor  # type: ignore[method-assign]
            backend.process.send_signal(signal.SIGSTOP)
            reading = asyncio.create_task(disk.read(0, SIZE))
            await asyncio.sleep(0)
            kill(backend)
            with pytest.raises(DeviceError, match="open it again") as raised:
                await asyncio.wait_for(reading, PATIENCE)
            assert raised.value.errno == errno.EMFILE
            del disk._session.link.verdict

    run(main)


def test_a_backend_that_is_killed_is_told_to_all_and_another_is_connected_to(attached: Setting) -> None:
    backend = attached.backend()

    async def main() -> None:
        async with await opened(attached) as disk:
            backend.process.send_signal(signal.SIGSTOP)
            tasks = [asyncio.create_task(disk.read(n * 4096, SIZE // 2)) for n in range(3)]
            await asyncio.sleep(0)
            kill(backend)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [PeerDied] * 3
            with pytest.raises(PeerDied, match="it died"):
                await disk.write(0, bytes(512))
            with pytest.raises(PeerDied):
                await disk.reconnect(timeout=0.05)
            attached.backend()
            await disk.reconnect(timeout=PATIENCE)
            assert await disk.read(0, SIZE) == attached.content

    run(main)


def test_with_patience_nobody_notices(attached: Setting) -> None:
    backend = attached.backend()
    data = os.urandom(SIZE)

    async def main() -> None:
        disk = await opened(attached, patience=PATIENCE)
        backend.process.send_signal(signal.SIGSTOP)
        half = SIZE // 2
        writers = [asyncio.create_task(disk.write(at, data[at : at + half])) for at in (0, half)]
        await asyncio.sleep(0)
        kill(backend)
        attached.backend()
        await asyncio.gather(*writers)
        assert await disk.read(0, SIZE) == data
        await disk.close()
        assert attached.now() == data

    run(main)


def test_a_backend_that_closes_in_order_is_named(attached: Setting) -> None:
    attached.backend()

    async def main() -> None:
        async with await opened(attached) as disk:
            attached.dom0.store.write(f"{DEVICE.front}/state", str(int(State.CLOSING)))  # a toolstack's doing
            with pytest.raises(PeerClosed, match="went to state"):
                await read_for_ever(disk)

    run(main)


def test_closing_answers_who_still_waits(attached: Setting) -> None:
    backend = attached.backend()

    async def main() -> None:
        disk = await opened(attached)
        backend.process.send_signal(signal.SIGSTOP)
        task = asyncio.create_task(disk.read(0, SIZE))
        await asyncio.sleep(0)
        await disk.close(timeout=0.05)
        with pytest.raises(Closed):
            await task
        backend.process.send_signal(signal.SIGCONT)

    run(main)


def all_is_given_back(attached: Setting) -> None:
    """Wait until the frontend grants nothing. A page lasts until the backend, in its process, has unmapped it too."""
    deadline = time.monotonic() + PATIENCE
    while left := [grant for grant in attached.machine.grants() if grant.granter == 1]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def test_an_opening_that_is_cancelled_leaves_nothing(attached: Setting) -> None:
    async def main() -> None:
        with pytest.raises(TimedOut):
            await opened(attached, timeout=0.01)
        opening = asyncio.create_task(opened(attached, timeout=0.3))
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    async def too_late() -> None:
        """The handshake goes on behind the cancelled task, and succeeds."""
        opening = asyncio.create_task(opened(attached))
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    async def many() -> None:
        """Some get in each other's way."""
        for naps in range(4):
            opening = asyncio.create_task(opened(attached))
            await asyncio.sleep(naps * 0.002)
            opening.cancel()
            with contextlib.suppress(asyncio.CancelledError, GntallocError):
                await (await opening).close()

    run(main)
    attached.backend()
    run(too_late)  # which waits for its threads
    all_is_given_back(attached)
    run(many)
    all_is_given_back(attached)
    with attached.open() as disk:
        assert disk.read(0, 1) == attached.content[:1]
