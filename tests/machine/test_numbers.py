"""A domain's number before it lives and after it has died: what is said of it, by nodes, pages and ports alike.

docs/architecture.md has the rule ("What a number means").
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from gntalloc.errors import DeviceError
from gntalloc.xenstore.errors import Denied, NoNode, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc import Domain, Machine

NODE = "/local/domain/{}/data/for-nine"
PATIENCE = 30.0


class Said:
    """A node, a page and a port of domain `owner` that are for number 9."""

    def __init__(self, owner: Domain) -> None:
        self.owner = owner
        owner.store.write(NODE.format(owner.domid), "1")
        owner.store.set_permissions(NODE.format(owner.domid), [f"n{owner.domid}", "r9"])
        self.pages = owner.share(9)
        self.pages.memory[:4] = b"page"
        self.port = owner.events.bind(9)

    def seen_by(self, domain: Domain) -> None:
        """Read the node, map the page, connect to the port."""
        assert domain.store.read(NODE.format(self.owner.domid)) == b"1"
        with domain.map(self.pages.grant) as mapped:
            assert bytes(mapped.memory[:4]) == b"page"
        with domain.events.connect(self.owner.domid, self.port.number) as port:
            self.port.notify()
            port.wait(timeout=PATIENCE)

    def close(self) -> None:
        self.port.close()
        self.pages.close()
        self.owner.store.remove(NODE.format(self.owner.domid))


@pytest.fixture
def said(alice: Domain) -> Iterator[Said]:
    what = Said(alice)
    yield what
    what.close()


def gone(domain: Domain) -> None:
    domain.destroy()
    domain.devices.close()


def test_what_is_said_of_a_number_holds_before_it_lives_and_for_each_that_has_it(machine: Machine, said: Said) -> None:
    for _ in range(3):
        nine = machine.domain(9)
        said.seen_by(nine)
        gone(nine)


def test_domain_0_speaks_of_numbers_too(machine: Machine) -> None:
    dom0 = machine.domain(0)
    dom0.store.write("/for-nine", "1")
    dom0.store.set_permissions("/for-nine", ["n0", "b9"])
    for number in range(2):
        nine = machine.domain(9)
        nine.store.write("/for-nine", str(number))
        nine.store.write("/for-nine/below", "nine's own")
        gone(nine)
        assert dom0.store.list("/for-nine") == ()
    dom0.store.remove("/for-nine")
    gone(dom0)


def test_it_holds_no_longer_than_the_domain_that_said_it(machine: Machine) -> None:
    seven, nine = machine.domain(7), machine.domain(9)
    what = Said(seven)
    grant, port = what.pages.grant, what.port.number
    gone(seven)
    seven = machine.domain(7)
    with pytest.raises((NoNode, Denied)):
        nine.store.read(NODE.format(7))
    with pytest.raises(DeviceError) as refused:
        nine.map(grant)
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(DeviceError):
        nine.events.connect(7, port)
    what.port.close()
    what.pages.close()
    gone(seven)
    gone(nine)


def test_a_dead_domains_own_pass_to_nobody(machine: Machine, alice: Domain) -> None:
    """Nodes that it made anywhere, what counts for it, watches, and rights over other domains."""
    dom0, first = machine.domain(0), machine.domain(9)
    alice.store.write("data/open", "")
    alice.store.set_permissions("data/open", ["n1", "b9"])
    first.store.write("/local/domain/1/data/open/mine", "secret")
    first.store.write("data/kept", "secret")
    watch = first.store.watch("data")
    transaction = first.store.transaction()
    transaction.write("data/more", "1")
    shared = first.share(1)
    gone(first)
    assert alice.store.list("data/open") == ()
    second = machine.domain(9)
    assert second.store.list("data") == ()
    with pytest.raises((NoNode, Denied)):
        second.store.read("/local/domain/1/data/open/mine")
    own = next(each for each in machine.statistics().domains if each.domid == 9)
    fresh = next(each for each in machine.statistics().domains if each.domid == 3)
    for name in ("nodes", "watches", "transactions", "pages_in_use", "references", "ports"):
        assert getattr(own, name) == getattr(fresh, name), name
    with pytest.raises(DeviceError):
        alice.map(shared.grant)
    shared.close()
    watch.close()
    alice.store.remove("data/open")
    gone(second)
    gone(dom0)


def test_no_node_is_owned_by_a_number_without_a_domain(machine: Machine) -> None:
    dom0 = machine.domain(0)
    dom0.store.write("/gift", "")
    with pytest.raises(StoreError) as refused:
        dom0.store.set_permissions("/gift", ["n9"])
    assert refused.value.errno == errno.ENOENT
    dom0.store.remove("/gift")
    gone(dom0)


def test_with_linux_behaviour_the_store_forgets_as_xenstored_does(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(behaviour="linux")
    one = machine.domain(1)
    one.store.write("data/x", "1")
    one.store.set_permissions("data/x", ["n1", "r2"])
    two = machine.domain(2)
    with pytest.raises(Denied):
        two.store.read("/local/domain/1/data/x")
    one.store.set_permissions("data/x", ["n1", "r2"])
    assert two.store.read("/local/domain/1/data/x") == b"1"
    gone(two)
    two = machine.domain(2)
    with pytest.raises(Denied):
        two.store.read("/local/domain/1/data/x")
    gone(two)
    gone(one)


# Channels, which are nodes, pages and a port.

CLIENT = """
import gntalloc
with gntalloc.current_domain().connect(1, "again", timeout=30) as channel:
    channel.send(b"hello")
    print(channel.recv(timeout=30).decode())
"""


def test_a_listener_serves_each_domain_that_gets_its_number(machine: Machine, alice: Domain) -> None:
    with alice.listen(9, "again") as listener:
        for _ in range(3):
            nine = machine.domain(9)
            client = subprocess.Popen(
                [sys.executable, "-c", CLIENT], env=machine.environ(9), stdout=subprocess.PIPE, text=True
            )
            try:
                with listener.accept(timeout=PATIENCE) as channel:
                    channel.send(channel.recv(timeout=PATIENCE).upper())
                    assert client.communicate(timeout=PATIENCE)[0] == "HELLO\n"
            finally:
                client.kill()
                client.communicate(timeout=PATIENCE)
            gone(nine)


def test_a_listener_in_domain_0(machine: Machine) -> None:
    dom0 = machine.domain(0)
    with dom0.listen(9, "x") as listener:
        for _ in range(2):
            nine = machine.domain(9)
            offered = listener.offer()
            with nine.connect(0, "x", timeout=PATIENCE) as client:
                client.send(b"there")
                assert listener.accept(timeout=PATIENCE) is offered
                assert offered.recv(timeout=PATIENCE) == b"there"
            offered.close()
            gone(nine)
    gone(dom0)


def test_the_number_is_that_of_another_users_domain(machine: Machine, said: Said) -> None:
    """A number is no person: whoever makes domains of a machine decides whom it gives an old number to."""
    if os.getuid():
        pytest.skip("only root can become somebody else")
    nine = machine.domain(9, uid=12345)
    said.seen_by(nine)  # root enters every domain
    gone(nine)
