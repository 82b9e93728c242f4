"""Machine(): started, asked, ended."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from limits import status_of

from gntalloc import DeviceError, GntallocError, Machine, MachineGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc import Domain


@pytest.mark.parametrize("arguments", [{"limit": -1}, {"behaviour": "xen"}, {"table_frames": 0}], ids=str)
def test_settings_that_cannot_be(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"limit|behaviour|table"):
        Machine(**arguments)  # type: ignore[arg-type]


def test_a_machine_leaves_nothing_in_its_folder(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    folder = Path(machine.folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    domain = machine.domain(1)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "1.store", "control"]
    domain.devices.close()
    machine.close()
    machine.close()
    assert not folder.exists()
    with pytest.raises(MachineGone):
        machine.statistics()


def test_two_machines_know_nothing_of_each_other(make_machine: Callable[..., Machine]) -> None:
    one, two = make_machine(), make_machine()
    for machine in (one, two):
        alice = machine.domain(1)
        alice.share(2).close()
        alice.close()
        alice.devices.close()
    assert one.pid != two.pid
    assert one.folder != two.folder


def test_a_domain_that_another_thread_has_just_made_is_there(
    make_machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = make_machine()
    first = machine.domain(1)
    answers = iter([False, True])  # not there when it was looked for, and there after all
    monkeypatch.setattr("os.path.exists", lambda _path: next(answers))
    again = machine.domain(1)
    monkeypatch.undo()
    assert again.domid == 1
    for domain in (first, again):
        domain.devices.close()


def test_a_domain_is_made_once(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(limit=10)
    first, again, other = machine.domain(1), machine.domain(1, limit=10, uid=os.getuid()), machine.domain(2, limit=5)
    assert (first.domid, again.domid, first.limit, other.limit) == (1, 1, 10, 5)
    for asked in ({"limit": 5}, {"uid": os.getuid() + 1}, {"limit": 0, "uid": os.getuid()}):
        with pytest.raises(ValueError, match=f"{next(iter(asked))}=.* it is there already, with limit=10, uid="):
            machine.domain(1, **asked)
    other.limit = 7
    with pytest.raises(ValueError, match="with limit=7"):
        machine.domain(2, limit=5)
    machine.domain(2, limit=7).devices.close()
    for domid in (-1, 0x7FF0, 1 << 20):
        with pytest.raises(DeviceError, match="0 to 32751") as caught:
            machine.domain(domid)
        assert caught.value.errno == errno.EEXIST
    for domain in (first, again, other):
        domain.devices.close()


def test_a_domain_that_is_destroyed(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    alice, bob = machine.domain(1), machine.domain(2)
    shared = alice.share(bob, writable=True)
    mapped = bob.map(shared.grant)
    alice.destroy()
    with pytest.raises(MachineGone):
        alice.share(bob)
    mapped.memory[0] = 1
    assert shared.memory[0] == 1
    with pytest.raises(DeviceError, match="no domain 1"):
        bob.map(shared.grant)
    assert machine.statistics().pages == 1
    shared.close()
    mapped.close()
    assert machine.statistics().pages == 0
    again = machine.domain(1)
    again.share(bob).close()
    for domain in (alice, bob, again):
        domain.close()
        domain.devices.close()


def test_forgetting_to_close_is_a_resource_warning() -> None:
    machines = [Machine()]
    folder = machines[0].folder
    with pytest.warns(ResourceWarning, match="never closed"):
        machines.clear()
    assert not Path(folder).exists()


def test_the_machine_cannot_be_looked_into(machine: Machine) -> None:
    """Programs of the same user could otherwise read every page in its memory, or stop it with a debugger."""
    if os.getuid() == 0:
        assert os.stat(f"/proc/{machine.pid}/mem").st_uid == 0
    with open(f"/proc/{machine.pid}/status", encoding="ascii") as status:
        assert "TracerPid:\t0" in status.read()


def test_statistics_and_grants(machine: Machine, alice: Domain, bob: Domain) -> None:
    with alice.share(bob, pages=3) as shared, bob.map(1, shared.refs[0]):
        statistics = machine.statistics()
        assert (statistics.pid, statistics.pages, statistics.extents) == (machine.pid, 3, 1)
        assert [domain.pages_in_use for domain in statistics.domains] == [3, 0, 0]
        grants = machine.grants()
        assert [grant.ref for grant in grants] == list(shared.refs)
        assert [grant.mapped_by for grant in grants] == [(2,), (), ()]
        assert [grant.held for grant in grants] == [True, False, False]
        assert {(grant.granter, grant.peer, grant.opener) for grant in grants} == {(1, 2, os.getpid())}


def test_a_machine_that_cannot_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(GntallocError, match="did not start"):
        Machine()
    assert list((tmp_path / "gntalloc").iterdir()) == []


def test_a_child_of_fork_neither_ends_the_machine_nor_commands_it(machine: Machine) -> None:
    child = os.fork()
    if not child:
        code = 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                machine.close()
            try:
                machine.statistics()
            except MachineGone:
                code = 0
        finally:
            os._exit(code)
    assert status_of(child) == 0
    assert machine.statistics().pid == machine.pid


def test_threads_that_make_the_same_domains(make_machine: Callable[..., Machine]) -> None:
    """Each gets them all: whoever finds a domain there can enter it."""
    machine = make_machine()
    domids = range(1, 30)
    barrier = threading.Barrier(4)
    found: list[list[int]] = []

    def make_all() -> None:
        mine = []
        for domid in domids:
            barrier.wait(20)
            domain = machine.domain(domid)
            mine.append(domain.domid)
            domain.devices.close()
        found.append(mine)

    threads = [threading.Thread(target=make_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [list(domids)] * 4
