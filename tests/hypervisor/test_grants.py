"""Grant tables and domains: pure state, and rules that must hold whatever is called in whatever order."""

from __future__ import annotations

import random

import pytest

from gntalloc.abi.grants import BAD_DOMAIN, BAD_GNTREF, GENERAL_ERROR, NO_SPACE
from gntalloc.hypervisor import domains
from gntalloc.hypervisor.domains import DomainExists, Hypervisor
from gntalloc.hypervisor.grants import GrantTable, MapRefused, TableFull


def table_of(owner: int = 1, frames: int = 1, *, oldest_first: bool = True, refuse: bool = True) -> GrantTable[str]:
    return GrantTable(owner, max_frames=frames, oldest_first=oldest_first, refuse_while_ending=refuse)


def status_of(table: GrantTable[str], ref: int, mapper: int = 2, *, writable: bool = True) -> int:
    with pytest.raises(MapRefused) as caught:
        table.map(ref, mapper, writable=writable)
    assert len(caught.value.why) > 10
    return caught.value.status


def test_references_start_after_the_reserved_ones_and_end_with_the_table() -> None:
    table = table_of(frames=2)
    assert [table.permit(2, [""], readonly=False)[0] for _ in range(1016)] == list(range(8, 1024))
    with pytest.raises(TableFull):
        table.permit(2, [""], readonly=False)[0]
    assert table.usage() == (1016, 0, 1016)
    assert table.end([500]) == []
    assert table.permit(2, [""], readonly=False)[0] == 500


@pytest.mark.parametrize(("oldest_first", "expected"), [(True, [508, 509, 510]), (False, [10, 9, 8])])
def test_which_reference_comes_next(oldest_first: bool, expected: list[int]) -> None:
    table = table_of(oldest_first=oldest_first)
    for _ in range(500):
        table.permit(2, [""], readonly=False)[0]
    live = sorted(table._entries)
    for ref in live[:3]:
        table.end([ref])
    if oldest_first:
        assert [table.permit(2, [""], readonly=False)[0] for _ in range(3)] == expected
    else:
        assert [table.permit(2, [""], readonly=False)[0] for _ in range(3)] == live[:3][::-1]


def test_why_a_map_is_refused() -> None:
    table = table_of()
    ref, readonly = table.permit(2, ["a"], readonly=False)[0], table.permit(2, ["b"], readonly=True)[0]
    assert status_of(table, 512) == BAD_GNTREF
    assert status_of(table, 1 << 40) == BAD_GNTREF
    assert status_of(table, 0) == GENERAL_ERROR
    assert status_of(table, ref + 5) == GENERAL_ERROR
    assert status_of(table, ref, mapper=3) == GENERAL_ERROR
    assert status_of(table, readonly) == GENERAL_ERROR
    assert table.map(readonly, 2, writable=False).frame == "b"


@pytest.mark.parametrize("refuse", [True, False])
def test_an_ending_entry(refuse: bool) -> None:
    table = table_of(refuse=refuse)
    ref = table.permit(2, [""], readonly=False)[0]
    table.map(ref, 2, writable=True)
    assert table.end([ref]) == [ref]
    if refuse:
        assert status_of(table, ref) == GENERAL_ERROR
    else:
        table.map(ref, 2, writable=True)
        assert not table.unmap(ref, 2)
    assert table.unmap(ref, 2)  # the last of all
    assert table.usage().live == 1  # nothing is freed behind its owner's back
    assert table.end([ref]) == []
    assert table.usage().live == 0


def test_busy_is_as_good_as_mapped() -> None:
    table = table_of()
    ref = table.permit(2, [""], readonly=False)[0]
    assert table.end([ref], busy=True) == [ref]
    assert status_of(table, ref) == GENERAL_ERROR
    assert table.end([ref]) == []


def test_domains_have_numbers_of_domains() -> None:
    hypervisor: Hypervisor[str] = Hypervisor()
    for domid in (0, 0x7FEF):
        hypervisor.create(domid, table_of(domid))
    for domid in (-1, 0x7FF0, 1 << 40):
        with pytest.raises(DomainExists, match="no domain's number"):
            hypervisor.create(domid, table_of(domid))
    with pytest.raises(DomainExists, match="exists already"):
        hypervisor.create(0, table_of(0))
    assert list(hypervisor) == [0, 0x7FEF]


def test_no_more_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domains, "MAX_HANDLES", 3)
    hypervisor: Hypervisor[str] = Hypervisor()
    table = table_of()
    hypervisor.create(1, table)
    ref = table.permit(2, [""], readonly=False)[0]
    handles = [hypervisor.map(2, 1, ref, writable=True) for _ in range(3)]
    with pytest.raises(MapRefused) as caught:
        hypervisor.map(2, 1, ref, writable=True)
    assert caught.value.status == NO_SPACE
    hypervisor.unmap([handles.pop()])
    hypervisor.map(2, 1, ref, writable=True)


def test_a_table_is_told_once_which_entries_nobody_maps_any_more() -> None:
    hypervisor: Hypervisor[str] = Hypervisor()
    table = table_of()
    hypervisor.create(1, table)
    told: list[list[tuple[int, str]]] = []
    table.on_idle = told.append
    one, two, three = table.permit(2, ["one", "two", "three"], readonly=False)
    handles = [hypervisor.map(2, 1, ref, writable=True) for ref in (one, two, two, three)]
    hypervisor.unmap(handles[:2])
    assert told == [[(one, "one")]]
    hypervisor.unmap(handles[2:])
    assert told[1:] == [[(two, "two"), (three, "three")]]


def test_a_handle_outlives_the_granting_domain() -> None:
    hypervisor: Hypervisor[str] = Hypervisor()
    table = table_of()
    hypervisor.create(1, table)
    handle = hypervisor.map(2, 1, table.permit(2, ["page"], readonly=False)[0], writable=True)
    hypervisor.destroy(1)
    assert handle.frame == "page"
    with pytest.raises(MapRefused) as caught:
        hypervisor.map(2, 1, handle.ref, writable=True)
    assert caught.value.status == BAD_DOMAIN
    hypervisor.unmap([handle])
    assert table.end([handle.ref]) == []


@pytest.mark.parametrize("seed", range(5))
def test_in_any_order_of_calls_the_counts_agree(seed: int) -> None:
    """Live entries and free references make up the table; an entry goes when it is ended and nobody maps it."""
    chance = random.Random(seed)
    table = table_of(frames=1)
    ended: set[int] = set()
    pins: dict[int, int] = {}

    for _ in range(3000):
        deed = chance.choice(("permit", "map", "unmap", "end"))
        ref = chance.choice(sorted(pins)) if pins else 0
        if deed == "permit" and len(pins) < 504:
            pins[table.permit(2, [""], readonly=False)[0]] = 0
        elif deed == "map" and ref:
            if ref in ended or pins[ref] == 128:
                assert status_of(table, ref) == GENERAL_ERROR
            else:
                table.map(ref, 2, writable=True)
                pins[ref] += 1
        elif deed == "unmap" and ref and pins[ref]:
            pins[ref] -= 1
            assert table.unmap(ref, 2) == (not pins[ref])
            if not pins[ref] and ref in ended:
                assert table.end([ref]) == []
                ended.remove(ref)
                del pins[ref]
        elif deed == "end" and ref and ref not in ended:
            gone = not table.end([ref])
            assert gone == (pins[ref] == 0)
            if gone:
                del pins[ref]
            else:
                ended.add(ref)
        assert table.usage() == (len(pins), 504 - len(pins), 504)
        assert all((2,) * bool(count) == table.mapped_by(ref) for ref, count in pins.items())


@pytest.mark.parametrize("oldest_first", [True, False])
def test_references_are_given_out_in_order_however_many_there_were(oldest_first: bool) -> None:
    table: GrantTable[str] = GrantTable(1, max_frames=64, oldest_first=oldest_first)
    refs = table.permit(2, [""] * 30_000, readonly=False)
    assert len(set(refs)) == 30_000
    assert table.end(refs) == []
    given = table.permit(2, [""] * 20_000, readonly=False)
    assert len(set(given)) == 20_000
    if not oldest_first:
        assert given == refs[::-1][:20_000]  # those freed last come first
    usage = table.usage()
    assert (usage.live, usage.live + usage.free) == (20_000, table._frames * 512 - 8)
    assert sorted([*given, *table._free]) == list(range(8, table._frames * 512))
