"""What a probe is, and how one is tried.

Each probe is a function that does a thing once, on throw-away files of its own, and says in a few words what it found.
If it cannot, it raises, and the exception becomes the finding. Each probe names its purpose, and what to do if it
fails.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Finding", "Lacking", "Probe", "look", "probe", "setting"]

_LIMITS = {  # limits that can stand in the way of any probe
    errno.EFBIG: "raise the limit of a file's size: ulimit -f unlimited",
    errno.EMFILE: "raise the limit of open files: ulimit -n 1024",
    errno.EAGAIN: "raise the limit of processes: ulimit -u",
}


class Lacking(Exception):
    """A probe found something wrong, which is said in place of an errno. It may also know better what to do."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(what)
        self.advice = advice


class Probe(NamedTuple):
    """Describe one thing to try."""

    name: str
    purpose: str
    advice: str
    required: bool
    attempt: Callable[[], str]
    of_run: bool = False


class Finding(NamedTuple):
    """Tell the outcome of a probe."""

    name: str
    ok: bool
    required: bool
    found: str
    purpose: str
    advice: str
    of_run: bool = False  # whether `gntalloc run` needs it


def look(probe: Probe) -> Finding:
    """Try one thing. An exception that it raises is a finding, not an error."""
    ok, found, advice = True, "", probe.advice
    try:
        found = probe.attempt()
    except Lacking as lack:
        ok, found, advice = False, str(lack), lack.advice or advice
    except OSError as error:
        ok, found = False, f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, 'no errno')})"
        advice = _LIMITS.get(error.errno or 0, advice)
    except Exception as error:
        ok, found = False, f"{type(error).__name__}: {error}"
    return Finding(probe.name, ok, probe.required, found, probe.purpose, "" if ok else advice, probe.of_run)


def probe(
    probes: list[Probe], name: str, purpose: str, advice: str, *, required: bool = False, of_run: bool = False
) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Add the function below to `probes`."""

    def register(attempt: Callable[[], str]) -> Callable[[], str]:
        probes.append(Probe(name, purpose, advice, required, attempt, of_run))
        return attempt

    return register


def setting(name: str) -> str:
    """Read a setting of the kernel, below /proc/sys."""
    with open(f"/proc/sys/{name}", encoding="ascii") as file:
        return file.read().strip()
