"""Name the lab's errors. Every text says what was asked, what stood in the way, and what to do."""

from __future__ import annotations

import errno

from gntalloc.errors import GntallocError, NoMachine, TimedOut

__all__ = ["BuildFailed", "Crashed", "LabBroke", "LabError", "LabTimedOut", "NothingToRunOn", "explain"]


class LabError(GntallocError):
    """The root of the lab's errors."""


class NothingToRunOn(LabError, NoMachine):
    """QEMU or another tool is missing on this machine, or no images have been built yet."""

    code = NoMachine.code


class BuildFailed(LabError):
    """The images could not be made. Images made before are untouched."""


class Crashed(LabError):
    """Xen, dom0 or a guest went down under the command. The text ends with the tail of its console."""


class LabBroke(LabError):
    """An agent in the lab sent what its protocol forbids. Boot the lab anew."""

    code = errno.EPROTO


class LabTimedOut(LabError, TimedOut):
    """The time limit passed first. The text ends with the tail of the console."""

    code = TimedOut.code


def explain(asked: str, obstacle: str, remedy: str, *, log: str = "") -> str:
    """Put the three parts of an error text together, and the tail of a console under them."""
    text = f"{asked}: {obstacle}. {remedy}."
    return f"{text}\n{_quoted(log)}" if log else text


def _quoted(log: str) -> str:
    return "\n".join(f"  | {line}" for line in log.splitlines())
