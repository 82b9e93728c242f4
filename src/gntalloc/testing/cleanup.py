"""Was everything given back? This process is asked through /proc, the machine through its statistics."""

from __future__ import annotations

import gc
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from gntalloc.embed import Machine

__all__ = ["Snapshot", "assert_cleaned_up"]

_PATIENCE = 5.0  # seconds: a process that was killed is gone a little later than kill(2) returns
_NAP = 0.005
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What this process has open and mapped, and what its machine keeps."""

    descriptors: dict[str, int]
    """How many descriptors there are of each kind: what they link to, less the numbers of sockets and pipes."""

    maps: int
    """Bytes of granted memory that are mapped here."""

    machine: dict[str, int]
    """Pages, extents, references, ports, pages in use and open files, over all domains. Empty without a machine."""

    @classmethod
    def of(cls, machine: Machine | None) -> Self:
        """Take one now."""
        return cls(_descriptors(), _maps(), _counts(machine) if machine is not None else {})


def assert_cleaned_up(machine: Machine | None, before: Snapshot) -> None:
    """See that there is nothing more than `before`.

    Raises:
        AssertionError: there is; the text says what.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        left = _differences(before, Snapshot.of(machine))
        if not left:
            return
        if time.monotonic() > deadline:
            raise AssertionError("not everything was given back: " + "; ".join(left))
        gc.collect()  # an exception that was caught may keep what is in its frames
        time.sleep(_NAP)


def _differences(before: Snapshot, now: Snapshot) -> list[str]:
    left = [
        f"{count - before.descriptors.get(target, 0):+d} descriptors of {target}"
        for target, count in now.descriptors.items()
        if count > before.descriptors.get(target, 0)
    ]
    if now.maps != before.maps:
        left.append(f"{now.maps} bytes of granted memory mapped, {before.maps} before")
    left += [
        f"{name} of the machine is {count}, {before.machine[name]} before"
        for name, count in now.machine.items()
        if count != before.machine[name]
    ]
    return left


def _descriptors() -> dict[str, int]:
    found: dict[str, int] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that listed the others
            continue
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


def _counts(machine: Machine) -> dict[str, int]:
    statistics = machine.statistics()
    counts = {name: statistics[name] for name in ("pages", "extents")}
    for name in ("references", "ports", "pages_in_use", "files", "files_mapped"):
        counts[name] = sum(domain[name] for domain in statistics["domains"])
    return counts
