"""Every call to the kernel that the machine makes fails once: it goes on, others are served, and the books balance."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from kernelfaults import KernelFaults

from gntalloc import Domain, holders, waits
from gntalloc.abi.gntdev import GRANT_COPY, ForeignPage, GrantCopy, GrantCopySegment
from gntalloc.guest.control import ControlClient
from gntalloc.guest.devices.machine import MachineDevices
from gntalloc.machine.control import Control
from gntalloc.machine.machine import Machine as Core
from gntalloc.machine.server import Server
from gntalloc.places import domain_path, store_path
from gntalloc.testing import recount
from gntalloc.unasked import Disposal
from gntalloc.xenstore.client import Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc import SharedPages

T = TypeVar("T")
PATIENCE = 20.0
MOST_CALLS = 2000
COUNTED = "pages_in_use", "references", "ports", "files", "watches", "transactions"


class Setting:
    """A machine on a thread, its owner, and a neighbour in domain 4 that never notices anything."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = str(folder)
        self.server = Server(Core(), self.folder)
        ours, theirs = socket.socketpair()
        machine = self.server.machine
        orders = {
            **self.server._orders,
            "recount": lambda _owner: recount(machine),
            "shares": lambda _owner: self._shares(),
        }
        self.server._add_control(Control(ours, orders, Disposal()), ends_the_machine=True)
        for domid in (1, 2, 4):
            self.server.create(domid, uid=os.getuid())
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.owner = ControlClient(self.folder, sock=waits.Socket(fileno=theirs.detach()))
        self.neighbour = self.domain(4)
        self.look_at_the_neighbour()

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self.error = error
            self.server.close()  # so that nobody waits for it

    @property
    def ident(self) -> int:
        assert self.thread.ident is not None
        return self.thread.ident

    def domain(self, domid: int) -> Domain:
        return Domain(MachineDevices(domain_path(self.folder, domid)))

    def look_at_the_neighbour(self) -> None:
        with self.neighbour.share(2, 2, writable=True) as pages:
            assert not pages.held
        self.neighbour.store.write("data/x", "1")
        assert self.neighbour.store.read("data/x") == b"1"
        port = self.neighbour.events.bind(2)
        port.close()

    def wait_until_empty(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not left, f"this is left: {left}"
        self.owner.order("recount")

    def _shares(self) -> dict[str, int]:
        """Give what is counted of the programs of each domain, without the neighbour's, and what of none."""
        machine = self.server.machine
        of_domains = {
            f"{what} of {guest.domid}": count
            for guest in machine.guests.values()
            if guest is not machine.guests[4]
            for what, count in (
                ("descriptors", guest.descriptors.taken),
                ("connections", guest.connections),
                ("waits", guest.waits),
            )
        }
        of_all = sum(guest.descriptors.taken for guest in machine.guests.values())
        return {**of_domains, "descriptors of nobody": machine.descriptors.taken - of_all}

    def descriptors(self) -> int:
        """Count the descriptors of this process, after a scene in which nothing fails."""
        Scene(self).play()
        self.look_at_the_neighbour()
        self.wait_until_empty()
        deadline = time.monotonic() + PATIENCE
        count, same = -1, 0
        while same < 5 and time.monotonic() < deadline:  # what was closed is noticed a moment later
            now = self.owner.order("statistics")["descriptors"]
            count, same = now, same + 1 if now == count else 0
            time.sleep(0.01)
        return count

    def _left(self) -> dict[Any, Any]:
        said = self.owner.order("statistics")
        left = {
            domain["domid"]: counts
            for domain in said["domains"]
            if any((counts := {name: domain[name] for name in COUNTED}).values()) and domain["domid"] != 4
        }
        totals = {"pages": said["pages"], "extents": said["extents"], **self.owner.order("shares")}
        return {**left, **{name: count for name, count in totals.items() if count}}

    def close(self) -> None:
        self.neighbour.close()
        self.owner.close()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        if self.error is None:
            self.server.close()


def attempt(work: Callable[[], T]) -> T | None:
    """Do something that the machine may refuse, or during which it may hang up."""
    try:
        return work()
    except OSError:
        return None


class Scene:
    """Programs of domains 1, 2 and 3, which use all that there is. Each step may fail; all is given back at the end."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.stack = contextlib.ExitStack()

    def keep(self, work: Callable[[], T]) -> T | None:
        """Attempt to make something, which is closed in the end."""
        thing = attempt(work)
        if isinstance(thing, Domain):
            assert isinstance(thing.devices, MachineDevices)
            self.stack.callback(thing.devices._channel.close)  # as its process's end would
        if thing is not None:
            self.stack.callback(lambda: attempt(thing.close))  # type: ignore[attr-defined]
        return thing

    def play(self) -> None:
        with self.stack:
            alice = self.keep(lambda: self.setting.domain(1))
            bob = self.keep(lambda: self.setting.domain(2))
            if alice is not None and bob is not None:
                self.pages(alice, bob)
                self.events(alice, bob)
            self.store()
            self.a_domain_that_ends()
            self.lists()

    def pages(self, alice: Domain, bob: Domain) -> None:
        writable = self.keep(lambda: alice.share(2, 3, writable=True))
        read_only = self.keep(lambda: alice.share(2, 1))
        mapped = [
            self.keep(partial(bob.map, 1, refs_of(each), writable=each is writable)) for each in (writable, read_only)
        ]
        if writable is not None:
            attempt(lambda: writable.held)
            attempt(lambda: writable.mapped_by)
            descriptor = attempt(writable.released_descriptor)
            if descriptor is not None:
                os.close(descriptor)
            attempt(lambda: writable.notify_when_unmapped(clear=0))
            attempt(lambda: copy_from(bob, writable.refs[0]))
        for pages in mapped:
            if pages is not None:
                attempt(pages.close)
        if writable is not None:
            attempt(writable.close)
        attempt(lambda: bob.map(1, [77]).close())

    def events(self, alice: Domain, bob: Domain) -> None:
        waiting = self.keep(lambda: alice.events.bind(2))
        if waiting is None:
            return
        calling = self.keep(lambda: bob.events.connect(1, waiting.number))
        if calling is not None:
            attempt(calling.notify)
            attempt(lambda: waiting.wait(timeout=0.05))
        with_port = self.keep(lambda: alice.share(2, 1))
        if with_port is not None:
            attempt(lambda: with_port.notify_when_unmapped(port=waiting.number))

    def store(self) -> None:
        store = self.keep(lambda: Store(store_path(self.setting.folder, 1)))
        if store is None:
            return
        watch = self.keep(lambda: store.watch("data"))
        attempt(lambda: store.transact(lambda each: each.write("data/a/b", "1"), timeout=0.05))
        if watch is not None:
            attempt(lambda: watch.wait(timeout=0.05))
        attempt(lambda: store.remove("data/a"))

    def a_domain_that_ends(self) -> None:
        owner = self.setting.owner
        attempt(lambda: owner.order("create", domid=3, uid=os.getuid()))
        carol = self.keep(lambda: self.setting.domain(3))
        if carol is not None:
            self.keep(lambda: carol.share(2, 2))
            self.keep(lambda: carol.events.bind(2))
            self.keep(lambda: carol.store.watch("data"))
        attempt(lambda: owner.order("destroy", domid=3))

    def lists(self) -> None:
        for name in ("grants", "files", "statistics", "store_connections"):
            attempt(partial(self.setting.owner.order, name))


def refs_of(shared: SharedPages | None) -> tuple[int, ...]:
    """Its references, or, if there is none, one that nobody has granted."""
    return (77,) if shared is None else shared.refs


def copy_from(domain: Domain, ref: int) -> None:
    file = domain.devices.open("gntdev")
    try:
        buffer = bytearray(5)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        segments = bytearray(GrantCopySegment(ForeignPage(ref, 10, 1).to_word(), address, 5, 1, 77).pack())
        where = ctypes.addressof(ctypes.c_char.from_buffer(segments))
        file.ioctl(GRANT_COPY, GrantCopy(1, where).pack(), memory=[(where, segments), (address, buffer)])
    finally:
        file.close()


def what_goes_wrong(setting: Setting, faults: KernelFaults, number: int) -> str:
    """Play the scene with its call `number` failing. Return what is wrong then. Empty: nothing is."""
    faults.arm(setting.ident, number)
    Scene(setting).play()
    faults.disarm()
    if setting.error is None:
        attempt(lambda: setting.owner.order("destroy", domid=3))
        try:
            setting.look_at_the_neighbour()
            setting.wait_until_empty()
        except (AssertionError, OSError) as error:
            return repr(error)
    if setting.error is not None:
        where = traceback.extract_tb(setting.error.__traceback__)[-3:]
        return f"{setting.error!r} has left the loop, at {[f'{Path(at.filename).name}:{at.lineno}' for at in where]}"
    return ""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("choice", [0, 1, 2])
def test_every_call_to_the_kernel_fails_once(
    choice: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = KernelFaults(monkeypatch, choice=choice)
    monkeypatch.setattr(holders, "_INTERVALS", (0.001,) * len(holders._INTERVALS))
    monkeypatch.setattr(holders, "_UNHEARD", 0.01)
    monkeypatch.setattr(holders, "_UNSOLVED", 0.05)
    caplog.set_level(logging.WARNING)
    wrong: list[str] = []
    setting = Setting(tmp_path / "0")
    before = setting.descriptors()
    for number in range(1, MOST_CALLS):
        found = what_goes_wrong(setting, faults, number)
        if not faults.failed:
            break
        if caplog.records:
            found = f"{found} and the log has: {caplog.text.strip().splitlines()[-1]}"
            caplog.clear()
        if found:
            wrong.append(f"call {number}, {faults.failed}: {found}")
            setting.close()
            setting = Setting(tmp_path / str(number))
    left = setting.descriptors() - before
    setting.close()
    assert not found
    assert not wrong, f"{len(wrong)} of {number} calls:\n" + "\n".join(wrong)
    assert MOST_CALLS > number > 100
    assert left < number // 10, f"after {number} failures the machine has {left} descriptors more"
