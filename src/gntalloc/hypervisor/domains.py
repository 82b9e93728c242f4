"""Find domains by domid, so that a mapping of one reaches the grant table of another.

Sources: Xen's common/grant_table.c (status codes of a map; 1024 maptrack frames of 256 handles a domain) and
public/xen.h (numbers from 0x7FF0 up are not domains).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from gntalloc.abi.grants import BAD_DOMAIN, DOMID_FIRST_RESERVED, NO_SPACE
from gntalloc.hypervisor.grants import Grant, GrantTable, MapRefused, Span

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["DomainExists", "Handle", "Hypervisor", "common"]

AnySpan = TypeVar("AnySpan", bound="Span")  # type: ignore[type-arg]

MAX_HANDLES = 1024 * 256


class DomainExists(Exception):
    """A domain of that number is there already, or no domain may have that number."""


class Handle(NamedTuple, Generic[AnySpan]):
    """Stand for mapped pages of one grant, from `page` on: keep it to unmap them.

    It names the table itself, so it outlives the granting domain.
    """

    table: GrantTable[AnySpan]
    grant: Grant[Any]
    page: int
    pages: int


class Hypervisor(Generic[AnySpan]):
    """Keep all domains, and count the pages that they map of each other."""

    def __init__(self) -> None:
        self._tables: dict[int, GrantTable[AnySpan]] = {}
        self._handles: dict[int, int] = {}

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._tables))

    def create(self, domid: int, table: GrantTable[AnySpan]) -> None:
        """Let `table` be the grants of a new domain."""
        if domid in self._tables:
            raise DomainExists(f"domain {domid} exists already")
        if not 0 <= domid < DOMID_FIRST_RESERVED:
            raise DomainExists(f"{domid} is no domain's number: they go from 0 to {DOMID_FIRST_RESERVED - 1}")
        self._tables[domid] = table

    def destroy(self, domid: int) -> None:
        """Forget the domain. Pages that others still map stay mapped until they unmap them."""
        del self._tables[domid]

    def look(self, mapper: int, granter: int, ref: int, *, writable: bool) -> tuple[AnySpan, int]:
        """Give the page that `map` would map, for a use that ends before anything else happens. Nothing is counted.

        Returns: its span, and its number within the grant.

        Raises:
            MapRefused: as `map`.
        """
        table = self._may_map(mapper, granter)
        return table.look(ref, mapper, writable=writable), table.page_of(ref)

    def maps(self, mapper: int, granter: int, ref: int) -> bool:
        """Say whether domain `mapper` maps page `ref` of `granter` now."""
        table = self._tables.get(granter)
        return table is not None and mapper in table.mapped_by(ref)

    def map(self, mapper: int, granter: int, refs: Sequence[int], at: int = 0, *, writable: bool) -> Handle[AnySpan]:
        """Map pages of `granter` for domain `mapper`: that of `refs[at]`, and those after it that follow in its span.

        Raises:
            MapRefused: with Xen's status and the reason.
        """
        table = self._may_map(mapper, granter)
        first = refs[at]
        span, page = table.look(first, mapper, writable=writable), table.page_of(first)
        there = self._handles.get(mapper, 0)
        most = min(len(refs) - at, span.page + span.count - page, MAX_HANDLES - there)
        count = 1 if most == 1 else common(refs, at, span.grant.refs, page, most)
        table.map(span.grant, page, count)
        self._handles[mapper] = there + count
        return Handle(table, span.grant, page, count)

    def unmap(self, handles: Iterable[Handle[AnySpan]]) -> None:
        """Undo one `map` for each handle, and tell each table which of its spans nobody maps any more."""
        idle: dict[GrantTable[AnySpan], list[AnySpan]] = {}
        for table, grant, page, count in handles:
            self._handles[grant.domid] -= count
            spans = table.unmap(grant, page, count)
            if spans:
                idle.setdefault(table, []).extend(spans)
        for table, spans in idle.items():
            if table.on_idle is not None:
                table.on_idle(spans)

    def _may_map(self, mapper: int, granter: int) -> GrantTable[AnySpan]:
        table = self._tables.get(granter)
        if table is None:
            raise MapRefused(BAD_DOMAIN, f"there is no domain {granter}")
        if self._handles.get(mapper, 0) >= MAX_HANDLES:
            raise MapRefused(NO_SPACE, f"domain {mapper} maps {MAX_HANDLES} pages already")
        return table


def common(refs: Sequence[int], at: int, granted: Sequence[int], page: int, most: int) -> int:
    """Count how many of `refs`, from `at` on, are those granted from `page` on, up to `most`. It is one at least."""
    count = 1
    more = 1
    while more and refs[at + count : at + count + more] == granted[page + count : page + count + more]:
        count += more
        more = min(2 * more, most - count)
    while count < most and refs[at + count] == granted[page + count]:
        count += 1
    return count
