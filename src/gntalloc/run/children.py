"""Find the processes that are left to this one: its children, and those that its children leave when they end.

A subreaper (prctl) becomes the parent of every orphan below it. So a process that kills its children again and again
reaches all that they had started. No other process collects a child, so its number is its own until it is collected
here.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from gntalloc.libc import PR_SET_CHILD_SUBREAPER, libc

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["adopt_orphans", "children", "send", "status_of"]


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent ends."""
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children(wanted: Callable[[int, dict[str, str]], bool]) -> list[int]:
    """Open a pidfd for each living child that is `wanted`, for the caller to close.

    Args:
        wanted: says of a child whether it is wanted, by its pid and its /proc/PID/status.
    """
    found: list[int] = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            status = status_of(name)
            if int(status["PPid"]) == os.getpid() and status["State"][0] != "Z" and wanted(int(name), status):
                found.append(os.pidfd_open(int(name)))
        except OSError:
            pass  # it has ended
    return found


def status_of(process: str) -> dict[str, str]:
    """Read /proc/PROCESS/status.

    Raises:
        OSError: there is no such process.
    """
    with open(f"/proc/{process}/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def send(process: int, number: int) -> None:
    """Send a signal to the process of a pidfd. A process that has ended is no error."""
    try:
        signal.pidfd_send_signal(process, number)
    except OSError:
        pass
