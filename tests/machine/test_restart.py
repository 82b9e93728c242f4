"""A machine, or a domain, that ends and comes back under the same name: one rule for all that a program has of it.

What finds others by name is served again: Domain, its events and its store, Listener. What was made in the one that
ended says so, and what to do: pages, ports, channels, watches, a frontend.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

import gntalloc
from gntalloc import Domain, aio
from gntalloc.errors import MachineGone, NoMachine, PeerGone
from gntalloc.frontend.blkback import Backend
from gntalloc.frontend.blkfront import BlockDevice
from gntalloc.frontend.nodes import Device, attach
from gntalloc.guest.control import ControlClient
from gntalloc.places import domain_path, machine_folder
from gntalloc.testing import Program, Snapshot, assert_cleaned_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PATIENCE = 30.0
THREADS = 8


class Named:
    """A machine by name, in the foreground, that can be killed or ended and started again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "gntalloc", "machine", "--name", self.name, "--domain", "1", "--domain", "2"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        while "runs as pid" not in (line := self._process.stdout.readline()):
            assert line, "the machine did not start"

    def end(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.communicate(timeout=PATIENCE)

    def domain(self, domid: int) -> Domain:
        return gntalloc.current_domain(domain_path(machine_folder(self.name), domid))


@pytest.fixture
def named(request: pytest.FixtureRequest) -> Iterator[Named]:
    before = Snapshot.of(None)
    machine = Named(f"again-{abs(hash(request.node.name)) % 100000}")
    machine.start()
    yield machine
    machine.end(signal.SIGTERM)
    assert_cleaned_up(None, before)


def killed(named: Named) -> None:
    named.end(signal.SIGKILL)
    named.start()


def ended(named: Named) -> None:
    named.end(signal.SIGTERM)
    named.start()


def domains_made_anew(named: Named) -> None:
    with closing(ControlClient(machine_folder(named.name))) as control:
        for domid in (1, 2):
            control.order("destroy", domid=domid)
            control.order("create", domid=domid, uid=os.getuid())


WAYS = pytest.mark.parametrize("restart", [killed, ended, domains_made_anew])


def closed(*domains: Domain) -> None:
    for domain in domains:
        domain.close()
        domain.devices.close()


@WAYS
def test_a_domain_goes_on(named: Named, restart: Callable[[Named], None]) -> None:
    """The very first call after the restart, whichever it is."""
    one, two = named.domain(1), named.domain(2)
    for _ in range(2):
        with one.share(2) as shared, two.map(shared.grant) as mapped:
            shared.memory[:1] = b"x"
            assert bytes(mapped.memory[:1]) == b"x"
        restart(named)
        with one.events.bind(2) as port:
            restart(named)
            with pytest.raises(MachineGone):
                port.notify()
        one.store.write("data/x", "1")
        restart(named)
        one.store.write("data/x", "2")
        assert one.store.read("data/x") == b"2"
        restart(named)
        with two.events.bind(1):
            pass
        with pytest.raises(gntalloc.DeviceError):
            two.map(1, 8)
    closed(one, two)


@WAYS
def test_threads_that_notice_at_once_all_go_on(named: Named, restart: Callable[[Named], None]) -> None:
    one = named.domain(1)
    one.share(2).close()
    together = threading.Barrier(THREADS)

    def share(_: int) -> None:
        together.wait(PATIENCE)
        one.share(2).close()

    with ThreadPoolExecutor(THREADS) as threads:
        for _ in range(5):
            restart(named)
            list(threads.map(share, range(THREADS), timeout=PATIENCE))
    closed(one)


@WAYS
def test_what_was_made_there_says_that_it_is_gone(named: Named, restart: Callable[[Named], None]) -> None:
    one, two = named.domain(1), named.domain(2)
    shared = one.share(2)
    mapped = two.map(shared.grant)
    port = one.events.bind(2)
    store = one.store
    watch = store.watch("data")
    while watch.poll():
        pass
    restart(named)
    asks: list[Callable[[], object]] = [
        lambda: shared.held,
        lambda: shared.mapped_by,
        lambda: shared.wait_released(timeout=PATIENCE),
        lambda: mapped.notify_when_unmapped(clear=0),
        lambda: port.wait(timeout=PATIENCE),
        port.notify,
        lambda: watch.wait(timeout=PATIENCE),
    ]
    for _ in range(2):  # the second time too
        for ask in asks:
            with pytest.raises(MachineGone) as gone:
                ask()
            assert "again" in str(gone.value) or "anew" in str(gone.value), gone.value
        with one.share(2):  # whatever was used, the domain goes on
            pass
    shared.memory[:2] = b"ok"
    assert bytes(mapped.memory[:2]) == b"ok"  # pages live as long as they are mapped
    for each in (shared, mapped, port, watch):
        each.close()
    store.close()
    closed(one, two)


@WAYS
@pytest.mark.parametrize("direct", [True, False])
def test_a_listener_serves_again(named: Named, restart: Callable[[Named], None], direct: bool) -> None:
    """A channel whose ends ring each other directly goes on meanwhile; one that needs the machine ends."""
    one, two = named.domain(1), named.domain(2)
    with one.listen(2, "x", extensions=None if direct else False) as listener:
        for _ in range(2):
            listener.offer()
            with two.connect(1, "x", timeout=PATIENCE) as client, listener.accept(timeout=PATIENCE) as server:
                client.write(b"1")
                assert server.read(1, timeout=PATIENCE) == b"1"
                restart(named)
                if direct:
                    client.write(b"2")
                    assert server.read(1, timeout=PATIENCE) == b"2"
                else:
                    with pytest.raises((MachineGone, PeerGone)):
                        server.read(1, timeout=PATIENCE)
            # Both were closed, which is no error then.
    closed(one, two)


@WAYS
def test_a_listener_that_waits_meanwhile(named: Named, restart: Callable[[Named], None]) -> None:
    one, two = named.domain(1), named.domain(2)
    heard: list[bytes] = []
    started = threading.Event()

    def serve() -> None:
        with one.listen(2, "x") as listener:
            listener.offer()
            started.set()
            while True:
                try:
                    channel = listener.accept(timeout=PATIENCE)
                    break
                except MachineGone:  # it has not come back yet
                    continue
            with channel:
                heard.append(channel.recv(timeout=PATIENCE))

    server = threading.Thread(target=serve)
    server.start()
    assert started.wait(PATIENCE)
    restart(named)
    with two.connect(1, "x", timeout=PATIENCE) as client:
        client.send(b"again")
        client.drain(timeout=PATIENCE)
        server.join(PATIENCE)
    assert heard == [b"again"]
    closed(one, two)


def test_as_long_as_nobody_is_there_it_says_so(named: Named) -> None:
    one = named.domain(1)
    with one.share(2), one.listen(2, "x") as listener:
        named.end(signal.SIGKILL)
        for _ in range(2):
            for ask in (lambda: one.share(2), lambda: one.events.bind(2), lambda: one.store, listener.accept):
                with pytest.raises((MachineGone, NoMachine)) as gone:
                    ask()
                assert "start" in str(gone.value), gone.value
        named.start()
        with one.share(2):
            pass
        with pytest.raises(gntalloc.TimedOut):
            listener.accept(timeout=0)
    closed(one)


# What is above: asyncio, and a disk.


async def _accept_and_read(one: Domain, ready: threading.Event) -> bytes:
    async with aio.listen(one, 2, "x") as listener:
        ready.set()
        while True:
            try:
                channel = await asyncio.wait_for(listener.accept(), PATIENCE)
                break
            except MachineGone:
                await asyncio.sleep(0.01)
        async with channel:
            return await asyncio.wait_for(channel.recv(), PATIENCE)


@WAYS
def test_a_listener_of_asyncio(named: Named, restart: Callable[[Named], None]) -> None:
    one, two = named.domain(1), named.domain(2)
    ready = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(lambda: asyncio.run(_accept_and_read(one, ready)))
        assert ready.wait(PATIENCE)
        restart(named)
        with two.connect(1, "x", timeout=PATIENCE) as client:
            client.send(b"again")
            assert heard.result(PATIENCE) == b"again"
    closed(one, two)


def serve(domain: Domain, device: Device, path: str) -> None:
    """A backend, in its own process."""
    with Backend(domain, device, path) as backend:
        backend.serve()


def _disk(named: Named, image: Path) -> tuple[Domain, Program]:
    back = named.domain(2)
    device = Device("vbd", 51712, 1, 2)
    with closing(ControlClient(machine_folder(named.name))) as control:
        control.order("enter", domid=0)
        dom0 = named.domain(0)
        attach(dom0.store, device, {"virtual-device": "51712", "device-type": "disk"}, {"mode": "w"})
        closed(dom0)
        return back, Program(back, serve, device, str(image))


@pytest.mark.parametrize("restart", [killed, ended])
def test_a_disk_says_that_it_is_gone_and_a_new_one_works(
    named: Named, restart: Callable[[Named], None], tmp_path: Path
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"x" * (1 << 20))
    one = named.domain(1)
    for _ in range(2):
        back, program = _disk(named, image)
        with program, BlockDevice(one, timeout=PATIENCE, patience=PATIENCE) as disk:
            assert disk.read(0, 4) == b"xxxx"
            restart(named)
            for _ in range(2):
                with pytest.raises(MachineGone) as gone:
                    disk.read(0, 4, timeout=PATIENCE)
                assert "again" in str(gone.value) or "anew" in str(gone.value), gone.value
            program.kill()
        closed(back)
    closed(one)
