"""Both ends in one process: what each call promises, with our own peer and with one that knows libxenvchan only."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from looks import WAYS, Recorder, long

from gntalloc import (
    Busy,
    Closed,
    GntallocError,
    NotKnownHere,
    PeerBroke,
    PeerClosed,
    PeerGone,
    TimedOut,
    ViewsStillExported,
)
from gntalloc.atomics import plain
from gntalloc.vchan import layout, offers, role
from gntalloc.vchan.layout import NOTIFY_READ, NOTIFY_WRITE

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.vchan.channel import Channel

    Pair = Callable[..., tuple[Channel, Channel]]

PATIENCE = 20.0
SIZES = [(1024, 2048), (2048, 1024), (2048, 4096), (4096, 2048), (4096, 4096), (65536, 16384)]
MODES: list[dict[str, Any]] = [
    {},
    {"extensions": False},
    {"spin": 0, "client": {"spin": 0}},
    {"spin": 0, "client": {"spin": 0, "extensions": False}},
]


@pytest.fixture(params=["libatomic", "plain"])
def any_atomics(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With libatomic, and as where it is not installed."""
    if request.param == "libatomic":
        request.getfixturevalue("libatomic")
    else:
        monkeypatch.setattr(offers, "atomics", plain)
        monkeypatch.setattr("gntalloc.vchan.client.atomics", plain)


@pytest.mark.usefixtures("libatomic")
def test_the_page_is_libxenvchans(pair: Pair) -> None:
    """The bytes that the C library leaves after its own start, and after the same steps."""
    ours, theirs = pair(size=(1024, 2048), extensions=False)
    page = ours._end.pages.memory
    assert bytes(page[:24]).hex() == "000000000000000000000000000000000a000b0001010101"
    assert bytes(page[24:1024]) == bytes(1000)
    theirs.write(b"12345")
    assert bytes(page[:24]).hex() == "00000000050000000000000000000000" + "0a000b0001010001"
    assert ours.read(timeout=PATIENCE) == b"12345"
    ours.write(bytes(37))
    assert theirs.read(timeout=PATIENCE) == bytes(37)
    theirs.close()
    assert bytes(page[:20]).hex() == "05000000050000002500000025000000" + "0a000b00"
    assert page[layout.CLI_LIVE] == 0


def test_a_server_that_waits_looks_like_the_c_librarys(alice: Any) -> None:
    with alice.listen(2, "test", size=0, extensions=False) as listener:
        page = listener.offer()._end.pages.memory
        assert bytes(page[:24]).hex() == "00000000000000000000000000000000" + "0a000b0002010100"


@pytest.mark.usefixtures("any_atomics")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_every_byte_both_ways_at_once(pair: Pair, size: tuple[int, int], mode: dict[str, Any]) -> None:
    chance = random.Random(repr(size))
    total = 40 * max(size)
    ends = pair(size=size, **mode)
    data = [chance.randbytes(total) for _ in ends]
    got = [hashlib.sha256(), hashlib.sha256()]
    lengths = [0, 0]

    def write(me: int) -> None:
        at = 0
        pieces = random.Random(me)
        while at < total:
            piece = pieces.choice([1, 7, 64, 1023, 5000])
            ends[me].write(data[me][at : at + piece], timeout=PATIENCE)
            at += piece

    def read(me: int) -> None:
        buffer = bytearray(3000)
        while lengths[me] < total:
            if lengths[me] % 2:
                piece = ends[me].read(777, timeout=PATIENCE)
            else:
                piece = bytes(buffer[: ends[me].readinto(buffer, timeout=PATIENCE)])
            got[me].update(piece)
            lengths[me] += len(piece)

    threads = [threading.Thread(target=work, args=(me,)) for work in (write, read) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [each.digest() for each in got] == [hashlib.sha256(data[1 - me]).digest() for me in (0, 1)]


@pytest.mark.parametrize("mode", MODES)
def test_messages(pair: Pair, mode: dict[str, Any]) -> None:
    first, second = pair(size=4096, **mode)
    chance = random.Random(3)
    messages = [chance.randbytes(chance.choice([0, 1, 64, 600, 4092])) for _ in range(500)]

    def send() -> None:
        for message in messages:
            first.send(message, timeout=PATIENCE)

    sender = threading.Thread(target=send)
    sender.start()
    buffer = bytearray(5000)
    for number, message in enumerate(messages):
        if number % 3 == 0:
            assert second.recv(timeout=PATIENCE) == message
        elif number % 3 == 1:
            assert buffer[: second.recv_into(buffer, timeout=PATIENCE)] == message
        else:
            assert second.peek(message=True, timeout=PATIENCE) == message
            second.release()
    sender.join(PATIENCE)


def test_a_message_on_the_wire_is_its_length_and_itself(pair: Pair) -> None:
    first, second = pair()
    first.send(b"hello")
    assert second.read(timeout=PATIENCE) == b"\x05\0\0\0hello"


def test_a_message_too_long_for_the_ring_is_refused_and_nothing_is_written(pair: Pair) -> None:
    first, second = pair(size=4096)
    with pytest.raises(GntallocError, match="larger `size`") as caught:
        first.send(bytes(4093))
    assert caught.value.errno == errno.EMSGSIZE
    first.send(b"x")
    assert second.recv(timeout=PATIENCE) == b"x"


def test_a_buffer_too_small_loses_no_message(pair: Pair) -> None:
    first, second = pair()
    first.send(b"12345")
    with pytest.raises(GntallocError, match="5 bytes long") as caught:
        second.recv_into(bytearray(4), timeout=PATIENCE)
    assert caught.value.errno == errno.EMSGSIZE
    assert second.recv(timeout=PATIENCE) == b"12345"


def test_buffers_of_any_items(pair: Pair) -> None:
    first, second = pair()
    numbers = np.arange(100, dtype="<u4")
    for put in (first.send, first.write):
        put(numbers)
    assert np.array_equal(np.frombuffer(second.recv(timeout=PATIENCE), "<u4"), numbers)
    into = np.zeros(100, "<u4")
    assert second.readinto(into, timeout=PATIENCE) == 400
    assert np.array_equal(into, numbers)


# Timeouts.


@pytest.mark.parametrize("timeout", [0, 0.02])
def test_nothing_to_read(pair: Pair, timeout: float) -> None:
    first, second = pair()
    for call in (second.read, second.recv, second.peek):
        with pytest.raises(TimedOut, match="domain 1"):
            call(timeout=timeout)
    first.send(b"x")
    assert second.recv(timeout=PATIENCE) == b"x"


@pytest.mark.parametrize("timeout", [0, 0.02])
def test_no_room_says_how_much_was_written(pair: Pair, timeout: float) -> None:
    first, second = pair(size=4096)
    data = random.Random(1).randbytes(10000)
    with pytest.raises(TimedOut) as caught:
        first.write(data, timeout=timeout)
    assert caught.value.done == 4096
    with pytest.raises(TimedOut) as caught:
        first.send(b"x", timeout=timeout)
    with pytest.raises(TimedOut):
        first.reserve(1, timeout=timeout)
    assert (second.ready, first.room) == (4096, 0)
    assert second.read(timeout=PATIENCE) == data[:4096]


def test_drain_waits_for_the_reader(pair: Pair) -> None:
    first, second = pair()
    first.drain(timeout=0)
    first.write(b"abc")
    with pytest.raises(TimedOut):
        first.drain(timeout=0.02)
    threading.Timer(0.05, second.read).start()
    first.drain(timeout=PATIENCE)


# In place.


def test_numpy_fills_the_ring_and_reads_it(pair: Pair) -> None:
    first, second = pair(size=65536)
    for turn in range(40):
        array = np.frombuffer(first.reserve(8000), "<u8")
        array[:] = np.arange(1000) + turn
        del array
        first.commit()
        with second.peek(8000, timeout=PATIENCE) as view:
            seen = np.frombuffer(view, "<u8")
            assert np.array_equal(seen, np.arange(1000) + turn)
            assert not seen.flags.writeable
            del seen
        second.release()


def test_what_is_reserved_is_unseen_until_it_is_committed(pair: Pair) -> None:
    first, second = pair()
    view = first.reserve(10)
    view[:] = b"0123456789"
    assert second.ready == 0
    for refused in (lambda: first.write(b"x"), lambda: first.send(b"x"), lambda: first.reserve(1)):
        with pytest.raises(Busy):
            refused()
    first.commit(4)
    assert second.read(timeout=PATIENCE) == b"0123"
    first.reserve(10)
    first.commit(0)
    with pytest.raises(ValueError, match="nothing was reserved"):
        first.commit()
    first.write(b"x")
    assert second.read(timeout=PATIENCE) == b"x"


def test_a_message_in_place(pair: Pair) -> None:
    first, second = pair(size=4096)
    for turn in range(30):  # its place comes to be parted by the ring's end
        view = first.reserve(900, message=True)
        view[:] = bytes([turn]) * 900
        first.commit(899)
        with second.peek(message=True, timeout=PATIENCE) as got:
            assert got == bytes([turn]) * 899
        second.release()


def test_what_is_peeked_stays_until_it_is_released(pair: Pair) -> None:
    first, second = pair()
    first.write(b"abcdef")
    assert bytes(second.peek(4, timeout=PATIENCE)) == b"abcd"
    for refused in (second.read, second.recv, second.peek):
        with pytest.raises(Busy):
            refused(timeout=0)
    second.release(1)
    assert bytes(second.peek(timeout=PATIENCE)) == b"bcdef"
    second.release()
    with pytest.raises(ValueError, match="nothing was peeked"):
        second.release()
    with pytest.raises(TimedOut):
        second.peek(1, timeout=0)


def test_closing_with_an_array_alive_is_refused_and_can_be_repeated(pair: Pair) -> None:
    first, second = pair()
    array = np.frombuffer(first.reserve(100), "u1")
    with pytest.raises(ViewsStillExported):
        first.close()
    with pytest.raises(Closed):
        first.send(b"x")
    assert second.read(timeout=PATIENCE) == b""  # it was told all the same
    del array
    first.close()
    assert first.closed


# The end.


def test_what_was_written_before_the_close_is_read_and_then_the_end(pair: Pair) -> None:
    first, second = pair()
    first.send(b"last")
    first.close()
    assert second.recv(timeout=PATIENCE) == b"last"
    with pytest.raises(PeerClosed, match="closed its end"):
        second.recv(timeout=PATIENCE)
    assert second.read(timeout=PATIENCE) == b""
    assert bytes(second.peek(timeout=PATIENCE)) == b""
    assert not second.connected
    with pytest.raises(PeerClosed):
        second.write(b"x")
    with contextlib.suppress(PeerGone):  # this may still go into the ring
        second.send(b"x")
    with pytest.raises(PeerGone):
        second.send(b"x")


@pytest.mark.parametrize("mode", MODES)
def test_a_close_wakes_reader_and_writer(pair: Pair, mode: dict[str, Any]) -> None:
    first, second = pair(size=4096, **mode)
    first.write(bytes(4096))
    ended: list[str] = []

    def write() -> None:
        try:
            first.write(b"more", timeout=PATIENCE)
        except PeerClosed as error:
            ended.append(f"written {error.done}")

    def read() -> None:
        ended.append(f"read {len(first.read(timeout=PATIENCE))}")

    threads = [threading.Thread(target=write), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    second.close()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(ended) == ["read 0", "written 0"]


@pytest.mark.parametrize("call", ["read", "recv", "write", "drain"])
def test_closing_ones_own_end_wakes_who_waits_there(pair: Pair, call: str) -> None:
    first, _ = pair(size=4096)
    first.write(bytes(4096))
    ended: list[str] = []

    def wait() -> None:
        try:
            if call == "write":
                first.write(b"more", timeout=PATIENCE)
            else:
                getattr(first, call)(timeout=PATIENCE)
        except Closed as error:
            ended.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    first.close()
    thread.join(PATIENCE)
    assert len(ended) == 1


def test_one_direction_finishes_and_the_other_goes_on(pair: Pair) -> None:
    first, second = pair()
    first.send(b"question")
    first.finish()
    first.finish()
    assert second.recv(timeout=PATIENCE) == b"question"
    assert second.read(timeout=PATIENCE) == b""
    with pytest.raises(PeerClosed):
        second.recv(timeout=PATIENCE)
    with pytest.raises(Closed, match="finish"):
        first.write(b"x")
    second.send(b"answer")
    second.finish()
    assert list(first) == [b"answer"]


def test_a_libxenvchan_cannot_be_told_of_half_an_end(pair: Pair) -> None:
    first, second = pair(extensions=False)
    for each in (first, second):
        assert not each.extended
        with pytest.raises(NotKnownHere, match="drain"):
            each.finish()


def test_a_message_cut_short_by_a_close_is_named(pair: Pair) -> None:
    first, second = pair()
    first.write(b"\x05\0\0\0hel")
    first.close()
    with pytest.raises(PeerBroke, match="middle of a message"):
        second.recv(timeout=PATIENCE)


def test_after_close_every_call_says_so(pair: Pair) -> None:
    first, _ = pair()
    first.close()
    first.close()
    calls: list[Callable[[], object]] = [
        first.read, first.recv, first.peek, first.drain, first.finish, first.commit, first.release,
        lambda: first.write(b"x"), lambda: first.send(b"x"), lambda: first.reserve(1),
        lambda: first.readinto(bytearray(1)),
        lambda: first.ready, lambda: first.room, first.wait_connected,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(Closed):
            call()


def test_several_writers_take_turns(pair: Pair) -> None:
    first, second = pair(size=4096)

    def send(name: int) -> None:
        for number in range(200):
            first.send(bytes([name, number]) * 20, timeout=PATIENCE)

    threads = [threading.Thread(target=send, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    seen: dict[int, int] = dict.fromkeys(range(4), 0)
    for _ in range(800):
        message = second.recv(timeout=PATIENCE)
        assert message == bytes([message[0], seen[message[0]]]) * 20
        seen[message[0]] += 1
    for thread in threads:
        thread.join(PATIENCE)


def test_a_busy_direction_is_waited_for_no_longer_than_said(pair: Pair) -> None:
    first, second = pair()
    reader = threading.Thread(target=first.read)
    reader.start()
    time.sleep(0.05)
    with pytest.raises(TimedOut):
        first.read(timeout=0.02)
    second.write(b"x")
    reader.join(PATIENCE)


# Larger rings.


def test_between_our_own_ends_a_ring_may_be_larger(make_machine: Any) -> None:
    machine = make_machine(limit=4096)
    alice, bob = machine.domain(1), machine.domain(2)
    data = random.Random(9).randbytes(6 << 20)
    with alice.listen(2, "large", size=4 << 20) as listener:
        offered = listener.offer()
        offered.write(data[: 1 << 19])  # before anybody has come
        for extensions, size in ((None, 4 << 20), (False, 1 << 20)):
            result: list[Channel] = []
            client = threading.Thread(
                target=lambda extensions=extensions, result=result: result.append(
                    bob.connect(1, "large", timeout=PATIENCE, extensions=extensions)
                )
            )
            client.start()
            with listener.accept(timeout=PATIENCE) as first:
                client.join(PATIENCE)
                with result[0] as second:
                    assert first.sizes == second.sizes == (size, size)
                    rest = data[1 << 19 :] if extensions is None else data
                    writer = threading.Thread(target=first.write, args=(rest,), kwargs={"timeout": PATIENCE})
                    writer.start()
                    got = bytearray()
                    while len(got) < len(data):
                        got += second.read(timeout=PATIENCE)
                    writer.join(PATIENCE)
                    assert got == data
    for domain in (alice, bob):
        domain.close()
        domain.devices.close()


def test_a_spin_is_bounded_by_the_timeout(pair: Pair) -> None:
    first, _ = pair(spin=1000)
    with pytest.raises(TimedOut):
        first.read(timeout=0.05)


@pytest.mark.parametrize("answer", WAYS)
@pytest.mark.parametrize("call", ["read", "recv", "write"])
def test_a_wait_asks_how_long_to_look_and_says_that_it_was_woken(pair: Pair, answer: Any, call: str) -> None:
    channel, other = pair(size=4096)
    recorder = Recorder(answer)
    channel._end.looks = {NOTIFY_READ: recorder, NOTIFY_WRITE: recorder}  # type: ignore[dict-item]
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: channel.read(timeout=PATIENCE),
        "recv": lambda: channel.recv(timeout=PATIENCE),
        "write": lambda: channel.write(b"x", timeout=PATIENCE),
    }
    deadline = time.monotonic() + PATIENCE
    with ThreadPoolExecutor(1) as threads:
        while "woken" not in recorder.heard:  # it may not have come to sleep yet when it is told
            if call == "write" and channel.room:
                channel.write(bytes(channel.room))
            waiting = threads.submit(calls[call])
            while not channel._end._wanted:
                assert time.monotonic() < deadline, "it does not ask to be woken"
                time.sleep(0.001)
            time.sleep(0.01)
            if call == "write":
                assert other.read(timeout=PATIENCE)
            else:
                other.send(b"x")
            waiting.result(PATIENCE)
    assert recorder.heard[0] == "until"
    assert "paid" not in recorder.heard


def test_a_look_pays_if_the_peer_comes_meanwhile(pair: Pair) -> None:
    channel, other = pair()
    recorder = Recorder(long)
    channel._end.looks = {NOTIFY_WRITE: recorder}  # type: ignore[dict-item]
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(channel.recv, timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while not recorder.heard:
            assert time.monotonic() < deadline, "it does not ask how long to look"
            time.sleep(0.001)
        other.send(b"x")
        assert reading.result(PATIENCE) == b"x"
    assert recorder.heard == ["until", "paid"]


def test_each_direction_looks_by_itself_and_without_a_spin_none_does(pair: Pair) -> None:
    one, other = pair(client={"spin": 0})
    assert one._end.looks[NOTIFY_READ] is not one._end.looks[NOTIFY_WRITE]
    assert other._end.looks == {}


def test_roles_mirror_each_other() -> None:
    one, other = role.SERVER, role.CLIENT
    assert (one.my_live, one.asking, one.my_state) == (other.peer_live, other.asked, other.peer_state)
    assert one.writes == other.reads[::-1]
    assert other.writes == one.reads[::-1]
