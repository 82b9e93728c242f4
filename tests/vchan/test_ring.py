"""The ring, against a model: any order of puts and takes, any sizes, any start of the indexes; and peers that lie."""

from __future__ import annotations

import mmap
import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gntalloc.atomics import Atomics, atomics, plain
from gntalloc.errors import PeerBroke
from gntalloc.vchan.ring import HEADER, Reader, Writer

WORD = 1 << 32
STARTS = st.sampled_from([0, 1, 1000, WORD - 1, WORD - 700, WORD // 2 - 3])


class Two:
    """A ring between other things, and both its ends."""

    def __init__(self, order: int, start: int, *, mirrored: bool = False, barriers: Atomics | None = None) -> None:
        self.size = 1 << order
        span = 2 * self.size if mirrored else self.size
        self.before, self.after = b"<" * 64, b">" * 64
        self.area = mmap.mmap(-1, 128 + span)
        self.area[:] = self.before + bytes(span) + self.after
        self.indexes = memoryview(bytearray(16)).cast("I")
        self.indexes[0] = self.indexes[1] = start
        barriers = barriers or atomics()
        ends = {"base": 64, "mirrored": self.size if mirrored else 0}
        self.writer = Writer(memoryview(self.area), self.size, self.indexes, 1, 0, barriers, **ends)
        self.reader = Reader(memoryview(self.area), self.size, self.indexes, 0, 1, barriers, **ends)

    def untouched(self) -> bool:
        return (self.area[:64], self.area[-64:]) == (self.before, self.after)


class RingModel(RuleBasedStateMachine):
    """Bytes go through in their order, none is lost, made up, or written outside."""

    @initialize(order=st.sampled_from([10, 11]), start=STARTS, seed=st.integers(0, 2**32))
    def make(self, order: int, start: int, seed: int) -> None:
        self.two = Two(order, start)
        self.model: deque[int] = deque()
        self.random = random.Random(seed)

    def fresh(self, size: int) -> bytes:
        data = self.random.randbytes(size)
        self.model.extend(data)
        return data

    def expected(self, size: int) -> bytes:
        return bytes(self.model.popleft() for _ in range(size))

    @rule(size=st.integers(0, 2048))
    def put(self, size: int) -> None:
        size = min(size, self.two.writer.refresh())
        self.two.writer.put(memoryview(self.fresh(size)))

    @rule(size=st.integers(0, 2048))
    def fill_in_place(self, size: int) -> None:
        size = min(size, self.two.writer.refresh())
        data = self.fresh(size)
        view = self.two.writer.view(size)
        if view is None:
            self.two.writer.fill(memoryview(data))
        else:
            assert len(view) == size
            view[:] = data
        self.two.writer.advance(size)

    @rule(size=st.integers(0, 2048))
    def take(self, size: int) -> None:
        size = min(size, self.two.reader.refresh())
        assert self.two.reader.take(size) == self.expected(size)

    @rule(size=st.integers(0, 2048))
    def take_into(self, size: int) -> None:
        buffer = bytearray(min(size, self.two.reader.refresh()))
        self.two.reader.take_into(memoryview(buffer))
        assert buffer == self.expected(len(buffer))

    @rule()
    def look_in_place(self) -> None:
        self.two.reader.refresh()
        size = self.two.reader.in_one_piece()
        view = self.two.reader.view(size)
        assert view is not None
        assert view.readonly
        assert bytes(view) == self.expected(size)
        self.two.reader.advance(size)

    @precondition(lambda self: hasattr(self, "two"))
    @invariant()
    def nothing_else_happened(self) -> None:
        two = self.two
        used = (two.indexes[1] - two.indexes[0]) % WORD
        assert used == len(self.model) == two.writer.unread() == two.reader.refresh()
        assert two.writer.refresh() == two.size - used
        assert two.untouched()


RingModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRing = RingModel.TestCase


@pytest.mark.parametrize("barriers", [atomics(), plain()], ids=["libatomic", "plain"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_messages_arrive_whole_and_in_order(mirrored: bool, barriers: Atomics) -> None:
    chance = random.Random(5)
    two = Two(10, WORD - 5000, mirrored=False, barriers=barriers)
    waiting: deque[bytes] = deque()
    for _ in range(3000):
        message = chance.randbytes(chance.choice([0, 1, 3, 60, 513, 1020 - 4]))
        if two.writer.refresh() >= len(message) + HEADER:
            two.writer.put_message(message, len(message))
            waiting.append(message)
        if chance.random() < 0.5:
            two.reader.refresh()
            got = two.reader.take_message()
            assert got == (waiting.popleft() if waiting else None)
        if waiting and chance.random() < 0.3:
            two.reader.refresh()
            length = two.reader.message_length()
            assert length == len(waiting[0])
            buffer = bytearray(length + 3)
            two.reader.copy_message(length, memoryview(buffer))
            assert buffer[:length] == waiting.popleft()
    assert two.untouched()


def test_a_mirrored_ring_is_always_one_piece() -> None:
    two = Two(10, 1000, mirrored=True)
    view = two.writer.view(1024)
    assert view is not None
    assert len(view) == 1024


def test_a_message_is_seen_whole_or_not_at_all() -> None:
    two = Two(10, 0)
    two.writer.put(memoryview(b"\x05\x00"))
    two.reader.refresh()
    assert two.reader.take_message() is None
    two.writer.put(memoryview(b"\x00\x00abcd"))
    two.reader.refresh()
    assert two.reader.take_message() is None
    two.writer.put(memoryview(b"e"))
    two.reader.refresh()
    assert two.reader.take_message() == b"abcde"


def test_a_message_longer_than_the_ring_is_a_lie() -> None:
    two = Two(10, 0)
    two.writer.put(memoryview((1021).to_bytes(4, "little") + b"x" * 8))
    two.reader.refresh()
    with pytest.raises(PeerBroke, match="1021 bytes long"):
        two.reader.take_message()


@given(start=STARTS, used=st.integers(0, 1024), lie=st.integers(0, WORD - 1))
def test_no_index_of_the_writer_can_mislead_the_reader(start: int, used: int, lie: int) -> None:
    two = Two(10, start)
    two.writer.put(memoryview(bytes(used)))
    two.reader.refresh()
    two.indexes[1] = lie
    true = used <= (lie - start) % WORD <= 1024
    if true:
        assert two.reader.refresh() == (lie - start) % WORD
    else:
        with pytest.raises(PeerBroke, match="cannot be"):
            two.reader.refresh()


@given(start=STARTS, used=st.integers(0, 1024), lie=st.integers(0, WORD - 1))
def test_no_index_of_the_reader_can_mislead_the_writer(start: int, used: int, lie: int) -> None:
    two = Two(10, start)
    two.writer.put(memoryview(bytes(used)))
    two.indexes[0] = lie
    true = (two.writer.index - lie) % WORD <= used
    if true:
        assert two.writer.refresh() == 1024 - (two.writer.index - lie) % WORD
    else:
        with pytest.raises(PeerBroke, match="cannot be"):
            two.writer.refresh()


def test_our_own_index_in_the_page_is_for_the_peers_eyes_only() -> None:
    two = Two(10, 0)
    two.writer.put(memoryview(b"hello"))
    two.indexes[0] = 77  # the writer cannot move the reader's place
    assert two.reader.refresh() == 5
    assert two.reader.take(5) == b"hello"


@given(st.integers(10, 14), st.integers(0, 1024), st.integers(0, 1024))
def test_enlarging_keeps_what_is_there(order: int, first: int, second: int) -> None:
    area = memoryview(mmap.mmap(-1, 1 << 15))
    indexes = memoryview(bytearray(16)).cast("I")
    writer = Writer(area, 1024, indexes, 1, 0, atomics())
    reader = Reader(area, 1024, indexes, 0, 1, atomics())
    data = random.Random(1).randbytes(first)
    writer.put(memoryview(data))
    for end in (writer, reader):
        end.enlarge(1 << order)
    more = random.Random(2).randbytes(min(second, writer.refresh()))
    writer.put(memoryview(more))
    assert reader.refresh() == first + len(more)
    assert reader.take(first + len(more)) == data + more
