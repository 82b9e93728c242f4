"""A machine, two domains, a channel between them: each as a context manager that looks afterwards what is left.

pytest's fixtures are these (`gntalloc_pytest`). Other frameworks enter them: `TestCase.enterContext(two_domains())`.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from gntalloc.embed import Machine
from gntalloc.testing.cleanup import Snapshot, assert_cleaned_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc.guest.domain import Domain
    from gntalloc.vchan.channel import Channel

__all__ = ["Channels", "Domains", "channel_pair", "checked_machine", "two_domains"]

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


@contextmanager
def checked_machine(**settings: Any) -> Iterator[Machine]:
    """A machine, closed at the end of the block.

    Args:
        settings: as for `gntalloc.Machine`.

    Raises:
        AssertionError: at the end: this process has kept a map, or a descriptor. (Not if the block raised.)
    """
    before = Snapshot.of(None)
    with Machine(**settings) as machine:
        yield machine
    assert_cleaned_up(None, before)


@contextmanager
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


@contextmanager
def channel_pair(
    domains: Domains | None = None,
    *,
    size: int | tuple[int, int] = 65536,
    extensions: bool | None = None,
    spin: float | None = None,
    **settings: Any,
) -> Iterator[Channels]:
    """A vchan between two domains, both ends in this process, closed at the end of the block.

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
            server = stack.enter_context(listener.accept(PATIENCE))
            client = stack.enter_context(connecting.result(PATIENCE))
        yield Channels(server, client)
