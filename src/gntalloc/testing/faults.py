"""Faults that Xen may bring at any time, brought by a test: nothing here happens that a real system could not do.

    with faults.pages(alice, 3): ...                        the fourth page is refused: ENOSPC
    with faults.events(bob, delay=0.2, repeat=3): ...       events come late, and come again
    with faults.store(alice, nodes=1): ...                  the second new node is refused
    with faults.peer_dies(bob, function, at=700): ...       a program that SIGKILL ends at its 700th byte
    faults.machine_dies(machine)                            and there is no machine any more

All but the last are over when the block ends. They are done in the machine, so they meet every program of the domain.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from gntalloc import waits
from gntalloc.errors import MachineGone, NoMachine, NotKnownHere, TimedOut
from gntalloc.guest.control import ControlClient
from gntalloc.testing.blocks import block
from gntalloc.testing.program import Program, ProgramFailed, last_words
from gntalloc.vchan.ring import HEADER, Reader, Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc.domain import Domain
    from gntalloc.embed import Machine

__all__ = ["events", "machine_dies", "pages", "peer_dies", "store"]

__tracebackhide__ = True  # for pytest: what is raised here is about the caller's program

Moved = Literal["written", "read"]

_PATIENCE = 30.0  # seconds, against hangs
_AT_ITS_BYTE = b"at its byte"


@block
def pages(domain: Domain, more: int) -> Iterator[None]:
    """Let a domain have `more` pages granted than it has now, and no more at once: then ENOSPC, as at its limit.

    Raises:
        NotKnownHere: the domain is one of a real Xen.
    """
    with _control(domain) as control:
        used = next(
            each["pages_in_use"] for each in control.order("statistics")["domains"] if each["domid"] == domain.domid
        )
    before = domain.limit
    domain.limit = used + more
    try:
        yield
    finally:
        try:
            domain.limit = before
        except (MachineGone, NoMachine):
            pass  # another fault was stronger


@block
def events(domain: Domain, *, delay: float = 0.0, repeat: int = 0) -> Iterator[None]:
    """Let events for the ports of a domain come late, or again, as they may on Xen. Those on their way come at the end.

    Between two ends of this package channels wake each other without events; with `extensions=False` they use them.

    Args:
        domain: the one that is to receive them.
        delay: seconds that each of them takes. Those sent meanwhile to the same port are the same event.
        repeat: how often each of them comes again, each time as soon as the port is re-armed.

    Raises:
        NotKnownHere: the domain is one of a real Xen.
    """
    with _disturbed(domain, delay=round(delay * 1e6), repeats=repeat):
        yield


@block
def store(
    domain: Domain, *, nodes: int | None = None, watches: int | None = None, transactions: int | None = None
) -> Iterator[None]:
    """Let a domain reach its quotas of xenstore when it has so many more nodes, watches or open transactions.

    What is refused is a StoreError with the daemon's errno: ENOSPC for nodes and transactions, E2BIG for watches. A
    commit that makes nodes may not even reach the quota: so it is with the real daemon.

    Raises:
        NotKnownHere: the domain is one of a real Xen.
        ValueError: the domain is 0, which has no quotas.
    """
    if domain.domid == 0:
        raise ValueError("no quota holds for domain 0; use another domain")
    with _disturbed(domain, nodes=nodes, watches=watches, transactions=transactions):
        yield


@block
def peer_dies(
    domain: Domain, function: Callable[..., Any], *args: Any, at: int, moved: Moved = "written", **options: Any
) -> Iterator[Program]:
    """Start a Program that is killed (SIGKILL) when its channels have moved exactly `at` bytes, and not one more.

    The last of them are in the ring, for the peer to see. A message's length is four bytes of it.

    Args:
        domain: where, as for `Program`.
        function: likewise. It uses channels of this package; of another program nobody knows which byte is the last.
        args: for the function.
        at: so many bytes. 0: it dies when it tries to move the first.
        moved: whether bytes count that it has "written", or that it has "read".
        options: as for `Program`.

    Raises:
        ProgramFailed: at the end: the program ended in another way, or never moved so many bytes. (Not if the block
            raised.)
    """
    if at < 0 or moved not in {"written", "read"}:
        raise ValueError(f"at={at}, moved={moved!r}: a program dies at byte 0 or later, of what it has written or read")
    doomed = Program(domain, function, *args, before=partial(_die_at, at, moved), **options)
    with doomed:
        yield doomed
        try:
            status = doomed.wait(timeout=_PATIENCE)
        except TimedOut:
            raise ProgramFailed(f"{doomed!r} was to die when it had {moved} {at} bytes, and is still running") from None
        if status != -signal.SIGKILL or doomed.last_words != _AT_ITS_BYTE:
            if status == 1:
                doomed.result()  # which raises what it raised
            raise ProgramFailed(f"{doomed!r} was to die when it had {moved} {at} bytes, and {doomed.ending} before")


def machine_dies(machine: Machine) -> None:
    """Kill the machine's process (SIGKILL), and wait until it is gone. Its programs get MachineGone."""
    process = os.pidfd_open(machine.pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        waiting = waits.poll()
        waiting.register(process, waits.POLLIN)
        waiting.poll()
    finally:
        os.close(process)


@block
def _disturbed(domain: Domain, **how: int | None) -> Iterator[None]:
    """For as long as a control connection of its own is open, which closes also when this process is killed."""
    with _control(domain) as control:
        control.order("disturb", domid=domain.domid, **how)
        try:
            yield
        finally:
            try:
                control.order("calm")
            except MachineGone:
                pass  # another fault was stronger


@block
def _control(domain: Domain) -> Iterator[ControlClient]:
    if not domain.on_machine:
        raise NotKnownHere(f"the domain at {domain.address} is one of a real Xen; faults are for a gntalloc.Machine")
    control = ControlClient(os.path.dirname(domain.address))
    try:
        yield control
    finally:
        control.close()


# In the program that dies.


def _die_at(at: int, moved: Moved) -> None:
    """From now on an index of a ring goes no further than to byte `at`, and then this process is killed.

    All channels of the process count together. Bytes are moved when the peer can see it: when the index is.
    """
    ring: Any = Writer if moved == "written" else Reader
    advance = ring.advance
    left = at

    def advance_or_die(self: Any, length: int) -> None:
        nonlocal left
        if length >= left:
            advance(self, left)
            last_words(_AT_ITS_BYTE)
            os.kill(os.getpid(), signal.SIGKILL)
        left -= length
        advance(self, length)

    def put_message(self: Writer, message: Any, length: int) -> None:
        self.fill_length(length)
        self.fill(memoryview(message), HEADER)
        self.advance(length + HEADER)

    def take_message(self: Reader) -> bytes | None:
        length = self.message_length()
        if length is None:
            return None
        message = self.look(length, HEADER)
        self.advance(length + HEADER)
        return message

    # Whole messages have a way of their own to move the index.
    ring.advance = advance_or_die
    if moved == "written":
        ring.put_message = put_message
    else:
        ring.take_message = take_message
