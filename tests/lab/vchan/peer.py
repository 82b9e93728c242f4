"""One end of a vchan, ours. The other is peer.c's, a proxy's, or another of these.

    python3 peer.py DATA PEER CASE...      CASE is ROLE,PATH,READ,WRITE,MODE,COUNT,WHO

Both ends are started with the same cases, but for the ROLE: server or client. READ and WRITE are the sizes that the
server asks for, DATA is a file of bytes that both have. What each case sends is a piece of it, the server's from its
start and the client's from another place, and who receives compares every byte. A case is a process of its own.

    MODE      what happens                                                           prints
    turns     WHO writes COUNT bytes, in pieces of 1 to 2 rings, then reads as many  turns SENT RECEIVED
    packets   the same, in pieces of 1 byte to a ring; each waits for all of it      packets SENT RECEIVED
    both      both write and read COUNT bytes at the same time                       both SENT RECEIVED
    awaiting  the same, ours with asyncio                                            awaiting SENT RECEIVED
    closing   WHO writes COUNT bytes and closes; the other reads up to the end       closing RECEIVED READ'S-END ERROR
    killed    WHO writes COUNT bytes and gets SIGKILL                                killed RECEIVED READ'S-END ERROR
    stalled   WHO reads COUNT bytes and gets SIGKILL; the other writes in vain       stalled ERROR
    messages  between ours only: COUNT messages each way, and `finish`               messages SENT RECEIVED
    stream    WHO writes COUNT bytes in chunks of 64 KiB, the other reads them       stream SECONDS
    in-place  the same; one of ours looks at them where they lie                     in-place SECONDS
    trips     COUNT round trips of 64 bytes, as WHO measures them                    trips SECONDS

SPIN in the environment is how many seconds an end looks before it sleeps.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

import gntalloc
import gntalloc.vchan.client
import gntalloc.vchan.server
import gntalloc.xenstore.client
from gntalloc import PeerClosed, PeerDied

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc.vchan.channel import Channel

PATIENCE = 60.0
CLIENTS_FROM = 1_000_003
CHUNK = 65536
SPIN = float(os.environ["SPIN"]) if "SPIN" in os.environ else None


class Case(NamedTuple):
    role: str
    path: str
    sizes: tuple[int, int]
    mode: str
    amount: int
    mine: bool

    @classmethod
    def parse(cls, text: str) -> Case:
        role, path, read, write, mode, count, who = text.split(",")
        return cls(role, path, (int(read), int(write)), mode, int(count), who == role)


class Flow:
    """One direction: the bytes there are to be, and in which pieces they go."""

    def __init__(self, data: memoryview, start: int, seed: int, limit: int) -> None:
        self.data = data
        self.done = start
        self.start = start
        self.seed = seed
        self.limit = limit

    @classmethod
    def pair(cls, case: Case, data: memoryview, limits: tuple[int, int]) -> tuple[Flow, Flow]:
        """What this end sends, and what it receives."""
        starts = ((0, 1), (CLIENTS_FROM, 2))
        mine, theirs = starts if case.role == "server" else starts[::-1]
        return cls(data, *mine, limits[0]), cls(data, *theirs, limits[1])

    def piece(self, size: int) -> memoryview:
        at = self.done % (len(self.data) // 2)
        self.done += size
        return self.data[at : at + size]

    def sizes(self, count: int) -> Iterator[int]:
        while count:
            self.seed = (self.seed * 1103515245 + 12345) & 0x7FFFFFFF
            size = min(1 + (self.seed >> 8) % self.limit, count)
            count -= size
            yield size

    def check(self, got: bytes | bytearray | memoryview) -> int:
        at = self.done - self.start
        if self.piece(len(got)) != got:
            raise AssertionError(f"bytes from {at} to {at + len(got)} of what came differ")
        return len(got)


class End:
    def __init__(self, channel: Channel, case: Case, data: memoryview) -> None:
        self.channel = channel
        self.case = case
        reads, writes = channel.sizes
        times = 1 if case.mode == "packets" else 2
        self.out, self.into = Flow.pair(case, data, (writes * times, reads * times))
        self.buffer = memoryview(bytearray(1 << 20))

    def run(self) -> None:
        case = self.case
        if case.mode in {"turns", "packets", "messages"}:
            for way in ("send", "receive") if case.mine else ("receive", "send"):
                getattr(self, f"{way}_{case.mode}")()
            self.show(self.out.done - self.out.start, self.into.done - self.into.start)
        else:
            getattr(self, case.mode.replace("-", "_"))()

    def show(self, *what: object) -> None:
        print(self.case.mode, *what)

    def send_turns(self) -> None:
        for size in self.out.sizes(self.case.amount):
            self.channel.write(self.out.piece(size), timeout=PATIENCE)
        if self.case.mode == "turns":
            self.channel.drain(timeout=PATIENCE)  # a proxy throws away what it has not read before a close

    def receive_turns(self) -> None:
        left = self.case.amount
        while left:
            left -= self.receive_some(left)

    def receive_some(self, most: int = 1 << 20) -> int:
        count = self.channel.readinto(self.buffer[:most], timeout=PATIENCE)
        self.into.check(self.buffer[:count])
        return count

    def send_packets(self) -> None:
        for size in self.out.sizes(self.case.amount):
            with self.channel.reserve(size, timeout=PATIENCE) as view:
                view[:] = self.out.piece(size)
            self.channel.commit()

    def receive_packets(self) -> None:
        for size in self.into.sizes(self.case.amount):
            with self.channel.peek(size, timeout=PATIENCE) as view:
                assert self.into.check(view) == size
            self.channel.release()

    def send_messages(self) -> None:
        for size, _ in zip(self.out.sizes(1 << 40), range(self.case.amount), strict=False):
            self.channel.send(self.out.piece(size // 4), timeout=PATIENCE)
        self.channel.finish(timeout=PATIENCE)

    def receive_messages(self) -> None:
        received = sum(1 for message in self.channel if self.into.check(message) >= 0)
        assert received == self.case.amount, received
        self.channel.drain(timeout=PATIENCE)

    def both(self) -> None:
        writer = threading.Thread(target=self.send_turns)
        writer.start()
        self.receive_turns()
        writer.join(PATIENCE)
        self.show(self.out.done - self.out.start, self.into.done - self.into.start)

    def awaiting(self) -> None:
        import asyncio  # here, since it takes seconds in an emulator

        from gntalloc import aio

        channel = aio.Channel(self.channel)

        async def send() -> None:
            for size in self.out.sizes(self.case.amount):
                await channel.write(self.out.piece(size))

        async def receive() -> None:
            left = self.case.amount
            while left:
                left -= self.into.check(await channel.read(left))

        async def move() -> None:
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(send(), receive())

        asyncio.run(move())
        self.show(self.out.done - self.out.start, self.into.done - self.into.start)

    def closing(self) -> None:
        if self.case.mine:
            self.send_turns()
            if self.case.mode == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            return
        ends: list[object] = []
        try:
            while self.receive_some():
                pass
            ends.append("end")
        except PeerDied as died:
            ends.append(type(died).__name__)
        self.show(self.into.done - self.into.start, *ends, self.name_of_refusal())

    killed = closing

    def stalled(self) -> None:
        if self.case.mine:
            self.receive_turns()
            os.kill(os.getpid(), signal.SIGKILL)
        self.show(self.name_of_refusal())

    def name_of_refusal(self) -> str:
        while True:
            try:
                self.channel.write(self.out.piece(1000), timeout=PATIENCE)
            except (PeerClosed, PeerDied) as gone:
                return type(gone).__name__

    def stream(self) -> None:
        self.timed(self.send_chunks, self.receive_chunks)

    def in_place(self) -> None:
        self.timed(self.send_chunks, self.look_at_chunks)

    def trips(self) -> None:
        self.timed(lambda: self.turn(first=True), lambda: self.turn(first=False))

    def timed(self, mine: Any, theirs: Any) -> None:
        started = time.monotonic()
        (mine if self.case.mine else theirs)()
        if self.case.mine:
            self.show(f"{time.monotonic() - started:.6f}")

    def send_chunks(self) -> None:
        chunk = self.out.data[:CHUNK]
        for _ in range(0, self.case.amount, CHUNK):
            self.channel.write(chunk, timeout=PATIENCE)
        assert self.channel.read(1, timeout=PATIENCE)

    def receive_chunks(self) -> None:
        left, buffer, readinto = self.case.amount, bytearray(CHUNK), self.channel.readinto
        while left:
            left -= readinto(buffer, timeout=PATIENCE)
        self.channel.write(b"!", timeout=PATIENCE)

    def look_at_chunks(self) -> None:
        left, peek, release = self.case.amount, self.channel.peek, self.channel.release
        while left:
            with peek(None, timeout=PATIENCE) as view:
                left -= len(view)
            release()
        self.channel.write(b"!", timeout=PATIENCE)

    def turn(self, *, first: bool) -> None:
        channel, ball = self.channel, bytes(64)
        for _ in range(self.case.amount):
            if first:
                channel.write(ball, timeout=PATIENCE)
            got = len(channel.read(64, timeout=PATIENCE))
            while got < 64:
                got += len(channel.read(64 - got, timeout=PATIENCE))
            if not first:
                channel.write(ball, timeout=PATIENCE)


def run(case: Case, peer: int, data: memoryview) -> None:
    with contextlib.closing(gntalloc.current_domain()) as domain:
        if case.role == "server":
            with domain.listen(peer, case.path, size=case.sizes, spin=SPIN) as listener:
                channel = listener.accept(timeout=PATIENCE)
        else:
            channel = domain.connect(peer, case.path, timeout=PATIENCE, spin=SPIN)
        with channel:
            End(channel, case, data).run()


def bytes_twice(path: str) -> memoryview:
    """A file's bytes, twice in a row, so that no piece of them wraps."""
    with open(path, "rb") as file:
        whole = file.read()
    data = mmap.mmap(-1, 2 * len(whole))
    data[: len(whole)] = data[len(whole) :] = whole
    return memoryview(data)


def main() -> int:
    data = bytes_twice(sys.argv[1])
    bad = 0
    for text in sys.argv[3:]:
        case = Case.parse(text)
        if not (child := os.fork()):
            try:
                run(case, int(sys.argv[2]), data)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        expected = signal.SIGKILL if case.mine and case.mode in {"killed", "stalled"} else 0
        if status != expected:
            print(f"{text} ended with {status:#x}", file=sys.stderr)
            bad = 1
    return bad


if __name__ == "__main__":
    sys.exit(main())
