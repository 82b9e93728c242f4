"""The shared ring, against a model: any order of requests and responses, any sleeps; and peers that lie."""

from __future__ import annotations

import mmap
from collections import deque
from struct import pack, unpack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gntalloc.atomics import atomics
from gntalloc.errors import PeerBroke
from gntalloc.frontend.ring import HEADER, Back, Front, slots_of

WORD = 1 << 32
ENTRY = 112
STARTS = st.sampled_from([0, 1, WORD - 1, WORD - 5, WORD // 2 - 3])


def two(start: int = 0, pages: int = 1) -> tuple[Front, Back, memoryview]:
    """Both ends of a ring whose indexes begin at `start`, as if so many requests had come and gone."""
    memory = memoryview(mmap.mmap(-1, pages * mmap.PAGESIZE))
    front = Front(memory, ENTRY, atomics())
    words = memory[:16].cast("I")
    front._put = front._shown = front._taken = front._seen = words[0] = words[2] = start
    words[1] = words[3] = (start + 1) % WORD
    return front, Back(memory, ENTRY, atomics()), words


class RingModel(RuleBasedStateMachine):
    """Each request arrives once and in order, so does each response; who sleeps is woken when there is news."""

    @initialize(start=STARTS)
    def make(self, start: int) -> None:
        self.front, self.back, self.words = two(start)
        self.number = 0
        self.hidden: deque[int] = deque()  # requests put, not shown
        self.asked: deque[int] = deque()  # shown, not taken
        self.served: deque[int] = deque()  # taken, not answered
        self.unshown: deque[int] = deque()  # answered, not shown
        self.answered: deque[int] = deque()  # shown, not taken
        self.front_sleeps = self.back_sleeps = False

    @precondition(lambda self: self.front.room)
    @rule(many=st.integers(1, 40))
    def ask(self, many: int) -> None:
        for _ in range(min(many, self.front.room)):
            self.front.put(pack("=Q104s", self.number, bytes(104)))
            self.hidden.append(self.number)
            self.number += 1

    @rule()
    def show_requests(self) -> None:
        wake = self.front.show()
        if self.back_sleeps and self.hidden:
            assert wake
            self.back_sleeps = False
        self.asked += self.hidden
        self.hidden.clear()

    @rule(many=st.integers(0, 40))
    def serve(self, many: int) -> None:
        assert self.back.ready() == len(self.asked)
        for _ in range(min(many, len(self.asked))):
            assert unpack("=Q", self.back.take(8)) == (self.asked.popleft(),)
            self.served.append(0)

    @rule(many=st.integers(0, 40))
    def answer(self, many: int) -> None:
        for _ in range(min(many, len(self.served))):
            self.served.popleft()
            self.number += 1
            self.back.put(pack("=QQ", self.number, 0))
            self.unshown.append(self.number)

    @rule()
    def show_responses(self) -> None:
        wake = self.back.show()
        if self.front_sleeps and self.unshown:
            assert wake
            self.front_sleeps = False
        self.answered += self.unshown
        self.unshown.clear()

    @rule()
    def collect(self) -> None:
        assert self.front.ready() == len(self.answered)
        while self.answered:
            assert unpack("=Q", self.front.take(8)) == (self.answered.popleft(),)

    @rule()
    def front_goes_to_sleep(self) -> None:
        self.front_sleeps = self.front.ask() == 0
        assert self.front_sleeps == (not self.answered)

    @rule()
    def back_goes_to_sleep(self) -> None:
        self.back_sleeps = self.back.ask() == 0
        assert self.back_sleeps == (not self.asked)

    @precondition(lambda self: hasattr(self, "front"))
    @invariant()
    def the_books_agree(self) -> None:
        under_way = sum(map(len, (self.hidden, self.asked, self.served, self.unshown, self.answered)))
        assert self.front.room == self.front.slots - under_way
        assert self.back.unanswered == len(self.served)


RingModel.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestRing = RingModel.TestCase


@pytest.mark.parametrize(("size", "entry", "slots"), [(4096, 112, 32), (4096, 16, 128), (8192, 112, 64), (176, 112, 1)])
def test_how_many_slots(size: int, entry: int, slots: int) -> None:
    assert slots_of(size, entry) == slots


def test_a_ring_without_a_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        slots_of(175, 112)


def test_what_a_new_ring_looks_like() -> None:
    """As ring.h says: producers 0, events 1, the rest of the header zero."""
    memory = bytearray(b"\xff" * 4096)
    Front(memoryview(memory), ENTRY, atomics())
    assert memory[:HEADER] == pack("=4I48x", 0, 1, 0, 1)


def test_nobody_is_woken_who_did_not_ask() -> None:
    front, back, words = two()
    front.put(b"one")
    assert front.show()  # req_event is 1 in a new ring
    front.put(b"two")
    assert not front.show()
    assert not front.show()  # nothing new at all
    assert back.ready() == 2
    back.take(8), back.take(8)
    assert back.ask(3) == 0  # only when three more have come
    for wake in (False, False, True, False):
        front.put(b"more")
        assert front.show() is wake
    assert words[1] == 5


@given(start=STARTS, shown=st.integers(0, 32), taken=st.integers(0, 32), lie=st.integers(0, WORD - 1))
@settings(max_examples=300, deadline=None)
def test_a_front_that_lies_is_found(start: int, shown: int, taken: int, lie: int) -> None:
    front, back, words = two(start)
    for _ in range(shown):
        front.put(bytes(8))
    front.show()
    back.ready()
    for _ in range(min(shown, taken)):
        back.take(8)
    words[0] = lie
    if shown <= (lie - start) % WORD <= 32:  # more than that it has not answered, and fewer it has shown before
        assert back.ready() == (lie - start) % WORD - min(shown, taken)
        return
    with pytest.raises(PeerBroke, match="count of requests"):
        back.ready()
    words[0] = (start + shown) % WORD
    with pytest.raises(PeerBroke):  # once and for all
        back.ask()


@given(start=STARTS, shown=st.integers(0, 32), answered=st.integers(0, 32), lie=st.integers(0, WORD - 1))
@settings(max_examples=300, deadline=None)
def test_a_back_that_lies_is_found(start: int, shown: int, answered: int, lie: int) -> None:
    front, back, words = two(start)
    for _ in range(shown):
        front.put(bytes(8))
    front.show()
    answered = min(shown, answered)
    for _ in range(min(back.ready(), answered)):
        back.take(8)
        back.put(bytes(16))
    back.show()
    assert front.ready() == answered
    words[2] = lie
    if answered <= (lie - start) % WORD <= shown:
        assert front.ready() == (lie - start) % WORD
        return
    with pytest.raises(PeerBroke, match="count of responses"):
        front.ready()
    words[2] = start
    with pytest.raises(PeerBroke):
        front.ready()


@pytest.mark.parametrize("near", [0, 31, 32, 33, WORD - 1])
def test_near_lies(near: int) -> None:
    """What hypothesis may miss: just right, and just too many."""
    front, back, words = two()
    words[0] = near
    if near <= 32:
        assert back.ready() == near
    else:
        with pytest.raises(PeerBroke):
            back.ready()
    words[2] = near
    if near:
        with pytest.raises(PeerBroke):  # nothing was shown
            front.ready()


def test_own_indexes_are_not_read_back() -> None:
    front, back, words = two()
    front.put(pack("=Q", 5))
    front.show()
    words[2] = words[1] = words[3] = 0xDEAD  # rsp_prod is the back's, and the events are anybody's
    assert back.ready() == 1
    assert unpack("=Q", back.take(8)) == (5,)
    back.put(bytes(16))
    back.show()
    assert words[2] == 1
    assert front.ready() == 1
    words[0] = 0xDEAD
    front.take(16)
    front.put(bytes(8))
    front.show()
    assert words[0] == 2


def test_a_back_goes_on_where_the_ring_is_and_believes_no_more_than_a_ringful() -> None:
    front, _, words = two(WORD - 2)
    for _ in range(32):
        front.put(bytes(8))
    front.show()
    memory = front._memory
    assert Back(memory, ENTRY, atomics()).ready() == 32
    words[2] = WORD - 3
    with pytest.raises(PeerBroke):
        Back(memory, ENTRY, atomics())


def test_an_entry_is_a_copy() -> None:
    front, back, _ = two()
    front.put(b"first...")
    front.show()
    back.ready()
    entry = back.take(8)
    front._memory[HEADER : HEADER + 8] = b"changed!"
    assert entry == b"first..."


def test_what_comes_while_falling_asleep_is_seen() -> None:
    """The other shows something between the last look and the asking, and sees no wish to be woken."""
    front, _, _ = two()

    class Late:
        ordered = True

        def fence(self) -> None:
            front.put(b"late")
            front.show()

    late = Back(front._memory, ENTRY, Late())
    assert late.ask() == 1
