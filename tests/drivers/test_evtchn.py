"""evtchn against a strict caller: rows 92 to 114 of the table of bad and odd inputs, delivery, masks, the ring."""

from __future__ import annotations

import errno
import os
from struct import pack
from typing import TYPE_CHECKING

import pytest
from event_program import ADDRESS, Events, pair
from fake_program import refused

from gntalloc.abi.evtchn import (
    BIND_INTERDOMAIN,
    BIND_STATIC,
    BIND_UNBOUND_PORT,
    BIND_VIRQ,
    NOTIFY,
    RESET,
    RESTRICT_DOMID,
    UNBIND,
)
from gntalloc.hypervisor.ports import LAST_PORT
from gntalloc.testing import FakeMemory

if TYPE_CHECKING:
    from gntalloc.machine.machine import Machine as Core

OF_THE_KERNEL = 4  # ports that a guest has from the start


@pytest.fixture
def events(core: Core) -> Events:
    return Events(core, 1)


def restrict(events: Events, domid: int) -> int:
    memory = FakeMemory()
    memory.put(ADDRESS, pack("=H", domid))
    return events.file.ioctl(RESTRICT_DOMID, ADDRESS, memory)


# The file.


@pytest.mark.parametrize("request_number", [0x4599, 0, 0xFFFF_FFFF, 0x0014_4705, 0xC004_4502])
def test_row_92_an_unknown_request_is_enosys(events: Events, request_number: int) -> None:
    with refused(errno.ENOSYS, f"{request_number:#010x}"):
        events.ioctl(request_number)


def test_there_is_nothing_to_map(events: Events) -> None:
    with refused(errno.ENODEV):
        events.file.mmap(0, 4096, prot=1, shared=True)


def test_opened_as_a_device_of_the_domain(core: Core) -> None:
    file = core.open(core.guest(1), "evtchn", os.O_RDONLY, opener=1)
    assert file.driver is core.guest(1).evtchn


@pytest.mark.parametrize(
    "request_number", [BIND_VIRQ, BIND_INTERDOMAIN, BIND_UNBOUND_PORT, UNBIND, NOTIFY, BIND_STATIC]
)
def test_arguments_are_read_whole(events: Events, request_number: int) -> None:
    words = 1 if request_number == BIND_INTERDOMAIN else 0
    with refused(errno.EFAULT):
        events.ioctl(request_number, *[7] * words)
    with refused(errno.EFAULT):
        events.file.ioctl(request_number, 0, FakeMemory())


def test_restrict_reads_two_bytes(events: Events) -> None:
    memory = FakeMemory()
    memory.put(ADDRESS, b"\x05")
    with refused(errno.EFAULT):
        events.file.ioctl(RESTRICT_DOMID, ADDRESS, memory)


def test_reset_has_no_argument(events: Events) -> None:
    assert events.file.ioctl(RESET, 0, FakeMemory()) == 0


# Binding.


def test_row_105_a_port_for_no_domain(events: Events) -> None:
    assert events.bind_unbound(99) == OF_THE_KERNEL + 1


def test_ports_are_the_domains_and_the_lowest_free_one_is_given(core: Core) -> None:
    one, other = Events(core, 1), Events(core, 1)
    ports = [one.bind_unbound(2), other.bind_unbound(2), one.bind_unbound(2)]
    one.unbind(ports[0])
    assert other.bind_unbound(2) == ports[0]


def test_a_domain_has_so_many_ports(events: Events) -> None:
    for _ in range(LAST_PORT - OF_THE_KERNEL):
        events.bind_unbound(2)
    with refused(errno.ENOSPC, "1023"):
        events.bind_unbound(2)
    with refused(errno.ENOSPC):
        events.bind_virq(5)


def test_rows_100_and_101_virtual_interrupts(events: Events) -> None:
    with refused(errno.EINVAL, "24"):
        events.bind_virq(24)
    with refused(errno.EINVAL):
        events.bind_virq(0xFFFF_FFFF)
    port = events.bind_virq(3)
    with refused(errno.EEXIST):
        events.bind_virq(3)
    events.notify(port)  # nobody to send to, and no error
    assert events.read() == []
    events.unbind(port)
    assert events.bind_virq(3) == port


@pytest.mark.parametrize("virq", [0, 1], ids=["timer", "debug"])
def test_virtual_interrupts_of_the_kernels_own(events: Events, virq: int) -> None:
    with refused(errno.EEXIST):
        events.bind_virq(virq)


def test_row_102_no_such_domain(events: Events) -> None:
    with refused(errno.ESRCH, "no domain 99"):
        events.bind(99, 1)


def test_row_103_a_port_meant_for_another(core: Core, events: Events) -> None:
    port = Events(core, 2).bind_unbound(7)
    with refused(errno.EINVAL, "domain 7"):
        events.bind(2, port)


def test_row_104_a_domid_is_cut_to_16_bits(core: Core) -> None:
    first, second = Events(core, 1), Events(core, 2)
    port = first.bind_unbound(0x10002)
    assert second.bind(0x10001, port) == OF_THE_KERNEL + 1


# UNBIND and NOTIFY.


def test_row_106_unbind_what_is_not_on_this_file(core: Core, events: Events) -> None:
    foreign = Events(core, 1).bind_unbound(2)
    for port in (0, 1, foreign, 1023):
        with refused(errno.ENOTCONN):
            events.unbind(port)


@pytest.mark.parametrize("port", [1024, 0xFFFF_FFFF], ids=["row_107", "row_107_all_ones"])
def test_row_107_unbind_a_number_that_is_no_ports(events: Events, port: int) -> None:
    with refused(errno.EINVAL):
        events.unbind(port)


def test_row_108_notify_what_is_not_on_this_file(core: Core, events: Events) -> None:
    foreign = Events(core, 1).bind_unbound(2)
    for port in (0, 1, foreign, 1024, 0xFFFF_FFFF):
        with refused(errno.ENOTCONN):
            events.notify(port)


def test_row_109_notify_when_nobody_is_there(core: Core) -> None:
    first, port, second, remote = pair(core)
    second.unbind(remote)
    first.notify(port)
    assert second.read() == []
    assert second.bind(1, port) == remote  # the port waits for the same domain


# RESTRICT_DOMID.


@pytest.mark.parametrize("domid", [0, 0x7FF0, 0xFFFF])
def test_row_110_restrict_to_what_is_none(events: Events, domid: int) -> None:
    with refused(errno.EINVAL):
        restrict(events, domid)
    assert events.bind_unbound(2)


def test_rows_111_and_112_restricted(core: Core, events: Events) -> None:
    port = Events(core, 2).bind_unbound(1)
    assert restrict(events, 2) == 0
    with refused(errno.EACCES):
        restrict(events, 2)
    with refused(errno.EACCES):
        events.file.ioctl(RESTRICT_DOMID, 0, FakeMemory())  # before the argument is read
    for request_number in (BIND_UNBOUND_PORT, BIND_VIRQ):
        with refused(errno.EACCES, "domain 2"):
            events.ioctl(request_number)
    for peer in (1, 0x10002):  # all 32 bits are compared
        with refused(errno.EACCES):
            events.bind(peer, port)
    with refused(errno.EFAULT):
        events.ioctl(BIND_INTERDOMAIN)
    assert events.bind(2, port) > 0


# BIND_STATIC.


def test_rows_113_and_114_static_ports(core: Core, events: Events) -> None:
    with refused(errno.ENOMEM):
        events.ioctl(BIND_STATIC, 131072)
    assert events.ioctl(BIND_STATIC, 131071) == 0
    with refused(errno.EISCONN):
        events.ioctl(BIND_STATIC, 131071)
    other = Events(core, 1)
    with refused(errno.EBUSY):
        other.ioctl(BIND_STATIC, 131071)
    with refused(errno.EBUSY):
        other.ioctl(BIND_STATIC, 1)  # the kernel's
    with refused(errno.EISCONN):
        events.ioctl(BIND_STATIC, events.bind_unbound(2))
    events.notify(131071)
    events.close()
    assert other.ioctl(BIND_STATIC, 131071) == 0


def test_a_static_port_that_the_hypervisor_gives_out_later(core: Core, events: Events) -> None:
    assert events.ioctl(BIND_STATIC, OF_THE_KERNEL + 1) == 0
    other = Events(core, 1)
    with refused(errno.EBUSY):
        other.bind_unbound(2)
    events.close()
    assert other.bind_unbound(2) == OF_THE_KERNEL + 1


# Delivery and masks.


def test_the_binders_end_has_an_event_from_the_start(core: Core) -> None:
    first, second = Events(core, 1), Events(core, 2)
    port = first.bind_unbound(2)
    remote = second.bind(1, port)
    assert (first.read(), second.read()) == ([], [remote])


def test_an_event_both_ways(core: Core) -> None:
    first, port, second, remote = pair(core)
    first.notify(port)
    second.notify(remote)
    assert (first.read(), second.read()) == ([port], [remote])


def test_a_port_is_masked_until_it_is_written_back(core: Core) -> None:
    first, port, second, remote = pair(core)
    first.notify(port)
    assert second.read() == [remote]
    for _ in range(3):
        first.notify(port)
    assert second.read() == []
    second.write(remote)
    assert second.read() == [remote]  # three in one
    second.write(remote)
    assert second.read() == []


def test_written_back_unread_it_is_there_twice(core: Core) -> None:
    first, port, second, remote = pair(core)
    first.notify(port)
    second.write(remote)
    first.notify(port)
    assert second.read() == [remote, remote]


def test_events_come_oldest_first(core: Core) -> None:
    first, second = Events(core, 1), Events(core, 2)
    ports = [first.bind_unbound(2) for _ in range(3)]
    remotes = [second.bind(1, port) for port in ports]
    second.read()
    second.write(*remotes)
    for port in (ports[1], ports[2], ports[0]):
        first.notify(port)
    assert second.read() == [remotes[1], remotes[2], remotes[0]]


def test_rows_97_to_99_write(core: Core) -> None:
    first, port, second, remote = pair(core)
    first.notify(port)
    first.notify(port)
    assert second.file.write(b"\0" * 3) == 0
    assert second.file.write(pack("=I", 7)) == 4
    assert second.file.write(pack("=I", 0xFFFF_FFFF)) == 4
    assert second.file.write(pack("=IH", remote, 0)) == 4
    assert second.read() == [remote, remote]


def test_row_98_a_page_is_the_most_that_is_taken(core: Core) -> None:
    first, port, second, remote = pair(core)
    first.notify(port)
    first.notify(port)
    assert second.file.write(bytes(4096) + pack("=I", remote)) == 4096
    assert second.read() == [remote]
    assert second.file.write(bytes(4092) + pack("=I", remote) + bytes(900)) == 4096
    assert second.read() == [remote]


def test_a_foreign_port_cannot_be_written_back(core: Core) -> None:
    first, port, second, remote = pair(core)
    stranger = Events(core, 2)
    first.notify(port)
    second.read()
    first.notify(port)
    stranger.write(remote)
    assert (second.read(), stranger.read()) == ([], [])


def test_unbinding_does_not_take_back_what_is_queued(core: Core) -> None:
    first, port, second, remote = pair(core)
    first.notify(port)
    second.unbind(remote)
    assert second.read() == [remote]


def test_a_port_bound_anew_has_no_event_of_the_old_one(core: Core) -> None:
    first, port, second, remote = pair(core)
    first.notify(port)
    first.notify(port)  # this one stays pending
    second.unbind(remote)
    second.read()
    assert second.bind_unbound(1) == remote
    second.write(remote)
    assert second.read() == []


# The ring.


def overflow(first: Events, port: int, second: Events, remote: int, size: int = 64) -> None:
    for _ in range(size):
        first.notify(port)
        second.write(remote)
    second.file.read(4)  # still all right
    first.notify(port)
    with refused(errno.EFBIG):
        second.file.read(4)


def test_row_95_65_events_written_back_and_none_read(core: Core) -> None:
    first, port, second, remote = pair(core)
    overflow(first, port, second, remote)
    assert second.file.read(3) == b""  # fewer than four bytes: not even looked at
    assert second.read() == [remote] * 64
    with refused(errno.EFBIG):
        second.file.read(4)  # until RESET
    second.reset()
    assert second.file.read(4) == b""


def test_what_was_read_makes_room(core: Core) -> None:
    first, port, second, remote = pair(core)
    for _ in range(63):
        first.notify(port)
        second.write(remote)
    for _ in range(200):
        second.queue.events.popleft()
        for _ in range(1):
            first.notify(port)
            second.write(remote)
    assert second.file.read(4) == b""
    first.notify(port)
    second.write(remote)
    first.notify(port)
    with refused(errno.EFBIG):
        second.file.read(4)


def test_reset_leaves_ports_masked(core: Core) -> None:
    first, port, second, remote = pair(core)
    overflow(first, port, second, remote)
    second.read()
    second.reset()
    first.notify(port)
    assert second.read() == []
    second.write(remote)
    assert second.read() == [remote]


def test_the_ring_doubles_when_there_are_more_ports_than_it_holds(core: Core) -> None:
    first, port, second, remote = pair(core)
    for _ in range(64):
        second.bind_unbound(1)
    overflow(first, port, second, remote, 128)


def test_64_ports_share_the_first_ring(core: Core) -> None:
    first, port, second, remote = pair(core)
    for _ in range(63):
        second.bind_unbound(1)
    overflow(first, port, second, remote, 64)


def test_it_never_shrinks(core: Core) -> None:
    first, port, second, remote = pair(core)
    others = [second.bind_unbound(1) for _ in range(64)]
    for other in others:
        second.unbind(other)
    overflow(first, port, second, remote, 128)


def test_an_outlet_that_is_full_for_a_while_loses_nothing(core: Core) -> None:
    first, second = Events(core, 1), Events(core, 2, room=3)
    ports = [first.bind_unbound(2) for _ in range(10)]
    remotes = [second.bind(1, port) for port in ports]
    seen = []
    while got := second.read():
        seen += got
        second.driver.hand_over(second.file)
    assert seen == remotes


def test_reset_empties_what_the_outlet_did_not_take(core: Core) -> None:
    first, second = Events(core, 1), Events(core, 2, room=3)
    for _ in range(10):
        second.bind(1, first.bind_unbound(2))
    second.reset()
    assert len(second.read()) == 3
    second.driver.hand_over(second.file)
    assert second.read() == []


# The end.


def test_close_unbinds(core: Core) -> None:
    first, port, second, remote = pair(core)
    second.close()
    assert second.driver.in_use == 0
    first.notify(port)
    again = Events(core, 2)
    assert again.bind(1, port) == remote


def test_a_domain_dies(core: Core) -> None:
    first, port, _, _ = pair(core)
    core.destroy(2)
    first.notify(port)
    with refused(errno.ESRCH):
        first.bind(2, 5)
    core.create(2, uid=os.getuid())
    assert Events(core, 2).bind(1, port) > 0


# References.


def test_a_reference_keeps_a_port(core: Core) -> None:
    first, port, second, remote = pair(core)
    first.driver.take(port)
    first.close()
    first.driver.notify(port)
    assert second.read() == [remote]
    assert first.driver.in_use == 1
    first.driver.drop(port)
    assert first.driver.in_use == 0
    second.write(remote)
    first.driver.notify(port)
    assert second.read() == []


def test_a_port_that_only_a_reference_keeps_delivers_to_nobody(core: Core) -> None:
    first, port, second, remote = pair(core)
    first.driver.take(port)
    first.unbind(port)
    second.notify(remote)
    assert first.read() == []
    first.driver.drop(port)


@pytest.mark.parametrize("port", [0, 1, 4, 5, 1000, 1 << 31, 0xFFFF_FFFF])
def test_rows_44_to_47_ports_that_cannot_be_referred_to(core: Core, port: int) -> None:
    with refused(errno.EINVAL, f"port {port}"):
        core.guest(1).evtchn.take(port)


def test_references_are_bounded(events: Events) -> None:
    port = events.bind_unbound(2)
    for _ in range(32766):
        events.driver.take(port)
    with refused(errno.EINVAL, "32767"):
        events.driver.take(port)
    for _ in range(32766):
        events.driver.drop(port)


def test_a_reference_outlives_its_domain(core: Core) -> None:
    first, port, second, remote = pair(core)
    first.driver.take(port)
    core.destroy(1)
    first.driver.notify(port)
    first.driver.drop(port)
    assert second.read() == []
    second.notify(remote)
    core.create(1, uid=os.getuid())
