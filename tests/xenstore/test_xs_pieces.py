"""Long requests are served in pieces: each is short, and what others see in between is what they may see."""

from __future__ import annotations

import random
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from test_xs_daemon import Shop, recount

from gntalloc.steps import finish_steps
from gntalloc.xenstore import wire
from gntalloc.xenstore.daemon.limits import Refused
from gntalloc.xenstore.wire import Message, Type, join

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import FrameType

    from gntalloc.xenstore.daemon.session import Session

DEEP = 900
MOST_WATCHES = 129
HOME = "/local/domain/1"


@pytest.fixture
def shop() -> Shop:
    return Shop()


def chain(depth: int, name: str = "a") -> str:
    return HOME + f"/{name}" * depth


def begin(shop: Shop, who: int | Session, kind: int, body: bytes, tx_id: int = 0) -> Generator[None, None, object]:
    session = shop.sessions[who] if isinstance(who, int) else who
    return shop.server.begin(session, Message(kind, 5, tx_id, body))


def start(shop: Shop, who: int | Session) -> int:
    return int(shop.ask(who, Type.TRANSACTION_START, b"\0").rstrip(b"\0"))


def paths(messages: list[Message]) -> list[bytes]:
    return [message.body.split(b"\0")[0] for message in messages if message.type == Type.WATCH_EVENT]


def steps(work: Callable[[], object]) -> int:
    """Count the function calls that some work takes, Python's and C's."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def a_deep_transaction(shop: Shop, depth: int = DEEP, who: int | Session = 1) -> int:
    """Write one node below the other, so that a commit fires watches for each."""
    tx_id = start(shop, who)
    for level in range(1, depth + 1):
        shop.ask(who, Type.WRITE, join(chain(level)), tx_id)
    return tx_id


# Each piece is short, and the work grows as the nodes do.


@pytest.mark.parametrize("what", ["MKDIR", "RM", "commit", "release"])
def test_the_work_grows_as_the_depth_does(what: str) -> None:
    def cost(depth: int) -> int:
        shop = Shop()
        for number in range(MOST_WATCHES):
            shop.ask(1, Type.WATCH, join(chain(number + 1), "t"))
        shop.read(1)
        if what == "MKDIR":
            return steps(lambda: shop.ask(1, Type.MKDIR, join(chain(depth))))
        if what == "commit":
            tx_id = a_deep_transaction(shop, depth)
            return steps(lambda: next(begin(shop, 1, Type.TRANSACTION_END, b"T\0", tx_id)))
        shop.ask(1, Type.MKDIR, join(chain(depth)))
        shop.read(1)
        if what == "RM":
            return steps(lambda: shop.ask(1, Type.RM, join(chain(1))))
        return steps(lambda: shop.server.destroy(1))

    less, more = cost(225), cost(900)
    assert more < 6 * less, f"four times the depth took {less} and {more} calls"


@pytest.mark.parametrize("same_node", [True, False])
def test_no_piece_of_a_firing_is_long(shop: Shop, same_node: bool) -> None:
    """900 nodes fire 129 watches each: a piece tells of one node at most, on one connection."""
    for number in range(MOST_WATCHES):
        shop.ask(1, Type.WATCH, join(HOME if same_node else chain(number + 1), f"t{number}"))
    shop.read(1)
    tx_id = a_deep_transaction(shop)
    commit = begin(shop, 1, Type.TRANSACTION_END, b"T\0", tx_id)
    next(commit)  # everything has changed now
    assert chain(DEEP) in shop.server.tree
    pieces = 0
    session = shop.sessions[1]
    session.drop_unread()
    for _ in commit:
        pieces += 1
        assert len(session.outbox) <= MOST_WATCHES
        session.drop_unread()
    assert pieces >= DEEP // 20


def test_a_deep_node_in_a_transaction_is_made_and_removed_in_pieces(shop: Shop) -> None:
    tx_id = start(shop, 1)
    for kind, path in ((Type.MKDIR, chain(DEEP)), (Type.RM, chain(1))):
        assert len(list(begin(shop, 1, kind, join(path), tx_id))) >= DEEP
        assert shop.read(1)[-1].body == b"OK\0"
    recount(shop.server)


def test_who_must_not_be_found_is_found_without_the_whole_tree(shop: Shop) -> None:
    """The end of a domain looks at its own nodes and at those above, not at everybody's."""
    for number in range(800):
        shop.ask(2, Type.WRITE, join(f"/local/domain/2/{number % 20}/{number}"))
    shop.ask(1, Type.WRITE, join(f"{HOME}/x"))
    assert steps(lambda: shop.server.destroy(1)) < 1000


# What others see in between.


def test_a_commit_is_seen_whole_though_its_events_are_still_on_their_way(shop: Shop) -> None:
    shop.ask(0, Type.WATCH, join(HOME, "t"))
    shop.read(0)
    tx_id = a_deep_transaction(shop)
    work = begin(shop, 1, Type.TRANSACTION_END, b"T\0", tx_id)
    seen = Counter(shop.ask(0, Type.DIRECTORY, join(chain(DEEP - 1))) for _ in work)
    assert set(seen) == {b"a\0"}, seen
    assert shop.read(1)[-1].body == b"OK\0"


def test_a_removal_is_seen_whole(shop: Shop) -> None:
    shop.ask(0, Type.WATCH, join(HOME, "t"))
    shop.ask(1, Type.MKDIR, join(chain(DEEP)))
    for depth in range(1, 100):
        shop.ask(2, Type.WATCH, join(chain(depth), "t"))
    work = begin(shop, 1, Type.RM, join(chain(1)))
    seen = {shop.ask(0, Type.DIRECTORY, join(chain(depth))) for _ in work for depth in (1, DEEP // 2, DEEP)}
    assert seen == {b"ENOENT\0"}


def test_every_connection_gets_its_events_in_order_and_all_of_them(shop: Shop) -> None:
    """Two connections change the same nodes in turns of a piece each: both hear it in the order of the changes."""
    listeners = [shop.server.connect(0) for _ in range(20)]
    for listener in listeners:
        shop.ask(listener, Type.WATCH, join(HOME, "t"))
        shop.read(listener)
    writers = [shop.server.connect(1) for _ in range(3)]
    works: list[Generator[None, None, object]] = []
    expected: list[bytes] = []
    for number, writer in enumerate(writers):
        shop.ask(writer, Type.MKDIR, join(f"{HOME}/{number}"))  # so that the transactions have no node in common
    for number, writer in enumerate(writers):
        tx_id = start(shop, writer)
        for node in range(40):
            shop.ask(writer, Type.WRITE, join(f"{HOME}/{number}/{node}"), tx_id)
            expected.append(b"%s/%d/%d" % (HOME.encode(), number, node))
    for writer in writers:
        work = begin(shop, writer, Type.TRANSACTION_END, b"T\0", next(iter(writer.transactions)))
        next(work, None)
        works.append(work)
    chance = random.Random(1)
    while works:
        work = chance.choice(works)
        try:
            next(work)
        except StopIteration:
            works.remove(work)
    heard = [paths(shop.read(listener)) for listener in listeners]
    made = [path for path in heard[0] if path in expected]
    assert sorted(made) == sorted(expected)
    assert all(each == heard[0] for each in heard)
    assert [shop.read(writer)[-1].body for writer in writers] == [b"OK\0"] * 3


def test_a_new_watch_does_not_hear_of_what_was_before_it(shop: Shop) -> None:
    shop.ask(0, Type.WATCH, join(HOME, "old"))
    shop.read(0)
    tx_id = a_deep_transaction(shop, 50)
    work = begin(shop, 1, Type.TRANSACTION_END, b"T\0", tx_id)
    next(work)
    new = begin(shop, 0, Type.WATCH, join(HOME, "new"))
    finish_steps(new)
    finish_steps(work)
    events = [message.body for message in shop.read(0) if message.type == Type.WATCH_EVENT]
    assert [event for event in events if event.endswith(b"\0new\0")] == [join(HOME, "new")]
    assert events[-1] == join(HOME, "new"), "its first event comes after those of what was changed before"
    assert len(events) == 51  # fifty nodes, and the new watch's first


def test_a_watch_that_was_taken_off_hears_no_more(shop: Shop) -> None:
    shop.ask(0, Type.WATCH, join(HOME, "t"))
    shop.read(0)
    tx_id = a_deep_transaction(shop)
    work = begin(shop, 1, Type.TRANSACTION_END, b"T\0", tx_id)
    next(work)
    shop.ask(0, Type.UNWATCH, join(HOME, "t"))
    shop.read(0)
    finish_steps(work)
    assert shop.read(0) == []


# Connections and domains that end in between.


def test_events_arrive_though_the_connection_that_caused_them_has_ended(shop: Shop) -> None:
    shop.ask(0, Type.WATCH, join(HOME, "t"))
    shop.read(0)
    session = shop.server.connect(1)
    tx_id = a_deep_transaction(shop, DEEP, session)
    work = begin(shop, session, Type.TRANSACTION_END, b"T\0", tx_id)
    next(work)
    shop.server.disconnect(session)
    del work
    assert len(paths(shop.read(0))) == DEEP  # `read` lets the daemon catch up
    recount(shop.server)


@pytest.mark.parametrize("end", ["disconnect", "INTRODUCE", "RELEASE", "destroy"])
@pytest.mark.parametrize("kind", [Type.MKDIR, Type.RM, Type.TRANSACTION_END])
def test_a_transaction_that_is_ended_between_two_pieces(shop: Shop, kind: Type, end: str) -> None:
    shop.ask(0, Type.WATCH, join("/local", "t"))
    session = shop.server.connect(1)
    for number in range(50):
        shop.ask(session, Type.WATCH, join(HOME, str(number)))
    tx_id = start(shop, session) if kind == Type.MKDIR else a_deep_transaction(shop, 300, session)
    body = {Type.MKDIR: join(chain(300)), Type.RM: join(chain(1)), Type.TRANSACTION_END: b"T\0"}[kind]
    work = begin(shop, session, kind, body, tx_id)
    for _ in range(100):
        next(work)
    match end:
        case "disconnect":
            shop.server.disconnect(session)
        case "INTRODUCE":
            shop.ask(0, Type.INTRODUCE, join("1", "0", "1"))
        case "RELEASE":
            shop.ask(0, Type.RELEASE, join("1"))
        case _:
            shop.server.destroy(1)
    finish_steps(work)
    finish_steps(shop.server.catch_up())
    assert not session.watches
    assert not session.transactions
    assert session.unread == sum(map(len, session.outbox))
    for each in shop.sessions.values():
        shop.read(each)
    recount(shop.server)


@pytest.mark.parametrize("seed", range(30))
def test_the_books_agree_whatever_is_served_between_two_pieces(seed: int) -> None:
    chance = random.Random(seed)
    shop = Shop()
    sessions = {number: shop.server.connect(domid) for number, domid in enumerate((0, 1, 1, 2, 2))}
    works: dict[int, Generator[None, None, object]] = {}

    def request(session: Session) -> Generator[None, None, object]:
        home = f"/local/domain/{session.domain.domid or 1}"
        path = home + "/a" * chance.randint(0, 40) + chance.choice(["", "/b", "/c"])
        tx_id = chance.choice([0, *session.transactions]) if session.transactions else 0
        kind, body = chance.choice(
            [
                (Type.MKDIR, join(path)),
                (Type.WRITE, join(path) + b"x"),
                (Type.RM, join(path)),
                (Type.WATCH, join(path, str(chance.randint(0, 3)))),
                (Type.UNWATCH, join(path, "1")),
                (Type.TRANSACTION_START, b"\0"),
                (Type.TRANSACTION_END, chance.choice([b"T\0", b"T\0", b"F\0"])),
                (Type.RESET_WATCHES, b"\0"),
                (Type.DIRECTORY, join(path)),
                (Type.SET_PERMS, join(path, f"n{session.domain.domid}", "r1")),
            ]
        )
        if kind == Type.TRANSACTION_START:
            tx_id = 0
        return shop.server.begin(session, Message(kind, 5, tx_id, body))

    for _ in range(1500):
        number = chance.choice(list(sessions))
        work = works.pop(number, None) or request(sessions[number])
        for _ in range(chance.choice([1, 1, 2, 30])):
            try:
                next(work)
            except StopIteration:
                break
        else:
            works[number] = work
        if chance.random() < 0.02:
            for each in sessions.values():
                shop.read(each)
        if chance.random() < 0.01:
            shop.server.disconnect(sessions[number])
            works.pop(number, None)
            sessions[number] = shop.server.connect(sessions[number].domain.domid)
    for work in works.values():
        finish_steps(work)
    finish_steps(shop.server.catch_up())
    for each in sessions.values():
        assert not each.behind
    assert not shop.server._watches._lagging
    recount(shop.server)


def test_a_long_list_is_refused_before_it_is_made(shop: Shop) -> None:
    for number in range(1000):
        shop.ask(0, Type.WRITE, join(f"/big/{number:08}"))
    assert steps(lambda: shop.ask(0, Type.DIRECTORY, join("/big"))) < 300
    with pytest.raises(Refused):
        raise shop.server.handle(shop.sessions[0], Message(Type.DIRECTORY, 5, 0, join("/big"))) or AssertionError
    assert wire.PAYLOAD_MAX < 9000
