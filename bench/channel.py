"""A vchan between two domains of a machine, beside multiprocessing.Pipe and os.pipe; and iceoryx2, if it is installed.

    python bench/channel.py [--json FILE] [--quick]

Two processes on two processors. Throughput: the median of rounds taken in turn, so that what else the computer does
falls on all alike. Round trips: the median of the rounds' medians, once more with both processes on one processor.
"copied" ends with the bytes in memory of the reader's own; "in place" looks at the first and the last byte where they
lie. "asleep" does not spin; "as it is" is what `listen` and `connect` make if they are not told how to spin.

The last table is how long it takes until a reader that sleeps is told that its peer has closed, was killed, or lies.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import struct
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from multiprocessing import Pipe
from typing import TYPE_CHECKING, Any

import gntalloc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc import Machine

    Step = Callable[[], object]

RING = 4 << 20
SPIN = 200e-6
ROUNDS = 7
SIZES = (64, 65536, 1 << 20)
ICEORYX = importlib.util.find_spec("iceoryx2") is not None
TARGET = 0.15  # seconds a round

Figures = dict[str, float]
Ends = tuple["Callable[[bytes], object]", "Callable[[], object]"]


class Peer(ABC):
    """A transport: made before the fork, `end` called on both sides after it."""

    ring = RING
    spins = False

    def __init__(self, machine: Machine, size: int) -> None:
        self.machine = machine
        self.size = size

    @abstractmethod
    def end(self, first: bool) -> Ends:
        """Give this side's end of the transport."""

    def close(self) -> None:  # noqa: B027  most transports hold nothing
        """Give back what the transport holds."""


class PipeOfMultiprocessing(Peer):
    def __init__(self, machine: Machine, size: int) -> None:
        super().__init__(machine, size)
        self.ends = Pipe()

    def end(self, first: bool) -> Ends:
        connection = self.ends[0 if first else 1]
        return connection.send_bytes, connection.recv_bytes


class PipeOfOs(Peer):
    def __init__(self, machine: Machine, size: int) -> None:
        super().__init__(machine, size)
        self.pipes = os.pipe(), os.pipe()

    def end(self, first: bool) -> Ends:
        there, back = self.pipes if first else self.pipes[::-1]
        out, into, size = there[1], back[0], self.size
        buffer = memoryview(bytearray(size))
        write, readv = os.write, os.readv

        def send(data: bytes) -> None:
            sent = write(out, data)
            while sent < size:
                sent += write(out, memoryview(data)[sent:])

        def recv() -> None:
            got = readv(into, [buffer])
            while got < size:
                got += readv(into, [buffer[got:]])

        return send, recv


class Vchan(Peer):
    spin: float | None = SPIN
    extensions: bool | None = None

    def end(self, first: bool) -> Ends:
        settings: dict[str, Any] = {"spin": self.spin, "extensions": self.extensions}
        domain = gntalloc.current_domain(self.machine.environ(1 if first else 2)["GNTALLOC_DOMAIN"])
        path = f"bench/{self.size}"
        if first:
            with domain.listen(2, path, size=self.ring, **settings) as listener:
                self.channel = listener.accept(timeout=30)
        else:
            self.channel = domain.connect(1, path, timeout=30, **settings)
        return self.calls()

    def calls(self) -> Ends:
        return self.channel.send, self.channel.recv

    def close(self) -> None:
        self.channel.close()


class VchanInto(Vchan):
    """Copied into one buffer that is used again and again, where memory of its own for each message would be dear."""

    def calls(self) -> Ends:
        buffer = bytearray(self.size)
        recv_into = self.channel.recv_into
        return self.channel.send, lambda: recv_into(buffer)


class VchanInPlace(Vchan):
    def calls(self) -> Ends:
        peek, release, size = self.channel.peek, self.channel.release, self.size

        def look() -> int:
            with peek(message=True) as view:
                seen = view[0] + view[size - 1]
            release()
            return seen

        return self.channel.send, look


class VchanAsIs(Vchan):
    """As `listen` and `connect` make it."""

    spin = None


class VchanAsleep(Vchan):
    spin = 0.0


class VchanOfC(Vchan):
    """What a libxenvchan could do: rings of 1 MiB, wake-ups through the machine."""

    ring = 1 << 20
    extensions = False


class VchanOfCAsIs(VchanOfC):
    spin = None


class VchanOfCAsleep(VchanOfC):
    spin = 0.0


class Iceoryx(Peer):
    """Publish and subscribe of a byte slice; the receiver polls, and copies out."""

    def __init__(self, machine: Machine, size: int) -> None:
        super().__init__(machine, size)
        self.tag = f"gntalloc-bench/{os.getpid()}/{time.monotonic_ns()}"

    def end(self, first: bool) -> Ends:
        import ctypes

        import iceoryx2 as iox2

        iox2.set_log_level(iox2.LogLevel.Error)
        self.node = node = iox2.NodeBuilder.new().create(iox2.ServiceType.Ipc)
        size = self.size

        def service(name: str) -> Any:
            builder = node.service_builder(iox2.ServiceName.new(f"{self.tag}/{name}"))
            builder = builder.publish_subscribe(iox2.Slice[ctypes.c_uint8]).enable_safe_overflow(False)
            builder = builder.subscriber_max_buffer_size(max(2, min(64, RING // size)))
            return builder.max_publishers(1).max_subscribers(1).open_or_create()

        there, back = ("there", "back") if first else ("back", "there")
        builder = service(there).publisher_builder().initial_max_slice_len(size)
        builder = builder.allocation_strategy(iox2.AllocationStrategy.Static)
        self.publisher = publisher = builder.backpressure_strategy(
            iox2.BackpressureStrategy.RetryUntilDelivered
        ).create()
        self.subscriber = subscriber = service(back).subscriber_builder().create()
        out, move = (ctypes.c_char * size)(), ctypes.memmove

        def send(data: bytes) -> None:
            sample = publisher.loan_slice_uninit(size)
            move(sample.payload_ptr, data, size)
            sample.assume_init().send()

        def recv() -> None:
            sample = subscriber.receive()
            while sample is None:
                sample = subscriber.receive()
            move(out, sample.payload_ptr, size)
            sample.delete()

        return send, recv


class Line:
    """What the two processes tell each other beside what is measured."""

    def __init__(self) -> None:
        self.pipes = os.pipe(), os.pipe()

    def end(self, first: bool) -> None:
        there, back = self.pipes if first else self.pipes[::-1]
        self.out, self.into = there[1], back[0]
        os.close(there[0])
        os.close(back[1])

    def say(self, what: bytes, count: int = 0) -> None:
        os.write(self.out, struct.pack("=cq", what, count))

    def hear(self) -> tuple[bytes, int]:
        got: tuple[bytes, int] = struct.unpack("=cq", os.read(self.into, 9))
        return got

    def close(self) -> None:
        os.close(self.out)
        os.close(self.into)


class Running:
    """One peer at one size, with its other process."""

    def __init__(self, kind: type[Peer], machine: Machine, size: int, processors: tuple[int, int]) -> None:
        peer = kind(machine, size)
        self.line = Line()
        self.payload = os.urandom(size)
        self.pid = os.fork()
        os.sched_setaffinity(0, {processors[0] if self.pid else processors[1]})
        self.line.end(first=bool(self.pid))
        if not self.pid:
            try:
                self.send, self.recv = peer.end(first=False)
                self._other()
                peer.close()
            finally:
                os._exit(0)
        self.send, self.recv = peer.end(first=True)
        self.peer = peer
        self.line.hear()
        self.count = 16
        while self.stream() < TARGET / 4:
            self.count *= 2

    def _other(self) -> None:
        self.line.say(b"r")
        while (order := self.line.hear())[0] != b"q":
            what, count = order
            for _ in range(count):
                self.recv()
                if what == b"t":
                    self.send(self.payload)
            self.line.say(b"k")

    def stream(self) -> float:
        """Seconds for `count` messages one way."""
        send, payload = self.send, self.payload
        self.line.say(b"s", self.count)
        started = time.perf_counter()
        for _ in range(self.count):
            send(payload)
        self.line.hear()
        return time.perf_counter() - started

    def trips(self, count: int) -> list[float]:
        """Seconds of each round trip."""
        send, recv, payload, clock = self.send, self.recv, self.payload, time.perf_counter
        self.line.say(b"t", count)
        took = []
        for _ in range(count):
            started = clock()
            send(payload)
            recv()
            took.append(clock() - started)
        self.line.hear()
        return took

    def close(self) -> None:
        self.line.say(b"q")
        os.waitpid(self.pid, 0)
        self.peer.close()
        self.line.close()


@contextmanager
def running(kinds: dict[str, type[Peer]], machine: Machine, size: int, two: tuple[int, int]) -> Iterator[list[Running]]:
    """All of them at once; those whose turn it is not sleep."""
    all_of_them: list[Running] = []
    try:
        all_of_them.extend(Running(kind, machine, size, two) for kind in kinds.values())
        yield all_of_them
    finally:
        for each in all_of_them:
            each.close()


def throughput(kinds: dict[str, type[Peer]], machine: Machine, size: int, two: tuple[int, int], rounds: int) -> Figures:
    """Microseconds a message."""
    took: dict[str, list[float]] = {name: [] for name in kinds}
    with running(kinds, machine, size, two) as all_of_them:
        for _ in range(rounds):
            for name, each in zip(kinds, all_of_them, strict=True):
                took[name].append(each.stream() / each.count * 1e6)
    return {name: statistics.median(each) for name, each in took.items()}


def round_trips(kinds: dict[str, type[Peer]], machine: Machine, two: tuple[int, int], rounds: int) -> Figures:
    """Microseconds a round trip of 64 bytes."""
    took: dict[str, list[float]] = {name: [] for name in kinds}
    with running(kinds, machine, 64, two) as all_of_them:
        for _ in range(rounds):
            for name, each in zip(kinds, all_of_them, strict=True):
                took[name].append(statistics.median(each.trips(1000)) * 1e6)
    return {name: statistics.median(each) for name, each in took.items()}


ENDS = {
    "close": "channel.close()",
    "SIGKILL": "os.kill(os.getpid(), 9)",
    "a lie": "channel._end.pages.memory[4:8] = b'\\xff' * 4; channel._end.bells.ring(); time.sleep(9)",
}


def how_soon(machine: Machine, rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds until a reader that sleeps has its error: the median and the longest."""
    found = {}
    domain = machine.domain(1)
    for name, end in ENDS.items():
        took = []
        for _ in range(rounds):
            with domain.listen(2, "end", size=4096, spin=0) as listener:
                program = (
                    "import gntalloc, os, sys, time\n"
                    "channel = gntalloc.current_domain().connect(1, 'end', timeout=9)\n"
                    "channel.recv()\ntime.sleep(0.02)\nprint(time.monotonic(), flush=True)\n" + end
                )
                other = subprocess.Popen(
                    [sys.executable, "-c", program], env=machine.environ(2), stdout=subprocess.PIPE, text=True
                )
                with listener.accept(timeout=9) as channel:
                    channel.send(b"go")
                    try:
                        channel.recv(timeout=9)
                    except gntalloc.GntallocError:
                        told = time.monotonic()
                assert other.stdout
                took.append((told - float(other.stdout.readline())) * 1000)
                other.kill()
                other.communicate()
        found[name] = statistics.median(took), max(took)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: to see that it runs")
    options = parser.parse_args()
    rounds = 3 if options.quick else ROUNDS
    allowed = sorted(os.sched_getaffinity(0))
    two = allowed[0], allowed[min(1, len(allowed) - 1)]
    result: dict[str, Any] = {"load": os.getloadavg()[0]}
    with gntalloc.Machine(limit=30000) as machine:
        for domid in (1, 2):
            machine.domain(domid)
        columns: dict[int, Figures] = {}
        for size in SIZES:
            kinds: dict[str, type[Peer]] = {"multiprocessing.Pipe": PipeOfMultiprocessing, "os.pipe": PipeOfOs}
            kinds |= {"vchan, messages": Vchan, "vchan, recv_into": VchanInto, "vchan, in place": VchanInPlace}
            if size + 4 <= VchanOfC.ring:
                kinds["vchan as libxenvchan's"] = VchanOfC
            if ICEORYX:
                kinds["iceoryx2, polling"] = Iceoryx
            columns[size] = throughput(kinds, machine, size, two, rounds)
        show("one way: µs a message, GB/s, times multiprocessing.Pipe", columns)
        result["one way, us"] = columns
        spinning: dict[str, type[Peer]] = {"vchan, both spinning": Vchan, "vchan, as it is": VchanAsIs}
        if ICEORYX:
            spinning["iceoryx2, polling"] = Iceoryx
        pipes: dict[str, type[Peer]] = {"os.pipe": PipeOfOs, "multiprocessing.Pipe": PipeOfMultiprocessing}
        asleep = {"vchan, both asleep": VchanAsleep, "vchan as libxenvchan's, both asleep": VchanOfCAsleep}
        trips = round_trips(spinning | pipes | asleep, machine, two, rounds)
        show_trips("round trip of 64 bytes, µs", trips)
        result["round trip, us"] = trips
        alike = {"vchan, as it is": VchanAsIs, "vchan as libxenvchan's": VchanOfCAsIs}
        trips = round_trips(pipes | alike | asleep, machine, (two[1], two[1]), rounds)
        show_trips("round trip of 64 bytes, both processes on one processor, µs", trips)
        result["round trip on one processor, us"] = trips
        os.sched_setaffinity(0, allowed)
        print("\nfrom the peer's end to the error here, ms: median, longest")
        result["end, ms"] = ends = how_soon(machine, rounds)
        for name, (median, longest) in ends.items():
            print(f"{name:38} {median:9.2f} {longest:9.2f}")
    if not ICEORYX:
        print("\niceoryx2 is not installed, so it is not beside them (pip install iceoryx2)")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


def show_trips(title: str, trips: Figures) -> None:
    print(f"\n{title}")
    for name, each in trips.items():
        print(f"{name:38} {each:9.1f}   {each / trips['os.pipe']:6.2f} x os.pipe")


def show(title: str, columns: dict[int, Figures]) -> None:
    print(title)
    print(f"{'':26}" + "".join(f"{size:>26}" for size in columns))
    for name in columns[SIZES[0]]:
        cells = []
        for size, column in columns.items():
            if name in column:
                times = column["multiprocessing.Pipe"] / column[name]
                cells.append(f"{column[name]:9.2f} {size / column[name] / 1000:7.2f} {times:6.2f} x")
            else:
                cells.append("")
        print(f"{name:26}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main()
