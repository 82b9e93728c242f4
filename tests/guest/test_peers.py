"""Every call that takes a domain, or a count, takes the same ones and refuses the others in the same words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gntalloc import Domain, Grant

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS: dict[str, Callable[[Domain, Any], Any]] = {
    "share": lambda domain, peer: domain.share(peer),
    "map": lambda domain, peer: domain.map(peer, 8),
    "map a grant": lambda domain, peer: domain.map(Grant(peer, (8,), writable=False)),
    "listen": lambda domain, peer: domain.listen(peer, "test"),
    "connect": lambda domain, peer: domain.connect(peer, "test", timeout=0),
    "events.bind": lambda domain, peer: domain.events.bind(peer),
    "events.connect": lambda domain, peer: domain.events.connect(peer, 5),
}
COUNTS: dict[str, Callable[[Domain, Any], Any]] = {
    "share pages": lambda domain, count: domain.share(2, pages=count),
    "share size": lambda domain, count: domain.share(2, size=count),
    "map references": lambda domain, count: domain.map(2, count),
    "map several": lambda domain, count: domain.map(2, [8, count]),
    "listen": lambda domain, count: domain.listen(2, "test", size=count),
    "listen, a pair": lambda domain, count: domain.listen(2, "test", size=(4096, count)),
    "events.connect": lambda domain, count: domain.events.connect(2, count),
}


class Index:
    """As numpy's whole numbers are: no int, but with `__index__`."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("peer", [-1, 65536, 2.0, "2", b"2", True, None, (2,), Index(-1)])
def test_what_is_no_domain_is_refused(alice: Domain, call: Callable[[Domain, Any], Any], peer: object) -> None:
    wanted = ValueError if isinstance(peer, (Index, int)) and peer is not True else TypeError
    with pytest.raises(wanted, match="is no domain's number; give a Domain, or a whole number from 0 to 65535"):
        call(alice, peer)


@pytest.mark.parametrize("call", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("count", [-1, 1 << 80, 2.0, "2", True])
def test_what_is_no_count_is_refused(alice: Domain, call: Callable[[Domain, Any], Any], count: object) -> None:
    wanted = ValueError if type(count) is int else TypeError
    with pytest.raises(wanted, match=r"is a whole number from [01] to [0-9]+, not "):
        call(alice, count)


@pytest.mark.parametrize("two", [2, Index(2), "the domain"], ids=str)
def test_a_domain_is_named_in_three_ways(alice: Domain, bob: Domain, two: Any) -> None:
    peer = bob if two == "the domain" else two
    with alice.share(peer, pages=Index(1)) as shared, bob.map(alice, list(shared.refs)) as mapped:  # type: ignore[arg-type]
        shared.memory[0] = 7
        assert mapped.memory[0] == 7
    with alice.events.bind(peer) as port, bob.events.connect(alice, port.number) as theirs:
        port.notify()
        theirs.wait(timeout=20)
    with alice.listen(peer, "test") as listener, bob.connect(alice, "test", timeout=20) as client:
        client.send(b"x")
        with listener.accept(timeout=20) as server:
            assert server.recv(timeout=20) == b"x"
