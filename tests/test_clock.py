"""One clock, which tools that stop a test's time leave alone: every wait with a timeout ends, in a frozen world too."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gntalloc import clock
from gntalloc.clock import Deadline

SOURCE = Path(clock.__file__).parent
TOOLS = {
    "freezegun": "import freezegun; stopped = freezegun.freeze_time('2020-02-02')",
    "freezegun, slowly": "import freezegun; stopped = freezegun.freeze_time('2020-02-02', auto_tick_seconds=1e-9)",
    "time-machine": "import time_machine; stopped = time_machine.travel(0.0, tick=False)",
}
PROGRAM = """
import time
with stopped:
    before = time.time(), time.monotonic()
    import gntalloc
    from gntalloc import TimedOut
    from gntalloc.testing import Snapshot, assert_cleaned_up
    from gntalloc.xenstore.client import Store

    def late(call):
        try:
            call()
        except TimedOut:
            return
        raise AssertionError(call)

    with gntalloc.Machine() as machine:
        alice, bob = machine.domain(1), machine.domain(2)
        seen = Snapshot.of(machine)
        late(lambda: bob.connect(1, "x", timeout=0.3))
        with alice.listen(2, "x", size=4096) as listener:
            late(lambda: listener.accept(timeout=0.05))
            offer = listener.offer()
            late(lambda: offer.wait_connected(timeout=0.05))
            with bob.connect(1, "x", timeout=20) as channel, listener.accept(timeout=20) as other:
                for call in (channel.recv, channel.read, channel.peek):
                    late(lambda: call(timeout=0.05))
                channel.write(bytes(4096))
                for call in (lambda: channel.write(b"x", timeout=0.05), lambda: channel.send(b"x", timeout=0.05)):
                    late(call)
                late(lambda: channel.drain(timeout=0.05))
                late(lambda: channel.reserve(1, timeout=0.05))
                assert other.read(4096, timeout=20) == bytes(4096)
                other.send(b"hello")
                assert channel.recv(timeout=20) == b"hello"
        with alice.events.bind(2) as port:
            late(lambda: port.wait(timeout=0.05))
            with bob.events.connect(1, port.number) as far:
                far.wait(timeout=20)
                far.notify()
                port.wait(timeout=20)
        with alice.share(2) as pages:
            with bob.map(pages.grant):
                late(lambda: pages.wait_released(timeout=0.05))
            pages.wait_released(timeout=20)
        with alice.store.watch("data") as watch:
            watch.wait(timeout=20)
            late(lambda: watch.wait(timeout=0.05))
        for domain in alice, bob:
            domain.close()
            domain.devices.close()
        assert_cleaned_up(machine, seen)
        with Store(machine.environ(1)["XENSTORED_PATH"]) as store, Store(store._connection.name.split()[-1]) as rival:

            def disturbed(transaction):
                transaction.read("data")
                rival.write("data", "changed")
                transaction.write("data/mine", "value")

            late(lambda: store.transact(disturbed, timeout=0.05))
    assert time.time() - before[0] < 1, "time was not stopped at all"
print("done")
"""


@pytest.mark.parametrize("first", [True, False], ids=["imported before", "imported in it"])
@pytest.mark.parametrize("tool", TOOLS)
def test_every_wait_ends_while_time_stands_still(tool: str, *, first: bool) -> None:
    module = tool.partition(",")[0].replace("-", "_")
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not there (pip install {module})")
    program = f"{TOOLS[tool]}\n{'import gntalloc.vchan.server, gntalloc.vchan.client' if first else ''}\n{PROGRAM}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50, env={**os.environ})
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_nobody_asks_another_clock() -> None:
    """Whoever computes a deadline does it by `gntalloc.clock`."""
    asks = re.compile(r"\b(time\.(monotonic|perf_counter|time|clock_gettime)|from time import)")
    found = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if asks.search(path.read_text())}
    assert found == {"clock.py"}


def test_a_deadline() -> None:
    never, past, later = Deadline(None), Deadline(-1), Deadline(1000)
    assert (never.remaining, never.milliseconds, never.expired, never.within(3)) == (None, None, False, 3)
    assert (past.remaining, past.milliseconds, past.expired, past.within(3)) == (0, 0, True, 0)
    assert later.remaining is not None
    assert later.milliseconds is not None
    assert 900 < later.remaining <= 1000
    assert 900_000 < later.milliseconds <= 1_000_000
    assert (later.expired, later.within(3)) == (False, 3)


def test_a_deadline_and_a_lock() -> None:
    lock = threading.Lock()
    assert Deadline(None).acquire(lock)
    assert not Deadline(0).acquire(lock)
    assert not Deadline(0.01).acquire(lock)
    lock.release()
    assert Deadline(-1).acquire(lock)
