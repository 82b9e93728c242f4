"""A disk: our frontend, and our backend in another process and domain."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import looks
import pytest
from tests.frontend.conftest import DEVICE, PATIENCE
from tests.frontend.kit import CHECKS, SIZE, kill, read_for_ever

from gntalloc import Closed, DeviceError, PeerClosed, PeerDied, TimedOut
from gntalloc.frontend.blkfront import BlockDevice
from gntalloc.frontend.blkif import Operation
from gntalloc.frontend.nodes import disk_number
from gntalloc.frontend.xenbus import State
from gntalloc.testing import Program

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.frontend.conftest import Setting

    from gntalloc import Domain

    Served = Callable[..., BlockDevice]

# How a backend serves, and with how many pages the frontend works.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kept": ({"way": "map"}, {}),
    "copied": ({"way": "copy"}, {}),
    "direct": ({"way": "map", "indirect": 0}, {}),
    "large sectors": ({"sector_size": 4096}, {}),
    "few pages": ({"way": "map"}, {"pages": 3}),
    "one page": ({"way": "copy"}, {"pages": 1}),
}


# With one page in flight everything takes long, and one check shows what there is to see.
PAIRS = [(way, check) for way in WAYS for check in CHECKS if way != "one page" or check is CHECKS[3]]


@pytest.mark.parametrize(("way", "check"), PAIRS, ids=[f"{way}-{check.__name__}" for way, check in PAIRS])
def test_conformance(served: Served, setting: Setting, way: str, check: Callable[[BlockDevice, bytes], None]) -> None:
    back, front = WAYS[way]
    disk = served(front, **back)
    check(disk, setting.content)
    disk.flush(timeout=PATIENCE)
    expected = disk.read(0, disk.size, timeout=PATIENCE)
    disk.close()
    assert setting.now() == expected


def test_what_a_disk_says_of_itself(served: Served) -> None:
    disk = served(sector_size=1024, indirect=20)
    assert (disk.number, disk.size, disk.sector_size, disk.read_only) == (51712, SIZE, 1024, False)
    assert disk.features.flush
    assert disk.features.persistent
    assert disk.features.indirect_segments == 20
    assert disk.largest == 20 * 4096


def test_discarded_sectors_read_as_zeros_and_their_neighbours_do_not(served: Served, setting: Setting) -> None:
    disk = served()
    disk.discard(8192, 1 << 20, timeout=PATIENCE)
    end = 8192 + (1 << 20)
    assert disk.read(0, SIZE, timeout=PATIENCE) == setting.content[:8192] + bytes(1 << 20) + setting.content[end:]


@pytest.mark.parametrize("by", ["toolstack", "backend"])
def test_a_read_only_disk_is_read(served: Served, setting: Setting, by: str) -> None:
    disk = served(mode="r") if by == "toolstack" else served(read_only=True)
    assert disk.read_only
    assert disk.read(0, 1000, timeout=PATIENCE) == setting.content[:1000]
    for refused in (lambda: disk.write(0, bytes(512)), lambda: disk.discard(0, 512)):
        with pytest.raises(DeviceError, match="read-only") as caught:
            refused()
        assert caught.value.errno == errno.EROFS
    disk.flush()  # nothing to do
    assert setting.now() == setting.content


def test_what_cannot_be_is_refused_before_it_is_sent(served: Served) -> None:
    disk = served()
    for wrong in (
        lambda: disk.read(SIZE - 5, 6),
        lambda: disk.read(-1, 1),
        lambda: disk.write(1, bytes(512)),
        lambda: disk.write(0, bytes(511)),
        lambda: disk.write(SIZE, bytes(512)),
        lambda: disk.discard(5, 512),
    ):
        with pytest.raises(ValueError, match="bytes at"):
            wrong()
    disk.close()
    disk.close()
    with pytest.raises(Closed):
        disk.read(0, 1)


def test_one_after_another(served: Served, setting: Setting) -> None:
    """The backend serves the next frontend, and lets go of all that the last one granted."""
    for number in range(3):
        disk = served() if number == 0 else setting.open()
        disk.write(0, bytes([number]) * 512, timeout=PATIENCE)
        disk.close()
        assert setting.now()[:512] == bytes([number]) * 512


def test_without_a_disk_or_a_backend_it_says_so(setting: Setting) -> None:
    with pytest.raises(DeviceError, match="it has: none") as caught:
        BlockDevice(setting.guest)
    assert caught.value.errno == errno.ENODEV
    setting.attach()
    with pytest.raises(DeviceError, match="no disk 5; it has: 51712"):
        BlockDevice(setting.guest, 5)
    with pytest.raises(TimedOut, match=r"1 \(Initialising\), where 2 \(Init wait\) was waited for"):
        BlockDevice(setting.guest, timeout=0.05)


def test_a_detached_disk_is_named_and_its_backend_ends(setting: Setting) -> None:
    setting.attach()
    backend = setting.backend()
    disk = setting.open()
    assert disk.read(0, 1, timeout=PATIENCE) == setting.content[:1]
    setting.detach()
    assert backend.result(timeout=PATIENCE)[1] == 0
    with pytest.raises((PeerClosed, PeerDied)):
        disk.read(0, 1, timeout=PATIENCE)
    assert not setting.dom0.store.exists(DEVICE.back)


@pytest.mark.parametrize(("name", "number"), [("xvda", 51712), ("xvda1", 51713), ("xvdb", 51728), ("51712", 51712)])
def test_names_of_disks(name: str, number: int) -> None:
    assert disk_number(name) == number


# Death.


def write_for_ever(domain: Domain) -> None:
    """Flushes a pattern, says so, and goes on writing elsewhere until it is killed."""
    disk = BlockDevice(domain, timeout=PATIENCE)
    disk.write(0, b"\xaa" * (1 << 20), timeout=PATIENCE)
    disk.flush(timeout=PATIENCE)
    os.write(1, b"flushed\n")
    while True:
        disk.write(1 << 20, os.urandom(1 << 20), timeout=PATIENCE)


@pytest.mark.parametrize("way", ["map", "copy"])
def test_a_frontend_is_killed_and_another_takes_over(setting: Setting, way: str) -> None:
    setting.attach()
    setting.backend(way=way)
    for _ in range(3):
        ours, theirs = os.pipe()
        with Program(setting.guest, write_for_ever, stdout=theirs) as program:
            os.close(theirs)
            with os.fdopen(ours, "rb") as said:
                assert said.readline() == b"flushed\n"
            program.kill()
            program.wait(timeout=PATIENCE)
            program.last_words  # noqa: B018  it was killed on purpose
        with setting.open() as disk:
            assert disk.read(0, 1 << 20, timeout=PATIENCE) == b"\xaa" * (1 << 20)
            assert disk.read(2 << 20, 1 << 20, timeout=PATIENCE) == setting.content[2 << 20 :]
            disk.write(0, bytes(1 << 20), timeout=PATIENCE)


def test_a_backend_is_killed_and_that_is_named_and_another_is_connected_to(setting: Setting) -> None:
    setting.attach()
    backend = setting.backend()
    disk = setting.open()
    assert disk.read(0, 100, timeout=PATIENCE) == setting.content[:100]
    backend.process.send_signal(signal.SIGSTOP)  # so that something is in flight when it dies
    outcome: list[BaseException] = []

    def read() -> None:
        try:
            disk.read(0, SIZE, timeout=PATIENCE)
        except BaseException as error:
            outcome.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    kill(backend)
    reader.join(PATIENCE)
    assert [type(error) for error in outcome] == [PeerDied]
    with pytest.raises(PeerDied, match="it died"):
        disk.write(0, bytes(512), timeout=PATIENCE)
    setting.backend(way="copy")
    disk.reconnect(timeout=PATIENCE)
    assert not disk.features.persistent
    assert disk.read(0, SIZE, timeout=PATIENCE) == setting.content


def test_with_patience_nobody_notices_that_a_backend_was_killed(setting: Setting) -> None:
    setting.attach()
    backend = setting.backend()
    disk = setting.open(patience=PATIENCE)
    backend.process.send_signal(signal.SIGSTOP)
    data = setting.content[::-1]
    writer = threading.Thread(target=disk.write, args=(0, data), kwargs={"timeout": PATIENCE})
    writer.start()
    kill(backend)
    setting.backend()
    writer.join(PATIENCE)
    assert not writer.is_alive()
    assert disk.read(0, SIZE, timeout=PATIENCE) == data
    disk.close()
    assert setting.now() == data


def test_a_backend_that_closes_in_order_has_not_died(setting: Setting) -> None:
    setting.attach()
    backend = setting.backend()
    disk = setting.open()
    setting.dom0.store.write(f"{DEVICE.front}/state", str(int(State.CLOSING)))  # a toolstack's doing
    with pytest.raises(PeerClosed, match="went to state"):
        read_for_ever(disk)
    assert backend.running
    disk.reconnect(timeout=PATIENCE)
    assert disk.read(0, SIZE, timeout=PATIENCE) == setting.content


@pytest.mark.parametrize(("answer", "ends"), [(looks.short, ("woken", "paid")), (looks.no_look, ("woken",))])
def test_a_wait_asks_how_long_to_look_and_says_how_it_ended(
    setting: Setting, answer: Callable[[], float], ends: tuple[str, ...]
) -> None:
    setting.attach()
    backend = setting.backend()
    disk = setting.open()
    backend.process.send_signal(signal.SIGSTOP)
    disk._waiting._look = recorder = looks.Recorder(answer)  # type: ignore[assignment]
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        reading = threads.submit(disk.read, 0, 512, timeout=PATIENCE)
        try:
            until(lambda: disk._waiting._asleep, "nobody sleeps")
        finally:
            backend.process.send_signal(signal.SIGCONT)
        assert reading.result(PATIENCE) == setting.content[:512]
    assert recorder.heard[0] == "until"
    assert recorder.heard[-1] in ends  # the first wake-up may have been for the backend's state
    assert not {"woken", "paid"} & set(recorder.heard[:-1])


@pytest.mark.parametrize("answer", looks.WAYS)
def test_a_wait_that_was_in_vain_tells_nothing_of_looking(setting: Setting, answer: Callable[[], float]) -> None:
    setting.attach()
    backend = setting.backend()
    disk = setting.open()
    backend.process.send_signal(signal.SIGSTOP)
    disk._waiting._look = recorder = looks.Recorder(answer)  # type: ignore[assignment]
    try:
        with pytest.raises(TimedOut):
            disk.read(0, 512, timeout=0.01)
        assert set(recorder.heard) == {"until"}
    finally:
        backend.process.send_signal(signal.SIGCONT)


def test_a_look_pays_if_the_answer_comes_meanwhile(setting: Setting) -> None:
    setting.attach()
    setting.backend()
    disk = setting.open()
    disk._waiting._look = recorder = looks.Recorder(looks.long)  # type: ignore[assignment]
    deadline = time.monotonic() + PATIENCE
    while "paid" not in recorder.heard:
        assert time.monotonic() < deadline, recorder.heard
        assert disk.read(0, 512, timeout=PATIENCE) == setting.content[:512]
    assert recorder.heard == ["until", "paid"]


def test_a_close_has_one_deadline_and_may_be_interrupted(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while it waits for what is in flight: the next close begins anew, and waits for no other."""
    setting.attach()
    backend = setting.backend()
    disk = setting.open()
    backend.process.send_signal(signal.SIGSTOP)
    disk.submit(Operation.READ, 0, bytearray(512))

    def interrupt() -> None:
        until(lambda: disk._waiting._asleep, "nobody waits for what is in flight")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        disk.close(timeout=NEVER)
    thread.join(PATIENCE)
    given: list[float] = []
    close = disk._session.close

    def noting(*, timeout: float) -> None:
        given.append(timeout)
        close(timeout=timeout)

    monkeypatch.setattr(disk._session, "close", noting)
    again = threading.Thread(target=lambda: disk.close(timeout=0.2), daemon=True)
    again.start()
    again.join(PATIENCE)
    assert not again.is_alive()
    assert given == [0.0]  # all of its time went to what is in flight
    kill(backend)


NEVER = 10 * PATIENCE


def until(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


@pytest.mark.parametrize("way", ["read with patience", "submit with patience", "reconnect", "read"])
def test_nobody_hangs_behind_a_thread_that_waits_for_the_backend(setting: Setting, way: str) -> None:
    setting.attach()
    backend = setting.backend()
    disk = setting.open(patience=NEVER if "patience" in way else 0)
    backend.process.send_signal(signal.SIGSTOP)
    buffer = bytearray(512)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        waiting: concurrent.futures.Future[object] = threads.submit(lambda: disk.read(0, SIZE, timeout=NEVER))
        try:
            if way != "read":
                until(lambda: len(disk._session.flights.in_flight) > 0, "nothing is in flight")
                kill(backend)
            if way == "reconnect":
                with pytest.raises(PeerDied):
                    waiting.result(PATIENCE)
                waiting = threads.submit(lambda: disk.reconnect(timeout=NEVER))
            if way != "read":
                until(lambda: disk._waiting.away, "nobody waits for another backend")
            if way == "submit with patience":
                beside = threads.submit(disk.submit, Operation.READ, 0, buffer)
            else:
                for call in (
                    lambda: disk.read(0, 512, timeout=0.05),
                    lambda: disk.write(0, buffer, timeout=0.05),
                    lambda: disk.reconnect(timeout=0.05),
                )[: 2 if way == "read" else 3]:
                    with pytest.raises(TimedOut):
                        call()
            assert (disk.size, disk.read_only, disk.number) == (SIZE, False, DEVICE.number)
            assert disk.features.flush
            assert "disk" in repr(disk)
        finally:
            disk.close(timeout=0.05)
        with pytest.raises(Closed):
            waiting.result(PATIENCE)
        if way == "submit with patience":
            with pytest.raises(Closed):
                beside.result(PATIENCE)
    disk.close()
    if way == "read":
        kill(backend)
