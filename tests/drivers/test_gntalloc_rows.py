"""gntalloc, row by row of the table of bad and odd inputs (docs/differences.md), against a strict caller."""

from __future__ import annotations

import errno
import os
from struct import pack, unpack_from
from typing import TYPE_CHECKING

import pytest
from fake_program import ADDRESS, ALLOC, DEALLOC, RW, Program, refused

from gntalloc.abi.grants import DOMID_SELF
from gntalloc.maps import PAGE_SIZE, PROT_READ
from gntalloc.steps import finish_steps
from gntalloc.testing import FakeMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.machine.machine import Machine as Core

LIMIT = 64


@pytest.fixture
def program(core: Core) -> Program:
    return Program(core, 1, "gntalloc")


@pytest.fixture
def ours(make_core: Callable[..., Core]) -> Program:
    return Program(make_core("ours"), 1, "gntalloc")


@pytest.fixture
def linux(make_core: Callable[..., Core]) -> Program:
    return Program(make_core("linux"), 1, "gntalloc")


def nothing_is_left(program: Program) -> None:
    assert (program.in_use(), program.references()) == (0, 0)
    assert (program.machine.frames.pages, program.machine.frames.extents) == (0, 0)


# The file.


def test_row_03_read_and_write_are_einval(program: Program) -> None:
    with refused(errno.EINVAL, "ioctl and mmap"):
        program.file.read(4)
    with refused(errno.EINVAL, "ioctl and mmap"):
        program.file.write(b"1234")


@pytest.mark.parametrize(
    "request_number",
    [
        pytest.param(0x00004799, id="row_06_unknown"),
        pytest.param(0x00184700, id="row_07_gntdev_map"),
        pytest.param(0x00144705, id="row_08_of_a_32_bit_program"),
        pytest.param(0xC0184705, id="row_09_direction_bits"),
        pytest.param(0, id="row_06_zero"),
        pytest.param(0xFFFFFFFF, id="row_06_all_ones"),
    ],
)
def test_rows_06_to_09_requests_that_are_none(program: Program, request_number: int) -> None:
    with refused(errno.ENOTTY, f"{request_number:#010x}"):
        program.file.ioctl(request_number, ADDRESS, FakeMemory())


# ALLOC.


def test_row_11_alloc_at_the_null_pointer(program: Program) -> None:
    with refused(errno.EFAULT):
        program.file.ioctl(ALLOC, 0, FakeMemory())
    assert program.next_index() == 0


def test_row_12_alloc_reads_24_bytes_though_20_would_do(program: Program) -> None:
    with refused(errno.EFAULT):
        program.ioctl(ALLOC, pack("=HHIQI", 2, 1, 1, 0, 0))
    nothing_is_left(program)
    assert program.next_index() == 0


def test_row_13_alloc_of_none_answers_the_next_index_and_echoes_the_rest(program: Program) -> None:
    program.alloc(2, 3)
    answer = program.ioctl(ALLOC, pack("=HHIQ", 2, 1, 0, 77) + b"REFSPADD")
    assert pack("=HHIQ", 2, 1, 0, 3 * PAGE_SIZE) + b"REFSPADD" == answer
    assert program.in_use() == 3


def test_row_14_alloc_of_none_while_over_the_limit(program: Program) -> None:
    program.alloc(2, 3)
    program.guest.gntalloc.limit = 2
    with refused(errno.ENOSPC, "limit of 2"):
        program.alloc(2, 0)
    program.guest.gntalloc.limit = 3
    assert program.alloc(2, 0).at == 3 * PAGE_SIZE


def test_row_15_alloc_of_as_many_as_the_limit(program: Program) -> None:
    granted = program.alloc(2, LIMIT)
    assert LIMIT == program.in_use() == len(set(granted.refs))


def test_row_16_alloc_of_one_more_than_the_limit(program: Program) -> None:
    with refused(errno.ENOSPC, f"limit is {LIMIT}"):
        program.alloc(2, LIMIT + 1)
    nothing_is_left(program)


def test_row_17_alloc_at_the_limit_leaves_the_index_alone(program: Program) -> None:
    program.alloc(2, LIMIT)
    with refused(errno.ENOSPC, f"{LIMIT} of the domain's limit of {LIMIT} are in use"):
        program.alloc(2)
    program.guest.gntalloc.limit += 1
    assert program.alloc(2).at == LIMIT * PAGE_SIZE


@pytest.mark.parametrize("count", [2_000_000, 0xFFFF_FFFF], ids=["row_18", "row_19"])
def test_rows_18_and_19_alloc_of_absurdly_many(program: Program, count: int) -> None:
    argument = pack("=HHIQQ", 2, 1, count, 0, 0)
    with refused(errno.ENOSPC):
        program.ioctl(ALLOC, argument)
    nothing_is_left(program)


def test_row_20_a_limit_of_0(program: Program) -> None:
    program.guest.gntalloc.limit = 0
    with refused(errno.ENOSPC):
        program.alloc(2)
    assert program.alloc(2, 0).at == 0


@pytest.mark.parametrize(("flags", "readonly"), [(0xFFFE, True), (0xFFFF, False)], ids=["row_22", "row_23"])
def test_rows_22_and_23_flags_nobody_knows_are_ignored(program: Program, flags: int, readonly: bool) -> None:
    granted = program.alloc(2, 1, flags)
    assert readonly == program.guest.table.readonly(granted.refs[0])


@pytest.mark.parametrize("domid", [30000, 1, DOMID_SELF, 0xFFFF], ids=["row_24", "own", "row_25", "row_26"])
def test_rows_24_to_26_any_domid_will_do(program: Program, domid: int) -> None:
    granted = program.alloc(domid)
    peer = Program(program.machine, 2, "gntdev")
    with refused(errno.EINVAL, "not granted to domain 2"):
        peer.map(1, *granted.refs)


def test_own_domid_can_be_mapped_by_oneself(program: Program) -> None:
    granted = program.alloc(1)
    mine, again = program.mmap(granted.at), Program(program.machine, 1, "gntdev").map(1, *granted.refs)
    mine.memory[0] = 7
    assert again.memory[0] == 7
    mine.unmap()
    again.unmap()


def _read_only_reply(program: Program) -> None:
    memory = FakeMemory()
    memory.put(ADDRESS, pack("=HHIQQ", 2, 1, 2, 0, 0), writable=False)
    with refused(errno.EFAULT, "read-only"):
        program.file.ioctl(ALLOC, ADDRESS, memory)


def test_row_27_reply_in_read_only_memory_ours_undoes(ours: Program) -> None:
    _read_only_reply(ours)
    nothing_is_left(ours)
    assert ours.alloc(2).at == 0


def test_row_27_reply_in_read_only_memory_linux_keeps_the_grants(linux: Program) -> None:
    _read_only_reply(linux)
    assert (linux.in_use(), linux.references()) == (2, 2)
    assert linux.next_index() == 2 * PAGE_SIZE
    linux.dealloc(0, 2)
    nothing_is_left(linux)


def _half_a_reply(program: Program) -> bytes:
    memory = FakeMemory()
    there = memory.put(ADDRESS, pack("=HHIQQ", 2, 1, 40, 99, 0))
    with refused(errno.EFAULT):
        program.file.ioctl(ALLOC, ADDRESS, memory)
    return bytes(there)


def test_row_28_index_is_written_references_are_not_ours_undoes(ours: Program) -> None:
    ours.alloc(2)
    assert unpack_from("=Q", _half_a_reply(ours), 8)[0] == PAGE_SIZE
    assert (ours.in_use(), ours.references()) == (1, 1)
    assert ours.next_index() == PAGE_SIZE


def test_row_28_index_is_written_references_are_not_linux_keeps_the_grants(linux: Program) -> None:
    linux.alloc(2)
    assert unpack_from("=Q", _half_a_reply(linux), 8)[0] == PAGE_SIZE
    assert (linux.in_use(), linux.references()) == (41, 41)
    assert linux.next_index() == 41 * PAGE_SIZE


def _fill_the_table(program: Program) -> None:
    program.guest.gntalloc.limit = 600
    program.alloc(2, 500)  # of 504 in a table of one frame
    with refused(errno.ENOSPC, "grant table has 500 of 504 in use"):
        program.alloc(2, 5)
    assert (program.in_use(), program.references()) == (500, 500)
    assert program.machine.frames.pages == 500


def test_row_29_table_full_is_undone_exactly_ours_puts_the_index_back(ours: Program) -> None:
    _fill_the_table(ours)
    assert ours.alloc(2, 4).at == 500 * PAGE_SIZE


def test_row_29_table_full_is_undone_exactly_linux_leaves_a_hole(linux: Program) -> None:
    _fill_the_table(linux)
    assert linux.alloc(2, 4).at == 505 * PAGE_SIZE


def test_row_29_the_limit_is_not_what_was_in_the_way(program: Program) -> None:
    """The count that B1 got wrong: after a full table, all of the limit can still be had."""
    _fill_the_table(program)
    program.dealloc(0, 500)
    nothing_is_left(program)
    program.guest.gntalloc.limit = 504
    program.alloc(2, 504)


def test_row_30_alloc_on_a_file_opened_for_reading(core: Core) -> None:
    assert Program(core, 1, "gntalloc", os.O_RDONLY).alloc(2).at == 0


# DEALLOC.


def test_row_31_dealloc_at_the_null_pointer(program: Program) -> None:
    with refused(errno.EFAULT):
        program.file.ioctl(DEALLOC, 0, FakeMemory())


def test_dealloc_reads_16_bytes(program: Program) -> None:
    program.alloc(2)
    with refused(errno.EFAULT):
        program.ioctl(DEALLOC, pack("=QI", 0, 1))
    assert program.in_use() == 1


@pytest.mark.parametrize(
    ("index", "count"),
    [
        pytest.param(0, 0, id="row_32_none"),
        pytest.param(1, 1, id="row_33_unaligned"),
        pytest.param(PAGE_SIZE - 1, 1, id="row_33_unaligned_below"),
        pytest.param(0, 4, id="row_35_one_too_many"),
        pytest.param(2 * PAGE_SIZE, 2, id="row_35_the_last_and_one_more"),
        pytest.param(0, 0xFFFF_FFFF, id="row_35_absurdly_many"),
        pytest.param(0xFFFF_FFFF_FFFF_F000, 2, id="row_35_around_the_end"),
    ],
)
def test_rows_32_to_35_dealloc_of_what_is_not_there_frees_nothing(program: Program, index: int, count: int) -> None:
    program.alloc(2, 3)
    with refused(errno.EINVAL):
        program.dealloc(index, count)
    assert (program.in_use(), program.references()) == (3, 3)


def test_row_34_dealloc_of_another_files_index(program: Program) -> None:
    program.alloc(2)
    stranger = Program(program.machine, 1, "gntalloc")
    with refused(errno.EINVAL):
        stranger.dealloc(0)
    stranger.alloc(2)
    stranger.dealloc(0)
    assert program.in_use() == 1


def test_row_36_dealloc_twice(program: Program) -> None:
    program.alloc(2)
    program.dealloc(0)
    with refused(errno.EINVAL, "freed already"):
        program.dealloc(0)
    nothing_is_left(program)


def test_rows_37_and_39_a_hole_in_the_middle(program: Program) -> None:
    program.alloc(2, 3)
    program.dealloc(PAGE_SIZE)
    with refused(errno.EINVAL):
        program.dealloc(0, 3)
    assert program.in_use() == 2
    program.dealloc(0)
    program.dealloc(2 * PAGE_SIZE)
    nothing_is_left(program)


def test_row_38_dealloc_over_two_allocs(program: Program) -> None:
    program.alloc(2, 2)
    program.alloc(2, 2)
    program.dealloc(PAGE_SIZE, 2)
    assert program.in_use() == 2


def test_row_40_dealloc_while_mapped_page_and_grant_live_on(program: Program) -> None:
    granted = program.alloc(2)
    mine = program.mmap(granted.at)
    mine.memory[:4] = b"kept"
    program.dealloc(granted.at)
    assert (program.in_use(), program.references()) == (1, 1)
    theirs = Program(program.machine, 2, "gntdev").map(1, *granted.refs)
    assert bytes(theirs.memory[:4]) == b"kept"
    assert finish_steps(program.guest.gntalloc.holders(program.file, granted.at, 1)) == (True, (2,))
    theirs.unmap()
    assert finish_steps(program.guest.gntalloc.holders(program.file, granted.at, 1)) == (False, ())
    mine.unmap()
    nothing_is_left(program)


# mmap and munmap.


@pytest.mark.parametrize("offset", [0, 5 * PAGE_SIZE], ids=["row_52", "row_53_at_a_bad_offset"])
def test_rows_52_and_53_a_private_map(program: Program, offset: int) -> None:
    program.alloc(2)
    with refused(errno.EINVAL, "private"):
        program.plan(offset, shared=False)


@pytest.mark.parametrize(
    ("flags", "prot", "code"),
    [
        pytest.param(os.O_RDONLY, PROT_READ, errno.EINVAL, id="row_54"),
        pytest.param(os.O_RDONLY, RW, errno.EACCES, id="row_55"),
        pytest.param(os.O_WRONLY, RW, errno.EACCES, id="row_56"),
        pytest.param(os.O_WRONLY, PROT_READ, errno.EACCES, id="row_56_reading"),
    ],
)
def test_rows_54_to_56_the_open_mode(core: Core, flags: int, prot: int, code: int) -> None:
    program = Program(core, 1, "gntalloc", flags)
    program.alloc(2)
    with refused(code):
        program.plan(0, prot=prot)


@pytest.mark.parametrize(
    ("offset", "length", "code"),
    [
        pytest.param(0, 0, errno.EINVAL, id="row_57_nothing"),
        pytest.param(1, PAGE_SIZE, errno.EINVAL, id="row_58_unaligned"),
        pytest.param(7 * PAGE_SIZE, PAGE_SIZE, errno.ENOENT, id="row_59_unknown"),
        pytest.param(0, 4 * PAGE_SIZE, errno.ENOENT, id="row_60_too_long"),
        pytest.param(0, 3 * PAGE_SIZE + 1, errno.ENOENT, id="row_60_rounded_up"),
        pytest.param(PAGE_SIZE, 3 * PAGE_SIZE, errno.ENOENT, id="row_60_beyond_the_end"),
        pytest.param(-PAGE_SIZE, PAGE_SIZE, errno.EOVERFLOW, id="negative"),
        pytest.param(0, -1, errno.EINVAL, id="negative_length"),
        pytest.param(0, 1 << 62, errno.ENOENT, id="absurdly_long"),
        pytest.param((1 << 63) - PAGE_SIZE, PAGE_SIZE, errno.EOVERFLOW, id="beyond_any_file"),
    ],
)
def test_rows_57_to_60_offset_and_length(program: Program, offset: int, length: int, code: int) -> None:
    program.alloc(2, 3)
    with refused(code):
        program.file.mmap(offset, length, prot=RW, shared=True)
    program.dealloc(0, 3)
    nothing_is_left(program)


def test_length_is_rounded_up_to_pages(program: Program) -> None:
    program.alloc(2, 3)
    plan = program.file.mmap(0, PAGE_SIZE + 1, prot=RW, shared=True)
    assert 2 * PAGE_SIZE == plan.record.length == sum(piece.pages for piece in plan.pieces) * PAGE_SIZE
    for loan in finish_steps(program.machine.carry_out(plan)):
        loan.close()
    program.machine.settle()


def test_row_61_mmap_after_dealloc(program: Program) -> None:
    program.alloc(2)
    mine = program.mmap(0)
    program.dealloc(0)
    with refused(errno.ENOENT):
        program.plan(0)
    mine.unmap()


def test_row_62_mmap_across_a_freed_hole(program: Program) -> None:
    program.alloc(2, 3)
    program.dealloc(PAGE_SIZE)
    with refused(errno.ENOENT, f"{PAGE_SIZE:#x}"):
        program.plan(0, 3)


def test_mmap_over_two_allocs_is_one_range(program: Program) -> None:
    program.alloc(2, 2)
    program.alloc(3, 2)
    whole, right = program.mmap(0, 4), program.mmap(2 * PAGE_SIZE, 2)
    whole.memory[2 * PAGE_SIZE] = 9
    assert right.memory[0] == 9
    whole.unmap()
    right.unmap()


def test_a_map_over_two_allocs_with_a_strangers_between_uses_its_own_pages(program: Program) -> None:
    """B3: Linux walks the global list at munmap, and lowers the stranger's count."""
    stranger = Program(program.machine, 1, "gntalloc")
    program.alloc(2)
    stranger.alloc(2)
    program.alloc(2)
    program.mmap(0, 2).unmap()
    assert (program.in_use(), program.references()) == (3, 3)
    program.dealloc(0, 2)
    assert (program.in_use(), program.references()) == (1, 1)


def test_row_63_mmap_the_same_range_twice(program: Program) -> None:
    granted = program.alloc(2)
    first, second = program.mmap(granted.at), program.mmap(granted.at)
    first.memory[0] = 1
    assert second.memory[0] == 1
    first.unmap()
    program.dealloc(granted.at)
    assert program.in_use() == 1
    second.unmap()
    nothing_is_left(program)


def test_row_65_munmap_of_half_releases_nothing(program: Program) -> None:
    granted = program.alloc(2, 2)
    mine = program.mmap(granted.at, 2)
    program.dealloc(granted.at, 2)
    mine.unmap(0, 1)
    mine.memory[PAGE_SIZE] = 5
    assert mine.memory[PAGE_SIZE] == 5
    assert (program.in_use(), program.references()) == (2, 2)
    mine.unmap()
    nothing_is_left(program)


def test_row_67_close_then_use_the_mapping(program: Program) -> None:
    granted = program.alloc(2)
    mine = program.mmap(granted.at)
    program.close()
    mine.memory[:2] = b"ok"
    assert bytes(mine.memory[:2]) == b"ok"
    assert (program.in_use(), program.references()) == (1, 1)
    mine.unmap()
    nothing_is_left(program)


def test_close_frees_all_that_is_listed(program: Program) -> None:
    program.alloc(2, 3)
    program.alloc(3, 3)
    program.close()
    nothing_is_left(program)


def test_pages_are_zero_also_those_that_were_used_before(program: Program) -> None:
    for _ in range(3):
        granted = program.alloc(2, 2)
        mine = program.mmap(granted.at, 2)
        assert bytes(2 * PAGE_SIZE) == bytes(mine.memory)
        mine.memory[:] = b"\xff" * (2 * PAGE_SIZE)
        mine.unmap()
        program.dealloc(granted.at, 2)


# Undo: the i-th copy of n fails, for every i.


def test_a_fault_at_any_copy_of_alloc_ours_leaves_nothing(ours: Program) -> None:
    for copy in (1, 2, 3):
        with refused(errno.EFAULT, f"copy {copy}"):
            ours.alloc(2, 3, fail_at=copy)
        nothing_is_left(ours)
        assert ours.next_index() == 0
    assert ours.alloc(2, 3, fail_at=4).at == 0  # there are three copies, as in Linux


def test_a_fault_at_any_copy_of_alloc_linux_keeps_what_was_published(linux: Program) -> None:
    for copy, kept in ((1, 0), (2, 3), (3, 6)):
        with refused(errno.EFAULT, f"copy {copy}"):
            linux.alloc(2, 3, fail_at=copy)
        assert (kept, kept) == (linux.in_use(), linux.references())
        assert kept * PAGE_SIZE == linux.next_index()
    linux.alloc(2, 3, fail_at=4)


# Released here, still mapped there.


def test_a_page_that_lingers_counts_ours(ours: Program) -> None:
    granted = ours.alloc(2)
    theirs = Program(ours.machine, 2, "gntdev").map(1, *granted.refs)
    ours.dealloc(granted.at)
    assert (ours.in_use(), ours.references()) == (1, 1)
    ours.guest.gntalloc.limit = 1
    with refused(errno.ENOSPC, "1 of them released here but still mapped by a peer"):
        ours.alloc(2)
    theirs.unmap()
    nothing_is_left(ours)
    ours.alloc(2)


def test_a_page_that_lingers_does_not_count_linux(linux: Program) -> None:
    granted = linux.alloc(2)
    theirs = Program(linux.machine, 2, "gntdev").map(1, *granted.refs)
    linux.dealloc(granted.at)
    assert (linux.in_use(), linux.references()) == (0, 1)
    theirs.unmap()
    nothing_is_left(linux)


def test_a_grant_that_was_ended_takes_no_new_maps_ours(ours: Program) -> None:
    granted = ours.alloc(2)
    peer = Program(ours.machine, 2, "gntdev")
    theirs = peer.map(1, *granted.refs)
    ours.dealloc(granted.at)
    with refused(errno.EINVAL, "has ended grant"):
        peer.map(1, *granted.refs)
    theirs.unmap()


def test_a_grant_that_was_ended_takes_new_maps_linux(linux: Program) -> None:
    granted = linux.alloc(2)
    peer = Program(linux.machine, 2, "gntdev")
    theirs = peer.map(1, *granted.refs)
    linux.dealloc(granted.at)
    again = peer.map(1, *granted.refs)
    theirs.unmap()
    assert linux.references() == 1
    again.unmap()
    nothing_is_left(linux)


def test_references_ours_oldest_first(ours: Program) -> None:
    first = ours.alloc(2).refs[0]
    ours.dealloc(0)
    assert first != ours.alloc(2).refs[0]


def test_references_linux_last_freed_first(linux: Program) -> None:
    linux.alloc(2)
    second = linux.alloc(2).refs[0]
    linux.dealloc(PAGE_SIZE)
    assert second == linux.alloc(2).refs[0]


def test_a_neighbour_that_is_still_mapped_does_not_keep_a_freed_page_readable(program: Program) -> None:
    """The peer has the whole memory file. What was freed of it must be empty at once."""
    for flags in (0, 1):
        granted = program.alloc(2, 2, flags)
        mine = program.mmap(granted.at), program.mmap(granted.at + PAGE_SIZE)
        mine[0].memory[:6] = mine[1].memory[:6] = b"secret"
        peer = Program(program.machine, 2, "gntdev")
        index = peer.map_refs(1, granted.refs[:1])
        loans = finish_steps(program.machine.carry_out(peer.plan(index, prot=PROT_READ)))
        peer.unmap_refs(index, 1)
        mine[1].unmap()
        program.dealloc(granted.at + PAGE_SIZE)
        assert os.pread(loans[0].descriptor, 6, granted.at) == b"secret"  # where its index says
        assert bytes(6) == os.pread(loans[0].descriptor, 6, granted.at + PAGE_SIZE)
        for loan in loans:
            loan.close()
        mine[0].unmap()
        program.machine.settle()
        program.dealloc(granted.at)
        nothing_is_left(program)
