"""ChannelConformance: what a byte channel between two domains has to keep, for any implementation of one.

    from gntalloc.testing.channels import ChannelConformance

    class TestMyChannel(ChannelConformance):
        @classmethod
        def serve(cls, domain, peer):
            return MyChannel.listen(domain, peer)       # when a client has come

        @classmethod
        def connect(cls, domain, peer):
            return MyChannel.connect(domain, peer)

A channel, or an adapter of it, has `write(data, timeout=)`, `read(size=None, timeout=)` and `close()` as `gntalloc`'s
channels have them; what else it has the class's attributes say. Errors are those of the standard library: TimeoutError,
ConnectionError for a peer that is gone, OSError for everything else.

No test framework is needed: a `unittest.TestCase` can have this class as a second base.
"""

from __future__ import annotations

import errno
import random
import time
import unittest
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from gntalloc.testing.blocks import block
from gntalloc.testing.checking import (
    PARTS,
    Beside,
    killed,
    raises,
    read_exactly,
    read_what_is_there,
    same,
    write_in_pieces,
)
from gntalloc.testing.fixtures import PATIENCE, Domains, two_domains
from gntalloc.testing.program import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from gntalloc.domain import Domain

__all__ = ["ChannelConformance"]

SHORT = 0.05  # seconds, for what is to time out
_MOMENT = 0.05  # for a thread to have begun to wait; if it has not, the check is an easier one
_LEFT_PROD, _RIGHT_CONS = 1, 2  # words of the page that the client moves
_FAR = 1 << 28


class ChannelConformance:
    """The checks. Subclass it, and say how a channel comes about and what it can do.

    Each check has two domains and a channel of its own, and sees that nothing is left of them.
    """

    ring: ClassVar[int] = 4096
    """Bytes that a direction holds, at least 64. A small one makes the checks quick."""
    messages: ClassVar[bool] = True
    """Whether it has `send(message, timeout=)` and `recv(timeout=)`, for whole messages of up to `longest` bytes."""
    longest: ClassVar[int] = 4092
    half_close: ClassVar[bool] = True
    """Whether it has `finish()`: no more is written, and the other direction goes on."""
    in_place: ClassVar[bool] = True
    """Whether it has `reserve`, `commit`, `peek` and `release`."""
    tells_death: ClassVar[bool] = True
    """Whether a peer that died is told from one that closed: with ConnectionError, and not b"" for the end."""

    # What an implementation says.

    @classmethod
    def serve(cls, domain: Domain, peer: int) -> Any:
        """Give the channel of a server in `domain`, when its client in domain `peer` has come."""
        raise NotImplementedError("say how a server gets its channel: def serve(cls, domain, peer)")

    @classmethod
    def connect(cls, domain: Domain, peer: int) -> Any:
        """Give the channel of a client in `domain`, to the server in domain `peer`, which may not be there yet."""
        raise NotImplementedError("say how a client gets its channel: def connect(cls, domain, peer)")

    @classmethod
    def indexes(cls, channel: Any) -> memoryview | None:  # noqa: ARG003  it is here to be overridden
        """Give the four indexes of the shared page, as 32-bit words: left's cons, prod, right's cons, prod.

        For the checks in which a client lies about those that it moves. None: there are no such checks.
        """
        return None

    def domains(self) -> AbstractContextManager[Domains]:
        """Where the channels are: domains 1 and 2 of a machine of their own, which must be left clean."""
        return two_domains(limit=4096)

    # Bytes.

    def test_every_byte_in_order_both_ways_at_once(self) -> None:
        """Four threads, pieces of all sizes, shorter and longer than the ring."""
        total = 12 * self.ring + 13
        sizes = [1, 7, 64, self.ring // 2 + 1, self.ring, 2 * self.ring + 3]
        with self.pair() as ends:
            data = [random.Random(number).randbytes(total) for number in (0, 1)]
            writers = [Beside(write_in_pieces, end, its, sizes) for end, its in zip(ends, data, strict=True)]
            readers = [Beside(read_exactly, end, total) for end in ends]
            for work in (*writers, *readers):
                work.result()
            same([reader.result() for reader in readers], data[::-1], "what was read is not what was written")

    def test_bytes_wrap_at_the_end_of_the_ring(self) -> None:
        """At many different places."""
        with self.pair() as (near, far):
            chance = random.Random(2)
            for length in [self.ring, self.ring - 1, 3, self.ring // 2 + 1] * 16:
                data = chance.randbytes(length)
                near.write(data, timeout=PATIENCE)
                same(read_exactly(far, length), data, f"{length} bytes were changed on their way")

    def test_read_gives_what_is_there_and_no_more_than_asked(self) -> None:
        """A stream: it neither waits for more than one byte, nor loses the rest."""
        with self.pair() as (near, far):
            near.write(b"abcdef", timeout=PATIENCE)
            first = far.read(4, timeout=PATIENCE)
            assert 1 <= len(first) <= 4, f"{len(first)} bytes for a read of 4"
            same(first + read_exactly(far, 6 - len(first)), b"abcdef", "bytes were lost between two reads")

    def test_a_reader_that_waits_is_woken(self) -> None:
        """With no deadline of its own."""
        with self.pair() as (near, far):
            for number in range(20):
                reader = Beside(far.read)
                time.sleep(_MOMENT if number == 0 else 0)
                near.write(bytes([number]), timeout=PATIENCE)
                same(reader.result(), bytes([number]), "another byte came")

    def test_a_writer_that_waits_is_woken(self) -> None:
        """When there is room again."""
        data = random.Random(3).randbytes(5 * self.ring)
        with self.pair() as (near, far):
            writer = Beside(near.write, data)
            time.sleep(_MOMENT)
            same(read_exactly(far, len(data)), data, "what was read is not what was written")
            writer.result()

    def test_bytes_go_to_another_process_and_back(self) -> None:
        """More than the rings hold."""
        data = random.Random(4).randbytes(10 * self.ring + 1)
        with self.with_program("echo") as (near, program):
            writer = Beside(near.write, data, timeout=PATIENCE)
            same(read_exactly(near, len(data)), data, "the echo is not what was written")
            writer.result()
            near.close()
            assert program.wait(timeout=PATIENCE) == 0, "the peer did not see the end"

    # Timeouts.

    def test_a_read_times_out_and_nothing_is_lost(self) -> None:
        """Twice, and then the bytes come."""
        with self.pair() as (near, far):
            for _ in range(2):
                raises(TimeoutError, "nothing was written", lambda: far.read(timeout=SHORT))
            near.write(b"late", timeout=PATIENCE)
            same(read_exactly(far, 4), b"late", "a read that timed out took something along")

    def test_a_read_without_patience_does_not_wait(self) -> None:
        """timeout=0: what is there, or TimeoutError."""
        with self.pair() as (near, far):
            raises(TimeoutError, "nothing was written", lambda: far.read(timeout=0))
            near.write(b"x", timeout=PATIENCE)
            same(far.read(timeout=0), b"x", "it was there")

    def test_a_write_times_out_and_says_how_much_was_done(self) -> None:
        """`done` of the error, if it has one; what did go is the beginning, and what follows comes after it."""
        data = random.Random(5).randbytes(3 * self.ring)
        with self.pair() as (near, far):
            error = raises(TimeoutError, "nobody reads", lambda: near.write(data, timeout=SHORT))
            got = read_what_is_there(far)
            same(got, data[: len(got)], "what a write that timed out has written is not its beginning")
            assert len(got) >= self.ring, f"{len(got)} bytes went, and the ring holds {self.ring}"
            done = getattr(error, "done", len(got))
            assert done == len(got), f"the error says that {done} bytes were written, and {len(got)} came"
            near.write(b"next", timeout=PATIENCE)
            same(read_exactly(far, 4), b"next", "the channel is not as it was before the timeout")

    # Whole messages.

    def test_messages_are_whole_and_in_order(self) -> None:
        """Empty ones and the longest too."""
        self._needs("messages")
        chance = random.Random(6)
        lengths = [0, 1, 64, self.longest, 0, self.longest // 2 + 1, *(chance.randrange(600) for _ in range(200))]
        sent = [chance.randbytes(length) for length in lengths]
        with self.pair() as (near, far):
            sender = Beside(lambda: [near.send(message, timeout=PATIENCE) for message in sent])
            got = [far.recv(timeout=PATIENCE) for _ in sent]
            sender.result()
            same(got, sent, "messages came in another form")

    def test_a_message_that_can_never_fit_is_refused(self) -> None:
        """EMSGSIZE, at once, and nothing of it is sent."""
        self._needs("messages")
        with self.pair() as (near, far):
            error = raises(OSError, "it is too long", lambda: near.send(bytes(self.longest + 1), timeout=PATIENCE))
            assert error.errno == errno.EMSGSIZE, f"{error!r}, where EMSGSIZE would say it"
            near.send(b"short", timeout=PATIENCE)
            same(far.recv(timeout=PATIENCE), b"short", "something of the long message was sent")

    def test_a_message_that_times_out_is_not_sent_in_part(self) -> None:
        """All of it or nothing."""
        self._needs("messages")
        with self.pair() as (near, far):
            near.send(bytes(self.longest // 2), timeout=PATIENCE)
            raises(TimeoutError, "there is no room", lambda: near.send(bytes(self.longest), timeout=SHORT))
            far.recv(timeout=PATIENCE)
            near.send(b"next", timeout=PATIENCE)
            same(far.recv(timeout=PATIENCE), b"next", "a part of a message was sent")

    def test_messages_of_several_threads_are_whole(self) -> None:
        """Each thread's in its order."""
        self._needs("messages")
        with self.pair() as (near, far):

            def send(name: int) -> None:
                for number in range(100):
                    near.send(bytes([name, number]) * 20, timeout=PATIENCE)

            senders = [Beside(send, name) for name in range(4)]
            seen = dict.fromkeys(range(4), 0)
            for _ in range(400):
                message = far.recv(timeout=PATIENCE)
                same(message, bytes([message[0], seen[message[0]]]) * 20, "a message is mixed of several")
                seen[message[0]] += 1
            for sender in senders:
                sender.result()

    # In place.

    def test_what_is_reserved_goes_when_it_is_committed(self) -> None:
        """Not before; and only as much as is said."""
        self._needs("in_place")
        with self.pair() as (near, far):
            for length in [64, self.ring // 2 + 1] * 8:
                data = random.Random(length).randbytes(length)
                with near.reserve(length, timeout=PATIENCE) as room:
                    room[:] = data
                raises(TimeoutError, "nothing was committed", lambda: far.read(timeout=0))
                near.commit(length - 1)
                same(read_exactly(far, length - 1), data[:-1], "what came is not what was filled in")

    def test_what_is_peeked_stays_until_it_is_released(self) -> None:
        """A part of it, too."""
        self._needs("in_place")
        with self.pair() as (near, far):
            for length in [64, self.ring // 2 + 1] * 8:
                data = random.Random(length).randbytes(length)
                near.write(data, timeout=PATIENCE)
                with far.peek(length, timeout=PATIENCE) as view:
                    same(bytes(view), data, "what lies there is not what was written")
                far.release(10)
                same(read_exactly(far, length - 10), data[10:], "what was not released is lost")

    # The end.

    def test_what_was_written_before_the_close_is_read_and_then_the_end(self) -> None:
        """And the end is told again and again."""
        with self.pair() as (near, far):
            near.write(b"last words", timeout=PATIENCE)
            near.close()
            same(read_exactly(far, 10), b"last words", "what was written before the close is lost")
            for _ in range(2):
                same(far.read(timeout=PATIENCE), b"", "the peer has closed")

    def test_writing_to_a_peer_that_has_closed(self) -> None:
        """ConnectionError, no later than when the ring is full."""
        with self.pair() as (near, far):
            far.close()
            data = bytes(2 * self.ring)
            raises(ConnectionError, "the peer has closed", lambda: near.write(data, timeout=PATIENCE))

    def test_a_close_wakes_the_peer_that_reads(self) -> None:
        """It gets the end."""
        with self.pair() as (near, far):
            reader = Beside(far.read)
            time.sleep(_MOMENT)
            near.close()
            same(reader.result(), b"", "the peer has closed")

    def test_a_close_wakes_the_peer_that_writes(self) -> None:
        """It gets ConnectionError."""
        with self.pair() as (near, far):
            writer = Beside(far.write, bytes(3 * self.ring))
            time.sleep(_MOMENT)
            near.close()
            raises(ConnectionError, "the peer has closed", writer.result)

    def test_closing_ones_own_end_wakes_who_waits_there(self) -> None:
        """It gets an OSError."""
        with self.pair() as (near, _far):
            reader = Beside(near.read)
            time.sleep(_MOMENT)
            near.close()
            raises(OSError, "this end was closed", reader.result)

    def test_close_can_be_repeated_and_then_every_call_says_so(self) -> None:
        """With an OSError, and no timeout."""
        with self.pair() as (near, _far):
            near.close()
            near.close()
            for call in (lambda: near.read(timeout=PATIENCE), lambda: near.write(b"x", timeout=PATIENCE)):
                error = raises(OSError, "this end was closed", call)
                assert not isinstance(error, TimeoutError), f"{error!r}, for an end that was closed"

    def test_one_direction_finishes_and_the_other_goes_on(self) -> None:
        """`finish`."""
        self._needs("half_close")
        with self.pair() as (near, far):
            near.write(b"question", timeout=PATIENCE)
            near.finish()
            same(read_exactly(far, 8), b"question", "what was written before the end is lost")
            same(far.read(timeout=PATIENCE), b"", "the peer has finished")
            raises(OSError, "this end has finished", lambda: near.write(b"x", timeout=PATIENCE))
            far.write(b"answer", timeout=PATIENCE)
            same(read_exactly(near, 6), b"answer", "the other direction does not go on")

    # SIGKILL.

    def test_sigkill_of_a_peer_that_writes(self) -> None:
        """Before its first byte, at the last of the ring, beyond it; a client, and a server: all it wrote comes."""
        many = 3 * self.ring + 7
        for length, serving in ((0, True), (self.ring, True), (many, True), (many, False)):
            with self.with_program("write_and_die", length, serving=serving) as (near, program):
                expected = random.Random(length).randbytes(length)
                same(read_exactly(near, length), expected, "bytes that were written are lost, or changed")
                self._ended_by_death(near)
                killed(program)

    def test_sigkill_of_a_peer_that_reads(self) -> None:
        """Whoever writes to it is told, however much it has read."""
        for length, serving in ((0, True), (self.ring + 1, True), (1, False)):
            with self.with_program("read_and_die", length, serving=serving) as (near, program):
                writer = Beside(near.write, bytes(length + 4 * self.ring))
                raises(ConnectionError, "the peer is dead", writer.result)
                killed(program)

    def test_sigkill_of_a_peer_wakes_who_waits(self) -> None:
        """A reader, and a writer."""
        with self.with_program("idle") as (near, program):
            read_exactly(near, 1)
            reader = Beside(near.read)
            writer = Beside(near.write, bytes(3 * self.ring))
            time.sleep(_MOMENT)
            program.kill()
            raises(ConnectionError, "the peer is dead", writer.result)
            if self.tells_death:
                raises(ConnectionError, "the peer is dead", reader.result)
            else:
                with suppress(ConnectionError):
                    same(reader.result(), b"", "the peer is dead")

    def _ended_by_death(self, near: Any) -> None:
        __tracebackhide__ = True
        if self.tells_death:
            raises(ConnectionError, "the peer died", lambda: near.read(timeout=PATIENCE))
            return
        with suppress(ConnectionError):
            same(near.read(timeout=PATIENCE), b"", "the peer died")

    # Lies.

    def test_a_client_that_lies_about_what_it_wrote(self) -> None:
        """Less than was read already, or more than any ring holds: an OSError that is no TimeoutError, and no bytes."""
        for by in (-1, _FAR, -_FAR):
            self._lied(_LEFT_PROD, by, lambda near: near.read(timeout=PATIENCE))

    def test_a_client_that_lies_about_what_it_read(self) -> None:
        """More than was written, or less than can be in the ring."""
        for by in (_FAR, -_FAR):
            self._lied(_RIGHT_CONS, by, lambda near: near.write(bytes(2 * self.ring), timeout=PATIENCE))

    def _lied(self, word: int, by: int, call: Callable[[Any], object]) -> None:
        __tracebackhide__ = True
        with self.pair() as (near, far):
            words = self.indexes(far)
            if words is None:
                raise unittest.SkipTest("this channel does not show its indexes")
            far.write(b"x", timeout=PATIENCE)
            read_exactly(near, 1)
            near.write(b"x", timeout=PATIENCE)
            read_exactly(far, 1)
            with words:  # which are released before the channel is closed
                words[word] = (words[word] + by) & 0xFFFF_FFFF
            error = raises(OSError, "the peer lies", lambda: call(near))
            assert not isinstance(error, TimeoutError), "a peer that lies was not seen, and waited for"

    # How channels come about here.

    @block
    def pair(self) -> Iterator[tuple[Any, Any]]:
        """Make a server's end in domain 1 and a client's in domain 2, both in this process."""
        __tracebackhide__ = True
        with self.domains() as (alice, bob):
            serving = Beside(self.serve, alice, bob.domid)
            far = self.connect(bob, alice.domid)
            try:
                near = serving.result()
                try:
                    yield near, far
                finally:
                    near.close()
            finally:
                far.close()

    @block
    def with_program(self, part: str, *args: Any, serving: bool = True) -> Iterator[tuple[Any, Program]]:
        """Make an end in domain 1, a server's or a client's. A process in domain 2 has the other, and plays `part`."""
        __tracebackhide__ = True
        with self.domains() as (alice, bob), Program(bob, self._play, part, args, serving) as program:
            near = (self.serve if serving else self.connect)(alice, bob.domid)
            try:
                yield near, program
            finally:
                near.close()

    @classmethod
    def _play(cls, domain: Domain, part: str, args: tuple[Any, ...], serving: bool) -> None:
        """In that process."""
        PARTS[part]((cls.connect if serving else cls.serve)(domain, 1), *args)

    def _needs(self, name: str) -> None:
        __tracebackhide__ = True
        if not getattr(self, name):
            raise unittest.SkipTest(f"this channel says {name} = False")
