"""WHY, a request of our own: answered by our daemon, harmless to others, and unseen by clients that do not know it."""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

import fake_xenstored
import pytest

from gntalloc.xenstore import wire
from gntalloc.xenstore.client import Store
from gntalloc.xenstore.daemon.limits import Quotas
from gntalloc.xenstore.daemon.server import Daemon
from gntalloc.xenstore.errors import StoreError
from gntalloc.xenstore.wire import Message, Type, join

if TYPE_CHECKING:
    from collections.abc import Iterator

BIG = "data/big"


class Full(fake_xenstored.Daemon):
    """Refuses all writes, and knows no WHY, as a stock daemon."""

    def carry_out(self, kind: int, tx_id: int, body: bytes, fired: list[str]) -> bytes:
        if kind == fake_xenstored.WRITE:
            raise fake_xenstored.Refusal("ENOSPC")
        return super().carry_out(kind, tx_id, body, fired)

    def answer(self, kind: int, req_id: int, tx_id: int, body: bytes) -> None:
        if kind == wire.WHY:
            assert (tx_id, body) == (0, b"\0")
            self.send(fake_xenstored.ERROR, req_id, tx_id, b"ENOSYS\0")
        else:
            super().answer(kind, req_id, tx_id, body)


@pytest.fixture
def stock() -> Iterator[Full]:
    daemon = Full()
    yield daemon
    daemon.stop()
    assert daemon.complaints == []


def test_a_stock_daemon_is_asked_once_and_the_text_is_general(stock: Full) -> None:
    with Store(stock.client) as store:
        for _ in range(3):
            with pytest.raises(StoreError, match="a quota of this domain is used up") as caught:
                store.write(BIG, "x")
            assert caught.value.errno == errno.ENOSPC
        assert store.domid == 7
    assert stock.requests.count(wire.WHY) == 1


def test_only_a_refusal_that_may_be_a_quotas_is_asked_about(stock: Full) -> None:
    stock.tree["/many"] = (b"", ("n0",))
    for number in range(500):
        stock.tree[f"/many/node-{number:06}"] = (b"", ("n0",))
    with Store(stock.client) as store:
        assert not store.exists("nothing")
        with pytest.raises(StoreError):
            store.read("secret")
        assert len(store.list("/many")) == 500  # E2BIG, and then in parts
    assert wire.WHY not in stock.requests


def test_a_daemon_that_is_silent_about_it_hides_no_refusal(stock: Full) -> None:
    stock.answer = lambda kind, *rest: None if kind == wire.WHY else Full.answer(stock, kind, *rest)  # type: ignore[method-assign]
    with Store(stock.client, timeout=0.3) as store, pytest.raises(StoreError, match="a quota of this domain"):
        store.write(BIG, "x")


def test_what_is_no_socket_is_never_asked(stock: Full, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's device takes an unknown request for a fault. No device is at hand: the socket stands for it."""
    monkeypatch.setattr(stat, "S_ISSOCK", lambda mode: False)
    with Store(stock.client) as store, pytest.raises(StoreError, match="a quota of this domain"):
        store.write(BIG, "x")
    assert wire.WHY not in stock.requests


def test_what_goes_over_the_wire_is_what_stock_clients_know() -> None:
    """An ERROR has the errno's name and a zero; WHY is answered to nobody but the connection that was refused."""
    server = Daemon(Quotas())
    for domid in (1, 2):
        server.create(domid)
        server.introduce(domid)
        server.own_view().make(f"/local/domain/{domid}", b"")
    zero, one, two = (server.connect(domid) for domid in (0, 1, 2))

    def ask(session: object, kind: int, body: bytes) -> tuple[int, bytes]:
        server.handle(session, Message(kind, 5, 0, body))  # type: ignore[arg-type]
        data = session.take()  # type: ignore[attr-defined]
        return wire.HEADER.unpack_from(data)[0], data[16:]

    ask(zero, Type.SET_PERMS, join("/local/domain/1", "n1"))
    assert ask(one, wire.WHY, b"\0") == (Type.ERROR, b"ENOENT\0")
    assert ask(one, Type.WRITE, join("a") + bytes(3000)) == (Type.ERROR, b"ENOSPC\0")
    assert ask(two, wire.WHY, b"\0") == (Type.ERROR, b"ENOENT\0")
    assert ask(one, wire.WHY, b"\0") == (
        wire.WHY,
        b"node-size 2048: the value has 3000 bytes, and all of the node 3032",
    )
    assert ask(one, wire.WHY, b"\0") == (Type.ERROR, b"ENOENT\0")
