"""Programs that gevent or eventlet has patched: both ends of everything in one process, whose greenlets take turns."""

from __future__ import annotations

import importlib.util
import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from gntalloc import waits

TOOLS = {
    "gevent": "from gevent import monkey, spawn; patch, result = monkey.patch_all, lambda green: green.get()",
    "eventlet": "import warnings; warnings.simplefilter('ignore')\n"
    "import eventlet; patch, spawn, result = eventlet.monkey_patch, eventlet.spawn, lambda green: green.wait()",
}
USES = "import gntalloc, gntalloc.vchan.server, gntalloc.vchan.client, gntalloc.vchan.pump"
PROGRAM = """
from gntalloc import PeerDied, TimedOut
import os, select, subprocess, sys, time
assert not hasattr(select, "epoll")

def late(call):
    try:
        call()
    except TimedOut:
        return
    raise AssertionError(call)

with gntalloc.Machine() as machine:
    alice, bob = machine.domain(1), machine.domain(2)
    ticks = 0

    def tick():
        global ticks
        while ticks >= 0:
            ticks += 1
            time.sleep(0.001)

    ticking = spawn(tick)

    # Channels: a server and its client, which wait for each other a hundred times.
    def serve():
        with alice.listen(2, "x", size=4096) as listener, listener.accept(timeout=20) as channel:
            for message in channel:
                channel.send(message.upper())

    def ask():
        with bob.connect(1, "x", timeout=20) as channel:
            for _ in range(100):
                channel.send(b"hello", timeout=20)
                assert channel.recv(timeout=20) == b"HELLO"
            late(lambda: channel.recv(timeout=0.05))
            channel.finish(timeout=20)
            assert channel.read(timeout=20) == b""

    serving, asking = spawn(serve), spawn(ask)
    result(asking), result(serving)

    # More than fits, both ways at once.
    with alice.listen(2, "x", size=4096) as listener:
        connecting = spawn(lambda: bob.connect(1, "x", timeout=20))
        ends = listener.accept(timeout=20), result(connecting)
    writers = [spawn(lambda end=end: end.write(bytes(100_000), timeout=20)) for end in ends]
    for end in ends:
        left = 100_000
        while left:
            left -= len(end.read(timeout=20))
    for writer in writers:
        result(writer)
    for end in ends:
        end.drain(timeout=20)
        end.close()

    # Events, pages and the store.
    with alice.events.bind(2) as port, bob.events.connect(1, port.number) as far:
        far.wait(timeout=20)
        late(lambda: port.wait(timeout=0.05))
        waiting = spawn(lambda: port.wait(timeout=20))
        time.sleep(0.01)
        far.notify()
        result(waiting)
    with alice.share(2) as pages:
        mapped = bob.map(pages.grant)
        late(lambda: pages.wait_released(timeout=0.05))
        releasing = spawn(lambda: pages.wait_released(timeout=20))
        time.sleep(0.01)
        mapped.close()
        result(releasing)
    with alice.store.watch("data") as watch:
        watch.wait(timeout=20)
        late(lambda: watch.wait(timeout=0.05))
        watching = spawn(lambda: watch.wait(timeout=20))
        time.sleep(0.01)
        alice.store.write("data/here", "x")
        assert result(watching) == "data/here"

    # A peer in another process, which is killed.
    code = "import gntalloc, time; c = gntalloc.current_domain().connect(1, 'x', timeout=20); c.send(b'!')"
    other = subprocess.Popen([sys.executable, "-c", code + "; time.sleep(60)"], env=machine.environ(2))
    with alice.listen(2, "x") as listener, listener.accept(timeout=20) as channel:
        assert channel.recv(timeout=20) == b"!"
        os.kill(other.pid, 9)
        try:
            channel.recv(timeout=20)
        except PeerDied:
            pass
        else:
            raise AssertionError("it lives")
    other.wait()
    assert ticks > 50, f"only {ticks} turns for others"
    ticks = -1 << 30
    result(ticking)
    for domain in alice, bob:
        domain.close()
        domain.devices.close()
print("done")
"""


@pytest.mark.parametrize("first", ["patched before", "patched after"])
@pytest.mark.parametrize("tool", TOOLS)
def test_greenlets_wait_for_each_other(tool: str, first: str) -> None:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not there (pip install {tool})")
    order = ("patch()", USES) if first == "patched before" else (USES, "patch()")
    program = "\n".join([TOOLS[tool], *order, PROGRAM])
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_poll_that_is_made_of_select(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "poll")
    ours, theirs = waits.socketpair()
    with ours, theirs:
        poll = waits.poll()
        poll.register(ours.fileno(), waits.POLLIN | waits.POLLOUT)
        assert poll.poll(0) == [(ours.fileno(), waits.POLLOUT)]
        theirs.send(b"x")
        assert poll.poll(None) == [(ours.fileno(), waits.POLLIN)]
        poll = waits.poll()
        poll.register(theirs.fileno(), waits.POLLIN)
        assert poll.poll(10) == []


def test_an_epoll_of_ones_own() -> None:
    made = waits._own_epoll()
    with made() as group:
        reads, writes = os.pipe()
        group.register(reads, select.EPOLLIN)
        os.write(writes, b"x")
        assert waits.ready(group, 1) == [(reads, select.EPOLLIN)]
        os.close(reads)
        os.close(writes)


def test_who_has_hung_up() -> None:
    ours, theirs = waits.socketpair()
    with ours:
        with theirs:
            assert not waits.hung_up(ours.fileno())
        assert waits.hung_up(ours.fileno())


def test_what_runs_in_programs_polls_by_this_module_only() -> None:
    """Of select's own, gevent and eventlet take away the one or the other."""
    source = Path(waits.__file__).parent
    calls = re.compile(r"select\.(poll|epoll)\(|socket\.(socket|socketpair)\(")
    parts = ["xenstore/*.py", "guest/**/*.py", "vchan/*.py", "frontend/*.py", "embed.py"]
    files = [path for part in parts for path in source.glob(part)]
    assert len(files) > 40
    assert [path.name for path in files if calls.search(path.read_text())] == []


def test_numbers() -> None:
    assert (waits.POLLIN, waits.POLLOUT) == (select.POLLIN, select.POLLOUT)
    assert not waits.patched()
