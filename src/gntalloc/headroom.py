"""Ask how much memory this process may still have: of its control group, of its own limits and of the computer.

A full control group (a container's memory limit) refuses nothing: the kernel kills a process in it, here the machine.
So the machine asks before it takes memory. The answer is no promise: nobody knows how much other processes of the group
take the next moment, or how much the kernel could still write out to a swap. MARGIN is left for them.

Sources: cgroups(7), the kernel's cgroup-v2 and cgroup-v1/memory documents, proc(5).
"""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.clock import now

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MARGIN", "Headroom"]

MARGIN = 4 << 20  # bytes that are not given away: the machine itself needs them, to refuse a request for example
_LOOK_AGAIN = 0.5  # seconds for which a look holds
_SHARE = 8  # one part in so many of the room that a look found is given away before the next look
_PAGE = resource.getpagesize()


class _Files(NamedTuple):
    """The files of a kind of control group, and the lines of memory.stat that the kernel can take back at once."""

    limit: str
    usage: str
    reclaimable: tuple[str, ...]


_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


class Headroom:
    """Tell, before memory is taken, whether there is room. `groups` and `proc` are the kernel's folders of counters."""

    def __init__(self, groups: str = "/sys/fs/cgroup", proc: str = "/proc") -> None:
        self._groups = groups
        self._proc = proc
        self._credit = 0
        self._until = 0.0

    def shortage(self, size: int) -> str | None:
        """Say why `size` bytes more cannot be had. None: they can, as far as can be known."""
        moment = now()
        if size <= self._credit and moment < self._until:
            self._credit -= size
            return None
        room, whose = min(self._rooms(), default=(1 << 62, ""))
        self._credit = max(0, room - MARGIN - size) // _SHARE
        self._until = moment + _LOOK_AGAIN
        if size <= room - MARGIN:
            return None
        return f"{whose} leaves {max(0, room) >> 10} KiB, of which {MARGIN >> 10} are the machine's own"

    def _rooms(self) -> Iterator[tuple[int, str]]:
        """Give each limit that there is: the bytes that it leaves, and its name."""
        for folder, files in self._own_groups():
            limit, used = _number(f"{folder}/{files.limit}"), _number(f"{folder}/{files.usage}")
            if limit is not None and used is not None:
                back = _lines(f"{folder}/memory.stat")
                yield limit - used + sum(back.get(name, 0) for name in files.reclaimable), f"the limit of {folder}"
        computer = _lines(f"{self._proc}/meminfo")
        if "MemAvailable:" in computer:
            left = computer["MemAvailable:"] + computer.get("SwapFree:", 0)
            yield left << 10, "this computer's memory"
        address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
        data, _ = resource.getrlimit(resource.RLIMIT_DATA)
        for limit, column, option in ((address_space, 0, "v"), (data, 5, "d")):
            if limit != resource.RLIM_INFINITY:
                pages = _words(f"{self._proc}/self/statm")
                yield limit - pages[column] * _PAGE, f"the machine's `ulimit -{option}`"

    def _own_groups(self) -> Iterator[tuple[str, _Files]]:
        """Give the folder of each control group of this process, from its own up to the outermost that is seen."""
        for line in _text(f"{self._proc}/self/cgroup").splitlines():
            number, controllers, path = [*line.split(":", 2), "", ""][:3]
            if number == "0" and not controllers:
                root, files = self._groups, _V2
            elif "memory" in controllers.split(","):
                root, files = f"{self._groups}/memory", _V1
            else:
                continue
            inner = os.path.normpath("/" + path.lstrip("/"))  # a group beyond the namespace is /../x
            while True:
                yield (root + inner).rstrip("/"), files
                if inner == "/":
                    break
                inner = os.path.dirname(inner)


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""  # not mounted, not ours to read, or another kind of group


def _words(path: str) -> list[int]:
    return [int(word) for word in _text(path).split() if word.isdecimal()]


def _number(path: str) -> int | None:
    """Read the one number of a file. None: there is none, or it is `max`."""
    numbers = _words(path)
    return numbers[0] if numbers else None


def _lines(path: str) -> dict[str, int]:
    """Read a table: the first two words of each line."""
    words = (line.split()[:2] for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdecimal()}
