"""A thread waits for the peer. What another thread asks meanwhile is answered at once, or by its own deadline."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from gntalloc import Busy, Closed, GntallocError, PeerBroke, TimedOut, aio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc import Domain
    from gntalloc.vchan.channel import Channel

    Pair = Callable[..., tuple[Channel, Channel]]

PATIENCE = 20.0
SIZE = 4096
FULL = bytes(SIZE)


@contextmanager
def waiting(call: Callable[[], Any], lock: Any) -> Iterator[None]:
    """Beside a thread that waits in a call, which takes this lock, for ever."""
    thread = threading.Thread(target=_until_closed, args=(call,), daemon=True)
    thread.start()
    deadline = time.monotonic() + PATIENCE
    while not lock.locked():
        assert time.monotonic() < deadline, "the thread does not wait"
        time.sleep(0.001)
    yield


def _until_closed(call: Callable[[], Any]) -> None:
    try:
        call()
    except (Closed, GntallocError):
        pass


def at_once(call: Callable[[], Any]) -> Any:
    """What it gives. If it waits, that is a failure and not a hang."""
    with_limit = ThreadPoolExecutor(1)
    try:
        return with_limit.submit(call).result(PATIENCE)
    finally:
        with_limit.shutdown(wait=False)


WAITS: dict[str, tuple[Callable[[Channel], Any], str]] = {
    "read": (lambda channel: channel.read(), "reading"),
    "readinto": (lambda channel: channel.readinto(bytearray(9)), "reading"),
    "recv": (lambda channel: channel.recv(), "reading"),
    "recv_into": (lambda channel: channel.recv_into(bytearray(9)), "reading"),
    "peek": (lambda channel: channel.peek(), "reading"),
    "write": (lambda channel: channel.write(FULL), "writing"),
    "send": (lambda channel: channel.send(b"x"), "writing"),
    "reserve": (lambda channel: channel.reserve(1), "writing"),
    "drain": (lambda channel: channel.drain(), "draining"),
}


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("extensions", [None, False], ids=["ours", "libxenvchan"])
def test_what_tells_of_a_channel_waits_for_nobody(pair: Pair, wait: str, extensions: bool | None) -> None:
    ours, theirs = pair(size=SIZE, extensions=extensions)
    ours.write(FULL)
    call, lock = WAITS[wait]
    with waiting(lambda: call(ours), getattr(ours._core, lock)):
        assert at_once(lambda: (ours.ready, ours.room, ours.unread)) == (0, 0, SIZE)
        assert at_once(lambda: (ours.connected, ours.closed, ours.waiting)) == (True, False, False)
        assert at_once(lambda: ours.extended) == (extensions is None)
        assert at_once(lambda: ours.sizes) == (SIZE, SIZE)
        assert "open" in at_once(lambda: repr(ours))
        assert at_once(ours.fileno) >= 0
        for give_back in ours.commit, ours.release:
            with pytest.raises(ValueError, match="nothing was"):
                at_once(give_back)
        at_once(ours.close)
        theirs.close()
        for ask in (lambda: ours.ready), (lambda: ours.room), (lambda: ours.unread), ours.commit, ours.fileno:
            with pytest.raises(Closed):
                at_once(ask)


@pytest.mark.parametrize("wait", ["write", "send", "reserve"])
def test_finish_keeps_its_deadline_beside_a_writer(pair: Pair, wait: str) -> None:
    ours, theirs = pair(size=SIZE)
    ours.write(FULL)
    with waiting(lambda: WAITS[wait][0](ours), ours._core.writing):
        with pytest.raises(TimedOut, match="another thread"):
            at_once(lambda: ours.finish(timeout=0.05))
        assert ours.unread == SIZE  # and nothing was said
        at_once(ours.close)
        theirs.close()


@pytest.mark.parametrize("wait", ["read", "drain"])
def test_finish_waits_for_no_reader_and_for_no_drain(pair: Pair, wait: str) -> None:
    ours, theirs = pair(size=SIZE)
    ours.write(b"the last")
    with waiting(lambda: WAITS[wait][0](ours), getattr(ours._core, WAITS[wait][1])):
        at_once(lambda: ours.finish(timeout=PATIENCE))
        assert (ours.room, theirs.read(timeout=PATIENCE), theirs.read(timeout=PATIENCE)) == (0, b"the last", b"")
        theirs.close()


def test_what_is_lent_can_be_given_back_beside_anybody(pair: Pair) -> None:
    ours, theirs = pair(size=SIZE)
    ours.write(b"first")
    theirs.write(b"theirs")
    with waiting(ours.drain, ours._core.draining):
        ours.reserve(6)[:] = b"second"
        assert bytes(ours.peek(timeout=PATIENCE)) == b"theirs"
        assert (ours.ready, ours.room, ours.unread) == (0, 0, 5)
        for call in (lambda: ours.write(b"x")), (lambda: ours.finish(timeout=PATIENCE)), ours.read:
            with pytest.raises(Busy):
                at_once(call)
        at_once(ours.commit)
        at_once(ours.release)
        assert (ours.ready, ours.unread) == (0, 11)
        assert theirs.read(timeout=PATIENCE) == b"firstsecond"


def test_the_numbers_are_right_while_another_thread_moves_the_indexes(pair: Pair) -> None:
    ours, theirs = pair(size=SIZE)
    total, over = 3_000_000, threading.Event()

    def write() -> None:
        for _ in range(total // 1000):
            ours.write(bytes(1000), timeout=PATIENCE)

    def read() -> None:
        left = total
        while left:
            left -= len(theirs.read(777, timeout=PATIENCE))
        over.set()

    threads = [threading.Thread(target=work) for work in (write, read)]
    for thread in threads:
        thread.start()
    try:
        while not over.is_set():
            assert 0 <= theirs.ready <= SIZE
            assert 0 <= ours.room <= SIZE
            assert 0 <= ours.unread <= SIZE
    finally:
        for thread in threads:
            thread.join(PATIENCE)
    assert (theirs.ready, ours.room, ours.unread) == (0, SIZE, 0)


def test_a_lie_is_named_by_who_only_looks(pair: Pair) -> None:
    ours, theirs = pair(size=SIZE)
    page = theirs._end.pages.memory[:16].cast("I")
    with page:
        page[1] += SIZE + 1  # left.prod, which the client writes
        for _ in range(2):
            with pytest.raises(PeerBroke):
                _ = ours.ready


def test_a_listener_that_accepts_makes_offers_and_can_be_closed(alice: Domain, bob: Domain) -> None:
    with alice.listen(2, "test", size=SIZE) as listener:
        with waiting(listener.accept, listener._accepting):
            offer = at_once(listener.offer)
            assert at_once(lambda: (offer.ready, offer.room, offer.unread)) == (0, SIZE, 0)
            at_once(lambda: offer.write(b"early"))
            with pytest.raises(TimedOut):
                at_once(lambda: listener.accept(timeout=0.01))
            with pytest.raises(TimedOut):
                at_once(lambda: offer.finish(timeout=0.01))
            assert "Listener" in at_once(lambda: repr(listener))
            at_once(listener.close)
        with pytest.raises(Closed):
            listener.offer()


def test_asyncio_beside_tasks_that_wait(pair: Pair) -> None:
    async def work() -> None:
        first, second = pair(size=SIZE)
        ours, theirs = aio.Channel(first), aio.Channel(second)
        await ours.write(b"first")
        tasks = [asyncio.create_task(each) for each in (ours.recv(), ours.drain(), ours.drain())]
        await asyncio.sleep(0)
        assert (ours.blocking.ready, ours.blocking.room, ours.blocking.unread) == (0, SIZE - 5, 5)
        async with asyncio.timeout(PATIENCE):
            (await ours.reserve(6))[:] = b"second"
            ours.commit()
            await ours.write(b"third")
            await ours.finish()
        assert await theirs.read() == b"firstsecondthird"
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*tasks[1:])
            theirs.close()
            await asyncio.wait(tasks)
        ours.close()
        assert isinstance(tasks[0].exception(), GntallocError)

    asyncio.run(work())
