"""Are the machine's books right? Everything is counted again from what there is, and compared with the counters.

For a machine in this process (`gntalloc.machine.machine.Machine`), between two calls, after it has settled. What is
never written down twice cannot be wrong; this is about all that is: users of pages, units of the limit, references,
mappings of them, memory, descriptions of it, ports and who refers to them.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

from gntalloc.abi.grants import RESERVED_REFS, V1_ENTRIES_PER_FRAME
from gntalloc.drivers.gntdev import Entry
from gntalloc.drivers.gntdev import FileState as GntdevState
from gntalloc.drivers.grefs import FileState as GntallocState
from gntalloc.hypervisor.ports import State
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc.drivers.chardev import Extent, File, Frame, Record
    from gntalloc.drivers.evtchn import EvtchnDriver
    from gntalloc.drivers.grefs import Gref
    from gntalloc.drivers.notify import Promise
    from gntalloc.drivers.pages import GrantedPages
    from gntalloc.hypervisor.grants import GrantTable
    from gntalloc.machine.machine import Guest, Machine

__all__ = ["recount"]

__tracebackhide__ = True  # for pytest: what is raised here is about the caller's program


def recount(machine: Machine) -> None:
    """Count everything.

    Raises:
        AssertionError: the books are wrong; the text says where.
    """
    wrong = list(_Census(machine).wrong())
    if wrong:
        raise AssertionError("the books are wrong: " + "; ".join(wrong))


class _Census:
    """What there is, found by following references and by no counter."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        # A domain that is gone has left its pages to those who map them: they are found by what the kernel is asked.
        frames = machine.frames
        listened_to = [*frames._watches.values(), *frames._planned, *frames._unheard, *frames._unsolved]
        owners = [extent.changed.__self__ for extent in listened_to]
        there = [guest.gntalloc._pages for guest in machine.guests.values()] + owners
        self.domains: list[GrantedPages] = list(dict.fromkeys(there))
        self.grefs: list[Gref] = [gref for pages in self.domains for gref in pages.grefs]
        self.pages: Counter[Extent] = Counter(gref.frame.extent for gref in self.grefs)
        self.records: dict[Record, None] = {}
        self.files: dict[File, None] = {}
        for file in self._find_files():
            self.files[file] = None
            self.records.update(dict.fromkeys(file.records))
        self.entries = list(self._find_entries())

    def _find_files(self) -> Iterator[File]:
        for guest in self.machine.guests.values():
            yield from guest.files
        for gref in self.grefs:
            yield gref.file
        for extent in self.pages:  # closed, and alive by what is mapped of it
            yield from (loan.holder.file for loan in extent.loans)

    def _find_entries(self) -> Iterator[Entry]:
        """Of gntdev: listed by a file, or only mapped."""
        found = [entry for file in self.files if isinstance(file.state, GntdevState) for entry in file.state.entries]
        found += [record.payload for record in self.records if isinstance(record.payload, Entry)]
        return iter(dict.fromkeys(found))

    def wrong(self) -> Iterator[str]:
        """Yield a line for each thing that does not agree."""
        yield from self._users()
        yield from self._memory()
        yield from self._descriptions()
        yield from self._mappings()
        for pages in self.domains:
            yield from _limit(pages)
            yield from _references(pages)
        for guest in self.machine.guests.values():
            yield from self._noted(guest)
            yield from self._ports(guest)

    def _users(self) -> Iterator[str]:
        """Compare a page's users with the file's list and each live mmap. A page without users lingers."""
        mapped = Counter(gref for record in self.records if isinstance(record.payload, list) for gref in record.payload)
        for gref in self.grefs:
            name = f"page {gref.ref} of pid {gref.file.opener}"
            state = gref.file.state
            assert isinstance(state, GntallocState)
            listed = state.grefs.get(gref.index) is gref
            yield from _differ(f"users of {name}", gref.users, listed + mapped[gref])
            yield from _differ(f"off the list: {name}", state.released.get(gref.index) is gref, not listed)
        known = set(self.grefs)
        for file in self.files:
            if isinstance(file.state, GntallocState):
                theirs = {*file.state.grefs.values(), *file.state.released.values()}
                yield from _differ("pages of a file that are none of the driver's", len(theirs - known), 0)

    def _memory(self) -> Iterator[str]:
        """Compare an extent's pages with those of its grefs, and the machine's memory with its extents."""
        frames = self.machine.frames
        yield from _differ("extents", frames.extents, len(self.pages))
        yield from _differ("pages of memory", frames.pages, sum(extent.pages for extent in self.pages))
        for extent, pages in self.pages.items():
            yield from _differ("pages in use of an extent", extent.in_use, pages)
            size = (extent.first + extent.pages) * PAGE_SIZE
            yield from _differ("bytes of an extent", os.fstat(extent.master).st_size, size)

    def _descriptions(self) -> Iterator[str]:
        """Compare loans with their extents, with the mmaps they were made for, and with the listeners for their end."""
        loans = [loan for extent in self.pages for loan in extent.loans]
        theirs = [loan for record in self.records for loan in record.loans]
        yield from _differ("loans of mmaps that no extent has", len(set(theirs) - set(loans)), 0)
        yield from _differ("loans of extents that no mmap has", len(set(loans) - set(theirs)), 0)
        yield from _differ("mmaps without a loan", sum(not record.loans for record in self.records), 0)
        frames = self.machine.frames
        planned, watches = {*frames._planned, *frames._unheard, *frames._unsolved}, frames._watches
        for extent in self.pages:
            sides = Counter(loan.granters for loan in extent.loans)
            yield from _differ("live loans of an extent", extent.live, [sides[False], sides[True]])
            heard = extent in planned or watches.get(extent.watch) is extent
            if extent.lent and not heard:
                yield "somebody has an extent, and nobody listens for its end"
            if extent.loans and not extent.lent:
                yield "an extent has loans, and by the books nobody has it"

    def _mappings(self) -> Iterator[str]:
        """Compare the pins of grants with their handles, and a domain's handles with the pages that it maps."""
        handles = [handle for entry in self.entries for handle in entry.handles]
        of_mapper = Counter(handle.mapper for handle in handles)
        there = self.machine._hypervisor._handles
        yield from _differ("handles of each domain", {key: n for key, n in there.items() if n}, dict(of_mapper))
        pins: dict[GrantTable[Frame], Counter[tuple[int, int]]] = {pages._table: Counter() for pages in self.domains}
        for handle in handles:
            pins[handle.table][handle.ref, handle.mapper] += 1
        for table, pinned in pins.items():
            said = {(ref, who): n for ref, entry in table._entries.items() for who, n in entry.mappers.items()}
            yield from _differ(f"who maps what of domain {table.owner}", said, dict(pinned))
            sums = {ref: sum(entry.mappers.values()) for ref, entry in table._entries.items()}
            yield from _differ(f"pins of domain {table.owner}", {r: e.pins for r, e in table._entries.items()}, sums)

    def _noted(self, guest: Guest) -> Iterator[str]:
        """Compare the references noted by MAP_GRANT_REF with the entries that files list."""
        driver = guest.gntdev
        listed = [
            entry.count
            for file in self.files
            if file.driver is driver and isinstance(file.state, GntdevState)
            for entry in file.state.entries
        ]
        yield from _differ(f"references noted in domain {guest.domid}", driver._noted, sum(listed))

    def _ports(self, guest: Guest) -> Iterator[str]:
        """Compare a port's references with its file and with each promise that is still to be kept."""
        driver = guest.evtchn
        promised = Counter(promise._port for promise in self._promises(driver))
        for number, bound in driver._bound.items():
            name = f"port {number} of domain {guest.domid}"
            yield from _differ(f"references to {name}", bound.references, (bound.file is not None) + promised[number])
        there = {number for number, port in driver._ports._ports.items() if number not in _ports_of_the_kernel(driver)}
        yield from _differ(f"ports of domain {guest.domid}", there - set(driver._bound), set())
        for number, port in driver._ports._ports.items():
            if port.state is State.INTERDOMAIN:
                other = driver._ports._domains[port.peer]._ports[port.remote]
                ends = (other.state, other.peer, other.remote)
                yield from _differ(f"the other end of port {number}", ends, (port.state, guest.domid, number))

    def _promises(self, ports: EvtchnDriver) -> Iterator[Promise]:
        promises = [gref.promise for gref in self.grefs if gref.users] + [entry.promise for entry in self.entries]
        for promise in promises:
            if promise is not None and promise._ports is ports and promise._port is not None:
                yield promise


def _limit(pages: GrantedPages) -> Iterator[str]:
    """Every page that is there counts, or every page that somebody uses."""
    counted = [gref for gref in pages.grefs if gref.users or pages._behaviour.count_held_pages]
    yield from _differ(f"pages in use of domain {pages._table.owner}", pages.in_use, len(counted))
    lingering = {gref for grefs in pages.lingering.values() for gref in grefs.values()}
    yield from _differ("lingering pages", lingering, {gref for gref in pages.grefs if not gref.users})


def _references(pages: GrantedPages) -> Iterator[str]:
    """Each page has an entry of the table, each other reference is free, once."""
    table = pages._table
    said = {ref: (entry.frame, entry.domid, entry.readonly, entry.ending) for ref, entry in table._entries.items()}
    due = {gref.ref: (gref.frame, gref.domid, gref.readonly, not gref.users) for gref in pages.grefs}
    yield from _differ(f"grants of domain {table.owner}", said, due)
    numbers = sorted([*table._free, *table._entries])
    every = range(RESERVED_REFS, table._frames * V1_ENTRIES_PER_FRAME)
    yield from _differ(f"references of domain {table.owner}, each once", numbers == list(every), True)


def _ports_of_the_kernel(driver: EvtchnDriver) -> set[int]:
    """List the four ports that are there before any program is."""
    return {1, 2, 3, 4} - set(driver._bound)


def _differ(what: str, said: object, counted: object) -> Iterator[str]:
    if said != counted:
        yield f"{what}: {said} by the books, {counted} as counted"
