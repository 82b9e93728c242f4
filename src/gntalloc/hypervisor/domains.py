"""Find domains by domid, so that a mapping of one reaches the grant table of another.

Sources: Xen's common/grant_table.c (status codes of a map; 1024 maptrack frames of 256 handles a domain) and
public/xen.h (numbers from 0x7FF0 up are not domains).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from gntalloc.abi.grants import BAD_DOMAIN, DOMID_FIRST_RESERVED, NO_SPACE
from gntalloc.hypervisor.grants import GrantTable, MapRefused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["DomainExists", "Handle", "Hypervisor"]

Frame = TypeVar("Frame")

MAX_HANDLES = 1024 * 256


class DomainExists(Exception):
    """A domain of that number is there already, or no domain may have that number."""


class Handle(NamedTuple, Generic[Frame]):
    """Stand for one mapped page: keep it to unmap. It names the table itself, so it outlives the granting domain."""

    table: GrantTable[Frame]
    ref: int
    mapper: int
    frame: Frame


class Hypervisor(Generic[Frame]):
    """Keep all domains, and count the pages that they map of each other."""

    def __init__(self) -> None:
        self._tables: dict[int, GrantTable[Frame]] = {}
        self._handles: dict[int, int] = {}

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._tables))

    def create(self, domid: int, table: GrantTable[Frame]) -> None:
        """Let `table` be the grants of a new domain."""
        if domid in self._tables:
            raise DomainExists(f"domain {domid} exists already")
        if not 0 <= domid < DOMID_FIRST_RESERVED:
            raise DomainExists(f"{domid} is no domain's number: they go from 0 to {DOMID_FIRST_RESERVED - 1}")
        self._tables[domid] = table

    def destroy(self, domid: int) -> None:
        """Forget the domain. Pages that others still map stay mapped until they unmap them."""
        del self._tables[domid]

    def look(self, mapper: int, granter: int, ref: int, *, writable: bool) -> Frame:
        """Give the page that `map` would map, for a use that ends before anything else happens. Nothing is counted.

        Raises:
            MapRefused: as `map`.
        """
        return self._may_map(mapper, granter).look(ref, mapper, writable=writable).frame

    def maps(self, mapper: int, granter: int, ref: int) -> bool:
        """Say whether domain `mapper` maps page `ref` of `granter` now."""
        table = self._tables.get(granter)
        return table is not None and mapper in table.mapped_by(ref)

    def map(self, mapper: int, granter: int, ref: int, *, writable: bool) -> Handle[Frame]:
        """Map page `ref` of `granter` for domain `mapper`.

        Raises:
            MapRefused: with Xen's status and the reason.
        """
        table = self._may_map(mapper, granter)
        entry = table.map(ref, mapper, writable=writable)
        self._handles[mapper] = self._handles.get(mapper, 0) + 1
        return Handle(table, ref, mapper, entry.frame)

    def unmap(self, handles: Iterable[Handle[Frame]]) -> None:
        """Undo one `map` for each handle, and tell each table which of its entries nobody maps any more."""
        idle: dict[GrantTable[Frame], list[tuple[int, Frame]]] = {}
        for table, ref, mapper, frame in handles:
            self._handles[mapper] -= 1
            if table.unmap(ref, mapper):
                idle.setdefault(table, []).append((ref, frame))
        for table, entries in idle.items():
            if table.on_idle is not None:
                table.on_idle(entries)

    def _may_map(self, mapper: int, granter: int) -> GrantTable[Frame]:
        table = self._tables.get(granter)
        if table is None:
            raise MapRefused(BAD_DOMAIN, f"there is no domain {granter}")
        if self._handles.get(mapper, 0) >= MAX_HANDLES:
            raise MapRefused(NO_SPACE, f"domain {mapper} maps {MAX_HANDLES} pages already")
        return table
