"""The pytest plugin of gntalloc: fixtures, and a marker with their settings. See docs/testing-your-code.md.

    gntalloc_machine     a gntalloc.Machine
    gntalloc_domains     two domains of it, `alice` (1) and `bob` (2)
    gntalloc_channels    the two ends of a channel between them, `server` and `client`
    gntalloc_run         starts unmodified programs in them, which end with the test

    @pytest.mark.gntalloc(limit=64, size=4096)

It is a module beside the package, and imports that only when a fixture is used: pytest loads plugins before everything
else, and who does not use this one shall not pay for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from gntalloc import Machine
    from gntalloc.testing import Channels, Domains, Programs

__all__ = ["gntalloc_channels", "gntalloc_domains", "gntalloc_machine", "gntalloc_run"]

_T = TypeVar("_T")

# Which settings of the marker belong to what.
_OF_A_MACHINE = ("limit", "behaviour", "strict", "table_frames")
_OF_A_CHANNEL = ("size", "extensions", "spin")

_raised = pytest.StashKey[BaseException]()


def pytest_configure(config: pytest.Config) -> None:
    """Tell pytest of the marker, and that the kit's asserts are to be explained like a test's."""
    names = ", ".join((*_OF_A_MACHINE, *_OF_A_CHANNEL))
    config.addinivalue_line("markers", f"gntalloc({names}): settings of gntalloc's machine and channels")
    pytest.register_assert_rewrite("gntalloc.testing.channels")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Remember what the test raised, or a fixture before it: ours end as a `with` around it would."""
    if call.when != "teardown" and call.excinfo is not None:
        item.stash[_raised] = call.excinfo.value


@pytest.fixture
def gntalloc_machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Make a machine for each test, with the settings of `@pytest.mark.gntalloc`. It must be left clean."""
    from gntalloc.testing import checked_machine

    yield from _as_with(request, checked_machine(**_settings(request, _OF_A_MACHINE)))


@pytest.fixture
def gntalloc_domains(request: pytest.FixtureRequest, gntalloc_machine: Machine) -> Iterator[Domains]:
    """Two domains of `gntalloc_machine`, 1 and 2: `alice, bob = gntalloc_domains`. They must be left clean."""
    from gntalloc.testing import two_domains

    yield from _as_with(request, two_domains(gntalloc_machine))


@pytest.fixture
def gntalloc_channels(request: pytest.FixtureRequest, gntalloc_domains: Domains) -> Iterator[Channels]:
    """Make a channel between `gntalloc_domains`: `server, client = gntalloc_channels`, both in this process."""
    from gntalloc.testing import channel_pair

    yield from _as_with(request, channel_pair(gntalloc_domains, **_settings(request, _OF_A_CHANNEL)))


@pytest.fixture
def gntalloc_run(request: pytest.FixtureRequest, gntalloc_domains: Domains) -> Iterator[Programs]:
    """Start commands as `gntalloc run` does, in domain 1 or 2: `gntalloc_run(1, ["./server"])` gives a `Program`.

    After the test each is killed with all that it has left; one that failed, and that nobody asked about, is an error.
    """
    from gntalloc.testing import running_programs

    yield from _as_with(request, running_programs(gntalloc_domains))


def _as_with(request: pytest.FixtureRequest, context: AbstractContextManager[_T]) -> Iterator[_T]:
    """End the context with what the test raised, or a fixture around it: one failure is not told twice."""
    from gntalloc import GntallocError
    from gntalloc.testing import ProgramFailed

    stash = request.node.stash
    try:
        given = context.__enter__()
    except GntallocError as error:
        raise _told(f"before the test, {request.fixturename}: {error}") from None
    yield given
    raised = stash.get(_raised, None)
    try:
        if raised is None:
            context.__exit__(None, None, None)
        else:
            context.__exit__(type(raised), raised, raised.__traceback__)
    except BaseException as error:
        if error is not raised:
            stash[_raised] = error
            if isinstance(error, (AssertionError, ProgramFailed)):  # the text says it all
                raise _told(f"after the test, {request.fixturename}: {error}") from None
            raise


def _told(text: str) -> BaseException:
    """Make a failure that is this text and nothing else."""
    return pytest.fail.Exception(text, pytrace=False)


def _settings(request: pytest.FixtureRequest, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the markers at this test that are called so; of two the one nearer to the test."""
    found: dict[str, Any] = {}
    for marker in request.node.iter_markers("gntalloc"):
        unknown = [name for name in marker.kwargs if name not in (*_OF_A_MACHINE, *_OF_A_CHANNEL)]
        if marker.args or unknown:
            what = f"{unknown[0]}=" if unknown else repr(marker.args[0])
            there = ", ".join(f"{name}=" for name in (*_OF_A_MACHINE, *_OF_A_CHANNEL))
            raise _told(f"@pytest.mark.gntalloc does not take {what}; it takes {there}")
        found = {name: value for name, value in marker.kwargs.items() if name in names} | found
    return found
