"""Fixtures for the core: a machine in this process for its drivers, and machines that are processes."""

from __future__ import annotations

import os
import random
import re
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from limits import pytest_timeout_set_timer  # noqa: F401  a hook

import gntalloc
from gntalloc.atomics import atomics
from gntalloc.lab import Lab, NothingToRunOn
from gntalloc.machine.machine import BEHAVIOURS
from gntalloc.machine.machine import Machine as Core
from gntalloc.testing import Snapshot, assert_cleaned_up, recount

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from gntalloc import Domain, Machine
    from gntalloc.lab import Session


def pytest_configure() -> None:
    """Let Ctrl-C, hang-ups and the terminal's stops reach the programs of the tests.

    A process in a shell's background, or under nohup, is born with some of them ignored, and hands that on.
    """
    for number in signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a package would mend is a skip, which names it; and in CI, where all of them shall be, a failure."""
    report = yield
    if report.skipped and os.environ.get("CI") and re.search("(apt|pip) install", str(report.longrepr)):
        report.outcome = "failed"
        report.longrepr = f"in CI no test is left out for want of a package: {report.longrepr}"
    return report


@pytest.fixture
def libatomic() -> None:
    """Where there is none, channels do without: what needs it is left out."""
    if not atomics().clears:
        pytest.skip("there is no libatomic here: apt install libatomic1")


@pytest.fixture(params=["ours", "linux"])
def behaviour(request: pytest.FixtureRequest) -> str:
    """Both, for what is the same in both."""
    return str(request.param)


@pytest.fixture
def make_core() -> Iterator[Callable[..., Core]]:
    """In-process machines of domains 1 and 2. What they held must be given back when the test ends."""
    before = Snapshot.of(None)
    cores: list[Core] = []

    def make(behaviour: str = "ours", *, limit: int = 64, table_frames: int = 1, strict: bool = False) -> Core:
        core = Core(limit=limit, behaviour=BEHAVIOURS[behaviour]._replace(strict=strict), table_frames=table_frames)
        for domid in (1, 2):
            core.create(domid, uid=os.getuid())
        cores.append(core)
        return core

    yield make
    for core in cores:
        recount(core)
        for guest in core.guests.values():
            for file in list(guest.files):
                core.close(guest, file)
        core.settle()
        recount(core)
        statistics = core.statistics()
        assert (statistics["pages"], statistics["extents"]) == (0, 0)
        for domain in statistics["domains"]:
            assert (domain["pages_in_use"], domain["references"], domain["files"]) == (0, 0, 0)
        core.frames.close()
    assert_cleaned_up(None, before)


@pytest.fixture
def core(make_core: Callable[..., Core], behaviour: str) -> Core:
    """One of each behaviour."""
    return make_core(behaviour)


class _Quiet:
    """A machine's standard error: a file, which must stay empty."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by check

    def start(self, *args: int | str, **settings: int | str) -> Machine:
        saved = os.dup(2)
        os.dup2(self._log.fileno(), 2)
        try:
            return gntalloc.Machine(*args, **settings)  # type: ignore[arg-type]
        finally:
            os.dup2(saved, 2)
            os.close(saved)

    def check(self) -> None:
        """Nothing may have been written."""
        with self._log:
            self._log.seek(0)
            assert self._log.read().decode(errors="replace") == ""


@pytest.fixture
def make_machine() -> Iterator[Callable[..., Machine]]:
    """Machines of any settings, closed at the end. They must have been silent, and left nothing behind."""
    before = Snapshot.of(None)
    started: list[tuple[Machine, _Quiet]] = []

    def make(*args: int | str, **settings: int | str) -> Machine:
        quiet = _Quiet()
        machine = quiet.start(*args, **settings)
        started.append((machine, quiet))
        return machine

    yield make
    for machine, quiet in started:
        machine.close()
        quiet.check()
    del machine, quiet
    started.clear()
    assert_cleaned_up(None, before)


@pytest.fixture(scope="module")
def _machine_of_the_module() -> Iterator[Machine]:
    quiet = _Quiet()
    with quiet.start(limit=64) as machine:
        for domid in (1, 2, 3):
            domain = machine.domain(domid)
            domain.close()
            domain.devices.close()
        yield machine
    quiet.check()


@pytest.fixture
def machine(_machine_of_the_module: Machine) -> Iterator[Machine]:
    """A machine with domains 1, 2 and 3. The test must give back what it takes, here and there."""
    before = Snapshot.of(_machine_of_the_module)
    yield _machine_of_the_module
    assert_cleaned_up(_machine_of_the_module, before)


def _domain(machine: Machine, domid: int) -> Iterator[Domain]:
    domain = machine.domain(domid)
    yield domain
    domain.close()
    domain.devices.close()


@pytest.fixture
def alice(machine: Machine) -> Iterator[Domain]:
    """Domain 1."""
    yield from _domain(machine, 1)


@pytest.fixture
def bob(machine: Machine) -> Iterator[Domain]:
    """Domain 2."""
    yield from _domain(machine, 2)


# A real Xen, booted once for all tests that leave it alive.

HERE = Path(__file__).parent
FOR_THE_LAB = [
    *(HERE / "lab" / name for name in ("granter.py", "grantee.py")),
    *(HERE / "conformance" / f"{name}.py" for name in ("seat", "driving", "rows", "event_rows", "far", "judge")),
]


@pytest.fixture(scope="session")
def some_bytes() -> bytes:
    """More than any ring, and no multiple of anything. In the lab it is the file `some-bytes`."""
    return random.Random(1).randbytes(3_000_017)


@pytest.fixture(scope="session")
def xen(some_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Dom0, a PV and a PVH guest in QEMU. Where the lab cannot run that is a skip with its reason; in CI a failure."""
    try:
        lab = Lab.find()
    except NothingToRunOn as why:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(why))
    file = tmp_path_factory.mktemp("lab") / "some-bytes"
    file.write_bytes(some_bytes)
    with lab.boot(("pv", "pvh"), files=[*FOR_THE_LAB, file], timeout=400) as session:
        yield session
