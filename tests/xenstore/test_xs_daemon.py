"""The daemon as pure state: what chance does not reach, its books, and transactions against a simple model."""

from __future__ import annotations

import errno
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xs_generate import generate
from xs_replay import GUESTS, Ours, Player

from gntalloc.steps import finish_steps
from gntalloc.xenstore import wire
from gntalloc.xenstore.daemon.arguments import decimal, integer, number
from gntalloc.xenstore.daemon.limits import Quotas, Refused
from gntalloc.xenstore.daemon.server import Daemon
from gntalloc.xenstore.daemon.tree import above, is_name, parent
from gntalloc.xenstore.wire import Message, Type, join

if TYPE_CHECKING:
    from gntalloc.xenstore.daemon.session import Session


class Shop:
    """A server, domain 0 and guests 1 and 2, each with a home it owns; ask them one at a time."""

    def __init__(self, quotas: Quotas | None = None) -> None:
        self.server = Daemon(quotas)
        for domid in (1, 2):
            self.server.create(domid)
            self.server.introduce(domid)
        self.sessions = {domid: self.server.connect(domid) for domid in (0, 1, 2)}
        for domid in (1, 2):
            self.ask(0, Type.MKDIR, join(f"/local/domain/{domid}"))
            self.ask(0, Type.SET_PERMS, join(f"/local/domain/{domid}", f"n{domid}"))

    def raw(self, who: int | Session, kind: int, body: bytes, tx_id: int = 0) -> Message:
        session = self.sessions[who] if isinstance(who, int) else who
        self.server.handle(session, Message(kind, 5, tx_id, body))
        return next(message for message in self.read(session) if message.type != Type.WATCH_EVENT)

    def ask(self, who: int | Session, kind: int, body: bytes, tx_id: int = 0) -> bytes:
        """The answer's body, or the name of an error."""
        message = self.raw(who, kind, body, tx_id)
        assert message.req_id == 5
        assert message.tx_id == tx_id
        return message.body

    def read(self, who: int | Session) -> list[Message]:
        session = self.sessions[who] if isinstance(who, int) else who
        finish_steps(self.server.catch_up())
        decoder = wire.Decoder()
        found: list[Message] = []
        while session.outbox:
            found += decoder.feed(session.take())
        return found


@pytest.fixture
def shop() -> Shop:
    return Shop()


# Arguments, as C reads them.


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("  7x", 7), ("-1", -1), ("", 0), ("x", 0), ("+3", 3), ("4294967297", 1), ("9" * 30, -1), ("0x10", 0)],
)
def test_atoi(text: str, value: int) -> None:
    assert integer(text.encode()) == value
    assert decimal(text.encode()) == value & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), ("0x10", 16), ("010", 8), (" 5", 5), ("-1", 0xFFFFFFFF), ("0", 0)]
)
def test_strtol(text: str, value: int) -> None:
    assert number(text) == value


@pytest.mark.parametrize("text", ["", "x", "7x", "08", "0x", "1 ", "--1"])
def test_strtol_refuses(text: str) -> None:
    with pytest.raises(Refused):
        number(text)


@pytest.mark.parametrize("path", ["/", "/a", "/a/b-c_d@e/F9", "/" + "x" * 2047, "/local/domain/5/" + "x" * 2048])
def test_names(path: str) -> None:
    assert is_name(path, 2048)


@pytest.mark.parametrize(
    "path", ["", "a", "//", "/a/", "/a//b", "/a b", "/a\n", "/\xe4", "/" + "x" * 2048, "/local/domain/5/" + "x" * 2049]
)
def test_no_names(path: str) -> None:
    assert not is_name(path, 2048)


def test_above() -> None:
    assert above("/a/b") == ["/a/b", "/a", "/"]
    assert above("/") == ["/"]
    assert parent("/a") == "/"


# What chance does not reach.


def test_a_long_list_comes_in_parts(shop: Shop) -> None:
    names = [f"name-{place:04}" for place in range(1000)]
    for name in names:
        shop.ask(0, Type.MKDIR, join(f"/many/{name}"))
    assert shop.raw(0, Type.DIRECTORY, join("/many")).body == b"E2BIG\0"
    offset, found = 0, b""
    while not found.endswith(b"\0\0"):
        body = shop.ask(0, Type.DIRECTORY_PART, join("/many", str(offset)))
        assert len(body) <= wire.PAYLOAD_MAX
        found += body.partition(b"\0")[2]
        offset = len(found)
    assert wire.split(found[:-1]) == names
    assert shop.ask(0, Type.DIRECTORY_PART, join("/many", "100000")).endswith(b"\0\0")


def test_a_part_says_when_the_node_has_changed(shop: Shop) -> None:
    shop.ask(0, Type.MKDIR, join("/d/x"))
    before = shop.ask(0, Type.DIRECTORY_PART, join("/d", "0"))
    assert shop.ask(0, Type.DIRECTORY_PART, join("/d", "0")) == before
    shop.ask(0, Type.MKDIR, join("/d/y"))
    assert shop.ask(0, Type.DIRECTORY_PART, join("/d", "0")).partition(b"\0")[0] != before.partition(b"\0")[0]


def test_a_domain_acts_for_its_target_until_one_goes(shop: Shop) -> None:
    shop.ask(2, Type.WRITE, join("secret") + b"2")
    read = join("/local/domain/2/secret")
    assert shop.ask(1, Type.READ, read) == b"EACCES\0"
    assert shop.ask(0, Type.SET_TARGET, join("1", "2")) == b"OK\0"
    assert shop.ask(1, Type.READ, read) == b"2"
    shop.server.destroy(2)
    shop.server.create(2)
    shop.server.introduce(2)
    shop.ask(0, Type.WRITE, join("/local/domain/2/secret") + b"3")
    shop.ask(0, Type.SET_PERMS, join("/local/domain/2/secret", "n2"))
    assert shop.ask(1, Type.READ, read) == b"EACCES\0"


def test_who_owns_the_root_and_goes_takes_nothing_along(shop: Shop) -> None:
    shop.ask(0, Type.SET_PERMS, join("/", "n1"))
    shop.server.destroy(1)
    assert shop.ask(0, Type.GET_PERMS, join("/")) == b"n0\0"
    assert shop.ask(0, Type.DIRECTORY, join("/")) == join("tool", "local")


def test_permissions_outlive_no_domain(shop: Shop) -> None:
    shop.ask(1, Type.WRITE, join("for-two") + b"1")
    shop.ask(1, Type.SET_PERMS, join("for-two", "n1", "r2"))
    assert shop.ask(2, Type.READ, join("/local/domain/1/for-two")) == b"1"
    shop.server.destroy(2)
    shop.server.create(2)
    shop.server.introduce(2)
    new = shop.server.connect(2)
    assert shop.ask(new, Type.READ, join("/local/domain/1/for-two")) == b"EACCES\0"
    assert shop.ask(1, Type.GET_PERMS, join("for-two")) == join("n1", "r2")  # it is shown, and void
    shop.ask(1, Type.SET_PERMS, join("for-two", "n1", "r2"))
    assert shop.ask(new, Type.READ, join("/local/domain/1/for-two")) == b"1"


def test_who_is_gone_can_be_given_nothing(shop: Shop) -> None:
    shop.ask(1, Type.WRITE, join("x") + b"1")
    shop.server.destroy(2)
    assert shop.ask(0, Type.SET_PERMS, join("/local/domain/1/x", "n2")) == b"ENOENT\0"
    assert shop.ask(1, Type.SET_PERMS, join("x", "n1", "r2")) == b"OK\0"
    shop.server.create(2)
    shop.server.introduce(2)
    assert shop.ask(shop.server.connect(2), Type.READ, join("/local/domain/1/x")) == b"EACCES\0"


def test_a_transaction_whose_nodes_others_removed(shop: Shop) -> None:
    """What it sees does not fit together any more: EIO, and no commit."""
    shop.ask(1, Type.WRITE, join("d/a"))
    shop.ask(1, Type.WRITE, join("d/b"))
    first, second = (int(shop.ask(1, Type.TRANSACTION_START, b"\0").rstrip(b"\0")) for _ in range(2))
    shop.ask(1, Type.READ, join("d"), first)
    shop.ask(1, Type.READ, join("d/a"), first)
    shop.ask(1, Type.RM, join("d/b"))
    assert shop.ask(1, Type.RM, join("d"), first) == b"EIO\0"
    assert shop.ask(1, Type.DIRECTORY, join("d"), first) == b"b\0"  # it got as far as that
    shop.ask(1, Type.READ, join("d"), second)
    shop.ask(1, Type.WRITE, join("d/c"))
    assert shop.ask(1, Type.RM, join("d/c"), second) == b"EIO\0"
    for tx_id in (first, second):
        assert shop.ask(1, Type.TRANSACTION_END, join("T"), tx_id) == b"EAGAIN\0"
    assert shop.ask(1, Type.DIRECTORY, join("d")) == b"a\0c\0"
    recount(shop.server)


def test_events_are_for_who_may_read(shop: Shop) -> None:
    shop.ask(1, Type.WATCH, join("@releaseDomain", "t"))
    shop.ask(0, Type.SET_PERMS, join("@releaseDomain", "n0", "r1"))
    shop.server.destroy(2)
    assert [message.body for message in shop.read(1)] == [join("@releaseDomain", "t")] * 1


def test_the_same_event_waits_once(shop: Shop) -> None:
    session = shop.server.connect(1)
    shop.ask(session, Type.WATCH, join("x", "t"))
    shop.read(session)
    for value in (b"1", b"2"):
        shop.ask(1, Type.WRITE, join("x") + value)
    assert [message.body for message in shop.read(session)] == [join("x", "t")]


def test_memory_is_a_quota() -> None:
    shop = Shop(Quotas(memory=20_000))
    answers = Counter(shop.ask(1, Type.WRITE, join(f"n{place}") + bytes(1000)) for place in range(50))
    assert answers == {b"OK\0": answers[b"OK\0"], b"EIO\0": answers[b"EIO\0"]}
    assert 10 < answers[b"OK\0"] < 20
    assert shop.ask(1, Type.WATCH, join("n0", "t" * 3000)) == b"ENOMEM\0"
    assert shop.ask(1, Type.RM, join("n0")) == b"OK\0"
    assert shop.ask(1, Type.WRITE, join("m") + b"1") == b"OK\0"
    assert shop.ask(2, Type.WRITE, join("m") + bytes(1000)) == b"OK\0"  # of each domain its own
    recount(shop.server)


def test_a_transaction_that_failed_cannot_be_committed() -> None:
    shop = Shop(Quotas(node_size=100))
    tx_id = int(shop.ask(1, Type.TRANSACTION_START, b"\0").rstrip(b"\0"))
    shop.ask(1, Type.WRITE, join("a") + b"1", tx_id)
    assert shop.ask(1, Type.WRITE, join("a") + bytes(100), tx_id) == b"ENOSPC\0"
    assert shop.ask(1, Type.TRANSACTION_END, join("T"), tx_id) == b"ENOMEM\0"
    assert shop.ask(1, Type.READ, join("a")) == b"ENOENT\0"
    recount(shop.server)


def test_control_shows_and_sets_quotas(shop: Shop) -> None:
    assert b"nodes            :     1000\n" in shop.ask(0, Type.CONTROL, join("quota"))
    assert shop.ask(0, Type.CONTROL, join("quota", "set", "nodes", "3")) == b"OK\0"
    assert shop.server.quotas.nodes == 3
    assert b"nodes            :        1\n" in shop.ask(0, Type.CONTROL, join("quota", "1"))
    assert shop.ask(1, Type.CONTROL, join("quota")) == b"EACCES\0"
    assert b"quota" in shop.ask(0, Type.CONTROL, join("help"))
    assert b"memory" in shop.ask(0, Type.CONTROL, join("quota-soft"))


def test_a_privileged_connection_that_never_reads_is_ended(shop: Shop) -> None:
    session = shop.server.connect(0)
    shop.ask(session, Type.WATCH, join("/w", "t" * 4000))
    for place in range(5000):
        shop.ask(0, Type.WRITE, join(f"/w/{place}"))
    assert session.closed
    shop.server.disconnect(session)
    recount(shop.server)


def test_introduce_of_nobody_is_refused(shop: Shop) -> None:
    with pytest.raises(Refused) as refused:
        shop.server.introduce(7)
    assert refused.value.code == errno.ENOENT
    with pytest.raises(Refused):
        shop.server.connect(7)


# The books: what is written down twice agrees.


def recount(server: Daemon) -> None:
    nodes: Counter[int] = Counter()
    owned: dict[int, set[str]] = {}
    memory: Counter[int] = Counter()
    for path, node in server.tree.items():
        owner = node.permissions[0].domid
        nodes[owner] += 1
        owned.setdefault(owner, set()).add(path)
        memory[owner] += node.size + len(path)
        assert node.names == len(node.listing())
        assert len(set(node.children)) == len(node.children)
        prefix = "" if path == "/" else path
        assert all(f"{prefix}/{child}" in server.tree for child in node.children)
        if path != "/":
            assert path.rpartition("/")[2] in server.tree[parent(path)].children
    for domid, domain in server.domains.items():
        expected = memory[domid]
        watches = transactions = 0
        for session in server.sessions.get(domain, ()):
            watches += len(session.watches)
            transactions += len(session.transactions)
            expected += sum(len(watch.path) + len(watch.token) for watch in session.watches.values())
            expected += sum(seen.charged for tx in session.transactions.values() for seen in tx.seen.values())
            expected += sum(len(data) for data in session.outbox)
            assert session.unread == sum(len(data) for data in session.outbox)
        found = domain.nodes, domain.watches, domain.transactions, domain.memory
        # Domain 0 has / and what the daemon made before it was counted.
        own = nodes[domid] - (domid == 0)
        assert found[:3] == (own, watches, transactions), domain
        assert domid == 0 or found[3] == expected, domain
    assert set(nodes) <= set(server.domains)
    assert {domid: set(names) for domid, names in server.tree.owned.items()} == owned


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_the_books_agree_after_any_episode(seed: int) -> None:
    ours = Ours({"a": 1, "b": 2})
    Player(ours).play(generate(seed, 80))
    recount(ours._server)
    for guest in GUESTS:
        ours._server.destroy(ours.domids[guest])
    recount(ours._server)
    assert not any(entry[0] == 1 for entry in (node.permissions[0] for node in ours._server.tree.values()))


# Transactions, against a dictionary: those that were committed happened one after the other.

NAMES = st.sampled_from(["/m/a", "/m/b", "/m/b/c", "/m/d/e/f"])
STEP = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 3), NAMES, st.binary(max_size=3)),
    st.tuples(st.just("read"), st.integers(0, 3), NAMES, st.just(b"")),
    st.tuples(st.just("rm"), st.integers(0, 3), NAMES, st.just(b"")),
    st.tuples(st.just("begin"), st.integers(1, 3), st.just(""), st.just(b"")),
    st.tuples(st.just("end"), st.integers(1, 3), st.just(""), st.sampled_from([b"T", b"T", b"F"])),
)
Model = dict[str, bytes]


def model_step(model: Model, what: str, path: str, value: bytes) -> bytes:
    if what == "read":
        return model.get(path, b"ENOENT\0")
    if what == "write":
        for name in above(path)[1:]:
            model.setdefault(name, b"")
        model[path] = value
        return b"OK\0"
    if parent(path) not in model:
        return b"ENOENT\0"
    for name in [name for name in model if name == path or name.startswith(path + "/")]:
        del model[name]
    return b"OK\0"


@settings(max_examples=300, deadline=None)
@given(steps=st.lists(STEP, max_size=40))
def test_committed_transactions_are_as_if_one_after_the_other(steps: list[tuple[str, int, str, bytes]]) -> None:
    shop = Shop()
    shop.ask(0, Type.MKDIR, join("/m"))
    kinds = {"write": Type.WRITE, "read": Type.READ, "rm": Type.RM}
    model: Model = {"/": b"", "/m": b""}
    ids: dict[int, int] = {0: 0}
    done: dict[int, list[tuple[str, str, bytes, bytes]]] = {}
    for what, which, path, value in steps:
        if what == "begin" and which not in ids:
            ids[which] = int(shop.ask(0, Type.TRANSACTION_START, b"\0").rstrip(b"\0"))
            done[which] = []
        elif what == "end" and which in ids:
            answer = shop.ask(0, Type.TRANSACTION_END, value + b"\0", ids.pop(which))
            if value == b"T" and answer == b"OK\0":
                assert [model_step(model, *step[:3]) for step in done[which]] == [step[3] for step in done[which]]
            else:
                assert value == b"F" or answer == b"EAGAIN\0"
        elif what in kinds and which in ids:
            answer = shop.ask(0, kinds[what], join(path) + (value if what == "write" else b""), ids[which])
            if which:
                done[which].append((what, path, value, answer))
            else:
                assert answer == model_step(model, what, path, value)
    found = {path: node.value for path, node in shop.server.tree.items() if path.startswith("/m")}
    assert found == {path: value for path, value in model.items() if path.startswith("/m")}
