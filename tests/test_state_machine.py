"""Random calls against a small model, with a fault at any step; after each step everything is counted again.

A failure ends with one line that replays it. GNTALLOC_SEED chooses where chance begins, GNTALLOC_EXAMPLES how long it
goes on: 200 runs of up to 50 steps unless it says otherwise.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
from pathlib import Path
from struct import pack
from typing import TYPE_CHECKING, Any

import model
import pytest
from event_program import Events, pair
from fake_program import RW, Program
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from scarce import descriptors_left

from gntalloc.descriptions import lock_place
from gntalloc.errors import DeviceError
from gntalloc.machine.machine import Machine as Core
from gntalloc.maps import PAGE_SIZE, PROT_READ, Mapping
from gntalloc.steps import finish_steps
from gntalloc.testing import recount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SET_NOTIFY = 0x00104707
LIMIT = 6
MORE_THAN_THE_TABLE = 700

RARELY = st.integers(0, 3)
PICK = st.integers(0, 1 << 16)
REFS = st.lists(PICK, min_size=1, max_size=3)
FAULTS = st.sampled_from(
    [model.Fault()] * 8 + [model.Fault(copy=n) for n in (1, 2, 3)] + [model.Fault(descriptors=n) for n in (0, 1, 2)]
)


class Placed:
    """A map as a process has it, and perhaps a child of it."""

    def __init__(
        self, program: Program, index: int, pages: int, prot: int, fault: model.Fault, inherited: bool
    ) -> None:
        self._core = program.machine
        with taken_away(fault):
            plan = program.plan(index * PAGE_SIZE, pages, prot)
            loans = finish_steps(self._core.carry_out(plan))
        self._mapping = Mapping(pages * PAGE_SIZE, prot=prot)
        descriptors = {loan.extent: loan.descriptor for loan in loans}
        at = 0
        for piece in plan.pieces:
            size = piece.pages * PAGE_SIZE
            self._mapping.place(at, size, descriptors[piece.extent], piece.offset)
            at += size
        self._childs = [os.dup(loan.descriptor) for loan in loans] if inherited else []
        for loan in loans:
            if plan.locks:
                lock_place(loan.descriptor, plan.record.mark, self._mapping.address, self._mapping.length)
            loan.close()

    def read(self, position: int) -> int:
        return self._mapping.memory[position * PAGE_SIZE]

    def write(self, position: int, value: int) -> None:
        self._mapping.memory[position * PAGE_SIZE] = value

    def unmap(self, position: int) -> None:
        self._mapping.unmap(position * PAGE_SIZE, PAGE_SIZE)

    def end_child(self) -> None:
        for descriptor in self._childs:
            os.close(descriptor)
        self._childs = []

    def close(self) -> None:
        self._mapping.close()
        self.end_child()


@contextlib.contextmanager
def taken_away(fault: model.Fault) -> Iterator[None]:
    if fault.descriptors > 100:
        yield
    else:
        with descriptors_left(fault.descriptors):
            yield


def outcome(call: Callable[[], Any]) -> tuple[int, Any]:
    """The errno, or 0 and what it returned."""
    try:
        return 0, call()
    except DeviceError as error:
        return error.errno or 0, None
    except model.Refused as refused:
        return refused.code, None


class Calls(RuleBasedStateMachine):
    """Each rule makes one call, on the model first, which says how it must end."""

    core: Core

    @initialize(writable=st.booleans(), filled=st.sampled_from([0, 0, 0, model.CAPACITY - 5]))
    def begin(self, writable: bool, filled: int) -> None:
        self.core = Core(limit=LIMIT, table_frames=1)
        for domid in (1, 2):
            self.core.create(domid, uid=os.getuid())
        self.model = model.Model({1: LIMIT, 2: LIMIT})
        self.programs: dict[model.File, Program] = {}
        self.placed: dict[model.Map, Placed] = {}
        near, near_port, far, far_port = pair(self.core)
        self.ends: dict[int, tuple[Events, int]] = {1: (near, near_port), 2: (far, far_port)}
        self.model.bound = {1, 2}
        for domid, device in ((1, "gntalloc"), (2, "gntdev")):
            self.open(domid, device)
        if filled:  # the table, nearly
            self.set_limit(1, MORE_THAN_THE_TABLE)
            self.alloc(0, 2, filled, writable, model.Fault())
        self.alloc(0, 2, 3, writable, model.Fault())

    def same(self, modelled: Callable[[], Any], real: Callable[[], Any]) -> tuple[Any, Any]:
        """Both do it. They must end alike."""
        expected, there = outcome(modelled)
        got, here = outcome(real)
        assert errno.errorcode.get(got, "success") == errno.errorcode.get(expected, "success")
        return there, here

    def files(self, device: str) -> list[model.File]:
        return [file for file in self.model.files if file.device == device and not file.closed]

    def a_file(self, device: str, pick: int) -> model.File:
        files = self.files(device)
        return files[pick % len(files)]

    # Rules.

    @rule(domid=st.integers(1, 2), device=st.sampled_from(["gntalloc", "gntdev"]))
    def open(self, domid: int, device: str) -> None:
        file = model.File(domid, device)
        self.model.files.append(file)
        self.programs[file] = Program(self.core, domid, device)

    @precondition(lambda self: self.files("gntalloc"))
    @rule(
        pick=PICK,
        peer=st.sampled_from([2, 2, 2, 1, 3]),
        count=st.sampled_from([1, 1, 2, 3, 5, 0, 200, 400]),
        writable=st.booleans(),
        fault=FAULTS,
    )
    def alloc(self, pick: int, peer: int, count: int, writable: bool, fault: model.Fault) -> None:
        file = self.a_file("gntalloc", pick)
        program = self.programs[file]

        def real() -> tuple[int, tuple[int, ...]]:
            with taken_away(fault):
                return program.alloc(peer, count, int(writable), fail_at=fault.copy or None)

        index = file.next_index
        pages, granted = self.same(lambda: self.model.alloc(file, peer, count, writable, fault), real)
        if granted is None:
            assert program.file.state.next_index == index * PAGE_SIZE  # type: ignore[attr-defined]
            return
        assert granted[0] == index * PAGE_SIZE
        taken = {page.ref for page in self.model.pages if page.file.domid == file.domid}
        assert not taken & set(granted[1])
        for page, ref in zip(pages, granted[1], strict=True):
            assert 8 <= ref < 8 + model.CAPACITY
            page.ref = ref

    def a_range(self, pick: int, count: int) -> tuple[model.File, int, int]:
        """Of a file of gntalloc, mostly pages that are there."""
        listed = [page for page in self.model.pages if page.listed and not page.file.closed]
        if not listed or pick % 16 == 15:
            return self.a_file("gntalloc", pick), pick % 5, count
        page = listed[pick % len(listed)]
        indexes = {each.index for each in listed if each.file is page.file}
        there = next(n for n in range(1, len(indexes) + 2) if page.index + n not in indexes)
        return page.file, page.index, min(count, there)

    @precondition(lambda self: self.files("gntalloc") and self.model.pages)
    @rule(pick=PICK, count=st.integers(0, 6), fault=FAULTS)
    def dealloc(self, pick: int, count: int, fault: model.Fault) -> None:
        file, first, count = self.a_range(pick, count)
        argument = pack("=QII", first * PAGE_SIZE, count, 0)
        self.same(
            lambda: self.model.dealloc(file, first, count, fault), lambda: self.ioctl(file, 0x00104706, argument, fault)
        )

    def ioctl(self, file: model.File, request: int, argument: bytes, fault: model.Fault) -> None:
        with taken_away(fault):
            self.programs[file].ioctl(request, argument, fail_at=fault.copy or None)

    @precondition(lambda self: self.files("gntalloc") and self.model.pages)
    @rule(pick=PICK, count=st.integers(1, 6), writable=st.booleans(), fault=FAULTS, inherited=st.booleans())
    def mmap(self, pick: int, count: int, writable: bool, fault: model.Fault, inherited: bool) -> None:
        file, first, count = self.a_range(pick, count)
        prot = RW if writable else PROT_READ
        self.note(
            *self.same(
                lambda: self.model.mmap(file, first, count, writable, fault, inherited),
                lambda: Placed(self.programs[file], first, count, prot, fault, inherited),
            )
        )

    def note(self, map_: model.Map | None, placed: Placed | None) -> None:
        if map_ is not None and placed is not None:
            self.placed[map_] = placed
            for position in map_.left if map_.writable else ():  # so that it shows when a byte is cleared
                self.model.write(map_, position, 1 + position)
                placed.write(position, 1 + position)

    @precondition(lambda self: self.files("gntdev"))
    @rule(pick=PICK, chosen=REFS, fault=FAULTS)
    def map_refs(self, pick: int, chosen: list[int], fault: model.Fault) -> None:
        files = self.files("gntdev")
        granted = {page.peer for page in self.model.pages}
        files = [file for file in files if file.domid in granted] or files
        file = files[pick % len(files)]
        known = [(page.file.domid, page.ref) for page in self.model.pages if page.peer == file.domid] or [(1, 8)]
        refs = [known[each % len(known)] if each % 16 < 15 else (each % 3, 8 + each % 600) for each in chosen]
        argument = pack("=IIQ", len(refs), 0, 0) + b"".join(pack("=II", *ref) for ref in refs)

        def real() -> int:
            with taken_away(fault):
                answer = self.programs[file].ioctl(0x00184700, argument, fail_at=fault.copy or None)
            return int.from_bytes(answer[8:16], "little")

        entry, index = self.same(lambda: self.model.map_refs(file, refs, fault), real)
        if entry is not None:
            assert index == entry.first * PAGE_SIZE

    @precondition(lambda self: self.files("gntdev"))
    @rule(pick=PICK, chosen=REFS, writable=st.booleans(), fault=FAULTS, inherited=st.booleans(), only=st.booleans())
    def map(
        self, pick: int, chosen: list[int], writable: bool, fault: model.Fault, inherited: bool, only: bool
    ) -> None:
        """All that a library does to map, with nothing between; `only` the map is left."""
        known = len(self.model.entries)
        self.map_refs(pick, chosen, model.Fault())
        for entry in self.model.entries[known:]:
            self.mmap_this(entry.file, entry.first, len(entry.refs), writable, fault, inherited)
            if only:
                self.unmap_this(entry.file, entry.first, len(entry.refs), model.Fault())

    def an_entry(self, pick: int, *, fresh: bool | None = None) -> tuple[model.File, int, int]:
        """Of a file of gntdev, mostly one that is there, rather one (not) mapped yet: its index and pages."""
        entries = [entry for entry in self.model.entries if entry.listed and not entry.file.closed]
        entries = [entry for entry in entries if entry.burned is not fresh] or entries
        if not entries or pick % 16 == 15:
            return self.a_file("gntdev", pick), pick % 5, 1 + pick % 3
        entry = entries[pick % len(entries)]
        return entry.file, entry.first, len(entry.refs)

    @precondition(lambda self: self.files("gntdev") and self.model.entries)
    @rule(pick=PICK, writable=st.booleans(), fault=FAULTS, inherited=st.booleans())
    def mmap_entry(self, pick: int, writable: bool, fault: model.Fault, inherited: bool) -> None:
        self.mmap_this(*self.an_entry(pick, fresh=True), writable, fault, inherited)

    def mmap_this(
        self, file: model.File, first: int, count: int, writable: bool, fault: model.Fault, inherited: bool
    ) -> None:
        prot = RW if writable else PROT_READ
        self.note(
            *self.same(
                lambda: self.model.mmap_entry(file, first, count, writable, fault, inherited),
                lambda: Placed(self.programs[file], first, count, prot, fault, inherited),
            )
        )

    @precondition(lambda self: self.files("gntdev") and self.model.entries)
    @rule(pick=PICK, any_count=st.booleans(), fault=FAULTS)
    def unmap_refs(self, pick: int, any_count: bool, fault: model.Fault) -> None:
        file, first, count = self.an_entry(pick)
        self.unmap_this(file, first, 0 if any_count else count, fault)

    def unmap_this(self, file: model.File, first: int, count: int, fault: model.Fault) -> None:
        argument = pack("=QII", first * PAGE_SIZE, count, 0)
        self.same(
            lambda: self.model.unmap_refs(file, first, count, fault),
            lambda: self.ioctl(file, 0x00104701, argument, fault),
        )

    @precondition(lambda self: self.model.maps)
    @rule(pick=PICK, whole=st.booleans(), fault=FAULTS)
    def munmap(self, pick: int, whole: bool, fault: model.Fault) -> None:
        map_ = self.model.maps[pick % len(self.model.maps)]
        positions = sorted(map_.left)
        for position in positions if whole else positions[pick % (len(positions) or 1) :][:1]:
            map_.left.discard(position)
            self.placed[map_].unmap(position)
        self.settle(fault)

    @precondition(lambda self: any(map_.inherited for map_ in self.model.maps))
    @rule(pick=PICK, fault=FAULTS)
    def end_child(self, pick: int, fault: model.Fault) -> None:
        maps = [map_ for map_ in self.model.maps if map_.inherited]
        map_ = maps[pick % len(maps)]
        map_.inherited = False
        self.placed[map_].end_child()
        self.settle(fault)

    @precondition(lambda self: self.files("gntalloc") + self.files("gntdev"))
    @rule(pick=PICK, fault=FAULTS, rarely=RARELY)
    def close(self, pick: int, fault: model.Fault, rarely: int) -> None:
        files = self.files("gntalloc") + self.files("gntdev")
        file = files[pick % len(files)]
        if rarely:
            return
        file.closed = True
        with taken_away(fault):
            self.programs[file].close()

    @precondition(lambda self: self.model.maps)
    @rule(pick=PICK, value=st.integers(1, 255))
    def write(self, pick: int, value: int) -> None:
        writable = [map_ for map_ in self.model.maps if map_.writable and map_.left]
        if writable:
            map_ = writable[pick % len(writable)]
            position = sorted(map_.left)[pick % len(map_.left)]
            self.model.write(map_, position, value)
            self.placed[map_].write(position, value)

    @rule(domid=st.integers(1, 2), rarely=RARELY, limit=st.sampled_from([LIMIT, MORE_THAN_THE_TABLE, 3]))
    def set_limit(self, domid: int, limit: int, rarely: int = 0) -> None:
        if not rarely:
            self.model.limits[domid] = self.core.guest(domid).gntalloc.limit = limit

    @precondition(lambda self: self.files("gntalloc") and self.files("gntdev") and self.model.pages)
    @rule(
        pick=PICK,
        of_page=st.booleans(),
        action=st.sampled_from([3, 2, 1, 0, 4]),
        fault=FAULTS,
    )
    def notify(self, pick: int, of_page: bool, action: int, fault: model.Fault) -> None:
        of_page |= not self.model.entries
        file, first, count = self.a_range(pick, 1) if of_page else self.an_entry(pick, fresh=False)
        index = first + pick % max(count, 1)
        judge = self.model.notify_page if of_page else self.model.notify_entry
        argument = pack("=QII", index * PAGE_SIZE, action, self.ends[file.domid][1])
        self.same(lambda: judge(file, index, action, fault), lambda: self.ioctl(file, SET_NOTIFY, argument, fault))

    @precondition(lambda self: self.model.bound)
    @rule(pick=PICK, fault=FAULTS, rarely=RARELY)
    def close_events(self, pick: int, fault: model.Fault, rarely: int) -> None:
        if not rarely:
            domid = sorted(self.model.bound)[pick % len(self.model.bound)]
            self.model.bound.discard(domid)
            with taken_away(fault):
                self.ends[domid][0].close()

    # What must hold after each.

    def settle(self, fault: model.Fault) -> None:
        with taken_away(fault):
            self.core.settle()

    def check_invariants(self, *_: Any, **__: Any) -> None:
        if hasattr(self, "ends"):
            self.model.settle()
            self.core.settle()
            recount(self.core)
            self.check_counters()
            self.check_grants()
            self.check_memory()
            self.check_events()

    def check_counters(self) -> None:
        said = self.core.statistics()
        allocs = self.model.allocs()
        assert (said["extents"], said["pages"]) == (len(allocs), sum(alloc.pages for alloc in allocs))
        for domain in said["domains"]:
            domid = domain["domid"]
            open_ = [file for file in self.model.files if file.domid == domid and not file.closed]
            mapped = {map_.file for map_ in self.model.maps} & set(open_)
            here = {
                "limit": self.model.limits[domid],
                "pages_in_use": self.model.in_use(domid),
                "references": self.model.in_use(domid),
                "ports": self.model.ports(domid),
                "files": len(open_) + (domid in self.model.bound),
                "files_mapped": len(mapped),
            }
            assert {key: domain[key] for key in here} == here

    def check_grants(self) -> None:
        fields = ("granter", "ref", "peer", "writable", "users", "mapped_by", "held")
        said = [tuple(grant[key] for key in fields) for grant in self.core.grants()]
        here = []
        for page in self.model.pages:
            users, mapped_by = self.model.users(page), self.model.mapped_by(page)
            held = bool(mapped_by)
            here.append((page.file.domid, page.ref, page.peer, page.writable, users, mapped_by, held))
        assert sorted(said) == sorted(here)

    def check_memory(self) -> None:
        for map_, placed in list(self.placed.items()):
            for position in map_.left:
                assert placed.read(position) == map_.pages[position].first_byte
            if not map_.lives:
                placed.close()
                del self.placed[map_]

    def check_events(self) -> None:
        heard = set()
        for domid in self.model.bound:
            events, port = self.ends[domid]
            while got := events.read():  # of several there is a second one, after the first was dealt with
                assert got == [port]
                events.write(*got)
                heard.add(domid)
        assert heard == self.model.heard
        self.model.heard.clear()

    def teardown(self) -> None:
        if not hasattr(self, "ends"):
            return
        for placed in self.placed.values():
            placed.close()
        for guest in self.core.guests.values():
            for file in list(guest.files):
                self.core.close(guest, file)
        try:
            self.core.settle()
            recount(self.core)
            statistics = self.core.statistics()
            assert (statistics["pages"], statistics["extents"]) == (0, 0)
            for domain in statistics["domains"]:
                assert (domain["pages_in_use"], domain["references"], domain["ports"]) == (0, 0, 0)
        finally:
            self.core.frames.close()


def commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@pytest.mark.timeout(0)  # GNTALLOC_EXAMPLES may ask for hours
def test_random_calls_do_what_the_model_does() -> None:
    number = int(os.environ.get("GNTALLOC_SEED") or random.SystemRandom().randrange(1 << 32))
    examples = int(os.environ.get("GNTALLOC_EXAMPLES") or 200)
    chosen = settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seed(number)(Calls), settings=chosen)
    except BaseException as error:
        how = f"GNTALLOC_SEED={number} GNTALLOC_EXAMPLES={examples} pytest {Path(__file__).name}"
        error.add_note(f"replay: {how}  # at commit {commit()}")
        raise
