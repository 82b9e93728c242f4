"""Ends that lie: a frontend that asks for what cannot be, a backend that answers what nobody asked."""

from __future__ import annotations

import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from struct import pack
from typing import TYPE_CHECKING, Any

import pytest
from tests.frontend.conftest import DEVICE, PATIENCE
from tests.frontend.kit import SIZE

from gntalloc import PeerBroke, PeerClosed
from gntalloc.clock import Deadline
from gntalloc.frontend.blkback import Backend
from gntalloc.frontend.blkif import (
    ENTRY,
    ERROR,
    NOT_SUPPORTED,
    OKAY,
    PROTOCOL,
    RESPONSE,
    Operation,
    Request,
    Response,
    Segment,
    pack_segments,
)
from gntalloc.frontend.link import Link, part, recover
from gntalloc.frontend.xenbus import FRONT, End, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.frontend.conftest import Setting

    from gntalloc.guest.pages import SharedPages

READ, WRITE = Operation.READ, Operation.WRITE
LAST = SIZE // 512 - 8


class Raw:
    """A frontend that puts whatever it is given into the ring."""

    def __init__(self, link: Link, page: SharedPages) -> None:
        self.link, self.page = link, page
        self.ref = page.refs[0]

    def ask(self, entry: bytes) -> Response:
        """Put 112 bytes, and wait for the one response."""
        ring = self.link.ring
        ring.put(entry.ljust(ENTRY, b"\0"))
        if ring.show():
            self.link.notify()
        deadline = time.monotonic() + PATIENCE
        while not ring.ask():
            assert time.monotonic() < deadline
            assert not self.link.sleep(timeout=PATIENCE) or self.link.verdict() is None
        return Response.parse(ring.take(RESPONSE))


@contextmanager
def raw_frontend(setting: Setting, **nodes: str) -> Iterator[Raw]:
    end = End(setting.guest.store, FRONT, DEVICE.front, DEVICE.back)
    deadline = Deadline(PATIENCE)
    recover(end, deadline)
    published = {"protocol": PROTOCOL, "feature-persistent": "1", **nodes}
    with setting.guest.share(0, pages=2, writable=True) as page:
        link = Link(setting.guest, DEVICE, end, ENTRY, published, deadline)
        try:
            end.go(State.CONNECTED)
            yield Raw(link, page)
            part(end, timeout=PATIENCE)
        finally:
            link.close()


def wrong_requests(ref: int, foreign: int, read_only: int) -> dict[str, tuple[bytes, int]]:
    """Each with the status it must get."""
    good = Segment(ref, 0, 7)
    wrong: dict[str, tuple[bytes, int]] = {
        "no such reference": (Request(READ, 1, 0, (Segment(0xFFFF_FFFF, 0, 7),)).pack(), ERROR),
        "one good, one bad": (Request(READ, 1, 0, (good, Segment(77_777, 0, 7))).pack(), ERROR),
        "not for this domain": (Request(WRITE, 1, 0, (Segment(foreign, 0, 7),)).pack(), ERROR),
        "read into a read-only page": (Request(READ, 1, 0, (Segment(read_only, 0, 7),)).pack(), ERROR),
        "no segments": (Request(READ, 1, 0).pack(), ERROR),
        "first after last": (Request(READ, 1, 0, (Segment(ref, 5, 4),)).pack(), ERROR),
        "beyond the page": (Request(READ, 1, 0, (Segment(ref, 0, 8),)).pack(), ERROR),
        "far beyond the page": (Request(WRITE, 1, 0, (Segment(ref, 255, 255),)).pack(), ERROR),
        "beyond the end": (Request(READ, 1, LAST + 1, (good,)).pack(), ERROR),
        "far beyond the end": (Request(WRITE, 1, (1 << 64) - 1, (good,)).pack(), ERROR),
        "where bytes would overflow": (Request(READ, 1, 1 << 55, (good,)).pack(), ERROR),
        "twelve segments": (pack("=BBH4xQQ", READ, 12, 0, 1, 0), ERROR),
        "255 segments": (pack("=BBH4xQQ", WRITE, 255, 0, 1, 0), ERROR),
        "a barrier": (Request(Operation.BARRIER, 1, 0).pack(), NOT_SUPPORTED),
        "an operation that nobody knows": (Request(200, 1, 0, (good,)).pack(), NOT_SUPPORTED),
        "a flush with data": (Request(Operation.FLUSH, 1, 0, (good,)).pack(), NOT_SUPPORTED),
        "discard beyond the end": (Request(Operation.DISCARD, 1, LAST, sectors=9).pack(), ERROR),
        "discard of everything and more": (Request(Operation.DISCARD, 1, 8, sectors=(1 << 64) - 8).pack(), ERROR),
        "discard of nothing": (Request(Operation.DISCARD, 1, 0, sectors=0).pack(), ERROR),
        "indirect, no segments": (Request(READ, 1, 0, indirect=0, pages=(ref,)).pack(), ERROR),
        "indirect, too many": (Request(READ, 1, 0, indirect=257, pages=(ref,)).pack(), ERROR),
        "indirect, no such page": (Request(READ, 1, 0, indirect=20, pages=(99_999,)).pack(), ERROR),
        "indirect flush": (Request(Operation.FLUSH, 1, 0, indirect=1, pages=(ref,)).pack(), ERROR),
        "indirect in indirect": (Request(Operation.INDIRECT, 1, 0, indirect=1, pages=(ref,)).pack(), ERROR),
    }
    return wrong


@pytest.mark.parametrize("way", ["map", "copy"])
@pytest.mark.parametrize("persistent", ["0", "1"])
def test_what_cannot_be_gets_an_error_and_nothing_else_happens(setting: Setting, way: str, persistent: str) -> None:
    setting.attach()
    backend = setting.backend(way=way)
    with (
        setting.guest.share(2, writable=True) as foreign,
        setting.guest.share(0) as read_only,
        raw_frontend(setting, **{"feature-persistent": persistent}) as raw,
    ):
        for name, (entry, status) in wrong_requests(raw.ref, foreign.refs[0], read_only.refs[0]).items():
            assert raw.ask(entry).status == status, name
            assert raw.ask(Request(READ, 7, LAST, (Segment(raw.ref, 0, 7),)).pack()) == Response(7, READ, OKAY), name
            assert raw.page.memory[:4096] == setting.content[-4096:]
        assert not any(read_only.memory)
        indirect = pack_segments([Segment(raw.ref, 0, 0), Segment(raw.ref, 0, 9)])
        raw.page.memory[4096 : 4096 + len(indirect)] = indirect
        assert raw.ask(Request(READ, 9, 0, indirect=2, pages=(raw.page.refs[1],)).pack()).status == ERROR
    assert backend.running
    assert setting.now() == setting.content
    with setting.open() as disk:
        assert disk.read(0, 5000, timeout=PATIENCE) == setting.content[:5000]


@pytest.mark.parametrize("way", ["map", "copy"])
def test_noise_gets_a_response_each(setting: Setting, way: str) -> None:
    """Reading only: a request that happens to be right may be carried out."""
    setting.attach("r")
    backend = setting.backend(way=way)
    chance = random.Random(11)
    with raw_frontend(setting) as raw:
        for number in range(400):
            entry = bytearray(chance.randbytes(ENTRY))
            entry[0] = chance.choice([0, 1, 2, 3, 4, 5, 6, 6, 0, 255])
            entry[1] = chance.choice([0, 1, 2, 11, 12, entry[1]])
            if chance.random() < 0.5:
                entry[16:28] = pack("=QI", chance.randrange(SIZE // 512), chance.choice(raw.page.refs))
            entry[8:16] = pack("=Q", number)
            assert raw.ask(bytes(entry)).id == number
    assert backend.running
    assert setting.now() == setting.content


def test_a_page_once_used_and_taken_back_is_let_go_of_when_others_come(setting: Setting) -> None:
    """What a frontend names is kept mapped; not without end."""
    setting.attach()
    setting.backend()
    setting.guest.limit = 4096
    with raw_frontend(setting) as raw:
        for number in range(30):
            with setting.guest.share(0, pages=88, writable=True) as many:
                for at in range(0, 88, 11):
                    segments = tuple(Segment(ref, 0, 7) for ref in many.refs[at : at + 11])
                    assert raw.ask(Request(READ, number, 0, segments).pack()).status == OKAY
                assert many.memory[: 11 * 4096] == setting.content[: 11 * 4096]
        held = sum(grant.held for grant in setting.machine.grants() if grant.granter == 1)
        assert held <= 1056 + 3
    setting.guest.limit = 1024


def test_a_backend_that_closes_while_its_frontend_looks_has_not_died(setting: Setting) -> None:
    setting.attach()
    setting.backend()
    with raw_frontend(setting) as raw:
        held = raw.link._held

        def held_after_it_closed() -> bool:
            setting.dom0.store.write(f"{DEVICE.front}/state", str(int(State.CLOSING)))
            while held():
                raw.link.sleep(timeout=PATIENCE)
            return held()

        raw.link._held = held_after_it_closed  # type: ignore[method-assign]
        assert isinstance(raw.link.verdict(), PeerClosed)


@pytest.mark.parametrize("lie", [33, 1 << 31, 0xFFFF_FFFF])
def test_a_frontend_that_breaks_the_ring_is_let_go_of_and_told_why(setting: Setting, lie: int) -> None:
    setting.attach()
    backend = setting.backend()
    with raw_frontend(setting) as raw:
        raw.link.ring._indexes[0] = lie
        raw.link.notify()
        while (verdict := raw.link.verdict()) is None:
            raw.link.sleep(timeout=PATIENCE)
        assert isinstance(verdict, PeerClosed)
        assert "count of requests" in str(verdict)
    assert backend.running
    with setting.open() as disk:
        assert disk.read(0, SIZE, timeout=PATIENCE) == setting.content


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ({"protocol": "x86_32-abi"}, "speaks 'x86_32-abi'"),
        ({"ring-ref": "99999"}, "99999"),
        ({"ring-ref": "no number"}, "missing"),
        ({"event-channel": "4000"}, "."),
        ({"event-channel": "-1"}, "missing"),
        ({"ring-ref": "9" * 400}, "missing"),
    ],
)
def test_a_handshake_that_cannot_be_is_refused_with_the_reason(
    setting: Setting, nodes: dict[str, str], why: str
) -> None:
    setting.attach()
    setting.backend()
    with pytest.raises(PeerClosed, match=f"it says: .*{why}"), raw_frontend(setting, **nodes):
        pass
    with setting.open() as disk:
        assert disk.read(0, 10, timeout=PATIENCE) == setting.content[:10]


# Backends that lie, in this process.


class Lying(Backend):
    """Answers as `answer` says, given a request's number and its id."""

    lie: Callable[[int, int], Response]
    runs_ahead = 0

    def _serve_ring(self, ring: Any) -> bool:
        for number in itertools.count():
            if not ring.ready():
                break
            _, id_ = Request.id_of(ring.take(ENTRY))
            ring.put(self.lie(number, id_).pack())
            ring._put += self.runs_ahead
            if ring.show():
                self._port.notify()
        return bool(ring.ask())


@contextmanager
def lying(setting: Setting, lie: Callable[[int, int], Response], *, runs_ahead: int = 0) -> Iterator[None]:
    setting.attach()
    with Lying(setting.dom0, DEVICE, setting.path) as backend:
        backend.lie, backend.runs_ahead = lie, runs_ahead
        server = threading.Thread(target=backend.serve)
        server.start()
        try:
            yield
        finally:
            backend.stop()
            server.join(PATIENCE)
            assert not server.is_alive()


def test_an_answer_that_nobody_asked_for_is_found(setting: Setting) -> None:
    with lying(setting, lambda _, id_: Response(id_ + 1000, READ, OKAY)), setting.open() as disk:
        for _ in range(2):  # once and for all
            with pytest.raises(PeerBroke, match="not in flight"):
                disk.read(0, 512, timeout=PATIENCE)


def test_an_answer_that_comes_twice_is_found(setting: Setting) -> None:
    seen: list[int] = []

    def lie(_: int, id_: int) -> Response:
        seen.append(id_)
        return Response(seen[0], READ, OKAY)

    with lying(setting, lie), setting.open() as disk:
        disk.read(0, 512, timeout=PATIENCE)
        with pytest.raises(PeerBroke, match="not in flight"):
            disk.read(0, 512, timeout=PATIENCE)


def test_a_backend_that_answers_more_than_was_asked_is_found(setting: Setting) -> None:
    with (
        lying(setting, lambda _, id_: Response(id_, READ, OKAY), runs_ahead=3),
        setting.open() as disk,
        pytest.raises(PeerBroke, match="runs ahead"),
    ):
        disk.read(0, 512, timeout=PATIENCE)


@pytest.mark.parametrize(("status", "error"), [(-1, "EIO|failed"), (-2, "does not support"), (-77, "-77"), (5, "5")])
def test_any_status_but_zero_is_an_error(setting: Setting, status: int, error: str) -> None:
    with lying(setting, lambda _, id_: Response(id_, READ, status)), setting.open() as disk:
        buffer = bytearray(b"x" * 512)
        with pytest.raises(OSError, match=error):
            disk.readinto(0, buffer, timeout=PATIENCE)
        assert buffer == b"x" * 512


class Noting(Backend):
    """Notes the state that it lets go of a ring in."""

    states: tuple[State, ...] = ()

    def _disconnect(self) -> None:
        if self._link is not None:
            self.states = (*self.states, self._end.state)
        super()._disconnect()


def test_a_backend_says_that_it_closes_before_it_lets_go(setting: Setting) -> None:
    """The other way round it would look like its death."""
    setting.attach()
    with Noting(setting.dom0, DEVICE, setting.path) as backend:
        server = threading.Thread(target=backend.serve)
        server.start()
        with setting.open():
            pass
        disk = setting.open()
        backend.stop()
        server.join(PATIENCE)
        disk.close()
        assert backend.states == (State.CLOSING, State.CLOSING)


class Choosy(Backend):
    """Answers nothing but what is asked of sector 0, until it is told to."""

    held: list[int]
    released = False

    def _serve_ring(self, ring: Any) -> bool:
        while ring.ready():
            request = Request.parse(ring.take(ENTRY), 256)
            if request.sector and not self.released:
                self.held.append(request.id)
            else:
                self.answer(ring, request.id)
        while self.released and self.held:
            self.answer(ring, self.held.pop())
        if ring.show():
            self._port.notify()
        return bool(ring.ask())

    def answer(self, ring: Any, id_: int) -> None:
        ring.put(Response(id_, READ, OKAY).pack())


def test_who_needs_one_answer_is_not_held_up_by_who_sleeps_until_there_are_many(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gntalloc.frontend.waiting._LOOK", 0.0)  # or it may see its answer before it must wait
    setting.attach()
    with Choosy(setting.dom0, DEVICE, setting.path) as backend, ThreadPoolExecutor(3) as threads:
        backend.held = []
        server = threads.submit(backend.serve)
        try:
            with setting.open() as disk:
                for _ in range(3):  # so that nothing but an answer is left that could wake the sleeper
                    disk.read(0, 512, timeout=PATIENCE)
                many = threads.submit(disk.read, 4096, 4 * disk.largest, timeout=PATIENCE)
                deadline = time.monotonic() + PATIENCE
                while len(backend.held) < 4 or not disk._waiting._asleep:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                small = threads.submit(lambda: [disk.read(0, 512) for _ in range(200)])
                assert len(small.result(PATIENCE)) == 200
                assert not many.done()
                backend.released = True
                disk.read(0, 512, timeout=PATIENCE)
                assert len(many.result()) == 4 * disk.largest
        finally:
            backend.stop()
            server.result()


def test_a_frontend_that_makes_ever_new_nodes(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the node that the backend watches: many changes are one look, and nothing is kept of them."""
    setting.attach()
    looks: list[State] = []
    follow = Backend._follow

    def slow(backend: Backend, state: State) -> None:
        looks.append(state)
        time.sleep(0.02)
        follow(backend, state)

    monkeypatch.setattr(Backend, "_follow", slow)
    changes = 3000
    with Backend(setting.dom0, DEVICE, str(setting.path)) as backend:
        server = threading.Thread(target=backend.serve)
        server.start()
        try:
            for number in range(changes // 2):
                setting.guest.store.write(f"{DEVICE.front}/state/{number}", "")
                setting.guest.store.remove(f"{DEVICE.front}/state/{number}")
            with setting.open() as disk:
                assert disk.read(0, SIZE, timeout=PATIENCE) == setting.content
            before = -1
            while before != len(looks):  # until it has no more to look at
                before = len(looks)
                assert before < changes // 15
                time.sleep(0.5)
        finally:
            backend.stop()
            server.join(PATIENCE)
