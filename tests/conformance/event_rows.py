"""Rows about event channels: numbers 92 to 112 of the specification's table, and G20 on.

All in one domain, which binds to a port of its own: that is safe for events, as it is not for vchan.
"""

from __future__ import annotations

import os
import time
from struct import iter_unpack, pack
from typing import TYPE_CHECKING, Any

from driving import PAGE
from rows import attach, row, said, share

from gntalloc.abi.evtchn import (
    BIND_INTERDOMAIN,
    BIND_UNBOUND_PORT,
    BIND_VIRQ,
    NOTIFY,
    RESET,
    RESTRICT_DOMID,
    UNBIND,
)

if TYPE_CHECKING:
    from driving import Program, Rig

NOBODY = 12345  # no domain has that number
FREE_VIRQ = 7  # of the profiler, which nothing in the lab uses
NON_BLOCKING = os.O_RDWR | os.O_NONBLOCK


class End:
    """A file of a program, and one port of it."""

    def __init__(self, program: Program, *, remote: int | None = None) -> None:
        self.program = program
        self.file = program.open("evtchn", NON_BLOCKING)
        own = program.domid
        self.port = self.call(BIND_UNBOUND_PORT, own) if remote is None else self.call(BIND_INTERDOMAIN, own, remote)

    def call(self, request: int, *words: int) -> Any:
        """The result, or the errno."""
        return self.program.ioctl(self.file, request, pack(f"={len(words)}I", *words))[0]

    def notify(self, times: int = 1) -> None:
        """Send."""
        for _ in range(times):
            assert self.call(NOTIFY, self.port) == 0

    def read(self, size: int = PAGE) -> str:
        """How many events of our port there are to read, or the errno."""
        answer = self.program.step("read", self.file, size)
        if not set(answer) <= set("0123456789abcdef"):
            return str(answer)
        ports = [port for (port,) in iter_unpack("=I", bytes.fromhex(answer))]
        return said(len(ports), *(f"not ours: {port}" for port in ports if port != self.port))

    def write_back(self) -> None:
        """Let the port have events again."""
        assert self.program.must("write", self.file, pack("=I", self.port).hex()) == 4

    def poll(self) -> Any:
        """What is ready: 1 in, 4 out, 8 error."""
        return self.program.must("poll", self.file)


def loop(program: Program) -> tuple[End, End]:
    """Two ends in two files, quiet."""
    first = End(program)
    second = End(program, remote=first.port)
    assert second.read() == "1"  # it is pending as soon as it is bound
    second.write_back()
    return first, second


def refused(key: str, title: str, says: str, request: int, *words: int) -> None:
    """A call on a fresh file."""

    @row(key, title, says)
    def _(rig: Rig) -> str:
        program = rig.granter
        return said(program.ioctl(program.open("evtchn"), request, pack(f"={len(words)}I", *words))[0])


refused("92", "evtchn, an unknown ioctl", "ENOSYS", 0x00084510, 0, 0)


# read and write.


@row("93", "evtchn read of 3 bytes with an event there, then of 7", "0")
def _(rig: Rig) -> str:
    first, second = loop(rig.granter)
    first.notify()
    return said(second.read(3), second.read(7))


@row("94", "evtchn non-blocking read, empty", "EAGAIN")
def _(rig: Rig) -> str:
    return loop(rig.granter)[0].read()


def overflow(first: End, second: End) -> None:
    """65 events, each written back, none read."""
    for _ in range(65):
        first.notify()
        second.write_back()


@row("95", "evtchn read after overflow, twice; of 3 bytes; RESET; read; one more event", "EFBIG until RESET")
def _(rig: Rig) -> str:
    first, second = loop(rig.granter)
    overflow(first, second)
    answers = [second.read(), second.read(), second.read(3), second.call(RESET), second.read()]
    first.notify()
    return said(*answers, second.read())


@row("96", "evtchn read into a bad buffer, then a good one", "EFAULT, events kept")
def _(rig: Rig) -> str:
    first, second = loop(rig.granter)
    first.notify()
    return said(rig.granter.step("read_nowhere", second.file, PAGE), second.read())


@row("97", "evtchn write of 3 bytes", "0")
def _(rig: Rig) -> str:
    return said(rig.granter.step("write", loop(rig.granter)[0].file, "000000"))


@row("98", "evtchn write of 5000 bytes", "4096")
def _(rig: Rig) -> str:
    return said(rig.granter.step("write", loop(rig.granter)[0].file, "00" * 5000))


@row("99", "evtchn write of an unbound port", "4")
def _(rig: Rig) -> str:
    return said(rig.granter.step("write", loop(rig.granter)[0].file, pack("=I", 1000).hex()))


# Binding.


refused("100", "evtchn BIND_VIRQ 24", "EINVAL", BIND_VIRQ, 24)


@row("101", "evtchn BIND_VIRQ twice, in one file and in two", "EEXIST")
def _(rig: Rig) -> str:
    first, second = End(rig.granter), End(rig.granter)
    port = first.call(BIND_VIRQ, FREE_VIRQ)
    again = first.call(BIND_VIRQ, FREE_VIRQ), second.call(BIND_VIRQ, FREE_VIRQ)
    return said("a port" if isinstance(port, int) else port, *again, first.call(UNBIND, port))


refused("102", "evtchn BIND_INTERDOMAIN, no such domain", "ESRCH", BIND_INTERDOMAIN, NOBODY, 1)


@row("103", "evtchn BIND_INTERDOMAIN, a port meant for another; one that is free", "EINVAL")
def _(rig: Rig) -> str:
    end = End(rig.granter)
    port = end.call(BIND_UNBOUND_PORT, NOBODY)
    own = rig.granter.domid
    return said(end.call(BIND_INTERDOMAIN, own, port), end.call(BIND_INTERDOMAIN, own, 1000))


@row("104", "evtchn BIND_INTERDOMAIN, domain number + 0x10000", "taken as the number")
def _(rig: Rig) -> str:
    end = End(rig.granter)
    port = end.call(BIND_INTERDOMAIN, rig.granter.domid | 0x10000, end.port)
    return "a port" if isinstance(port, int) else said(port)


@row("105", "evtchn BIND_UNBOUND_PORT for no domain", "a port")
def _(rig: Rig) -> str:
    port = End(rig.granter).call(BIND_UNBOUND_PORT, NOBODY)
    return "a port" if isinstance(port, int) else said(port)


@row("106", "evtchn UNBIND of a foreign port", "ENOTCONN")
def _(rig: Rig) -> str:
    return said(End(rig.granter).call(UNBIND, End(rig.granter).port))


refused("107", "evtchn UNBIND 0xFFFFFFFF", "EINVAL", UNBIND, 0xFFFFFFFF)


@row("108", "evtchn NOTIFY of a foreign port, of the kernel's, of 1000, of 100000", "ENOTCONN")
def _(rig: Rig) -> str:
    foreign = End(rig.granter).port
    return said(*(End(rig.granter).call(NOTIFY, port) for port in (foreign, 1, 1000, 100_000)))


@row("109", "evtchn NOTIFY, peer gone; the port bound to anew", "0")
def _(rig: Rig) -> str:
    first, second = loop(rig.granter)
    rig.granter.must("close", second.file)
    answer = first.call(NOTIFY, first.port)
    return said(answer, End(rig.granter, remote=first.port).read())


# RESTRICT_DOMID.


def restrict(end: End, domid: int) -> Any:
    """Its argument has two bytes."""
    return end.program.ioctl(end.file, RESTRICT_DOMID, pack("=H", domid))[0]


@row("110", "evtchn RESTRICT to 0, to 0x7FF0", "EINVAL")
def _(rig: Rig) -> str:
    return said(*(restrict(End(rig.granter), domid) for domid in (0, 0x7FF0)))


@row("111", "evtchn RESTRICT twice", "EACCES")
def _(rig: Rig) -> str:
    end = End(rig.granter)
    return said(restrict(end, 5), restrict(end, 5))


@row("112", "evtchn restricted: BIND_UNBOUND_PORT, BIND_VIRQ, BIND_INTERDOMAIN elsewhere, there", "EACCES")
def _(rig: Rig) -> str:
    end = End(rig.granter)
    restrict(end, NOBODY)
    calls = [(BIND_UNBOUND_PORT, 5), (BIND_VIRQ, FREE_VIRQ), (BIND_INTERDOMAIN, 5, 1), (BIND_INTERDOMAIN, NOBODY, 1)]
    return said(*(end.call(*call) for call in calls))


# Good paths.


@row("G20", "evtchn: an event each way", "1, 1")
def _(rig: Rig) -> str:
    first, second = loop(rig.granter)
    first.notify()
    second.notify()
    return said(first.read(), second.read())


@row("G21", "evtchn: three events; read; one more; read; write back; read", "collapsed, and masked till written back")
def _(rig: Rig) -> str:
    first, second = loop(rig.granter)
    first.notify(3)
    answers = [second.read()]
    first.notify()
    answers.append(second.read())
    second.write_back()
    return said(*answers, second.read())


@row("G22", "evtchn: an event, written back unread, an event", "2")
def _(rig: Rig) -> str:
    first, second = loop(rig.granter)
    first.notify()
    second.write_back()
    first.notify()
    return second.read()


@row("G23", "evtchn: an event, UNBIND, read", "it is still there")
def _(rig: Rig) -> str:
    first, second = loop(rig.granter)
    first.notify()
    return said(second.call(UNBIND, second.port), second.read())


@row("G24", "evtchn poll: empty, with an event", "out; in and out")
def _(rig: Rig) -> str:
    first, second = loop(rig.granter)
    empty = second.poll()
    first.notify()
    return said(empty, second.poll())


@row("G25", "evtchn poll after overflow", "error, nothing else")
def _(rig: Rig) -> str:
    first, second = loop(rig.granter)
    overflow(first, second)
    return said(second.poll())


@row("G26", "evtchn: mmap", "ENODEV")
def _(rig: Rig) -> str:
    return rig.granter.mmap(rig.granter.open("evtchn"), 0)


@row("G27", "evtchn: 64 events unread in a ring of 64; of 128 when there are 65 ports", "64; 65")
def _(rig: Rig) -> str:
    first, second = loop(rig.granter)
    for _ in range(64):
        first.notify()
        second.write_back()
    small = second.read()
    for _ in range(64):
        second.call(BIND_UNBOUND_PORT, NOBODY)
    overflow(first, second)
    return said(small, second.read())


@row("G28", "evtchn: after overflow and RESET, an event; written back; read", "masked till written back")
def _(rig: Rig) -> str:
    first, second = loop(rig.granter)
    for _ in range(2):
        first.notify()
    second.call(RESET)
    first.notify()
    before = second.read()
    second.write_back()
    return said(before, second.read())


# Unmap notifications.


@row("G29", "gntalloc NOTIFY: DEALLOC of what is mapped, munmap", "an event at the munmap, one")
def _(rig: Rig) -> str:
    first, second = loop(rig.granter)
    file, index, _, here = share(rig)
    armed = rig.granter.notify(file, index, 2, first.port)
    rig.granter.dealloc(file, index)
    before = second.read()
    rig.granter.must("munmap", here, 0, PAGE)
    return said(armed, before, second.read())


@row("G30", "gntalloc NOTIFY: the port's own file closed, then the page freed", "an event; then the port is closed")
def _(rig: Rig) -> str:
    first, second = loop(rig.granter)
    file, index, _, _ = share(rig, mapped=False)
    rig.granter.notify(file, index, 2, first.port)
    rig.granter.must("close", first.file)
    before = second.read()
    rig.granter.dealloc(file, index)
    return said(before, second.read())


@row("G31", "gntalloc NOTIFY: the program is killed", "an event")
def _(rig: Rig) -> str:
    victim = rig.program("victim")
    end = End(victim)
    file = victim.open("gntalloc")
    made = victim.grant(file)
    victim.mmap(file, made.index)
    victim.notify(file, made.index, 2, end.port)
    other = End(rig.granter, remote=end.port)
    other.read()
    other.write_back()
    victim.kill()
    return other.read()


@row("G32", "gntdev NOTIFY both: munmap, UNMAP", "the byte; the event after both")
def _(rig: Rig) -> str:
    first, second = loop(rig.grantee)
    _, _, refs, here = share(rig)
    rig.granter.must("poke", here, 0, "11" * 4)
    file = rig.grantee.open("gntdev")
    _, index = rig.grantee.reserve(file, refs)
    there = rig.grantee.mmap(file, index)
    armed = rig.grantee.notify(file, index + 2, 3, first.port)
    rig.grantee.must("munmap", there, 0, PAGE)
    before = second.read()
    rig.grantee.unreserve(file, index, 1)
    return said(armed, before, second.read(), rig.granter.step("peek", here, 0, 4))


@row("G33", "gntdev NOTIFY both: close, munmap", "the byte, the event")
def _(rig: Rig) -> str:
    first, second = loop(rig.grantee)
    _, _, refs, here = share(rig)
    rig.granter.must("poke", here, 0, "11" * 4)
    file = rig.grantee.open("gntdev")
    there = attach(rig.grantee, refs, file=file)
    rig.grantee.notify(file, 1, 3, first.port)
    rig.grantee.must("close", file)
    before = second.read()
    rig.grantee.must("munmap", there, 0, PAGE)
    return said(before, second.read(), rig.granter.step("peek", here, 0, 4))


@row("G35", "gntdev NOTIFY CLEAR_BYTE: munmap, then UNMAP; when is the byte cleared", "PV: at munmap; PVH: at UNMAP")
def _(rig: Rig) -> str:
    _, _, refs, here = share(rig)
    rig.granter.must("poke", here, 0, "11")
    file = rig.grantee.open("gntdev")
    _, index = rig.grantee.reserve(file, refs)
    there = rig.grantee.mmap(file, index)
    rig.grantee.notify(file, index, 1)
    rig.grantee.must("munmap", there, 0, PAGE)
    rig.granter.open("gntdev")  # ours clears the byte a moment after munmap, before it answers anything
    time.sleep(0.2)  # and what a kernel puts off it has done by then
    before = rig.granter.step("peek", here, 0, 1)
    rig.grantee.unreserve(file, index, 1)
    return said(before, rig.granter.step("peek", here, 0, 1))
