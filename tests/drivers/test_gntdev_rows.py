"""gntdev, row by row of the table of bad and odd inputs (docs/differences.md), against a strict caller."""

from __future__ import annotations

import errno
import os
from struct import pack, unpack_from
from typing import TYPE_CHECKING

import pytest
from fake_program import ADDRESS, MAP, RW, UNMAP, Granted, Program, close_loans, refused

from gntalloc.maps import PAGE_SIZE, PROT_READ
from gntalloc.steps import finish_steps
from gntalloc.testing import FakeMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.machine.machine import Machine as Core


class Pair:
    """Domain 1 grants, domain 2 maps."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.granter = Program(core, 1, "gntalloc")
        self.peer = Program(core, 2, "gntdev")

    def pins(self, granted: Granted) -> int:
        """Pages of these that somebody maps."""
        return sum(bool(self.granter.guest.table.mapped_by(ref)) for ref in granted.refs)


@pytest.fixture
def pair(core: Core) -> Pair:
    return Pair(core)


@pytest.fixture
def ours(make_core: Callable[..., Core]) -> Pair:
    return Pair(make_core("ours"))


@pytest.fixture
def linux(make_core: Callable[..., Core]) -> Pair:
    return Pair(make_core("linux"))


# MAP_GRANT_REF.


@pytest.mark.parametrize("count", [0, 65537, 0xFFFF_FFFF], ids=["row_68", "row_69", "row_69_absurd"])
def test_rows_68_and_69_how_many_at_once(pair: Pair, count: int) -> None:
    with refused(errno.EINVAL, str(count)):
        pair.peer.ioctl(MAP, pack("=IIQQ", count, 0, 0, 0))


def test_row_69_the_most_is_65536(pair: Pair) -> None:
    assert pair.peer.map_refs(1, tuple(range(65536))) == 0
    pair.peer.unmap_refs(0, 65536)


def test_map_at_the_null_pointer(pair: Pair) -> None:
    with refused(errno.EFAULT):
        pair.peer.file.ioctl(MAP, 0, FakeMemory())


def test_row_70_map_whose_references_cannot_be_read(pair: Pair) -> None:
    with refused(errno.EFAULT):
        pair.peer.ioctl(MAP, pack("=IIQIIII", 3, 0, 0, 1, 8, 1, 9))
    assert pair.peer.map_refs(1, (8,)) == 0


def test_row_71_map_whose_reply_cannot_be_written_leaves_no_entry(pair: Pair) -> None:
    for copy in (1, 2, 3):
        with refused(errno.EFAULT, f"copy {copy}"):
            pair.peer.map_refs(1, (8,), fail_at=copy)
        with refused(errno.ENOENT):
            pair.peer.unmap_refs(0, 1)
    assert pair.peer.map_refs(1, (8,), fail_at=4) == 0


def test_map_echoes_what_it_does_not_answer(pair: Pair) -> None:
    argument = pack("=IIQII", 1, 0x1234, 99, 1, 8)
    assert pair.peer.ioctl(MAP, argument) == pack("=IIQII", 1, 0, 0, 1, 8)


def test_index_is_the_first_gap_that_is_more_than_large_enough(pair: Pair) -> None:
    first = [pair.peer.map_refs(1, (8,) * count) for count in (1, 2, 3)]
    assert first == [0, PAGE_SIZE, 3 * PAGE_SIZE]
    pair.peer.unmap_refs(PAGE_SIZE, 2)
    assert pair.peer.map_refs(1, (8, 8)) == 6 * PAGE_SIZE  # it would just fit, and Linux asks for more
    assert pair.peer.map_refs(1, (8,)) == PAGE_SIZE


@pytest.mark.parametrize(
    ("granter", "ref", "why"),
    [
        pytest.param(1, 300, "grants nothing under reference 300", id="row_72_no_such_reference"),
        pytest.param(1, 512, "beyond domain 1's grant table", id="row_72_beyond_the_table"),
        pytest.param(1, 0xFFFF_FFFF, "beyond", id="row_72_absurd"),
        pytest.param(1, 3, "grants nothing", id="row_72_reserved"),
        pytest.param(7, 8, "no domain 7", id="row_72_no_such_domain"),
        pytest.param(0x7FF0, 8, "no domain", id="row_72_domid_self"),
        pytest.param(0xFFFF_FFFF, 8, "no domain", id="row_72_absurd_domain"),
    ],
)
def test_row_72_a_reference_that_does_not_exist_fails_at_mmap(pair: Pair, granter: int, ref: int, why: str) -> None:
    index = pair.peer.map_refs(granter, (ref,))
    with refused(errno.EINVAL, why):
        pair.peer.plan(index)


def test_one_bad_reference_of_three_undoes_the_others(pair: Pair) -> None:
    granted = pair.granter.alloc(2, 2)
    for bad in range(3):
        refs = [*granted.refs]
        refs.insert(bad, 300)
        with refused(errno.EINVAL):
            pair.peer.map(1, *refs)
        assert pair.pins(granted) == 0


# UNMAP_GRANT_REF.


@pytest.mark.parametrize(
    ("index", "count", "code"),
    [
        pytest.param(PAGE_SIZE, 2, errno.ENOENT, id="row_73_unknown_index"),
        pytest.param(0, 1, errno.ENOENT, id="row_74_wrong_count"),
        pytest.param(0, 3, errno.ENOENT, id="row_74_one_too_many"),
        pytest.param(0, 0, 0, id="row_75_count_0_is_any"),
        pytest.param(77, 2, 0, id="low_bits_are_ignored"),
    ],
)
def test_rows_73_to_75_unmap(pair: Pair, index: int, count: int, code: int) -> None:
    pair.peer.map_refs(1, (8, 9))
    if code:
        with refused(code):
            pair.peer.unmap_refs(index, count)
        pair.peer.unmap_refs(0, 2)
    else:
        pair.peer.unmap_refs(index, count)
    with refused(errno.ENOENT):
        pair.peer.unmap_refs(0, 2)


def test_unmap_reads_16_bytes(pair: Pair) -> None:
    with refused(errno.EFAULT):
        pair.peer.ioctl(UNMAP, pack("=QI", 0, 1))


def test_row_76_unmap_while_mapped_the_map_lives_on(pair: Pair) -> None:
    granted = pair.granter.alloc(2)
    index = pair.peer.map_refs(1, granted.refs)
    theirs = pair.peer.mmap(index)
    pair.peer.unmap_refs(index, 1)
    assert pair.pins(granted) == 1
    theirs.memory[0] = 1
    theirs.unmap()
    assert pair.pins(granted) == 0


def test_munmap_releases_ours(ours: Pair) -> None:
    granted = ours.granter.alloc(2)
    ours.peer.mmap(ours.peer.map_refs(1, granted.refs)).unmap()
    assert ours.pins(granted) == 0


def test_munmap_alone_does_not_release_linux(linux: Pair) -> None:
    granted = linux.granter.alloc(2)
    index = linux.peer.map_refs(1, granted.refs)
    linux.peer.mmap(index).unmap()
    assert linux.pins(granted) == 1
    linux.peer.unmap_refs(index, 1)
    assert linux.pins(granted) == 0


def test_close_releases_what_munmap_did_not_linux(linux: Pair) -> None:
    granted = linux.granter.alloc(2)
    linux.peer.mmap(linux.peer.map_refs(1, granted.refs)).unmap()
    linux.peer.close()
    assert linux.pins(granted) == 0


@pytest.mark.parametrize("number", [0x00044703, 0x00144709, 0x0008470A, 0x0014470B, 0x0008470C, 0x00184705])
def test_rows_79_and_91_requests_that_are_not_there(pair: Pair, number: int) -> None:
    """SET_MAX_GRANTS, the dma-buf requests, gntalloc's ALLOC."""
    with refused(errno.ENOTTY):
        pair.peer.file.ioctl(number, ADDRESS, FakeMemory())


# mmap.


def test_row_83_private_and_writable(pair: Pair) -> None:
    granted = pair.granter.alloc(2)
    index = pair.peer.map_refs(1, granted.refs)
    with refused(errno.EINVAL, "private"):
        pair.peer.plan(index, shared=False)
    assert pair.pins(granted) == 0


@pytest.mark.parametrize(("offset", "pages"), [(0, 1), (0, 3), (1, 1), (1, 2), (9, 2)], ids=str)
def test_row_84_part_of_an_entry(pair: Pair, offset: int, pages: int) -> None:
    granted = pair.granter.alloc(2, 2)
    pair.peer.map_refs(1, granted.refs)
    with refused(errno.EINVAL, "MAP_GRANT_REF of just that"):
        pair.peer.plan(offset * PAGE_SIZE, pages)


def test_row_85_an_entry_is_mapped_once(pair: Pair) -> None:
    granted = pair.granter.alloc(2)
    index = pair.peer.map_refs(1, granted.refs)
    pair.peer.mmap(index).unmap()
    with refused(errno.EINVAL, "once"):
        pair.peer.plan(index)
    pair.peer.unmap_refs(index, 1)


def test_row_85_a_failed_map_burns_the_entry(pair: Pair) -> None:
    granted = pair.granter.alloc(2, flags=0)
    pair.granter.mmap(granted.at).unmap()
    index = pair.peer.map_refs(1, granted.refs)
    with refused(errno.EINVAL, "read-only"):
        pair.peer.plan(index)
    with refused(errno.EINVAL, "once"):
        pair.peer.plan(index, prot=PROT_READ)


def test_row_86_writable_map_of_a_read_only_grant(pair: Pair) -> None:
    granted = pair.granter.alloc(2, flags=0)
    with refused(errno.EINVAL, "granted read-only, and a writable map was asked for"):
        pair.peer.map(1, *granted.refs)
    assert pair.pins(granted) == 0


def test_a_file_opened_for_reading_can_map_for_reading(core: Core) -> None:
    """The contrast to gntalloc, where that is row 54."""
    granter, peer = Program(core, 1, "gntalloc"), Program(core, 2, "gntdev", os.O_RDONLY)
    granted = granter.alloc(2)
    peer.map(1, *granted.refs, prot=PROT_READ).unmap()
    with refused(errno.EACCES):
        peer.map(1, *granted.refs)


def test_private_and_read_only_is_allowed(pair: Pair) -> None:
    granted = pair.granter.alloc(2)
    index = pair.peer.map_refs(1, granted.refs)
    close_loans(finish_steps(pair.core.carry_out(pair.peer.plan(index, prot=PROT_READ, shared=False))))
    pair.core.settle()
    pair.peer.unmap_refs(index, 1)


def test_pages_of_several_grants_in_any_order_and_twice_become_one_range(pair: Pair) -> None:
    one, two = pair.granter.alloc(2, 2), pair.granter.alloc(2, 2)
    mine = pair.granter.mmap(one.at, 4)
    for page in range(4):
        mine.memory[page * PAGE_SIZE] = page
    order = (3, 0, 2, 2, 1)
    refs = [(*one.refs, *two.refs)[page] for page in order]
    theirs = pair.peer.map(1, *refs)
    assert tuple(theirs.memory[::PAGE_SIZE]) == order
    theirs.unmap()
    mine.unmap()


def test_more_than_128_maps_of_one_page_are_refused_and_undone(pair: Pair) -> None:
    granted = pair.granter.alloc(2)
    theirs = pair.peer.map(1, *granted.refs * 128)
    with refused(errno.EINVAL, "mapped 128 times"):
        pair.peer.map(1, *granted.refs)
    theirs.unmap()
    with refused(errno.EINVAL, "mapped 128 times"):
        pair.peer.map(1, *granted.refs * 129)
    assert pair.pins(granted) == 0


# Read-only means read-only.


def test_a_read_only_grant_waits_for_its_granters_map(pair: Pair) -> None:
    granted = pair.granter.alloc(2, flags=0)
    index = pair.peer.map_refs(1, granted.refs)
    for _ in range(3):  # as often as it likes: that burns no entry
        with refused(errno.EAGAIN, "not mapped it yet"):
            pair.peer.plan(index, prot=PROT_READ)
    assert pair.pins(granted) == 0
    mine = pair.granter.mmap(granted.at)
    theirs = pair.peer.mmap(index, prot=PROT_READ)
    mine.memory[:5] = b"after"
    assert bytes(theirs.memory[:5]) == b"after"
    pair.peer.unmap_refs(index, 1)
    theirs.unmap()
    mine.unmap()


def test_a_read_only_peer_cannot_write_by_opening_its_descriptor_again(pair: Pair) -> None:
    import mmap

    granted = pair.granter.alloc(2, flags=0)
    mine = pair.granter.mmap(granted.at)
    index = pair.peer.map_refs(1, granted.refs)
    (loan,) = finish_steps(pair.core.carry_out(pair.peer.plan(index, prot=PROT_READ)))
    pair.peer.unmap_refs(index, 1)
    again = os.open(f"/proc/self/fd/{loan.descriptor}", os.O_RDWR)
    with pytest.raises(PermissionError):
        mmap.mmap(again, PAGE_SIZE)
    with pytest.raises(PermissionError):
        os.pwrite(again, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(again, 0)
    os.close(again)
    mine.memory[:4] = b"mine"
    assert os.pread(loan.descriptor, 4, 0) == b"mine"
    loan.close()
    mine.unmap()


def test_a_sealed_page_takes_no_new_writable_map_of_its_granter(pair: Pair) -> None:
    granted = pair.granter.alloc(2, flags=0)
    mine = pair.granter.mmap(granted.at)
    theirs = pair.peer.map(1, *granted.refs, prot=PROT_READ)
    with refused(errno.EPERM, "keep that map"):
        pair.granter.plan(granted.at)
    again = pair.granter.mmap(granted.at, prot=PROT_READ)
    mine.memory[0] = 3
    assert (again.memory[0], theirs.memory[0]) == (3, 3)
    for each in (again, theirs, mine):
        each.unmap()


# Ends of life.


def test_row_67_the_same_for_gntdev_close_then_use_the_mapping(pair: Pair) -> None:
    granted = pair.granter.alloc(2)
    theirs = pair.peer.map(1, *granted.refs)
    pair.peer.close()
    theirs.memory[0] = 1
    assert pair.pins(granted) == 1
    theirs.unmap()
    assert pair.pins(granted) == 0


def test_partial_munmap_releases_nothing(pair: Pair) -> None:
    granted = pair.granter.alloc(2, 2)
    theirs = pair.peer.map(1, *granted.refs)
    theirs.unmap(0, 1)
    assert pair.pins(granted) == 2
    theirs.memory[PAGE_SIZE] = 1
    theirs.unmap()
    assert pair.pins(granted) == 0


def test_the_granting_domain_ends_maps_stay_until_unmapped(pair: Pair) -> None:
    granted = pair.granter.alloc(2)
    theirs = pair.peer.map(1, *granted.refs)
    pair.core.destroy(1)
    theirs.memory[:5] = b"still"
    assert bytes(theirs.memory[:5]) == b"still"
    with refused(errno.EINVAL, "no domain 1"):
        pair.peer.map(1, *granted.refs)
    assert pair.core.frames.pages == 1
    theirs.unmap()
    assert pair.core.frames.pages == 0


def test_the_mapping_domain_ends_its_grants_come_back(pair: Pair) -> None:
    granted = pair.granter.alloc(2)
    pair.peer.map_refs(1, granted.refs)
    index = pair.peer.map_refs(1, granted.refs)
    loans = finish_steps(pair.core.carry_out(pair.peer.plan(index, prot=RW)))
    pair.core.destroy(2)
    assert pair.pins(granted) == 1  # its process has it mapped still
    close_loans(loans)
    pair.core.settle()
    assert pair.pins(granted) == 0


def test_a_new_domain_of_an_old_number_has_none_of_its_grants(pair: Pair) -> None:
    granted = pair.granter.alloc(2)
    theirs = pair.peer.map(1, *granted.refs)
    pair.core.destroy(1)
    pair.core.create(1, uid=0)
    with refused(errno.EINVAL, "grants nothing"):
        pair.peer.map(1, *granted.refs)
    fresh = Program(pair.core, 1, "gntalloc").alloc(2)
    theirs.unmap()
    assert pair.core.guest(1).table.usage().live == len(fresh.refs)


def test_references_answer_to_their_domain_alone(pair: Pair) -> None:
    granted = pair.granter.alloc(5)
    with refused(errno.EINVAL, "not granted to domain 2"):
        pair.peer.map(1, *granted.refs)
    assert unpack_from("=I", pack("=I", granted.refs[0]))[0] >= 8


def test_who_maps_by_calls_of_its_own_gets_the_place_in_the_file(core: Core) -> None:
    """As index: where the pages are in order and nothing is at it; or else far away. The kernel maps just that."""
    granter, peer = Program(core, 1, "gntalloc"), Program(core, 2, "gntdev")
    first, second = granter.alloc(2, 3), granter.alloc(2, 2)
    far = 1 << 32

    def index_of(*refs: int) -> int:
        memory = FakeMemory(by_offset=True)
        there = memory.put(ADDRESS, pack("=IIQ", len(refs), 0, 0) + b"".join(pack("=II", 1, ref) for ref in refs))
        assert peer.file.ioctl(MAP, ADDRESS, memory) == 0
        index: int = unpack_from("=Q", there, 8)[0]
        return index

    assert index_of(*second.refs) == second.at == 3 * PAGE_SIZE
    assert index_of(*first.refs[1:]) == PAGE_SIZE
    assert index_of(first.refs[0], second.refs[0]) == far
    assert index_of(*first.refs) == far + 2 * PAGE_SIZE  # where two of them are noted already
    assert index_of(4095) == far + 5 * PAGE_SIZE
    assert index_of(first.refs[0]) == 0
    mapped = peer.mmap(3 * PAGE_SIZE, 2)
    (loan,) = next(record for record in peer.file.records).loans
    assert loan.extent.first == 3
    mapped.unmap()


def test_pages_far_from_the_beginning_of_their_file(core: Core) -> None:
    """Each ALLOC begins in its file where its index says; what is given back there is emptied."""
    granter, peer = Program(core, 1, "gntalloc"), Program(core, 2, "gntdev")
    granter.alloc(2, 5)
    granted = granter.alloc(2, 2)
    mine = granter.mmap(granted.at, 2)
    theirs = peer.mmap(peer.map_refs(1, granted.refs), 2)
    mine.memory[:2], mine.memory[PAGE_SIZE : PAGE_SIZE + 2] = b"ab", b"cd"
    assert (bytes(theirs.memory[:2]), bytes(theirs.memory[PAGE_SIZE : PAGE_SIZE + 2])) == (b"ab", b"cd")
    mine.unmap(0, 2)
    theirs.unmap()
