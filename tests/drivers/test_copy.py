"""GRANT_COPY and GET_OFFSET_FOR_VADDR of gntdev, against a strict caller."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from struct import pack, unpack_from
from typing import TYPE_CHECKING

import pytest
from fake_program import ADDRESS, Program, refused

from gntalloc.abi.gntdev import GET_OFFSET_FOR_VADDR, GRANT_COPY
from gntalloc.abi.grants import BAD_DOMAIN, BAD_GNTREF, DOMID_SELF, GENERAL_ERROR, OKAY
from gntalloc.drivers.copy import MAX_SEGMENTS
from gntalloc.errors import DeviceError
from gntalloc.maps import PAGE_SIZE, PROT_READ
from gntalloc.steps import finish_steps
from gntalloc.testing import FakeMemory
from gntalloc.wire.memory import MessageCaller, Region

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc.machine.machine import Machine as Core

SEGMENTS = 0x7F00_1000_0000
BUFFER = 0x7F00_2000_0000
F_SEAL_FUTURE_WRITE = 0x0010
FROM, TO = 1, 2  # which side is a granted page
UNTOUCHED = 77


def page(ref: int, offset: int = 0, domid: int = 1) -> bytes:
    return pack("=IHH", ref, offset, domid)


def local(address: int) -> bytes:
    return pack("=Q", address)


def segment(source: bytes, dest: bytes, length: int, flags: int) -> bytes:
    return source + dest + pack("=HHh2x", length, flags, UNTOUCHED)


class Copying:
    """Domain 2 copies; domain 1 has pages of every kind, all mapped there."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.granter = Program(core, 1, "gntalloc")
        self.program = Program(core, 2, "gntdev")
        granted = self.granter.alloc(2, 2)
        self.refs = granted.refs
        self.memory = FakeMemory()
        self.buffer = self.memory.put(BUFFER, bytes(4 * PAGE_SIZE))
        self.pages = self.granter.mmap(granted.at, 2)

    def copy(self, *segments: bytes, count: int | None = None) -> list[int]:
        """Copy, and answer with the statuses."""
        self.segments = self.memory.put(SEGMENTS, b"".join(segments))
        self.memory.put(ADDRESS, pack("=I4xQ", len(segments) if count is None else count, SEGMENTS))
        assert self.program.file.ioctl(GRANT_COPY, ADDRESS, self.memory) == 0
        return self.statuses()

    def statuses(self) -> list[int]:
        return [unpack_from("=h", self.segments, at + 20)[0] for at in range(0, len(self.segments), 24)]

    def nothing_stays_mapped(self) -> bool:
        return not any(self.granter.guest.table.mapped_by(ref) for ref in self.refs)

    def close(self) -> None:
        self.pages.unmap()


@pytest.fixture
def copying(core: Core) -> Iterator[Copying]:
    copying = Copying(core)
    yield copying
    copying.close()


# What it does.


def test_from_a_granted_page(copying: Copying) -> None:
    copying.pages.memory[100:105] = b"hello"
    assert copying.copy(segment(page(copying.refs[0], 100), local(BUFFER + 7), 5, FROM)) == [OKAY]
    assert bytes(copying.buffer[6:13]) == b"\0hello\0"
    assert copying.nothing_stays_mapped()


def test_to_a_granted_page(copying: Copying) -> None:
    copying.buffer[:5] = b"hello"
    assert copying.copy(segment(local(BUFFER), page(copying.refs[1], PAGE_SIZE - 5), 5, TO)) == [OKAY]
    assert bytes(copying.pages.memory[2 * PAGE_SIZE - 6 :]) == b"\0hello"
    assert copying.nothing_stays_mapped()


def test_from_one_granted_page_to_another(copying: Copying) -> None:
    copying.pages.memory[:5] = b"hello"
    assert copying.copy(segment(page(copying.refs[0]), page(copying.refs[1], 1), 4, FROM | TO)) == [OKAY]
    assert bytes(copying.pages.memory[PAGE_SIZE : PAGE_SIZE + 6]) == b"\0hell\0"


def test_a_whole_page_over_a_page_boundary_of_the_buffer(copying: Copying) -> None:
    copying.pages.memory[:PAGE_SIZE] = bytes(range(256)) * 16
    assert copying.copy(segment(page(copying.refs[0]), local(BUFFER + 300), PAGE_SIZE, FROM)) == [OKAY]
    assert bytes(copying.buffer[300 : 300 + PAGE_SIZE]) == bytes(range(256)) * 16


def test_segments_see_what_those_before_them_did(copying: Copying) -> None:
    copying.pages.memory[:5] = b"hello"
    there = segment(page(copying.refs[0]), local(BUFFER), 5, FROM)
    back = segment(local(BUFFER), page(copying.refs[1]), 5, TO)
    assert copying.copy(there, back) == [OKAY, OKAY]
    assert bytes(copying.pages.memory[PAGE_SIZE : PAGE_SIZE + 5]) == b"hello"


def test_segments_that_go_over_a_map_of_the_page_see_what_those_before_them_did(copying: Copying) -> None:
    mapped = copying.program.map(1, copying.refs[0])
    copying.memory._stretches[BUFFER + (1 << 20)] = mapped.memory, True  # type: ignore[assignment]
    copying.buffer[:5] = b"hello"
    into = segment(local(BUFFER), page(copying.refs[0], 64), 5, TO)
    again = segment(local(BUFFER + (1 << 20) + 64), page(copying.refs[1]), 5, TO)
    assert copying.copy(into, again) == [OKAY, OKAY]
    assert bytes(copying.pages.memory[PAGE_SIZE : PAGE_SIZE + 5]) == b"hello"
    out = segment(page(copying.refs[1]), local(BUFFER + (1 << 20)), 5, FROM)
    assert copying.copy(out, segment(page(copying.refs[0]), local(BUFFER + 9), 5, FROM)) == [OKAY, OKAY]
    assert bytes(copying.buffer[9:14]) == b"hello"
    mapped.unmap()


def test_many_segments(copying: Copying) -> None:
    copying.pages.memory[:200] = bytes(range(200))
    segments = [segment(page(copying.refs[0], at), local(BUFFER + 199 - at), 1, FROM) for at in range(200)]
    assert copying.copy(*segments) == [OKAY] * 200
    assert bytes(copying.buffer[:200]) == bytes(range(199, -1, -1))


@pytest.mark.parametrize("seed", range(60))
def test_any_segments_do_what_a_model_does_one_by_one(copying: Copying, seed: int) -> None:
    """One way or mixed, touching or apart, in any order, one over the other."""
    chance = random.Random(seed)
    pages, buffer = bytearray(chance.randbytes(2 * PAGE_SIZE)), bytearray(chance.randbytes(4 * PAGE_SIZE))
    copying.pages.memory[:], copying.buffer[:] = pages, buffer
    ways = chance.choice([(FROM,), (TO,), (FROM, TO), (FROM, TO, FROM | TO)])
    segments, at = [], 0
    for _ in range(chance.randrange(1, 40)):
        length = chance.choice([1, 8, 100, 512, PAGE_SIZE - 1, PAGE_SIZE])
        at = chance.choice([at, chance.randrange(3 * PAGE_SIZE)]) % (3 * PAGE_SIZE)  # often where the last one ended
        sides = [(number, chance.randrange(PAGE_SIZE - length + 1)) for number in chance.choices((0, 1), k=2)]
        way = chance.choice(ways)
        places = [page(copying.refs[number], offset) for number, offset in sides]
        source = places[0] if way & FROM else local(BUFFER + at)
        dest = places[1] if way & TO else local(BUFFER + at)
        segments.append(segment(source, dest, length, way))
        (a, from_), (b, to) = sides
        data = pages[a * PAGE_SIZE + from_ :][:length] if way & FROM else buffer[at : at + length]
        if way & TO:
            pages[b * PAGE_SIZE + to : b * PAGE_SIZE + to + length] = data
        else:
            buffer[at : at + length] = data
        at += length
    assert copying.copy(*segments) == [OKAY] * len(segments)
    assert copying.buffer == buffer
    assert copying.pages.memory == pages
    assert copying.nothing_stays_mapped()


def test_row_90_none(copying: Copying) -> None:
    assert copying.copy(count=0) == []
    copying.memory.put(ADDRESS, pack("=I4xQ", 0, 0))
    assert copying.program.file.ioctl(GRANT_COPY, ADDRESS, copying.memory) == 0


def test_no_bytes(copying: Copying) -> None:
    """Not even the reference is looked at."""
    assert copying.copy(segment(page(30000, 0), local(1), 0, FROM)) == [OKAY]


def test_a_page_that_its_granter_has_not_mapped(copying: Copying) -> None:
    """A copy needs no map, and so no seal either."""
    granted = copying.granter.alloc(2, 1, 0)
    assert copying.copy(segment(page(granted.refs[0]), local(BUFFER), 100, FROM)) == [OKAY]
    mine = copying.granter.mmap(granted.at)
    mine.memory[0] = 5
    assert copying.copy(segment(page(granted.refs[0]), local(BUFFER), 1, FROM)) == [OKAY]
    assert copying.buffer[0] == 5
    mine.unmap()


def test_ones_own_page(copying: Copying) -> None:
    mine = Program(copying.core, 2, "gntalloc").alloc(2)
    for domid in (2, DOMID_SELF):
        assert copying.copy(segment(local(BUFFER), page(mine.refs[0], 0, domid), 10, TO)) == [OKAY]


# What the hypervisor refuses.


def test_row_89_statuses(copying: Copying) -> None:
    strangers = copying.granter.alloc(1).refs[0]
    unused = 300  # given out neither from the low end nor from the high
    readonly = copying.granter.alloc(2, 1, 0).refs[0]
    copying.buffer[:4] = b"same"
    statuses = copying.copy(
        segment(page(20000), local(BUFFER), 4, FROM),
        segment(page(unused), local(BUFFER), 4, FROM),
        segment(page(strangers), local(BUFFER), 4, FROM),
        segment(page(copying.refs[0], 0, 99), local(BUFFER), 4, FROM),
        segment(page(copying.refs[0], 0, 0xFFFF), local(BUFFER), 4, FROM),
        segment(local(BUFFER), page(readonly), 4, TO),
        segment(local(BUFFER), page(copying.refs[0]), 4, TO),
    )
    refusals = [BAD_GNTREF, GENERAL_ERROR, GENERAL_ERROR, BAD_DOMAIN, BAD_DOMAIN, GENERAL_ERROR]
    assert statuses == [*refusals, OKAY]
    assert bytes(copying.buffer[:4]) == bytes(copying.pages.memory[:4]) == b"same"
    assert copying.nothing_stays_mapped()


def test_the_first_of_two_refusals_is_the_status(copying: Copying) -> None:
    assert copying.copy(segment(page(20000), page(0, 0, 99), 4, FROM | TO)) == [BAD_GNTREF]
    over_a_boundary = segment(page(20000), local(BUFFER + PAGE_SIZE - 2), 4, FROM)
    assert copying.copy(over_a_boundary) == [BAD_GNTREF]


def test_a_granter_that_seals_its_pages_spoils_only_its_own_segments(copying: Copying) -> None:
    """With a read-only grant it may: the machine can then make no map of it any more."""
    sealed = copying.granter.alloc(2, 1, 0)
    (loan,) = finish_steps(copying.core.carry_out(copying.granter.plan(sealed.at)))
    fcntl.fcntl(loan.descriptor, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    loan.close()
    copying.core.settle()
    statuses = copying.copy(
        segment(page(sealed.refs[0]), local(BUFFER), 4, FROM), segment(page(copying.refs[0]), local(BUFFER), 4, FROM)
    )
    assert statuses == [GENERAL_ERROR, OKAY]
    assert copying.granter.guest.table.mapped_by(sealed.refs[0]) == ()


# What is an error.


def test_row_87_local_to_local(copying: Copying) -> None:
    for flags in (0, 4, 0x100):
        with refused(errno.EINVAL):
            copying.copy(segment(local(BUFFER), local(BUFFER + 9), 4, flags))
        assert copying.statuses() == [UNTOUCHED]


@pytest.mark.parametrize(("offset", "length"), [(4095, 2), (4096, 1), (0, 4097), (0xFFFF, 0), (1, 0xFFFF)])
def test_row_88_beyond_the_page(copying: Copying, offset: int, length: int) -> None:
    for one in (
        segment(page(copying.refs[0], offset), local(BUFFER), length, FROM),
        segment(local(BUFFER), page(copying.refs[0], offset), length, TO),
    ):
        with refused(errno.EINVAL, "beyond"):
            copying.copy(one)
        assert copying.statuses() == [UNTOUCHED]


def test_the_head_cannot_be_read(copying: Copying) -> None:
    with refused(errno.EFAULT):
        copying.program.file.ioctl(GRANT_COPY, 0, FakeMemory())


def test_a_segment_cannot_be_read(copying: Copying) -> None:
    with refused(errno.EFAULT):
        copying.copy(segment(page(copying.refs[0]), local(BUFFER), 4, FROM), count=2)


def test_a_status_cannot_be_written(copying: Copying) -> None:
    copying.memory.put(SEGMENTS, segment(page(copying.refs[0]), local(BUFFER), 4, FROM), writable=False)
    copying.memory.put(ADDRESS, pack("=I4xQ", 1, SEGMENTS))
    with refused(errno.EFAULT):
        copying.program.file.ioctl(GRANT_COPY, ADDRESS, copying.memory)


def test_a_local_buffer_that_is_not_there(copying: Copying) -> None:
    with refused(errno.EFAULT):
        copying.copy(segment(page(copying.refs[0]), local(BUFFER + 4 * PAGE_SIZE - 2), 4, FROM))
    with refused(errno.EFAULT):
        copying.copy(segment(local(0), page(copying.refs[0]), 4, TO))
    assert copying.nothing_stays_mapped()


def test_what_was_done_when_a_segment_is_wrong(copying: Copying) -> None:
    """Sixteen at a time: whole batches are done, the rest is not, though its status says so."""
    copying.pages.memory[:20] = bytes(range(1, 21))
    segments = [segment(page(copying.refs[0], at), local(BUFFER + at), 1, FROM) for at in range(20)]
    with refused(errno.EINVAL):
        copying.copy(*segments, segment(local(0), local(0), 1, 0))
    assert bytes(copying.buffer[:20]) == bytes(range(1, 17)) + bytes(4)
    assert copying.statuses() == [OKAY] * 20 + [UNTOUCHED]


def test_too_many(copying: Copying) -> None:
    for count in (MAX_SEGMENTS + 1, 0xFFFF_FFFF):
        with refused(errno.EINVAL, "make several"):
            copying.copy(count=count)


@pytest.mark.parametrize("address", [1, (1 << 64) - 1, (1 << 64) - 24])
def test_hostile_addresses(copying: Copying, address: int) -> None:
    copying.memory.put(ADDRESS, pack("=I4xQ", 2, address))
    with refused(errno.EFAULT):
        copying.program.file.ioctl(GRANT_COPY, ADDRESS, copying.memory)
    for one in (
        segment(page(copying.refs[0]), local(address), PAGE_SIZE, FROM),
        segment(local(address), page(copying.refs[0]), PAGE_SIZE, TO),
    ):
        with refused(errno.EFAULT):
            copying.copy(one)


def test_a_fault_at_every_copy(copying: Copying) -> None:
    head = pack("=I4xQ", 2, SEGMENTS)
    faults = 0
    for fail_at in range(1, 20):
        memory = FakeMemory(fail_at=fail_at)
        memory.put(ADDRESS, head)
        memory.put(BUFFER, bytes(2 * PAGE_SIZE))
        there = segment(page(20000), local(BUFFER + PAGE_SIZE - 1), 2, FROM)
        memory.put(SEGMENTS, there + segment(local(BUFFER), page(copying.refs[0]), 2, TO))
        try:
            copying.program.file.ioctl(GRANT_COPY, ADDRESS, memory)
        except DeviceError as error:
            faults += error.errno == errno.EFAULT
        assert copying.nothing_stays_mapped()
    assert 8 < faults < 19


# GET_OFFSET_FOR_VADDR.


def place(program: Program, address: int, process: int) -> None:
    """Say where a process has the map that no place is known of."""
    record = next(record for record in program.file.records if record.addresses is None)
    record.place(address)
    record.process = process


class Placed:
    """Domain 2 has mapped entries of 1 and 2 pages, as process 7, at made-up addresses."""

    def __init__(self, core: Core) -> None:
        granted = Program(core, 1, "gntalloc").alloc(2, 3)
        self.program = Program(core, 2, "gntdev")
        self.indexes = [
            self.program.map_refs(1, granted.refs[:1]),
            self.program.map_refs(1, granted.refs[1:]),
        ]
        self.maps = []
        for index, pages, address in ((self.indexes[0], 1, 0x10000), (self.indexes[1], 2, 0x20000)):
            self.maps.append(self.program.mmap(index, pages))
            place(self.program, address, 7)

    def ask(self, vaddr: int, process: int = 7, *, size: int = 24, writable: bool = True) -> tuple[int, int]:
        memory = FakeMemory(process=process)
        there = memory.put(ADDRESS, pack("=QQII", vaddr, 99, 98, 97)[:size], writable=writable)
        assert self.program.file.ioctl(GET_OFFSET_FOR_VADDR, ADDRESS, memory) == 0
        back, offset, count = unpack_from("=QQI", there)
        assert back == vaddr
        return offset, count


@pytest.fixture
def placed(core: Core) -> Iterator[Placed]:
    placed = Placed(core)
    yield placed
    for each in placed.maps:
        each.unmap()


def test_the_offset_of_an_address(placed: Placed) -> None:
    assert placed.ask(0x10000) == placed.ask(0x10FFF) == (placed.indexes[0], 1)
    assert placed.ask(0x20000) == placed.ask(0x21FFF) == (placed.indexes[1], 2)


@pytest.mark.parametrize("vaddr", [0, 0x11000, 0x1FFFF, 0x22000, (1 << 64) - 1])
def test_row_77_an_address_where_nothing_is(placed: Placed, vaddr: int) -> None:
    with refused(errno.EINVAL, hex(vaddr)):
        placed.ask(vaddr)


def test_after_unmap_of_the_entry_and_after_munmap(placed: Placed) -> None:
    placed.program.unmap_refs(placed.indexes[0], 1)
    assert placed.ask(0x10000) == (placed.indexes[0], 1)
    placed.maps.pop(0).unmap()
    with refused(errno.EINVAL):
        placed.ask(0x10000)


def test_two_processes_with_maps_at_one_address(placed: Placed) -> None:
    record = next(record for record in placed.program.file.records if record.length == 2 * PAGE_SIZE)
    record.place(0x10000)
    record.process = 8
    assert placed.ask(0x10000, 7) == (placed.indexes[0], 1)
    assert placed.ask(0x10000, 8) == (placed.indexes[1], 2)
    assert placed.ask(0x11000, 9) == (placed.indexes[1], 2)  # a child has what its parent mapped


def test_a_later_map_where_pages_of_an_earlier_one_were_unmapped(placed: Placed, core: Core) -> None:
    """The earlier one is still there, by another page of it."""
    refs = Program(core, 1, "gntalloc").alloc(2, 8).refs
    for ref in refs:
        index = placed.program.map_refs(1, (ref,))
        placed.maps.append(placed.program.mmap(index, 1))
        place(placed.program, 0x20000, 7)
        assert placed.ask(0x20000) == (index, 1)
    assert placed.ask(0x21000) == (placed.indexes[1], 2)


def test_the_offset_of_an_address_that_the_kernel_keeps(core: Core) -> None:
    """A program under `run` does not say where it has its map: the lock on its description does."""
    granted = Program(core, 1, "gntalloc").alloc(2, 2)
    program = Program(core, 2, "gntdev")
    index = program.map_refs(1, granted.refs)
    there = program.mmap(index, 2)
    address = there.address

    def ask(vaddr: int) -> tuple[int, int]:
        memory = FakeMemory(process=7)
        argument = memory.put(ADDRESS, pack("=QQII", vaddr, 99, 98, 97))
        assert program.file.ioctl(GET_OFFSET_FOR_VADDR, ADDRESS, memory) == 0
        return unpack_from("=QI", argument, 8)

    assert ask(address) == ask(address + 2 * PAGE_SIZE - 1) == (index, 2)
    for nowhere in (address - 1, address + 2 * PAGE_SIZE, 0, (1 << 64) - 1):
        with refused(errno.EINVAL, hex(nowhere)):
            ask(nowhere)
    there.unmap()
    with refused(errno.EINVAL):
        ask(address)


def test_faults_of_get_offset(placed: Placed) -> None:
    with refused(errno.EFAULT):
        placed.ask(0x10000, size=23)
    with refused(errno.EFAULT):
        placed.ask(0x10000, writable=False)


# Memory that comes in regions.


def test_a_copy_goes_over_regions_that_touch() -> None:
    first, second = (
        Region(0x1000, bytearray(b"abcd"), writable=True),
        Region(0x1004, bytearray(b"efgh"), writable=False),
    )
    caller = MessageCaller([second, first], process=3)
    assert caller.read(0x1002, 4) == b"cdef"
    with refused(errno.EFAULT, "read-only"):
        caller.write(0x1002, b"XXXX")
    assert (bytes(first.data), bytes(second.data)) == (b"abXX", b"efgh")
    assert (first.written, second.written) == (True, False)
    for address, size in ((0xFFF, 2), (0x1006, 3), (0x1008, 1)):
        with refused(errno.EFAULT):
            caller.read(address, size)


def test_read_only_maps_can_be_asked_for(core: Core) -> None:
    program = Program(core, 2, "gntdev", os.O_RDONLY)
    index = program.map_refs(1, Program(core, 1, "gntalloc").alloc(2).refs)
    mapped = program.mmap(index, prot=PROT_READ)
    next(iter(program.file.records)).place(0x5000)
    memory = FakeMemory()
    there = memory.put(ADDRESS, pack("=QQII", 0x5000, 99, 98, 97))
    program.file.ioctl(GET_OFFSET_FOR_VADDR, ADDRESS, memory)
    assert unpack_from("=QI", there, 8) == (0, 1)
    mapped.unmap()
