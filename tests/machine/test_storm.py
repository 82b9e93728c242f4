"""A seeded storm of clients: whatever they send, in any order, is answered or they are dropped, and it ends clean."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import socket
from collections import defaultdict
from struct import error as struct_error
from struct import pack, unpack_from
from typing import TYPE_CHECKING

import pytest
import rawwire as wire
from limits import status_of
from raw_client import ALLOC, ARGUMENT, DEALLOC, MAP, UNMAP, RawClient

from gntalloc.abi import evtchn
from gntalloc.descriptions import lock_place
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc import Domain, Machine

EDGES = (0, 1, 2, 8, PAGE_SIZE - 1, PAGE_SIZE, 2 * PAGE_SIZE, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)


EVTCHN = [request for request in evtchn.IOCTLS if request != evtchn.RESET]


class Client:
    """One client of the storm, with what it has seen of handles, homes, indexes and references."""

    def __init__(self, chance: random.Random, domain: Domain) -> None:
        self.chance = chance
        self.domain = domain
        self.raw = RawClient(domain)
        self.handles: defaultdict[bytes, list[int]] = defaultdict(list)
        self.homes: list[int] = []
        self.indexes: dict[bytes, list[int]] = {b"gntalloc": [0], b"gntdev": [0]}
        self.refs = [8]
        self.maps: list[mmap.mmap] = []
        self.descriptors: list[int] = []

    def number(self, bits: int, likely: list[int] | None = None) -> int:
        if likely and self.chance.random() < 0.92:
            return self.chance.choice(likely[-6:]) & ((1 << bits) - 1)  # what is recent is likely to live
        return self.chance.choice((*EDGES, self.chance.getrandbits(bits))) & ((1 << bits) - 1)

    def step(self) -> None:
        """One deed, weighted so that most of them mean something."""
        deeds: list[Callable[[], object]] = [
            self.open,
            self.alloc,
            self.alloc,
            self.alloc,
            self.dealloc,
            self.map_refs,
            self.map_refs,
            self.unmap_refs,
            self.mmap,
            self.mmap,
            self.mmap,
            self.munmap,
            self.close_home,
            self.holders,
            self.show,
            self.share,
            self.attach,
            self.notify,
            self.read_or_write,
            self.any_ioctl,
            self.cheat,
            self.garbage,
            self.hang_up,
        ]
        self.chance.choice(deeds)()

    def call(self, kind: int, payload: bytes, descriptors: tuple[int, ...] = ()) -> tuple[wire.Reply, list[int]] | None:
        try:
            answer = self.raw.call(kind, payload, descriptors)
        except (EOFError, ConnectionError):
            self.reconnect()
            return None
        assert (answer.error == 0) == (answer.why == ""), (answer.error, answer.why)
        return wire.Reply(answer.error, answer.why, answer.result, answer.body), answer.descriptors

    def reconnect(self) -> None:
        self.raw.close()
        self.raw = RawClient(self.domain)
        self.handles.clear()
        for home in self.homes:
            self.show_one(home)

    def open(self) -> None:
        name = self.chance.choice((b"gntalloc", b"gntdev", b"gntalloc", b"gntdev", b"evtchn", b"\xff\0"))
        flags = self.chance.choice((os.O_RDWR, os.O_RDWR, os.O_RDONLY, os.O_WRONLY, 3, 0xFFFF_FFFF))
        if (answer := self.call(wire.OPEN, wire.OPEN_REQUEST.pack(flags) + name)) and not answer[0].error:
            self.handles[name].append(answer[0].result)
            self.homes += answer[1]

    def ioctl(self, device: bytes, request: int, argument: bytes, *, whole: bool = True) -> bytes | None:
        regions = [wire.Region(ARGUMENT, self.chance.random() < 0.9, argument)]
        if not whole:
            regions = [wire.Region(self.number(64, [ARGUMENT]), True, argument[: self.chance.randrange(40)])] * 2
        body = wire.IOCTL_REQUEST.pack(self.number(32, self.handles[device]), request, ARGUMENT) + wire.encode_regions(
            regions
        )
        answer = self.call(wire.IOCTL, body)
        if answer and not answer[0].error and (written := wire.decode_regions(answer[0].body)):
            return bytes(written[0].data)
        return None

    def alloc(self) -> None:
        count = self.chance.choice((0, 1, 1, 2, 3, 5, 70, self.number(32)))
        argument = pack("=HHIQ", self.number(16, [1, 2]), self.number(16, [0, 1]), count, 7)
        written = self.ioctl(b"gntalloc", ALLOC, argument.ljust(max(24, 16 + 4 * min(count, 100)), b"\0"))
        if written and count < 100:
            _, _, _, index, *refs = unpack_from(f"=HHIQ{count}I", written)
            self.indexes[b"gntalloc"] += range(index, index + count * PAGE_SIZE, PAGE_SIZE)
            self.refs += refs

    def dealloc(self) -> None:
        self.ioctl(
            b"gntalloc",
            DEALLOC,
            pack("=QII", self.number(64, self.indexes[b"gntalloc"]), self.number(32, [1, 1, 2, 3]), 0),
        )

    def map_refs(self) -> None:
        count = self.chance.choice((0, 1, 1, 1, 2, 3))
        refs = b"".join(pack("=II", self.number(32, [1, 2]), self.number(32, self.refs)) for _ in range(count))
        written = self.ioctl(b"gntdev", MAP, (pack("=IIQ", self.number(32, [count]), 0, 7) + refs).ljust(24, b"\0"))
        if written:
            self.indexes[b"gntdev"].append(unpack_from("=Q", written, 8)[0])

    def unmap_refs(self) -> None:
        self.ioctl(
            b"gntdev", UNMAP, pack("=QII", self.number(64, self.indexes[b"gntdev"]), self.number(32, [0, 1, 2]), 0)
        )

    def mmap(self) -> None:
        prot = self.chance.choice((1, 3, 3, 0, 7))
        device = self.chance.choice((b"gntalloc", b"gntdev"))
        numbers = (self.number(64, self.indexes[device]), self.number(64, [PAGE_SIZE, PAGE_SIZE, 2 * PAGE_SIZE]))
        request = wire.MMAP_REQUEST.pack(
            self.number(32, self.handles[device]), prot, self.chance.choice((1, 1, 1, 0)), *numbers
        )
        answer = self.call(wire.MMAP, request)
        if not answer:
            return
        if not answer[0].error:
            self.map_what_came(answer)

    def munmap(self) -> None:
        if self.maps:
            self.maps.pop(self.chance.randrange(len(self.maps))).close()

    def close_home(self) -> None:
        if len(self.homes) > 4 or (self.homes and self.chance.random() < 0.1):
            os.close(self.homes.pop(self.chance.randrange(len(self.homes))))

    def holders(self) -> None:
        numbers = (self.chance.choice((0, 1)), self.number(64, self.indexes[b"gntalloc"]), self.number(64, [1, 2]))
        if answer := self.call(
            wire.HOLDERS, wire.HOLDERS_REQUEST.pack(self.number(32, self.handles[b"gntalloc"]), *numbers)
        ):
            self.descriptors += answer[1]

    def show(self) -> None:
        anything = [*self.homes, *self.descriptors, self.raw.sock.fileno(), 0]
        self.show_one(self.chance.choice(anything))

    def show_one(self, descriptor: int) -> None:
        if descriptor in self.homes:
            answer = self.raw.show(descriptor)
        else:
            inode = self.number(64, [os.fstat(descriptor).st_ino])
            answer = self.raw.call(wire.SHOW, wire.SHOW_REQUEST.pack(inode, self.chance.randbytes(16)))
        if not answer.error:
            self.handles[answer.body[4:]].append(answer.result)

    def share(self) -> None:
        numbers = self.number(32, self.handles[b"gntalloc"]), self.number(16, [1, 2]), self.number(16, [0, 1])
        pages, keep = self.number(32, [1, 1, 2, 3, 20]), self.chance.choice((0, 1))
        answer = self.call(wire.SHARE, wire.SHARE_REQUEST.pack(*numbers, pages, keep))
        if answer and not answer[0].error:
            self.indexes[b"gntalloc"].append(answer[0].result)
            self.refs += unpack_from(f"={(len(answer[0].body) - wire.SHARE_ANSWER.size) // 4}I", answer[0].body, 16)
            self.map_what_came(answer)

    def attach(self) -> None:
        refs = b"".join(pack("=I", self.number(32, self.refs)) for _ in range(self.chance.choice((0, 1, 1, 1, 2, 20))))
        numbers = self.number(32, self.handles[b"gntdev"]), self.number(32, [1, 2]), self.chance.choice((0, 0, 1))
        keep, place = self.chance.choice((0, 1)), self.number(64, [0x10000])
        refs = refs if self.chance.random() < 0.99 else refs + b"!"
        answer = self.call(wire.ATTACH, wire.ATTACH_REQUEST.pack(*numbers, keep, place) + refs)
        if answer and not answer[0].error:
            self.indexes[b"gntdev"].append(answer[0].result)
            self.map_what_came(answer)

    def map_what_came(self, answer: tuple[wire.Reply, list[int]]) -> None:
        """Lock, map and keep some of what an answer brought, or not."""
        (mark,) = wire.MARK.unpack_from(answer[0].body)
        for descriptor in answer[1]:
            if self.chance.random() < 0.8:
                with contextlib.suppress(OSError, OverflowError, struct_error):
                    lock_place(descriptor, self.number(64, [mark]), self.number(64, [0x10000]), PAGE_SIZE)
            if self.chance.random() < 0.7:
                with contextlib.suppress(OSError):
                    self.maps.append(mmap.mmap(descriptor, PAGE_SIZE, prot=self.chance.choice((1, 3))))
            if self.chance.random() < 0.8:
                os.close(descriptor)
            else:
                self.descriptors.append(descriptor)

    def notify(self) -> None:
        with contextlib.suppress(OSError):
            handle, port = self.number(32, self.handles[b"evtchn"]), self.number(32, [1, 2, 5, 6])
            self.raw.send(wire.NOTIFY, wire.NOTIFY_REQUEST.pack(handle, port))

    def read_or_write(self) -> None:
        handle = pack("=I", self.number(32, self.handles[self.chance.choice((b"gntdev", b"evtchn"))]))
        self.call(wire.READ, handle + pack("=I", self.number(32)))
        self.call(wire.WRITE, handle + self.chance.randbytes(self.chance.randrange(40)))

    def any_ioctl(self) -> None:
        request = self.chance.choice((ALLOC, DEALLOC, MAP, UNMAP, *EVTCHN, self.number(32)))
        device = self.chance.choice((b"gntalloc", b"gntdev", b"evtchn", b"evtchn"))
        argument = self.chance.randbytes(self.chance.choice((0, 2, 4, 4, 4, 8, 16, 24, 63)))
        self.ioctl(device, request, argument, whole=self.chance.random() < 0.7)

    def cheat(self) -> None:
        """What one may do with a memory file, or a home, and should not."""
        import fcntl

        with contextlib.suppress(OSError, LookupError, ValueError):
            descriptor = self.chance.choice([*self.descriptors, *self.homes])
            deed = self.chance.randrange(6)
            if deed == 0:
                self.descriptors.append(os.open(f"/proc/self/fd/{descriptor}", self.chance.choice((0, 2, os.O_PATH))))
            elif deed == 1:
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, pack("=hh4xqqi4x", self.chance.randrange(3), 0, 0, 0, 0))
            elif deed == 2:
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, self.chance.choice((1, 2, 4, 8, 16)))
            elif deed == 3:
                os.ftruncate(descriptor, self.chance.choice(EDGES[:8]))
            elif deed == 4 and descriptor in self.homes:
                with socket.socket(fileno=os.dup(descriptor)) as home:
                    home.setblocking(False)
                    socket.send_fds(home, [b"x"], [self.chance.choice([*self.descriptors, *self.homes])])
            else:
                os.close(self.descriptors.pop(self.chance.randrange(len(self.descriptors))))

    def garbage(self) -> None:
        if self.chance.random() < 0.9:
            return
        with contextlib.suppress(OSError):
            self.raw.sock.sendall(self.chance.randbytes(self.chance.randrange(1, 100)))
        self.reconnect()

    def hang_up(self) -> None:
        """In the middle of something, with an answer on its way."""
        if self.chance.random() < 0.9:
            return
        with contextlib.suppress(OSError):
            kind = self.chance.choice((wire.HELLO, wire.OPEN, wire.MMAP, wire.SHOW))
            message = self.raw.request(kind, self.chance.randbytes(32))
            self.raw.sock.sendall(message[: self.chance.randrange(1, len(message) + 1)])
        self.reconnect()

    def end(self) -> None:
        self.raw.close()
        for each in self.maps:
            each.close()
        for descriptor in (*self.homes, *self.descriptors):
            os.close(descriptor)


def storm(seed: int, domains: list[Domain], steps: int) -> list[Client]:
    chance = random.Random(seed)
    clients = [Client(chance, domain) for domain in domains for _ in range(2)]
    for client in clients:
        client.open()
    for _ in range(steps):
        client = chance.choice(clients)
        client.step()
        if chance.random() < 0.2:  # what one has heard of, others have too
            other = chance.choice(clients)
            other.refs += client.refs[-2:]
    return clients


@pytest.mark.parametrize("behaviour", ["ours", "linux"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_storm_leaves_a_machine_that_is_clean_and_works(
    make_machine: Callable[..., Machine], seed: int, behaviour: str
) -> None:
    machine = make_machine(limit=64, behaviour=behaviour, table_frames=1)
    domains = [machine.domain(1), machine.domain(2)]
    clients = storm(seed, domains, 2500)
    assert machine.statistics().descriptors > 10
    for client in clients:
        client.end()
    statistics = machine.statistics()
    assert (statistics.pages, statistics.extents) == (0, 0)
    for domain in statistics.domains:
        assert (domain.pages_in_use, domain.references, domain.files) == (0, 0, 0)
    assert machine.grants() == []
    alice, bob = domains
    with alice.share(bob, pages=64, writable=True) as shared, bob.map(shared.grant):
        assert shared.mapped_by == (2,)
    for domain_ in domains:
        domain_.close()
        domain_.devices.close()


def test_a_storm_that_is_killed_leaves_a_machine_that_is_clean(machine: Machine, alice: Domain, bob: Domain) -> None:
    for seed in range(4):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                _kept = storm(seed, [alice, bob], 300)
                os.write(writing, b"!")
                signal.pause()
            finally:
                os._exit(1)
        os.close(writing)
        assert os.read(reading, 1) == b"!"
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        status_of(child)
    # The fixture waits for all of it to come back.
