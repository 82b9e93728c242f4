"""Explain failed calls, for `gntalloc run -v`: one line for each, with the driver's reason.

The supervisor serves all calls of such a run. A machine that serves a program itself gives errnos and no reasons.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from gntalloc.abi import evtchn, gntalloc, gntdev, privcmd
from gntalloc.syscalls.serving import MMAP
from gntalloc.syscalls.threads import leader_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gntalloc.syscalls.listener import Call

__all__ = ["Explainer"]

_REQUESTS: Mapping[str, Mapping[int, str]] = {
    gntalloc.DEVICE: gntalloc.IOCTLS,
    gntdev.DEVICE: gntdev.IOCTLS,
    evtchn.DEVICE: evtchn.IOCTLS,
    privcmd.DEVICE: {privcmd.HYPERCALL: "HYPERCALL"},
}


class Explainer:
    """Say why calls failed.

    Args:
        say: tells the user a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def refused(self, call: Call, what: str, refusal: OSError) -> None:
        """Say why a call failed.

        Args:
            call: the call.
            what: the path of an open, or the device of an mmap.
            refusal: the errno and the reason.
        """
        kind = "mmap" if call.number == MMAP else "open"
        self._tell(call, f"{kind} of {what}", refusal.errno or errno.EIO, str(refusal))

    def refused_ioctl(self, call: Call, device: str, request: int, code: int, why: str) -> None:
        """Say why an ioctl failed."""
        name = _REQUESTS.get(device, {}).get(request, f"request {request:#010x}")
        self._tell(call, f"{name} on {device}", code, why)

    def not_served(self, call: Call, what: str, why: str) -> None:
        """Say that a call was left to the kernel, though it is about a device."""
        self._say(f"pid {_process(call)}: {what} is not served: {why}")

    def not_seen(self, call: Call) -> None:
        """Say that a program's calls cannot be read."""
        self._say(
            f"pid {_process(call)}: its calls are not served, since its memory may not be read: it is not dumpable "
            "(prctl PR_SET_DUMPABLE, or a file that may not be read), or Yama forbids it"
        )

    def _tell(self, call: Call, what: str, code: int, why: str) -> None:
        name = errno.errorcode.get(code, str(code))
        self._say(f"pid {_process(call)}: {what}: {name}: {why}")


def _process(call: Call) -> int:
    try:
        return leader_of(call.thread)
    except OSError:
        return call.thread  # it has ended
