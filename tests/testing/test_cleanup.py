"""gntalloc.testing: a check that cannot fail would be worse than none."""

from __future__ import annotations

import errno
import mmap
import os
import re
import socket
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

import gntalloc
from gntalloc import DeviceError
from gntalloc.testing import FakeMemory, Program, Snapshot, assert_cleaned_up, cleanup

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc import Domain, Machine


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleanup, "_PATIENCE", 0.05)
    monkeypatch.setattr(cleanup, "_PATIENCE_WITH_ONESELF", 0.05)


def test_nothing_left_is_nothing_said(machine: Machine, alice: Domain, bob: Domain) -> None:
    before = Snapshot.of(machine)
    assert_cleaned_up(machine, before)
    assert_cleaned_up(None, Snapshot.of(None))


LEFT: dict[str, tuple[Callable[[], int], str]] = {
    "file": (lambda: os.open(os.devnull, os.O_RDONLY), r"\+1 descriptors of /dev/null"),
    "socket": (lambda: socket.socket().detach(), r"\+1 descriptors of socket"),
    "memory file": (lambda: os.memfd_create("gntalloc"), r"\+1 descriptors of /memfd:gntalloc"),
}


@pytest.mark.parametrize(("leave", "said"), LEFT.values(), ids=LEFT.keys())
def test_a_descriptor_that_is_left(leave: Callable[[], int], said: str) -> None:
    before = Snapshot.of(None)
    left = leave()
    with pytest.raises(AssertionError, match=said):
        assert_cleaned_up(None, before)
    os.close(left)
    assert_cleaned_up(None, before)


def test_a_map_that_is_left() -> None:
    descriptor = os.memfd_create("gntalloc")
    os.ftruncate(descriptor, mmap.PAGESIZE)
    before = Snapshot.of(None)
    left = mmap.mmap(descriptor, mmap.PAGESIZE)
    os.close(descriptor)
    with pytest.raises(AssertionError, match=r"4096 bytes of granted memory mapped, 0 before"):
        assert_cleaned_up(None, before)
    left.close()


def test_grants_that_are_left(machine: Machine, alice: Domain, bob: Domain) -> None:
    with alice.share(bob) as warm_up:  # opens the file
        warm_up.memory[0] = 1
    before = Snapshot.of(machine)
    with (
        alice.share(bob, pages=2),
        pytest.raises(
            AssertionError, match=r"domain 1, this process: 2 pages granted to domain 2 \(references \d+-\d+"
        ),
    ):
        assert_cleaned_up(machine, before)
    assert_cleaned_up(machine, before)


def hold(domain: Domain, text: str) -> None:
    """Map a grant, bind a port, and stay."""
    with domain.map(gntalloc.Grant.parse(text)), domain.events.bind(1), domain.store.watch("data"):
        domain.store.write("data/holding", "x")
        threading.Event().wait(50)


def test_what_others_hold_and_who_they_are(machine: Machine, alice: Domain, bob: Domain) -> None:
    alice.share(2).close()
    bob.store.write("data/holding", "")
    before = Snapshot.of(machine)
    with alice.share(bob, pages=3) as shared:
        with bob.store.watch("data/holding") as watch, Program(bob, hold, str(shared.grant)) as program:
            while bob.store.read("data/holding") != b"x":
                watch.wait(timeout=20)
            shared.close()
            with pytest.raises(AssertionError) as caught:
                assert_cleaned_up(machine, before)
        text = str(caught.value)
    assert "3 pages granted to domain 2" in text
    assert "released, but still mapped by domain 2" in text
    who = rf"domain 2, pid {program.pid} \(Program hold\)"
    assert re.search(rf"{who}: 12288 bytes of gntdev mapped", text)
    assert re.search(rf"{who}: event channel port \d+ bound", text)
    assert re.search(rf"{who}: watch of /local/domain/2/data kept in xenstore \(token '[^']+'\)$", text)
    assert "domain 2, this process: watch of /local/domain/2/data/holding kept in xenstore" in text
    assert "the machine:" not in text  # all of it is explained
    bob.store.remove("data/holding")
    monitored = Snapshot.of(machine)
    assert (monitored.grants, monitored.files) == (before.grants, before.files)


def test_one_thing_is_told_once(machine: Machine, alice: Domain, bob: Domain) -> None:
    """A page that is shared is also mapped here, and counted by the machine."""
    with alice.share(bob) as shared, bob.map(shared.grant), bob.store.watch("data"):
        pass  # opens the files
    before = Snapshot.of(machine)
    with alice.share(bob) as shared, bob.map(shared.grant), bob.store.watch("data"):
        with pytest.raises(AssertionError) as caught:
            assert_cleaned_up(machine, before)
        lines = str(caught.value).splitlines()
    assert len(lines) == 4, lines
    assert re.match("  domain 1, this process: 1 page granted to domain 2 .*, mapped by domain 2", lines[1])
    assert lines[2] == "  domain 2, this process: 4096 bytes of gntdev mapped"
    assert lines[3].startswith("  domain 2, this process: watch of /local/domain/2/data ")


def test_more_watches_than_are_listed_are_counted(machine: Machine) -> None:
    dom0 = machine.domain(0)
    before = Snapshot.of(machine)
    with ExitStack() as watches:
        for number in range(1005):
            watches.enter_context(dom0.store.watch(f"/{number}{'x' * 300}"))
        with pytest.raises(AssertionError) as caught:
            assert_cleaned_up(machine, before)
    text = str(caught.value)
    assert text.count("watch of /") == 1000
    assert f"watch of /0{'x' * 198}… kept" in text
    assert "the machine: 1005 watches, 0 before" in text
    dom0.close()
    dom0.devices.close()


def test_of_a_machine_that_is_gone_only_this_process_is_looked_at(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    machine.domain(1).devices.close()
    before = Snapshot.of(machine)
    machine.close()
    assert_cleaned_up(machine, before)


def test_numbers_are_shown_as_ranges() -> None:
    assert cleanup._ranges([12, 8, 9, 10]) == "8-10, 12"


def test_fake_memory_is_strict() -> None:
    memory = FakeMemory()
    first, second = memory.put(100, b"abcd"), memory.put(104, b"efgh")
    memory.put(200, b"read", writable=False)
    assert memory.read(102, 4) == b"cdef"
    memory.write(103, b"XY")
    assert (bytes(first), bytes(second)) == (b"abcX", b"Yfgh")
    for address, size in ((99, 2), (104, 5), (0, 1), (150, 1)):
        with pytest.raises(DeviceError) as caught:
            memory.read(address, size)
        assert caught.value.errno == errno.EFAULT
    with pytest.raises(DeviceError, match="read-only"):
        memory.write(200, b"x")
    with pytest.raises(DeviceError):
        memory.write(106, b"IJKL")
    assert bytes(second) == b"YfIJ"  # as a kernel's copy: what lay before the hole is written
    assert memory.copies[0] == ("read", 102, 4)


def test_fake_memory_fails_when_told() -> None:
    memory = FakeMemory(fail_at=2)
    memory.put(0, bytes(8))
    memory.read(0, 8)
    with pytest.raises(DeviceError, match="copy 2"):
        memory.write(0, b"x")
    memory.write(0, b"x")
