"""What fails half-way is undone exactly: step i of n, for every i, by taking away what the step needs."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from fake_program import Program, close_loans, refused
from scarce import descriptors_left

from gntalloc.drivers import gntdev
from gntalloc.hypervisor import domains
from gntalloc.maps import PAGE_SIZE, PROT_READ
from gntalloc.steps import finish_steps

if TYPE_CHECKING:
    from gntalloc.machine.machine import Machine as Core

PAGES = 5


def everything(core: Core) -> tuple[object, ...]:
    """All the counts there are."""
    statistics = core.statistics()
    domains_ = [(each["pages_in_use"], each["references"], each["files_mapped"]) for each in statistics["domains"]]
    return statistics["pages"], statistics["extents"], domains_, dict(core._hypervisor._handles)


@pytest.mark.parametrize("left", range(PAGES))
def test_alloc_when_the_table_is_full_after_some(core: Core, left: int) -> None:
    filler = Program(core, 1, "gntalloc")
    filler.guest.gntalloc.limit = 1000
    filler.alloc(2, 504 - left)
    program = Program(core, 1, "gntalloc")
    before = everything(core)
    for _ in range(3):
        with refused(errno.ENOSPC, "grant table"):
            program.alloc(2, PAGES)
        assert everything(core) == before
    filler.dealloc(0, PAGES)
    assert len(program.alloc(2, PAGES).refs) == PAGES


def test_alloc_when_descriptors_run_out_after_some(core: Core) -> None:
    program = Program(core, 1, "gntalloc")
    before = everything(core)
    with descriptors_left(0), refused(errno.ENOMEM, "Too many open files"):
        program.alloc(2, PAGES)
    assert everything(core) == before
    program.alloc(2, PAGES)


def scattered(core: Core, flags: int = 1) -> tuple[Program, tuple[int, ...]]:
    """Pages of as many ALLOCs, each mapped by its granter."""
    granter = Program(core, 1, "gntalloc")
    refs = tuple(granter.alloc(2, 1, flags).refs[0] for _ in range(PAGES))
    return granter, refs


@pytest.mark.parametrize("left", range(PAGES))
def test_mmap_of_gntalloc_when_descriptors_run_out_after_some(core: Core, left: int) -> None:
    granter, _refs = scattered(core)
    before = everything(core)
    plan = granter.plan(0, PAGES)
    with descriptors_left(0), refused(errno.ENOMEM, "Too many open files"):
        finish_steps(core.carry_out(plan))
    assert everything(core) == before
    granter.mmap(0, PAGES).unmap()
    assert everything(core) == before


@pytest.mark.parametrize("left", range(PAGES))
def test_mmap_of_gntdev_when_descriptors_run_out_after_some(core: Core, left: int) -> None:
    _granter, refs = scattered(core)
    peer = Program(core, 2, "gntdev")
    peer.map(1, *refs).unmap()
    before = everything(core)
    index = peer.map_refs(1, refs)
    plan = peer.plan(index, PAGES)
    with descriptors_left(0), refused(errno.ENOMEM, "Too many open files"):
        finish_steps(core.carry_out(plan))
    peer.unmap_refs(index, PAGES)
    assert everything(core) == before


@pytest.mark.parametrize("bad", range(PAGES))
def test_mmap_of_gntdev_when_one_reference_is_bad(core: Core, bad: int) -> None:
    granter, refs = scattered(core)
    peer = Program(core, 2, "gntdev")
    peer.map(1, *refs).unmap()
    granter.dealloc(bad * PAGE_SIZE)
    before = everything(core)
    with refused(errno.EINVAL, "grants nothing"):
        peer.map(1, *refs)
    assert everything(core) == before


@pytest.mark.parametrize("left", range(PAGES))
def test_mmap_of_gntdev_when_handles_run_out_after_some(core: Core, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _granter, refs = scattered(core)
    peer = Program(core, 2, "gntdev")
    peer.map(1, *refs).unmap()
    before = everything(core)
    monkeypatch.setattr(domains, "MAX_HANDLES", left)
    with refused(errno.EINVAL, f"maps {left} pages already"):
        peer.map(1, *refs)
    assert everything(core) == before


@pytest.mark.parametrize("unready", range(PAGES))
def test_mmap_of_read_only_pages_when_one_is_not_ready(core: Core, unready: int) -> None:
    """Not one of the others is sealed or mapped by that try."""
    granter, refs = scattered(core, flags=0)
    maps = [granter.mmap(page * PAGE_SIZE) for page in range(PAGES) if page != unready]
    peer = Program(core, 2, "gntdev")
    index = peer.map_refs(1, refs)
    before = everything(core)
    with refused(errno.EAGAIN):
        peer.plan(index, PAGES, PROT_READ)
    assert dict.fromkeys(core._hypervisor._handles, 0) == core._hypervisor._handles
    assert everything(core)[:3] == before[:3]
    maps.append(granter.mmap(unready * PAGE_SIZE))
    maps += [granter.mmap(page * PAGE_SIZE) for page in range(PAGES)]  # which a seal would have refused
    theirs = peer.mmap(index, PAGES, PROT_READ)
    peer.unmap_refs(index, PAGES)
    for each in (*maps, theirs):
        each.unmap()


def test_a_map_whose_answer_never_arrived_is_undone(core: Core) -> None:
    granter, refs = scattered(core)
    peer = Program(core, 2, "gntdev")
    peer.map(1, *refs).unmap()
    before = everything(core)
    index = peer.map_refs(1, refs)
    loans = finish_steps(core.carry_out(peer.plan(index, PAGES)))
    peer.unmap_refs(index, PAGES)
    close_loans(loans[1:])
    core.settle()
    assert granter.guest.table.mapped_by(refs[1]) == (2,)  # a map lives until its last piece goes
    close_loans(loans[:1])
    core.settle()
    assert everything(core) == before


def test_references_noted_down_are_bounded(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """MAP_GRANT_REF maps nothing, so nothing else would stop a program from filling the machine's memory with them."""
    monkeypatch.setattr(gntdev, "MAX_NOTED", 10)
    one, two = Program(core, 2, "gntdev"), Program(core, 2, "gntdev")
    index = one.map_refs(1, (8,) * 6)
    with refused(errno.ENOMEM, "10 references"):
        two.map_refs(1, (8,) * 5)
    other = two.map_refs(1, (8,) * 4)
    one.unmap_refs(index, 6)
    two.map_refs(1, (8,) * 6)
    two.unmap_refs(other, 4)
    two.close()
    one.map_refs(1, (8,) * 10)
