"""Was everything given back? This process is asked through /proc, the machine through its control socket."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Self

from gntalloc.clock import now
from gntalloc.descriptors import open_files
from gntalloc.errors import MachineGone

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gntalloc.embed import Machine
    from gntalloc.guest.books import GrantedPage

__all__ = ["Snapshot", "assert_cleaned_up", "name_process"]

_IN_THE_STORE = ("watches", "transactions")
_PATIENCE = 5.0  # seconds: a process that was killed is gone a little later than kill(2) returns
_PATIENCE_WITH_ONESELF = 1.5  # for so long the machine looks again at what may have been unmapped
_NAP = 0.005
_NUMBER = re.compile(r"\d+")
_names: dict[int, str] = {}

__tracebackhide__ = True  # for pytest: what is raised here is about the caller's program


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What this process has open and mapped, and what its machine keeps."""

    descriptors: dict[str, int]
    """How many descriptors there are of each kind: what they link to, less the numbers of sockets and pipes."""

    maps: int
    """Bytes of granted memory that are mapped here."""

    machine: dict[str, int]
    """Counters over all domains: pages, extents, references, … Empty without a machine, or when it is gone."""

    grants: dict[tuple[int, int], _Grant] = field(default_factory=dict)
    """By granter and reference."""

    files: Counter[_File] = field(default_factory=Counter)
    """Bytes mapped, or ports bound, by domain, device and program."""

    store: Counter[_Kept] = field(default_factory=Counter)
    """Watches and open transactions of xenstore."""

    @classmethod
    def of(cls, machine: Machine | None) -> Self:
        """Take one now."""
        here = _descriptors(), _maps()
        if machine is None:
            return cls(*here, {})
        try:
            grants = {(each.granter, each.ref): _Grant.of(each) for each in machine.grants()}
            files: Counter[_File] = Counter()
            for each in machine.files():
                who = each.domid, each.device, each.opener
                files[_File("mapped", *who)] += each.mapped
                files.update(_File(f"port {number}", *who) for number in each.ports)
            kept = Counter(_kept(machine))
            return cls(*here, _counts(machine), grants, files, kept)
        except MachineGone:
            return cls(*here, {})


@dataclass(frozen=True, slots=True)
class _Grant:
    """Whose page it is, for whom, and who has it."""

    granter: int
    peer: int
    opener: int
    mapped_by: tuple[int, ...]
    released: bool

    @classmethod
    def of(cls, grant: GrantedPage) -> Self:
        return cls(grant.granter, grant.peer, grant.opener, grant.mapped_by, released=not grant.users)


@dataclass(frozen=True, slots=True)
class _File:
    """What is done with a device file, and by whom."""

    what: str
    domid: int
    device: str
    opener: int


@dataclass(frozen=True, slots=True)
class _Kept:
    """A watch, or a transaction that is open, and whose."""

    kind: str
    """What the machine's counters call it."""
    what: str
    domid: int
    pid: int


class _Left(NamedTuple):
    """Something that was not given back."""

    what: str
    whose: int | None
    """Of which process, if of one alone."""


def assert_cleaned_up(machine: Machine | None, before: Snapshot) -> None:
    """See that there is nothing more than `before`: no descriptor, no map, no grant, no port, no watch.

    What others hold is waited for a while: they may just be ending.

    Args:
        machine: the one that `before` was taken of. If it is gone only this process is looked at.
        before: a Snapshot.

    Raises:
        AssertionError: something is; the text says what was left behind, and by whom.
    """
    begin = now()
    while True:
        left = list(_differences(before, Snapshot.of(machine)))
        if not left:
            return
        if now() > begin + _patience(left):
            raise AssertionError("not everything was given back:\n  " + "\n  ".join(each.what for each in left))
        gc.collect()  # an exception that was caught may keep what is in its frames
        time.sleep(_NAP)


def name_process(pid: int, name: str) -> None:
    """Name a process, for when it has left something behind."""
    _names[pid] = name


def _differences(before: Snapshot, now: Snapshot) -> Iterator[_Left]:
    of_pages, of_files = [*_grants(before, now)], [*_files(before, now)]
    explained = of_pages + of_files
    yield from explained
    if now.maps != before.maps and not of_pages and not any(file.what == "mapped" for file in now.files - before.files):
        yield _Left(f"this process: {now.maps} bytes of granted memory mapped, {before.maps} before", os.getpid())
    for target, count in now.descriptors.items():
        if (more := count - before.descriptors.get(target, 0)) > 0:
            yield _Left(f"this process: {more:+d} descriptors of {target}", os.getpid())
    told = Counter[str]()
    for kept, times in (now.store - before.store).items():
        told[kept.kind] += times
        yield _Left(f"domain {kept.domid}, {_process(kept.pid)}: {kept.what}", kept.pid)
    for name, count in now.machine.items():
        was = before.machine.get(name, 0)
        if count != was and (count - was > told[name] if name in _IN_THE_STORE else not explained):
            yield _Left(f"the machine: {count} {name.replace('_', ' ')}, {was} before", None)


def _grants(before: Snapshot, now: Snapshot) -> Iterator[_Left]:
    """Pages that are alike in one line."""
    alike: dict[_Grant, list[int]] = {}
    for (granter, ref), grant in now.grants.items():
        if (granter, ref) not in before.grants:
            alike.setdefault(grant, []).append(ref)
    for grant, refs in alike.items():
        pages = "1 page" if len(refs) == 1 else f"{len(refs)} pages"
        mapped = f"mapped by domain {_listed(grant.mapped_by)}" if grant.mapped_by else "mapped by no peer"
        state = "released, but still " if grant.released else ""
        yield _Left(
            f"domain {grant.granter}, {_process(grant.opener)}: {pages} granted to domain {grant.peer} "
            f"(references {_ranges(refs)}), {state}{mapped}",
            None if grant.mapped_by else grant.opener,
        )


def _files(before: Snapshot, now: Snapshot) -> Iterator[_Left]:
    granters = {(now.grants[key].granter, now.grants[key].opener) for key in now.grants.keys() - before.grants.keys()}
    for file, count in (now.files - before.files).items():
        if file.what == "mapped" and file.device == "gntalloc" and (file.domid, file.opener) in granters:
            continue  # the same pages, which were told as granted
        done = f"{count} bytes of {file.device} mapped" if file.what == "mapped" else f"event channel {file.what} bound"
        yield _Left(f"domain {file.domid}, {_process(file.opener)}: {done}", file.opener)


def _patience(left: list[_Left]) -> float:
    """Nobody but this thread could give it back if it is all of this process, and then it hardly will."""
    alone = threading.active_count() == 1 and all(each.whose == os.getpid() for each in left)
    return _PATIENCE_WITH_ONESELF if alone else _PATIENCE


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _ranges(numbers: list[int]) -> str:
    """8, 9, 10, 12 as 8-10, 12."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _process(pid: int) -> str:
    if pid == os.getpid():
        return "this process"
    if pid in _names:
        return f"pid {pid} ({_names[pid]})"
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as name:
            return f"pid {pid} ({name.read().strip()})"
    except OSError:
        return f"pid {pid} (ended)"


def _descriptors() -> dict[str, int]:
    found: dict[str, int] = {}
    for target in open_files():
        kind = target if target.startswith("/") else _NUMBER.sub("", target)
        found[kind] = found.get(kind, 0) + 1
    return found


def _maps() -> int:
    total = 0
    with open("/proc/self/maps", encoding="utf-8") as lines:
        for line in lines:
            if "memfd:gntalloc" in line:
                first, _, end = line.split(" ", 1)[0].partition("-")
                total += int(end, 16) - int(first, 16)
    return total


def _kept(machine: Machine) -> Iterator[_Kept]:
    for each in machine.store_connections():
        domid, pid = each["domid"], each["pid"]
        for path, token in each["watches"]:
            yield _Kept("watches", f"watch of {path} kept in xenstore (token {token!r})", domid, pid)
        for number, path in each["transactions"]:
            about = f", which has looked at {path}" if path else ""
            yield _Kept("transactions", f"transaction {number} open in xenstore{about}", domid, pid)


def _counts(machine: Machine) -> dict[str, int]:
    statistics = machine.statistics()
    counts = {"pages": statistics.pages, "extents": statistics.extents}
    over_all = "references", "ports", "pages_in_use", "files", "files_mapped", "watches", "transactions"
    for name in over_all:
        counts[name] = sum(getattr(domain, name) for domain in statistics.domains)
    return counts
