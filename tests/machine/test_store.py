"""xenstore in the machine: domain.store, the stock tools, and the nodes of domains that come and go."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from limits import Limited, status_of

import gntalloc
from gntalloc.errors import MachineGone, NoMachine
from gntalloc.xenstore.client import Store
from gntalloc.xenstore.errors import Conflict, Denied, NoNode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc import Domain, Machine

PATIENCE = 20.0
PROBE = Path(__file__).parent.parent / "xenstore" / "probe.py"


@pytest.fixture
def dom0(machine: Machine) -> Iterator[Domain]:
    domain = machine.domain(0)
    yield domain
    domain.destroy()
    domain.devices.close()


def tool(machine: Machine, domid: int, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of the stock programs in a domain."""
    program = f"xenstore-{name}"
    if shutil.which(program) is None:
        pytest.skip(f"there is no {program} (apt install xenstore-utils)")
    return subprocess.run(
        [program, *arguments], env=machine.environ(domid), capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def test_a_domain_reads_and_writes_its_own(alice: Domain) -> None:
    store = alice.store
    assert store.domid == 1
    assert store.read("/local/domain/1/domid") == b"1"
    store.write("data/greeting", "hello")
    assert store.read("/local/domain/1/data/greeting") == b"hello"
    assert [str(entry) for entry in store.get_permissions("data/greeting")] == ["n1"]
    assert store.list("data") == ("greeting",)
    store.remove("data/greeting")
    with pytest.raises(NoNode):
        store.read("data/greeting")


def test_a_domain_may_not_what_it_may_not(alice: Domain, bob: Domain) -> None:
    alice.store.write("data/secret", "1")
    for path in ("/local/domain/1/data/secret", "/local/domain/1/domid", "/local/domain/0/name", "/tool"):
        with pytest.raises(Denied):
            bob.store.read(path)
    for path in ("/local/domain/2/name", "/local/domain/2/new", "/new"):
        with pytest.raises(Denied):
            bob.store.write(path, "mine")
    alice.store.set_permissions("data/secret", ["n1", "r2"])
    assert bob.store.read("/local/domain/1/data/secret") == b"1"
    with pytest.raises(Denied):
        bob.store.write("/local/domain/1/data/secret", "2")
    alice.store.remove("data/secret")


def test_domain_0_may_everything(dom0: Domain, alice: Domain) -> None:
    alice.store.write("data/secret", "1")
    assert dom0.store.read("/local/domain/1/data/secret") == b"1"
    dom0.store.write("/local/domain/1/data/secret", "2")
    assert alice.store.read("data/secret") == b"2"
    alice.store.remove("data/secret")


def test_a_watch_across_domains(alice: Domain, bob: Domain) -> None:
    alice.store.write("data/ring", "")
    alice.store.set_permissions("data/ring", ["r1"])
    with bob.store.watch("/local/domain/1/data/ring") as watch:
        assert watch.wait(timeout=PATIENCE) == "/local/domain/1/data/ring"
        alice.store.write("data/ring/ref", "8")
        assert watch.wait(timeout=PATIENCE) == "/local/domain/1/data/ring/ref"
        alice.store.write("data/other", "8")
        alice.store.remove("data/ring")
        assert watch.wait(timeout=PATIENCE) == "/local/domain/1/data/ring/ref"[: -len("/ref")]
    alice.store.remove("data/other")


def test_transactions_conflict(alice: Domain) -> None:
    store = alice.store
    store.write("data/count", "0")
    transaction = store.transaction()
    transaction.write("data/count", transaction.read("data/count") + b"1")
    store.write("data/count", "7")
    with pytest.raises(Conflict):
        transaction.commit()
    assert store.read("data/count") == b"7"
    with store.transaction() as another:
        another.write("data/count", "8")
        assert store.read("data/count") == b"7"
    assert store.read("data/count") == b"8"
    store.remove("data/count")


def test_two_processes_count_together(machine: Machine, alice: Domain) -> None:
    """What transactions are for: nobody's addition is lost."""
    program = (
        "import gntalloc\n"
        "domain = gntalloc.current_domain()\n"
        "def add(t): t.write('data/count', str(int(t.read('data/count')) + 1))\n"
        "for _ in range(50): domain.store.transact(add, timeout=20)\n"
        "domain.close()\n"
    )
    alice.store.write("data/count", "0")
    adding = [subprocess.Popen([sys.executable, "-c", program], env=machine.environ(1)) for _ in range(2)]
    assert [process.wait(PATIENCE) for process in adding] == [0, 0]
    assert alice.store.read("data/count") == b"100"
    alice.store.remove("data/count")


def test_a_store_is_made_anew_after_close_and_in_a_child(alice: Domain) -> None:
    first = alice.store
    assert alice.store is first
    first.close()
    second = alice.store
    assert second is not first
    second.write("data/x", "1")
    child = os.fork()
    if not child:
        try:
            alice.store.write("data/x", "2")
        finally:
            os._exit(0)
    assert status_of(child) == 0
    assert second.read("data/x") == b"2"
    second.remove("data/x")


@pytest.mark.parametrize("domid", [0, 1])
def test_what_holds_with_the_real_one_holds_here(machine: Machine, dom0: Domain, domid: int) -> None:
    """All that the probe looks at under a real Xen (tests/lab/test_store.py)."""
    dom0.store.mkdir("/local/domain/0/data")
    probe = [sys.executable, str(PROBE)]
    done = subprocess.run(probe, env=machine.environ(domid), capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# Domains that come and go.


def test_a_domain_leaves_nothing_to_the_next_of_its_number(machine: Machine, dom0: Domain, alice: Domain) -> None:
    first = machine.domain(9)
    first.store.write("data/left", "behind")
    alice.store.write("data/for-nine", "1")
    alice.store.set_permissions("data/for-nine", ["n1", "r9"])
    assert first.store.read("/local/domain/1/data/for-nine") == b"1"
    dom0.store.mkdir("/gift")
    dom0.store.set_permissions("/gift", ["n9"])
    old = first.store
    watch = old.watch("data")
    with dom0.store.watch("@releaseDomain") as released, dom0.store.watch("@introduceDomain") as introduced:
        heard = released.wait(timeout=PATIENCE), introduced.wait(timeout=PATIENCE)
        assert heard == ("@releaseDomain", "@introduceDomain")
        first.devices.destroy()
        assert released.wait(timeout=PATIENCE) == "@releaseDomain"
        with pytest.raises(MachineGone):
            old.read("data/left")
        watch.close()
        assert not dom0.store.exists("/local/domain/9")
        assert not dom0.store.exists("/gift")
        second = machine.domain(9)
        assert introduced.wait(timeout=PATIENCE) == "@introduceDomain"
    assert second.store.list("data") == ()
    assert second.store.read("/local/domain/1/data/for-nine") == b"1"  # which is alice's, and speaks of a number
    first.close()
    second.destroy()
    second.devices.close()
    alice.store.remove("data/for-nine")


def test_there_is_no_store_without_its_domain(machine: Machine) -> None:
    domain = machine.domain(9)
    address = domain.address
    domain.destroy()
    domain.devices.close()
    with pytest.raises(NoMachine):
        Store(f"{address}.store")


def test_released_by_domain_0_and_introduced_again(machine: Machine, dom0: Domain) -> None:
    """A domain that xenstore was told to forget is refused, and welcome again afterwards."""
    from gntalloc.xenstore.wire import Type, join

    domain = machine.domain(9)
    assert domain.store.domid == 9
    dom0.store._request(Type.RELEASE, "release", join("9"))
    with pytest.raises(MachineGone):
        domain.store.read("domid")
    with pytest.raises(MachineGone):
        domain.store.read("domid")
    dom0.store._request(Type.INTRODUCE, "introduce", join("9", "0", "1"))
    assert domain.store.get_domain_path(9) == "/local/domain/9"
    with pytest.raises(Denied):  # what domain 0 allowed domain 9 was meant for the one before
        domain.store.read("domid")
    domain.destroy()
    domain.devices.close()


# The stock programs.


def test_stock_read_write_list_exists_rm(machine: Machine) -> None:
    assert tool(machine, 1, "write", "data/a", "one", "data/b/c", "two words").returncode == 0
    assert tool(machine, 1, "read", "data/a", "/local/domain/1/data/b/c").stdout == "one\ntwo words\n"
    assert sorted(tool(machine, 1, "list", "data").stdout.split()) == ["a", "b"]
    assert tool(machine, 1, "exists", "data/a").returncode == 0
    assert tool(machine, 1, "exists", "data/z").returncode == 1
    assert tool(machine, 2, "read", "/local/domain/1/data/a").returncode == 1
    assert tool(machine, 1, "rm", "data/a", "data/b").returncode == 0
    assert tool(machine, 1, "list", "data").stdout == ""
    assert tool(machine, 1, "read", "data/a").returncode == 1


def test_stock_ls_and_chmod(machine: Machine) -> None:
    assert tool(machine, 1, "write", "data/a/b", "value").returncode == 0
    assert tool(machine, 1, "chmod", "-r", "data/a", "n1", "r2").returncode == 0
    shown = tool(machine, 2, "ls", "-fp", "/local/domain/1/data/a")
    assert shown.stdout == '/local/domain/1/data/a/b = "value"   (n1,r2)\n'
    shown = tool(machine, 1, "ls", "data")
    assert shown.stdout == 'a = ""\n b = "value"\n'
    assert tool(machine, 1, "chmod", "data/a", "n2").returncode == 1
    assert tool(machine, 1, "rm", "data/a").returncode == 0


def test_stock_ls_of_many_children(machine: Machine, dom0: Domain) -> None:
    """More than fit one message: DIRECTORY_PART."""
    names = [f"child-with-a-long-name-{number:04}" for number in range(500)]
    for name in names:
        dom0.store.write(f"/many/{name}", "")
    assert dom0.store.list("/many") == tuple(names)
    assert tool(machine, 0, "list", "/many").stdout.split() == names
    dom0.store.remove("/many")


def test_stock_watch(machine: Machine, alice: Domain) -> None:
    if shutil.which("xenstore-watch") is None:
        pytest.skip("there is no xenstore-watch (apt install xenstore-utils)")
    program = ["xenstore-watch", "-n", "3", "data/w"]
    with Limited(program, env=machine.environ(1), stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline() == "data/w\n"
        alice.store.write("data/w", "1")
        assert watching.stdout.readline() == "data/w\n"
        alice.store.write("data/w/x", "1")
        assert watching.stdout.readline() == "data/w/x\n"
        assert watching.wait(PATIENCE) == 0
    alice.store.remove("data/w")


# Descriptors.


def test_environ_leads_there(machine: Machine) -> None:
    path = machine.environ(1)["XENSTORED_PATH"]
    with Store(path) as store:
        assert store.domid == 1
    with gntalloc.Machine() as another:
        assert another.environ(1)["XENSTORED_PATH"] != path


def test_a_watch_can_be_selected_on(alice: Domain, bob: Domain) -> None:
    with alice.store.watch("data/s") as watch:
        watch.wait(timeout=PATIENCE)
        assert not select.select([watch], [], [], 0)[0]
        alice.store.write("data/s", "1")
        assert select.select([watch], [], [], PATIENCE)[0]
        assert watch.poll() == "data/s"
    alice.store.remove("data/s")


def test_a_program_of_another_user_is_refused(make_machine: Callable[..., Machine]) -> None:
    if os.getuid():
        pytest.skip("only root can be somebody else")
    machine = make_machine()
    domain = machine.domain(1)
    where = machine.environ(1)["XENSTORED_PATH"]
    os.chmod(where, 0o666)
    os.chmod(machine.folder, 0o755)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(where)
                code = 0 if sock.recv(1) == b"" else 2
        except OSError:
            code = 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(status_of(child)) == 0
    domain.close()
    domain.devices.close()
