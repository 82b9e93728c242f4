"""How the two ends find each other: nodes, order, permissions, waiting, one client after another."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from gntalloc import Closed, DeviceError, PeerBroke, TimedOut
from gntalloc.vchan import layout
from gntalloc.vchan.nodes import Address, Nodes
from gntalloc.xenstore.errors import NoNode

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc import Domain, Machine

PATIENCE = 20.0
PATH = "/local/domain/1/data/vchan/2/test"


def test_the_nodes_and_who_may_read_them(alice: Domain, bob: Domain) -> None:
    with alice.listen(2, "test") as listener:
        assert listener.path == PATH
        assert sorted(alice.store.list(PATH)) == ["event-channel", "ring-ref"]
        for name in ("event-channel", "ring-ref"):
            assert int(bob.store.read(f"{PATH}/{name}")) > 0
            assert [str(entry) for entry in alice.store.get_permissions(f"{PATH}/{name}")] == ["n1", "r2"]
        with pytest.raises(PermissionError):
            bob.store.list(PATH)
    with pytest.raises(NoNode):
        alice.store.list(PATH)


def test_one_client_after_another(alice: Domain, bob: Domain) -> None:
    served = []

    def serve() -> None:
        with alice.listen(2, "test", size=4096) as listener:
            for channel in listener:
                with channel:
                    name = channel.recv(timeout=PATIENCE)
                    channel.send(name.upper())
                    channel.drain(timeout=PATIENCE)
                    served.append(name)
                    if name == b"last":
                        return

    server = threading.Thread(target=serve)
    server.start()
    for name in (b"a", b"b", b"c", b"last"):
        with bob.connect(1, "test", timeout=PATIENCE) as channel:
            channel.send(name)
            assert channel.recv(timeout=PATIENCE) == name.upper()
    server.join(PATIENCE)
    assert served == [b"a", b"b", b"c", b"last"]


def test_accepted_channels_live_side_by_side(alice: Domain, bob: Domain) -> None:
    with alice.listen(2, "test", size=0) as listener:
        servers, clients = [], []
        for _ in range(5):
            thread = threading.Thread(target=lambda: clients.append(bob.connect(1, "test", timeout=PATIENCE)))
            thread.start()
            servers.append(listener.accept(timeout=PATIENCE))
            thread.join(PATIENCE)
    for number, (server, client) in enumerate(zip(servers, clients, strict=True)):
        server.send(bytes([number]))
        assert client.recv(timeout=PATIENCE) == bytes([number])
    for channel in (*servers, *clients):
        channel.close()


def test_a_client_waits_for_its_server(alice: Domain, bob: Domain) -> None:
    got = []
    waiting = threading.Thread(target=lambda: got.append(bob.connect(1, "test", timeout=PATIENCE)))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    with alice.listen(2, "test") as listener, listener.accept(timeout=PATIENCE) as server:
        waiting.join(PATIENCE)
        with got[0] as client:
            server.send(b"x")
            assert client.recv(timeout=PATIENCE) == b"x"


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_no_server(bob: Domain, timeout: float) -> None:
    with pytest.raises(TimedOut, match="no server waits at /local/domain/1/data/vchan/2/none"):
        bob.connect(1, "none", timeout=timeout)


def test_no_client_and_the_next_accept_goes_on(alice: Domain, bob: Domain) -> None:
    with alice.listen(2, "test") as listener:
        first = listener.offer()
        with pytest.raises(TimedOut):
            listener.accept(timeout=0.02)
        thread = threading.Thread(target=lambda: bob.connect(1, "test", timeout=PATIENCE).close())
        thread.start()
        with listener.accept(timeout=PATIENCE) as channel:
            assert channel is first
        thread.join(PATIENCE)


def test_a_server_that_is_taken_is_waited_for(alice: Domain, bob: Domain) -> None:
    """As with a C server, whose nodes stay while it has a client."""
    with alice.listen(2, "test") as listener:
        offered = listener.offer()
        address = Nodes(lambda: bob.store, PATH).read()
        assert address is not None
        client = bob.connect(1, "test", timeout=PATIENCE)
        offered.wait_connected(timeout=PATIENCE)
        Nodes(lambda: alice.store, PATH).publish(1, 2, address)
        with pytest.raises(TimedOut, match="has another client"):
            bob.connect(1, "test", timeout=0.3)
        client.close()
        offered.close()


def test_what_was_written_before_the_client_came(alice: Domain, bob: Domain) -> None:
    with alice.listen(2, "test", size=4096) as listener:
        offered = listener.offer()
        offered.send(b"welcome")
        assert not offered.connected
        with pytest.raises(TimedOut):
            offered.write(bytes(5000), timeout=0.02)
        with pytest.raises(TimedOut):
            offered.read(timeout=0.02)
        with bob.connect(1, "test", timeout=PATIENCE) as client:
            assert client.recv(timeout=PATIENCE) == b"welcome"
            offered.wait_connected(timeout=PATIENCE)
        offered.close()


def test_closing_a_listener_wakes_who_accepts(alice: Domain) -> None:
    listener = alice.listen(2, "test")
    ended = []

    def accept() -> None:
        try:
            listener.accept(timeout=PATIENCE)
        except Closed:
            ended.append(True)

    thread = threading.Thread(target=accept)
    thread.start()
    thread.join(0.1)
    listener.close()
    listener.close()
    thread.join(PATIENCE)
    assert ended == [True]
    with pytest.raises(Closed):
        listener.accept(timeout=0)


def test_paths(alice: Domain, bob: Domain) -> None:
    with alice.listen(2, "/local/domain/1/data/other") as listener:
        assert listener.path == "/local/domain/1/data/other"
        bob.connect(1, "/local/domain/1/data/other", timeout=PATIENCE).close()
        listener.accept(timeout=PATIENCE).close()
    long = "x" * 30
    for call in (alice.listen, bob.connect):
        with pytest.raises(ValueError, match="cuts names off after 49"):
            call(2 if call == alice.listen else 1, long)
    with alice.listen(2, long, extensions=True) as listener:
        bob.connect(1, long, timeout=PATIENCE, extensions=True).close()
        listener.accept(timeout=PATIENCE).close()


def test_a_domain_has_no_channel_with_itself(alice: Domain) -> None:
    for call in (alice.listen, alice.connect):
        with pytest.raises(ValueError, match="with itself"):
            call(1, "test")


def test_extensions_can_be_asked_for(alice: Domain, bob: Domain) -> None:
    with alice.listen(2, "test", extensions=False), pytest.raises(PeerBroke, match="is a libxenvchan"):
        bob.connect(1, "test", timeout=PATIENCE, extensions=True)
    with alice.listen(2, "test", extensions=True) as listener:
        bob.connect(1, "test", timeout=PATIENCE, extensions=False).close()
        with pytest.raises(TimedOut):
            listener.accept(timeout=0.1)


def test_stale_and_strange_pages(alice: Domain, bob: Domain) -> None:
    """Nodes that lead to something that is no vchan."""
    nodes = Nodes(lambda: alice.store, PATH)
    with alice.events.bind(2) as port, alice.share(2, writable=True) as page:
        nodes.publish(1, 2, Address(page.refs[0], port.number))
        with pytest.raises(TimedOut, match="has closed, and left its nodes"):
            bob.connect(1, "test", timeout=0.1)
        page.memory[layout.SRV_LIVE] = 1
        with pytest.raises(PeerBroke, match="order 0"):
            bob.connect(1, "test", timeout=0.1)
        layout.Orders(12, 12).write(page.memory)  # its references are zeros
        with pytest.raises(TimedOut, match="gone"):
            bob.connect(1, "test", timeout=0.1)
        for value in (b"0", b"-1", b"", b"99999999999", b"1x"):
            alice.store.write(f"{PATH}/event-channel", value)
            with pytest.raises(TimedOut, match="no server waits"):
                bob.connect(1, "test", timeout=0)
    nodes.withdraw()


def test_too_few_pages_say_so_and_leave_nothing(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(limit=40)
    alice = machine.domain(1)
    with pytest.raises(DeviceError, match="limit"):
        alice.listen(2, "test", size=1 << 20)
    with alice.listen(2, "test", size=65536):
        pass
    alice.close()
    alice.devices.close()
