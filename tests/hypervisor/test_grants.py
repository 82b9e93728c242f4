"""Grant tables and domains: pure state, and rules that must hold whatever is called in whatever order."""

from __future__ import annotations

import random
from typing import TypeAlias

import pytest

from gntalloc.abi.grants import BAD_DOMAIN, BAD_GNTREF, GENERAL_ERROR, NO_SPACE
from gntalloc.hypervisor import domains
from gntalloc.hypervisor.domains import DomainExists, Hypervisor
from gntalloc.hypervisor.grants import Grant, GrantTable, MapRefused, Span, TableFull

Pages: TypeAlias = "Span[Grant[str]]"
Table: TypeAlias = "GrantTable[Pages]"


def table_of(owner: int = 1, frames: int = 1, *, oldest_first: bool = True, refuse: bool = True) -> Table:
    return GrantTable(owner, max_frames=frames, oldest_first=oldest_first, refuse_while_ending=refuse)


def permit(table: Table, pages: int = 1, *, name: str = "", readonly: bool = False) -> Pages:
    span: Pages = Span(Grant(2, name, readonly))
    table.permit(span, pages)
    return span


def status_of(table: Table, ref: int, mapper: int = 2, *, writable: bool = True) -> int:
    with pytest.raises(MapRefused) as caught:
        table.look(ref, mapper, writable=writable)
    assert len(caught.value.why) > 10
    return caught.value.status


def test_references_start_after_the_reserved_ones_and_end_with_the_table() -> None:
    table = table_of(frames=2)
    spans = [permit(table) for _ in range(1016)]
    assert [span.refs[0] for span in spans] == list(range(8, 1024))
    with pytest.raises(TableFull):
        permit(table)
    assert table.usage() == (1016, 0, 1016)
    assert table.end(spans[492])
    assert permit(table).refs[0] == 500


@pytest.mark.parametrize(("oldest_first", "expected"), [(True, [508, 509, 510]), (False, [10, 9, 8])])
def test_which_reference_comes_next(oldest_first: bool, expected: list[int]) -> None:
    table = table_of(oldest_first=oldest_first)
    spans = sorted([permit(table) for _ in range(500)], key=lambda span: span.refs[0])
    live = [span.refs[0] for span in spans]
    for span in spans[:3]:
        table.end(span)
    given = [permit(table).refs[0] for _ in range(3)]
    assert given == (expected if oldest_first else live[:3][::-1])


def test_why_a_map_is_refused() -> None:
    table = table_of()
    (ref,), (readonly,) = permit(table, name="a").refs, permit(table, name="b", readonly=True).refs
    assert status_of(table, 512) == BAD_GNTREF
    assert status_of(table, 1 << 40) == BAD_GNTREF
    assert status_of(table, 0) == GENERAL_ERROR
    assert status_of(table, ref + 5) == GENERAL_ERROR
    assert status_of(table, ref, mapper=3) == GENERAL_ERROR
    assert status_of(table, readonly) == GENERAL_ERROR
    assert table.look(readonly, 2, writable=False).grant.memory == "b"


@pytest.mark.parametrize("refuse", [True, False])
def test_an_ending_span(refuse: bool) -> None:
    table = table_of(refuse=refuse)
    span = permit(table)
    (ref,) = span.refs
    table.map(span.grant, 0, 1)
    assert not table.end(span)
    if refuse:
        assert status_of(table, ref) == GENERAL_ERROR
    else:
        table.map(table.look(ref, 2, writable=True).grant, 0, 1)
        assert table.unmap(span.grant, 0, 1) == []
    assert table.unmap(span.grant, 0, 1) == [span]  # the last of all
    assert table.usage().live == 1  # nothing is freed behind its owner's back
    assert table.end(span)
    assert table.usage().live == 0


def test_busy_is_as_good_as_mapped() -> None:
    table = table_of()
    span = permit(table)
    assert not table.end(span, busy=True)
    assert status_of(table, span.refs[0]) == GENERAL_ERROR
    assert table.end(span)


def test_domains_have_numbers_of_domains() -> None:
    hypervisor: Hypervisor[Pages] = Hypervisor()
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
    hypervisor: Hypervisor[Pages] = Hypervisor()
    table = table_of()
    hypervisor.create(1, table)
    refs = permit(table, 5).refs
    handle = hypervisor.map(2, 1, refs, writable=True)
    assert handle[1:] == (handle.grant, 0, 3)  # as many as it may
    with pytest.raises(MapRefused) as caught:
        hypervisor.map(2, 1, refs[3:], writable=True)
    assert caught.value.status == NO_SPACE
    hypervisor.unmap([handle])
    assert hypervisor.map(2, 1, refs[3:], writable=True).pages == 2


def test_one_map_takes_what_follows_in_one_span() -> None:
    hypervisor: Hypervisor[Pages] = Hypervisor()
    table = table_of()
    hypervisor.create(1, table)
    refs = permit(table, 6).refs
    assert hypervisor.map(2, 1, [refs[1], refs[2], refs[4]], writable=True)[2:] == (1, 2)
    assert [span.pins for _, span in table.each()] == [0, 1, 1, 0, 0, 0]
    assert hypervisor.map(2, 1, refs, writable=True)[2:] == (0, 1)  # the others have gone their own way
    assert hypervisor.map(2, 1, [refs[0], refs[2], refs[1]], 1, writable=True)[2:] == (2, 1)
    assert [span.pins for _, span in table.each()] == [1, 1, 2, 0, 0, 0]


def test_a_table_is_told_once_which_spans_nobody_maps_any_more() -> None:
    hypervisor: Hypervisor[Pages] = Hypervisor()
    table = table_of()
    hypervisor.create(1, table)
    told: list[list[int]] = []
    table.on_idle = lambda spans: told.append([ref for span in spans for ref in span.refs])
    one, two, three = permit(table, 3).refs
    handles = [hypervisor.map(2, 1, [ref], writable=True) for ref in (one, two, two, three)]
    hypervisor.unmap(handles[:2])
    assert told == [[one]]
    hypervisor.unmap(handles[2:])
    assert told[1:] == [[two, three]]


def test_a_handle_outlives_the_granting_domain() -> None:
    hypervisor: Hypervisor[Pages] = Hypervisor()
    table = table_of()
    hypervisor.create(1, table)
    span = permit(table, name="page")
    handle = hypervisor.map(2, 1, span.refs, writable=True)
    hypervisor.destroy(1)
    assert handle.grant.memory == "page"
    with pytest.raises(MapRefused) as caught:
        hypervisor.map(2, 1, span.refs, writable=True)
    assert caught.value.status == BAD_DOMAIN
    hypervisor.unmap([handle])
    assert table.end(span)


@pytest.mark.parametrize("seed", range(20))
def test_split_in_any_order_each_page_goes_its_own_way(seed: int) -> None:
    """Page by page: who has it, how often it is mapped, and that each reference is used once."""
    chance = random.Random(seed)
    table = table_of(frames=1, oldest_first=chance.random() < 0.5)
    for span in [permit(table) for _ in range(chance.randrange(200))]:
        if chance.random() < 0.7:
            table.end(span)  # so that references are out of order
    taken = {ref for ref, _ in table.each()}
    pages = 40
    whole = permit(table, pages)
    grant, refs = whole.grant, list(whole.refs)
    splits: list[tuple[Pages, Pages]] = []
    table.on_split = lambda span, part: splits.append((span, part))
    pins, gone = [0] * pages, set[int]()
    for _ in range(300):
        first = chance.randrange(pages)
        count = chance.randrange(1, pages - first + 1)
        deed, those = chance.choice(("map", "unmap", "end", "isolate")), range(first, first + count)
        if gone.intersection(those):
            continue
        if deed == "map" and max(pins[first : first + count]) < 100:
            table.map(grant, first, count)
            for page in those:
                pins[page] += 1
        elif deed == "unmap" and min(pins[first : first + count]):
            idle = table.unmap(grant, first, count)
            for page in those:
                pins[page] -= 1
            told = sorted(span.page + at for span in idle for at in range(span.count))
            assert told == [page for page in those if not pins[page]]
        elif deed == "end" and not any(pins[first : first + count]) and chance.random() < 0.1:
            for part in table.isolate(grant, first, count, chance.randrange(1, 9)):
                assert part is not None
                assert table.end(part)
            gone.update(those)
        elif deed == "isolate":
            most = chance.randrange(1, 9)
            spans = list(table.isolate(grant, first, count, most))
            assert [page for span in spans if span for page in range(span.page, span.page + span.count)] == list(those)
            assert all(span and span.count <= most for span in spans)
        here = {ref: span for ref, span in table.each() if ref not in taken}
        assert sorted(here) == sorted(ref for page, ref in enumerate(refs) if page not in gone)
        for page, ref in enumerate(refs):
            if page not in gone:
                span = here[ref]
                assert (table.page_of(ref), span.pins, span.grant) == (page, pins[page], grant)
                assert span.page <= page < span.page + span.count
        assert sum(span.count for span in dict.fromkeys(here.values())) == len(here)
        there = list(table.spans(grant, 0, pages))
        assert sum(span.count if span else 1 for span in there) == pages
        assert table.usage() == (len(here) + len(taken), 504 - len(here) - len(taken), 504)
    assert splits


@pytest.mark.parametrize("seed", range(5))
def test_in_any_order_of_calls_the_counts_agree(seed: int) -> None:
    """Live spans and free references make up the table; a span goes when it is ended and nobody maps it."""
    chance = random.Random(seed)
    table = table_of(frames=1)
    ended: set[Pages] = set()
    pins: dict[Pages, int] = {}

    for _ in range(3000):
        deed = chance.choice(("permit", "map", "unmap", "end"))
        span = chance.choice(list(pins)) if pins else None
        if deed == "permit" and len(pins) < 504:
            pins[permit(table)] = 0
        elif span is None:
            continue
        elif deed == "map":
            if span in ended or pins[span] == 128:
                assert status_of(table, span.refs[0]) == GENERAL_ERROR
            else:
                table.map(table.look(span.refs[0], 2, writable=True).grant, 0, 1)
                pins[span] += 1
        elif deed == "unmap" and pins[span]:
            pins[span] -= 1
            assert table.unmap(span.grant, 0, 1) == [span] * (not pins[span])
            if not pins[span] and span in ended:
                assert table.end(span)
                ended.remove(span)
                del pins[span]
        elif deed == "end" and span not in ended:
            gone = table.end(span)
            assert gone == (pins[span] == 0)
            if gone:
                del pins[span]
            else:
                ended.add(span)
        assert table.usage() == (len(pins), 504 - len(pins), 504)
        assert all((2,) * bool(count) == table.mapped_by(each.refs[0]) for each, count in pins.items())


@pytest.mark.parametrize("oldest_first", [True, False])
def test_references_are_given_out_in_order_however_many_there_were(oldest_first: bool) -> None:
    table: Table = GrantTable(1, max_frames=64, oldest_first=oldest_first)
    span = permit(table, 30_000)
    refs = list(span.refs)
    assert len(set(refs)) == 30_000
    assert table.end(span)
    given = list(permit(table, 20_000).refs)
    assert len(set(given)) == 20_000
    if not oldest_first:
        assert given == refs[::-1][:20_000]  # those freed last come first
    usage = table.usage()
    assert (usage.live, usage.live + usage.free) == (20_000, table._frames * 512 - 8)
    assert sorted([*given, *table._free]) == list(range(8, table._frames * 512))
