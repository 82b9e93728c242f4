"""A machine, two domains, a channel, programs: each as a context manager that looks afterwards what is left.

pytest's fixtures are these (`gntalloc_pytest`). Other frameworks enter them: `TestCase.enterContext(two_domains())`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from gntalloc.embed import Machine
from gntalloc.testing.blocks import block
from gntalloc.testing.cleanup import Snapshot, assert_cleaned_up
from gntalloc.testing.program import Program

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from gntalloc.domain import Domain
    from gntalloc.vchan.channel import Channel

__all__ = ["Channels", "Domains", "Programs", "channel_pair", "checked_machine", "running_programs", "two_domains"]

__tracebackhide__ = True  # for pytest: what is raised here is about the caller's program

PATIENCE = 30.0  # seconds, against hangs
_PATH = "gntalloc-testing"


class Domains(NamedTuple):
    """Two domains of one machine."""

    alice: Domain
    """Domain 1."""
    bob: Domain
    """Domain 2."""


class Channels(NamedTuple):
    """The two ends of one channel."""

    server: Channel
    """In domain 1."""
    client: Channel
    """In domain 2."""


class Programs:
    """Starts unmodified programs in two domains, and ends them all."""

    def __init__(self, domains: Domains, stack: ExitStack) -> None:
        self._domains = domains
        self._stack = stack

    def __call__(self, domid: int, command: Sequence[str | os.PathLike[str]], **options: Any) -> Program:
        """Start one.

        Args:
            domid: of the domain, 1 or 2.
            command: the program, looked for in PATH, and its arguments.
            options: for subprocess.Popen: env, cwd, stdout, …

        Raises:
            FileNotFoundError, GntallocError: as `Program`.
        """
        domain = next((each for each in self._domains if each.domid == domid), None)
        if domain is None:
            raise ValueError(f"domain {domid!r} is none of these two; say 1 or 2, or use Program(…, unmodified=True)")
        return self._stack.enter_context(Program(domain, command, unmodified=True, **options))


@block
def checked_machine(**settings: Any) -> Iterator[Machine]:
    """Make a machine, and close it at the end of the block.

    Args:
        settings: as for `gntalloc.Machine`.

    Raises:
        AssertionError: at the end: this process has kept a map, or a descriptor. (Not if the block raised.)
    """
    before = Snapshot.of(None)
    with Machine(**settings) as machine:
        yield machine
    assert_cleaned_up(None, before)


@block
def two_domains(machine: Machine | None = None, **settings: Any) -> Iterator[Domains]:
    """Domains 1 and 2, closed at the end of the block.

    Args:
        machine: whose; if not given, one of their own.
        settings: of that, as for `gntalloc.Machine`.

    Raises:
        AssertionError: at the end: pages, maps, ports, watches or descriptors are left; the text says whose. (Not if
            the block raised.)
    """
    with ExitStack() as stack:
        if machine is None:
            machine = stack.enter_context(checked_machine(**settings))
        elif settings:
            raise TypeError(f"{', '.join(settings)} belong to a new machine, and there is one already")
        before = Snapshot.of(machine)
        domains = Domains(machine.domain(1), machine.domain(2))
        try:
            yield domains
        finally:
            for domain in domains:
                domain.close()
                domain.devices.close()
        assert_cleaned_up(machine, before)


@block
def channel_pair(
    domains: Domains | None = None,
    *,
    size: int | tuple[int, int] = 65536,
    extensions: bool | None = None,
    spin: float | None = None,
    **settings: Any,
) -> Iterator[Channels]:
    """Make a vchan between two domains, both ends in this process, and close it at the end of the block.

    Args:
        domains: whose; if not given, two of their own.
        size: see `Domain.listen`.
        extensions: see `Domain.listen`. False: as with a libxenvchan at the other end, all wake-ups by event channel.
        spin: see `Domain.listen`.
        settings: of a new machine.

    Raises:
        AssertionError: as `two_domains`.
    """
    from concurrent.futures import ThreadPoolExecutor

    with ExitStack() as stack:
        if domains is None:
            domains = stack.enter_context(two_domains(**settings))
        elif settings:
            raise TypeError(f"{', '.join(settings)} belong to a new machine, and there is one already")
        alice, bob = domains
        how: dict[str, Any] = {"extensions": extensions, "spin": spin}
        with alice.listen(bob, _PATH, size=size, **how) as listener, ThreadPoolExecutor(1) as other:
            connecting = other.submit(bob.connect, alice, _PATH, timeout=PATIENCE, **how)
            server = stack.enter_context(listener.accept(timeout=PATIENCE))
            client = stack.enter_context(connecting.result(PATIENCE))
        yield Channels(server, client)


@block
def running_programs(domains: Domains | None = None, **settings: Any) -> Iterator[Programs]:
    """Start commands as `gntalloc run` does; at the end of the block all of them are killed, and all that they left.

        with running_programs() as run:
            server = run(1, ["./server", "2"])

    Args:
        domains: where; if not given, two of their own.
        settings: of a new machine.

    Raises:
        ProgramFailed: at the end: one has failed, and nobody has asked how it ended. (Not if the block raised.)
        AssertionError: as `two_domains`.
    """
    with ExitStack() as stack:
        if domains is None:
            domains = stack.enter_context(two_domains(**settings))
        elif settings:
            raise TypeError(f"{', '.join(settings)} belong to a new machine, and there is one already")
        yield Programs(domains, stack)
