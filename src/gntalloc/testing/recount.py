"""Are the machine's books right? Everything is counted again from what there is, and compared with the counters.

For a machine in this process (`gntalloc.machine.machine.Machine`), between two calls, after it has settled. What is
never written down twice cannot be wrong; this is about all that is: users of pages, units of the limit, references,
mappings of them, memory, descriptions of it, ports and who refers to them. Pages are counted one by one, however the
books keep them together.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from gntalloc.abi.grants import RESERVED_REFS, V1_ENTRIES_PER_FRAME
from gntalloc.drivers.gntdev import Entry
from gntalloc.drivers.gntdev import FileState as GntdevState
from gntalloc.drivers.grefs import FileState as GntallocState
from gntalloc.hypervisor.ports import State
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc.drivers.chardev import Extent, File, Record
    from gntalloc.drivers.evtchn import EvtchnDriver
    from gntalloc.drivers.grefs import Alloc, Pages
    from gntalloc.drivers.notify import Promise
    from gntalloc.drivers.pages import GrantedPages
    from gntalloc.hypervisor.grants import Grant
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
        listened_to = [*frames._watches.things.values(), *frames._planned, *frames._unheard, *frames._unsolved]
        owners = [extent.changed.__self__ for extent in listened_to]
        there = [guest.gntalloc._pages for guest in machine.guests.values()] + owners
        self.domains: list[GrantedPages] = list(dict.fromkeys(there))
        self.pages: dict[tuple[Alloc, int], tuple[int, Pages]] = {
            (span.grant, pages._table.page_of(ref)): (ref, span)
            for pages in self.domains
            for ref, span in pages._table.each()
        }
        self.extents: Counter[Extent] = Counter(alloc.memory for alloc, _ in self.pages)
        self.records: dict[Record, None] = {}
        self.files: dict[File, None] = {}
        for file in self._find_files():
            self.files[file] = None
            self.records.update(dict.fromkeys(file.records))
        self.entries = list(self._find_entries())

    def _find_files(self) -> Iterator[File]:
        for guest in self.machine.guests.values():
            yield from guest.files
        for alloc, _ in self.pages:
            yield alloc.file
        for extent in self.extents:  # closed, and alive by what is mapped of it
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
        payloads = [record.payload for record in self.records if isinstance(record.payload, list)]
        mapped = Counter(
            (alloc, page)
            for ranges in payloads
            for alloc, first, count in ranges
            for page in range(first, first + count)
        )
        for (alloc, page), (ref, span) in self.pages.items():
            name = f"page {ref} of pid {alloc.file.opener}"
            yield from _differ(f"users of {name}", span.users, span.listed + mapped[alloc, page])
            yield from _differ(f"the reference of {name}", alloc.refs[page], ref)
            yield from _differ(f"{name} is in its span", span.page <= page < span.page + span.count, True)
            state = alloc.file.state
            assert isinstance(state, GntallocState)
            yield from _differ(f"{name} is found by its index", state.allocs.get(alloc.index) is alloc, True)
        allocs = {alloc for alloc, _ in self.pages}
        for file in self.files:
            if isinstance(file.state, GntallocState):
                theirs = set(file.state.allocs.values())
                yield from _differ("ALLOCs of a file of which no page is left", len(theirs - allocs), 0)

    def _memory(self) -> Iterator[str]:
        """Compare an extent's pages with those that are granted, and the machine's memory with its extents."""
        frames = self.machine.frames
        yield from _differ("extents", frames.extents, len(self.extents))
        yield from _differ("pages of memory", frames.pages, sum(extent.pages for extent in self.extents))
        for extent, pages in self.extents.items():
            yield from _differ("pages in use of an extent", extent.in_use, pages)
            size = (extent.first + extent.pages) * PAGE_SIZE
            yield from _differ("bytes of an extent", os.fstat(extent.master).st_size, size)

    def _descriptions(self) -> Iterator[str]:
        """Compare loans with their extents, with the mmaps they were made for, and with the listeners for their end."""
        loans = [loan for extent in self.extents for loan in extent.loans]
        theirs = [loan for record in self.records for loan in record.loans]
        yield from _differ("loans of mmaps that no extent has", len(set(theirs) - set(loans)), 0)
        yield from _differ("loans of extents that no mmap has", len(set(loans) - set(theirs)), 0)
        yield from _differ("mmaps without a loan", sum(not record.loans for record in self.records), 0)
        frames = self.machine.frames
        planned, watches = {*frames._planned, *frames._unheard, *frames._unsolved}, frames._watches.things
        for extent in self.extents:
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
        of_mapper: Counter[int] = Counter()
        pins: Counter[tuple[Grant[Any], int]] = Counter()
        for _, grant, first, count in handles:
            of_mapper[grant.domid] += count
            pins.update((grant, page) for page in range(first, first + count))
        there = self.machine._hypervisor._handles
        yield from _differ("handles of each domain", {key: n for key, n in there.items() if n}, dict(of_mapper))
        said = {key: span.pins for key, (_, span) in self.pages.items() if span.pins}
        yield from _differ("the pins of pages", said, dict(pins))

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
        spans = dict.fromkeys(span for _, span in self.pages.values() if span.users)
        promises = [span.promise for span in spans] + [entry.promise for entry in self.entries]
        for promise in promises:
            if promise is not None and promise._ports is ports and promise._port is not None:
                yield promise


def _limit(pages: GrantedPages) -> Iterator[str]:
    """Every page that is there counts, or every page that somebody uses."""
    there = [span for _, span in pages._table.each()]
    name = f"domain {pages._table.owner}"
    counted = [span for span in there if span.users or pages._behaviour.count_held_pages]
    yield from _differ(f"pages in use of {name}", pages.in_use, len(counted))
    yield from _differ(f"pages of {name}", pages.count, len(there))
    lingering = [(extent, span) for extent, spans in pages.lingering.items() for span in spans]
    due = {(span.grant.memory, span) for span in there if not span.users}
    yield from _differ("lingering pages", set(lingering), due)
    for span, count in Counter(there).items():
        yield from _differ("pages of a span", span.count, count)
        yield from _differ("a page without users is ending", span.ending, not span.users)


def _references(pages: GrantedPages) -> Iterator[str]:
    """Each reference is a page's, or is free, once."""
    table = pages._table
    used = [ref for ref, _ in table.each()]
    yield from _differ(f"references in use of domain {table.owner}", table.live, len(used))
    numbers = sorted([*table._free, *used])
    every = range(RESERVED_REFS, table._frames * V1_ENTRIES_PER_FRAME)
    yield from _differ(f"references of domain {table.owner}, each once", numbers == list(every), True)


def _ports_of_the_kernel(driver: EvtchnDriver) -> set[int]:
    """List the four ports that are there before any program is."""
    return {1, 2, 3, 4} - set(driver._bound)


def _differ(what: str, said: object, counted: object) -> Iterator[str]:
    if said != counted:
        yield f"{what}: {said} by the books, {counted} as counted"
