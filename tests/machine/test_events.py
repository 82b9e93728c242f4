"""Event channels between processes: the native provider, and programs that only know read(2), write(2) and poll(2)."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from contextlib import contextmanager, suppress
from struct import pack
from typing import TYPE_CHECKING

import pytest
from limits import status_of

from gntalloc.abi.evtchn import BIND_INTERDOMAIN, BIND_UNBOUND_PORT, NOTIFY, RESET, UNBIND
from gntalloc.abi.gntalloc import ALLOC_GREF, SET_UNMAP_NOTIFY, AllocGref, UnmapNotify
from gntalloc.errors import DeviceError, MachineGone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc import Domain, Machine
    from gntalloc.guest.devices.machine import MachineFile

PATIENCE = 20.0


def words(*numbers: int) -> bytes:
    return pack(f"={len(numbers)}I", *numbers)


@contextmanager
def refused(code: int) -> Iterator[None]:
    with pytest.raises(DeviceError) as caught:
        yield
    assert os.strerror(code) == os.strerror(caught.value.errno or 0)


class End:
    """One open evtchn file with one port."""

    def __init__(self, domain: Domain, peer: int, remote: int | None = None, flags: int = os.O_RDWR) -> None:
        self.file: MachineFile = domain.devices.open("evtchn", flags)  # type: ignore[assignment]
        if remote is None:
            self.port = self.file.ioctl(BIND_UNBOUND_PORT, words(peer))
        else:
            self.port = self.file.ioctl(BIND_INTERDOMAIN, words(peer, remote))

    def notify(self) -> None:
        self.file.ioctl(NOTIFY, words(self.port))

    def write_back(self) -> None:
        assert self.file.write(words(self.port)) == 4

    def ready(self) -> int:
        """What poll(2) says now."""
        poll = select.poll()
        poll.register(self.file.fileno(), select.POLLIN | select.POLLOUT)
        return sum(events for _, events in poll.poll(0))


@pytest.fixture
def ends(alice: Domain, bob: Domain) -> Iterator[tuple[End, End]]:
    """A channel. The second end is non-blocking, and has had its first event."""
    first = End(alice, 2)
    second = End(bob, 1, first.port, os.O_RDWR | os.O_NONBLOCK)
    assert second.file.read(4) == words(second.port)
    second.write_back()
    yield first, second
    first.file.close()
    second.file.close()


def test_an_event_each_way(ends: tuple[End, End]) -> None:
    first, second = ends
    first.notify()
    assert second.file.read(100) == words(second.port)
    second.notify()
    assert first.file.read(100) == words(first.port)


def test_poll_is_the_kernels(ends: tuple[End, End]) -> None:
    first, second = ends
    assert second.ready() == select.POLLOUT
    first.notify()
    assert second.ready() == select.POLLIN | select.POLLOUT
    second.file.read(4)
    assert second.ready() == select.POLLOUT


def test_row_93_fewer_than_four_bytes(ends: tuple[End, End]) -> None:
    first, second = ends
    first.notify()
    assert second.file.read(3) == b""
    assert second.file.write(b"123") == 0
    assert second.file.read(7) == words(second.port)


def test_row_94_non_blocking_and_empty(ends: tuple[End, End]) -> None:
    with refused(errno.EAGAIN):
        ends[1].file.read(4)
    os.set_blocking(ends[0].file.fileno(), False)
    with refused(errno.EAGAIN):
        ends[0].file.read(4)


def test_a_blocking_read_waits(ends: tuple[End, End]) -> None:
    first, second = ends
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(first.file.read(64)))
    reader.start()
    time.sleep(0.05)
    assert got == []
    second.notify()
    reader.join(PATIENCE)
    assert got == [words(first.port)]


def test_masked_until_written_back(ends: tuple[End, End]) -> None:
    first, second = ends
    for _ in range(3):
        first.notify()
    assert second.file.read(64) == words(second.port)
    assert second.ready() == select.POLLOUT
    second.write_back()
    assert select.select([second.file.fileno()], [], [], PATIENCE)[0]
    assert second.file.read(64) == words(second.port)


def test_a_write_counts_before_the_next_call(ends: tuple[End, End]) -> None:
    """A write is not answered; what a later ioctl does comes after it all the same."""
    first, second = ends
    for _ in range(200):
        first.notify()
        assert second.file.read(64) == words(second.port)
        second.write_back()


def test_a_read_finds_what_a_write_let_through(ends: tuple[End, End]) -> None:
    """The event was pending, so in a kernel it is there when write(2) returns."""
    first, second = ends
    for _ in range(200):
        first.notify()
        first.notify()
        assert second.file.read(64) == words(second.port)
        second.write_back()
        assert second.file.read(64) == words(second.port)
        second.write_back()


def test_a_read_finds_what_a_close_sent(alice: Domain, ends: tuple[End, End]) -> None:
    first, second = ends
    for _ in range(50):
        gntalloc = alice.devices.open("gntalloc")
        gntalloc.ioctl(ALLOC_GREF, bytearray(AllocGref(2, 0, 1, 0).pack() + bytes(8)))
        gntalloc.ioctl(SET_UNMAP_NOTIFY, UnmapNotify(0, 2, first.port).pack())
        gntalloc.close()
        assert second.file.read(64) == words(second.port)
        second.write_back()


def test_many_ports_of_one_file(alice: Domain) -> None:
    """More events than the socket alone would hold."""
    ends: list[int] = []
    file = alice.devices.open("evtchn")
    try:
        while len(ends) < 500:
            ends.append(file.ioctl(BIND_UNBOUND_PORT, words(1)))
            ends.append(file.ioctl(BIND_INTERDOMAIN, words(1, ends[-1])))
        file.read(4096)
        file.write(words(*ends))
        for port in ends:
            file.ioctl(NOTIFY, words(port))
        got = file.read(4096)
        assert sorted(memoryview(got).cast("I")) == sorted(ends)
    finally:
        file.close()


def overflow(first: End, second: End) -> None:
    for _ in range(65):
        first.notify()
        second.write_back()


def test_row_95_overflow_until_reset(ends: tuple[End, End]) -> None:
    first, second = ends
    overflow(first, second)
    for _ in range(2):
        with refused(errno.EFBIG):
            second.file.read(4)
    assert second.file.read(3) == b""
    assert second.file.ioctl(RESET, None) == 0
    with refused(errno.EAGAIN):
        second.file.read(4)
    first.notify()
    assert second.file.read(4) == words(second.port)


def test_64_unread_events_are_no_overflow(ends: tuple[End, End]) -> None:
    first, second = ends
    for _ in range(64):
        first.notify()
        second.write_back()
    assert second.file.read(4096) == words(second.port) * 64


def test_a_program_that_knows_only_system_calls(ends: tuple[End, End]) -> None:
    first, second = ends
    home = os.dup(second.file.fileno())
    first.notify()
    assert select.select([home], [], [], PATIENCE)[0] == [home]
    assert os.read(home, 4096) == words(second.port)
    first.notify()
    assert os.write(home, words(second.port)) == 4
    assert select.select([home], [], [], PATIENCE)[0] == [home]
    assert os.read(home, 4) == words(second.port)
    os.close(home)


def test_a_child_made_by_fork_reads_and_writes(ends: tuple[End, End]) -> None:
    first, second = ends
    child = os.fork()
    if not child:
        code = 1
        try:
            assert select.select([second.file], [], [], 20)[0]  # the parent may not have notified yet
            assert second.file.read(4) == words(second.port)
            second.write_back()
            second.notify()
            code = 0
        finally:
            os._exit(code)
    first.notify()
    assert first.file.read(4) == words(first.port)
    assert status_of(child) == 0
    first.notify()
    assert second.file.read(4) == words(second.port)


def test_closing_the_file_frees_its_ports(machine: Machine, ends: tuple[End, End], bob: Domain) -> None:
    first, second = ends
    assert machine.statistics().domains[1].ports == 1
    second.file.close()
    assert machine.statistics().domains[1].ports == 0
    first.notify()
    again = End(bob, 1, first.port)
    assert again.file.read(4) == words(again.port)
    again.file.close()


def test_unbind_and_bind_again(ends: tuple[End, End]) -> None:
    first, second = ends
    second.file.ioctl(UNBIND, words(second.port))
    with refused(errno.ENOTCONN):
        second.notify()
    assert second.file.ioctl(BIND_INTERDOMAIN, words(1, first.port)) == second.port


def test_the_machine_ends(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    end = End(machine.domain(1), 2)
    machine.close()
    for call in (lambda: end.file.read(4), end.write_back, end.notify):
        with pytest.raises(MachineGone):
            call()
    end.file.close()


# Hostile programs.


def test_one_that_never_reads_keeps_nobody_waiting(ends: tuple[End, End]) -> None:
    first, second = ends
    for _ in range(2000):
        first.notify()
        second.write_back()
    assert first.ready() == select.POLLOUT
    second.notify()
    assert first.file.read(4) == words(first.port)


def test_one_that_writes_rubbish_without_end(ends: tuple[End, End]) -> None:
    first, second = ends
    with socket.socket(fileno=os.dup(second.file.fileno())) as home:
        for _ in range(500):
            try:
                home.send(os.urandom(4001), socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
    first.notify()
    second.notify()
    assert first.file.read(4) == words(first.port)


def test_one_that_sends_descriptors_to_its_home(machine: Machine, ends: tuple[End, End]) -> None:
    before = machine.statistics().descriptors
    with socket.socket(fileno=os.dup(ends[1].file.fileno())) as home:
        for descriptors in ([0, 1, 2], [home.fileno()]):
            with suppress(PermissionError):  # since Linux 6.16 none get that far
                socket.send_fds(home, [words(ends[1].port)], descriptors)
    assert machine.statistics().descriptors == before


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_one_that_shuts_its_home_down(machine: Machine, ends: tuple[End, End], how: int) -> None:
    first, second = ends
    with socket.socket(fileno=os.dup(second.file.fileno())) as home:
        home.shutdown(how)
    for _ in range(3):
        first.notify()
    first.file.write(words(first.port))
    before = _processor_time(machine.pid)
    time.sleep(0.3)
    assert _processor_time(machine.pid) - before < 0.2  # it does not run in circles


def _processor_time(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
