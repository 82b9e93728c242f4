"""Two programs: closing, dying, and lying; each is named, and nobody hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from gntalloc import PeerBroke, PeerClosed, PeerDied, TimedOut
from gntalloc.vchan.layout import NOTIFY_WRITE

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.vchan.channel import Channel

    Start = Callable[..., tuple[Channel, subprocess.Popen[str]]]

PATIENCE = 20.0
ECHO = """
while data := channel.read(timeout=20):
    channel.write(data, timeout=20)
channel.close()
"""
ECHO_UNTIL_RESTING = """
look = channel._end.looks[1]
assert channel._end.looks.keys() == {1, 2}
rests = 0
try:
    while channel.recv(timeout=20):
        rests += look._rest > 0
        channel.send(b"I too" if rests >= 10 else b"not yet", timeout=20)
except gntalloc.PeerClosed:
    channel.close()
"""
SLEEP = "\nchannel.send(b'ready')\ntime.sleep(60)\n"
MODES: list[dict[str, Any]] = [{}, {"extensions": False}, {"spin": 0}]


@pytest.mark.parametrize("mode", MODES)
def test_an_echo_and_an_orderly_end(with_program: Start, mode: dict[str, Any]) -> None:
    channel, process = with_program(ECHO, **mode)
    for size in (1, 64, 5000, 100_000):
        data = os.urandom(size)
        writer = threading.Thread(target=channel.write, args=(data,), kwargs={"timeout": PATIENCE})
        writer.start()
        got = b""
        while len(got) < size:
            got += channel.read(timeout=PATIENCE)
        writer.join(PATIENCE)
        assert got == data
    channel.close()
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("mode", [{}, {"extensions": False}])
def test_two_ends_on_one_processor_find_that_looking_does_harm(with_program: Start, mode: dict[str, Any]) -> None:
    """Both do; and nobody has told them where they run."""
    channel, process = with_program("os.sched_setaffinity(0, [int(channel.recv())])" + ECHO_UNTIL_RESTING, **mode)
    before = os.sched_getaffinity(0)
    one = min(before)
    look = channel._end.looks[NOTIFY_WRITE]
    deadline = time.monotonic() + PATIENCE
    rests, answer = 0, b""
    try:
        os.sched_setaffinity(0, {one})
        channel.send(str(one).encode())
        while rests < 10 or answer != b"I too":
            assert time.monotonic() < deadline, f"{rests} waits were in a rest here; the other says {answer!r}"
            channel.send(b"x")
            answer = channel.recv(timeout=PATIENCE)
            rests += look._rest > 0
    finally:
        os.sched_setaffinity(0, before)
    channel.close()
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("call", ["read", "recv", "write", "send", "drain", "peek", "reserve"])
def test_sigkill_of_a_peer_is_named_in_every_call(with_program: Start, call: str) -> None:
    channel, process = with_program(SLEEP, size=4096)
    assert channel.recv(timeout=PATIENCE) == b"ready"
    channel.write(bytes(4096 if call in {"write", "send", "reserve"} else 1))
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            arguments = {"write": (b"more",), "send": (b"more",), "reserve": (1,)}.get(call, ())
            getattr(channel, call)(*arguments, timeout=PATIENCE)
        except BaseException as error:
            outcome.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    os.kill(process.pid, signal.SIGKILL)
    waiter.join(PATIENCE)
    assert [type(error) for error in outcome] == [PeerDied]
    assert not channel.connected


def test_what_a_killed_peer_had_written_is_read_first(with_program: Start) -> None:
    channel, process = with_program("channel.send(b'one'); channel.send(b'two'); os.kill(os.getpid(), 9)")
    process.wait(PATIENCE)
    assert [channel.recv(timeout=PATIENCE), channel.recv(timeout=PATIENCE)] == [b"one", b"two"]
    with pytest.raises(PeerDied, match="without closing"):
        channel.recv(timeout=PATIENCE)


def test_of_a_libxenvchan_nobody_knows_whether_it_closed_or_died(with_program: Start) -> None:
    channel, process = with_program(SLEEP, extensions=False)
    assert channel.recv(timeout=PATIENCE) == b"ready"
    os.kill(process.pid, signal.SIGKILL)
    assert channel.read(timeout=PATIENCE) == b""
    with pytest.raises(PeerClosed):
        channel.write(b"x")


def test_sigkill_of_the_server(machine: Any, alice: Any, bob: Any) -> None:
    """The client is here. The dead server's nodes stay; a client waits for a living one."""
    program = (
        "import gntalloc, time\n"
        "with gntalloc.current_domain().listen(2, 'test', size=4096) as listener:\n"
        "    channel = listener.accept(timeout=20); channel.send(b'ready'); listener.offer()\n"
        "    channel.recv(timeout=20)\n"
        "    channel.send(b'offered'); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program]
    server = subprocess.Popen(command, env=machine.environ(1))
    with server, bob.connect(1, "test", timeout=PATIENCE) as channel:
        assert channel.recv(timeout=PATIENCE) == b"ready"
        channel.send(b"go on")
        assert channel.recv(timeout=PATIENCE) == b"offered"
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(PeerDied):
            channel.recv(timeout=PATIENCE)
    assert bob.store.exists("/local/domain/1/data/vchan/2/test/event-channel")
    with pytest.raises(TimedOut, match="server is gone"):
        bob.connect(1, "test", timeout=0.3)
    with alice.listen(2, "test", size=0) as listener:
        accepting = threading.Thread(target=lambda: listener.accept(timeout=PATIENCE).close())
        accepting.start()
        bob.connect(1, "test", timeout=PATIENCE).close()
        accepting.join(PATIENCE)


# Lies. The hostile program writes into the page as it likes: it has it mapped.

LIES = {
    "prod beyond the ring": "words[1] = words[1] + size + 1",
    "prod far away": "words[1] = 0xFFFFFFFF",
    "cons beyond what was written": "words[2] = words[2] + 5000",
    "cons far back": "words[2] = 0x80000000",
    "a message of four gigabytes": "channel.write(b'\\xff\\xff\\xff\\xff' + bytes(100))",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_the_page_is_named_in_the_call_that_waits(with_program: Start, lie: str, mode: dict[str, Any]) -> None:
    hostile = f"""
channel.send(b'ready')
channel.read(timeout=20)
words = channel._end.pages.memory[:16].cast('I')
size = channel._end.writer.size
{LIES[lie]}
channel._end.bells.ring()
time.sleep(60)
"""
    channel, _ = with_program(hostile, size=4096, **mode)
    assert channel.recv(timeout=PATIENCE) == b"ready"
    channel.write(b"go")
    with pytest.raises(PeerBroke):
        _until_it_is_seen(channel, writing=lie.startswith("cons"))
    with pytest.raises(PeerBroke):  # and so it stays
        channel.read(timeout=PATIENCE)
    with pytest.raises(PeerBroke):
        channel.write(b"x", timeout=PATIENCE)


def _until_it_is_seen(channel: Channel, *, writing: bool) -> None:
    while writing:
        channel.write(bytes(1000), timeout=PATIENCE)
    channel.recv(timeout=PATIENCE)


def test_a_peer_that_writes_anything_anywhere_causes_named_errors_only(with_program: Start) -> None:
    hostile = """
import random
chance = random.Random(7)
page = channel._end.pages.memory
stop = time.monotonic() + 3
while time.monotonic() < stop:
    for _ in range(20):
        page[chance.choice([*range(24), *range(64, 140)])] = chance.randrange(256)
    try:
        channel._end.bells.ring()
    except Exception:
        pass
"""
    channel, process = with_program(hostile, size=(1024, 2048))
    named = 0
    while process.poll() is None:
        for call in (
            lambda: channel.read(timeout=0.01),
            lambda: channel.recv(timeout=0.01),
            lambda: channel.write(b"x" * 100, timeout=0.01),
            lambda: channel.send(b"x" * 100, timeout=0.01),
            lambda: channel.drain(timeout=0.01),
        ):
            try:
                call()
            except (PeerBroke, PeerClosed, PeerDied, TimedOut):
                named += 1
    assert named


def test_a_flood_of_wake_ups_is_only_a_flood(with_program: Start) -> None:
    flood = """
stop = time.monotonic() + 1
while time.monotonic() < stop:
    channel._end.bells.ring()
channel.send(b'done')
channel.recv()
"""
    channel, _ = with_program(flood)
    assert channel.recv(timeout=PATIENCE) == b"done"
    channel.send(b"go")


def test_a_peer_that_does_not_read_its_wake_ups_stops_nobody(with_program: Start) -> None:
    channel, process = with_program("channel.send(b'ready'); os.kill(os.getpid(), 19)")  # SIGSTOP
    assert channel.recv(timeout=PATIENCE) == b"ready"
    for _ in range(2000):
        channel._end.bells.ring()
    with pytest.raises(TimedOut):
        channel.recv(timeout=0.05)
    os.kill(process.pid, signal.SIGCONT)
