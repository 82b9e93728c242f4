"""Attack a machine's other programs, as `bench/neighbours.py` asks: each attack is one process.

    python bench/attacks.py NAME CONNECTIONS ADDRESS ADDRESS

The addresses are those of two domains that belong to the attacker. When the attack has begun it writes a line. It goes
on until it is killed.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import gntalloc
from gntalloc.abi.gntalloc import ALLOC_GREF, AllocGref
from gntalloc.abi.gntdev import COPY_SOURCE_GREF, GRANT_COPY, ForeignPage, GrantCopy, GrantCopySegment
from gntalloc.guest.control import ControlClient
from gntalloc.maps import PAGE_SIZE
from gntalloc.places import store_path
from gntalloc.wire.memory import Region
from gntalloc.wire.messages import Holders, Ioctl, Notify, Open, frame
from gntalloc.xenstore import wire as store

if TYPE_CHECKING:
    from collections.abc import Callable


SEGMENTS = 4096
DEEP = 960
NODES = 900
WATCHES = 129
ARGUMENT, TABLE, BUFFER = 0x10000, 0x20000, 0x100000
ANSWER = 1 << 20


def flood(addresses: list[str], openings: list[bytes], messages: list[bytes], *, once: bool = False) -> None:
    """Send each connection's opening, then messages again and again, and read what is answered.

    Args:
        addresses: the socket of each connection.
        openings: what is sent first, to each.
        messages: what follows, to each, for ever.
        once: wait for an answer before the next.
    """
    poll = select.epoll()
    lines: dict[int, tuple[socket.socket, bytes]] = {}
    left: dict[int, memoryview] = {}
    for address, opening, message in zip(addresses, openings, messages, strict=True):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address)
        sock.sendall(opening)
        sock.setblocking(False)
        lines[sock.fileno()] = sock, message
        left[sock.fileno()] = memoryview(message)
        poll.register(sock.fileno(), select.EPOLLIN | select.EPOLLOUT | (select.EPOLLET if once else 0))
    print("begun", flush=True)
    while lines:
        for number, events in poll.poll():
            sock, message = lines[number]
            try:
                if events & select.EPOLLIN and not sock.recv(ANSWER):
                    raise ConnectionError
                if events & select.EPOLLOUT or once:
                    sent = sock.send(left[number] or message)
                    left[number] = (left[number] or memoryview(message))[sent:]
            except BlockingIOError:
                continue
            except OSError:  # dropped
                del lines[number]
                sock.close()


def copy(connections: int, ours: str, theirs: str, *, refused: bool) -> None:
    """Copy 4,096 segments a call, from granted pages or by references that are none, two calls at a time."""
    accomplice, domain = gntalloc.current_domain(theirs), gntalloc.current_domain(ours)
    segment = accomplice.share(domain.domid)
    word = ForeignPage(1 << 20 if refused else segment.grant.refs[0], 0, accomplice.domid).to_word()
    table = b"".join(
        GrantCopySegment(word, BUFFER, PAGE_SIZE - each % 7, COPY_SOURCE_GREF, 0).pack() for each in range(SEGMENTS)
    )
    regions = [
        Region(ARGUMENT, bytearray(GrantCopy(SEGMENTS, TABLE).pack()), writable=True),
        Region(TABLE, bytearray(table), writable=True),
        Region(BUFFER, bytearray(PAGE_SIZE), writable=True),
    ]
    message = frame(Ioctl(1, GRANT_COPY, ARGUMENT, regions), 2) * 2
    opening = frame(Open(os.O_RDWR, "gntdev"), 1)
    flood([ours] * connections, [opening] * connections, [message] * connections)


def notes(connections: int, ours: str, _theirs: str) -> None:
    """Send events through a port that is not there, and ask for no answer."""
    opening, message = frame(Open(os.O_RDWR, "evtchn"), 1), frame(Notify(1, 77), 2) * 60
    flood([ours] * connections, [opening] * connections, [message] * connections)


def allocations(connections: int, ours: str, _theirs: str) -> None:
    """Ask for more pages than there can be."""
    region = Region(ARGUMENT, bytearray(AllocGref(0, 1, 1 << 31, 0).pack() + bytes(8)), writable=True)
    message = frame(Ioctl(1, ALLOC_GREF, ARGUMENT, [region]), 2) * 50
    flood([ours] * connections, [frame(Open(os.O_RDWR, "gntalloc"), 1)] * connections, [message] * connections)


def waits(connections: int, ours: str, theirs: str) -> None:
    """Wait for 1,000 single pages a thousand times, and let another page come and go."""
    peer, domain = gntalloc.current_domain(theirs), gntalloc.current_domain(ours)
    file = domain.devices.open("gntalloc")
    segments = [domain.share(peer.domid) for _ in range(1000)]
    kept = [peer.map(segments[-1].grant), peer.map(segments[0].grant)]
    handle = segments[0]._file._handle  # noqa: SLF001  a program that behaves so uses no library
    channel = domain.devices._channel  # noqa: SLF001
    ends = [channel.ask(Holders(handle, 1, 0, 1000)) for _ in range(min(connections, 1000))]
    print("begun", flush=True)
    while ends:
        kept[1].close()
        kept[1] = peer.map(segments[0].grant)
        file.close()
        file = domain.devices.open("gntalloc")


def chains(connections: int, ours: str, _theirs: str) -> None:
    """Make and remove a chain of 960 nodes in xenstore."""
    domid = os.path.basename(ours)
    path = f"/local/domain/{domid}/data" + "/a" * DEEP
    first = f"/local/domain/{domid}/data/a"
    message = b"".join(
        store.encode(store.Message(kind, number, 0, each.encode() + b"\0"))
        for number, (kind, each) in enumerate([(store.Type.MKDIR, path), (store.Type.RM, first)])
    )
    flood([_store(ours)] * connections, [b""] * connections, [message * 4] * connections)


def transactions(connections: int, ours: str, _theirs: str) -> None:
    """Commit 900 nodes at a time, under 129 watches."""
    domid = os.path.basename(ours)
    base = f"/local/domain/{domid}/data"
    watching = b"".join(
        store.encode(store.Message(store.Type.WATCH, number, 0, f"{base}\0{number}\0".encode()))
        for number in range(WATCHES - 1)
    )
    writes = b"".join(
        store.encode(store.Message(store.Type.WRITE, number, 1, f"{base}/{number}".encode() + b"\0x"))
        for number in range(NODES)
    )
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(_store(ours))
        _ask(sock, watching, WATCHES - 1)
        print("begun", flush=True)
        while True:
            sock.sendall(store.encode(store.Message(store.Type.TRANSACTION_START, 0, 0, b"\0")))
            number = int(_answer(sock, store.Type.TRANSACTION_START).rstrip(b"\0"))
            head = struct.Struct("=IIII")
            for at in range(0, NODES, 15):  # no more answers may be left unread than twenty
                part = writes.split(b"\0x")[at : at + 15]
                data = b"".join(each + b"\0x" for each in part)
                sock.sendall(_in_transaction(data, head, number))
                for _ in part:
                    _answer(sock, store.Type.WRITE)
            sock.sendall(store.encode(store.Message(store.Type.TRANSACTION_END, 0, number, b"T\0")))
            _answer(sock, store.Type.TRANSACTION_END)


def _in_transaction(data: bytes, head: struct.Struct, number: int) -> bytes:
    changed, at = bytearray(data), 0
    while at < len(changed):
        kind, request, _, length = head.unpack_from(changed, at)
        head.pack_into(changed, at, kind, request, number, length)
        at += head.size + length
    return bytes(changed)


def _answer(sock: socket.socket, kind: int) -> bytes:
    """Read until an answer of this kind comes. Events before it are thrown away."""
    while True:
        head = _exactly(sock, 16)
        came, _, _, length = struct.unpack("=IIII", head)
        body = _exactly(sock, length)
        if came in {kind, store.Type.ERROR}:
            return body


def _ask(sock: socket.socket, messages: bytes, answers: int) -> None:
    at = 0
    for _ in range(answers):
        length = 16 + struct.unpack_from("=I", messages, at + 12)[0]
        sock.sendall(messages[at : at + length])
        _answer(sock, store.Type.WATCH)
        at += length


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += sock.recv(size - len(data)) or sys.exit("dropped")
    return data


def maps(connections: int, ours: str, theirs: str) -> None:
    """Map 1,000 pages of 1,000 ALLOCs at once, and unmap them, again and again."""
    accomplice, domain = gntalloc.current_domain(theirs), gntalloc.current_domain(ours)
    segments = [accomplice.share(domain.domid, writable=True) for _ in range(connections)]
    refs = [segment.grant.refs[0] for segment in segments]
    grant = gntalloc.Grant(accomplice.domid, tuple(refs), writable=True)
    print("begun", flush=True)
    while True:
        domain.map(grant).close()


def big_maps(connections: int, ours: str, theirs: str) -> None:
    """Share, map and unmap very many pages at once, again and again."""
    accomplice, domain = gntalloc.current_domain(theirs), gntalloc.current_domain(ours)
    print("begun", flush=True)
    while True:
        with accomplice.share(domain.domid, pages=connections, writable=True) as segment:
            domain.map(segment.grant).close()


def locks(connections: int, ours: str, theirs: str) -> None:
    """Map a page as often as may be, keep thousands of locks on its memory, and map and unmap it again and again."""
    accomplice, domain = gntalloc.current_domain(theirs), gntalloc.current_domain(ours)
    segment = accomplice.share(domain.domid, writable=True)
    kept = [domain.map(segment.grant) for _ in range(100)]
    descriptor = os.open(_memory_of(kept[0]), os.O_RDWR)
    for each in range(connections):
        lock = struct.pack("=hh4xqqi4x", fcntl.F_RDLCK, os.SEEK_SET, (1 << 30) + 2 * each, 1, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
    print("begun", flush=True)
    while True:
        domain.map(segment.grant).close()


def _memory_of(_mapping: object) -> str:
    with open("/proc/self/maps", encoding="ascii") as lines:
        found = [line.split()[0] for line in lines if "memfd:gntalloc" in line]
    return f"/proc/self/map_files/{found[-1]}"


def knocks(_connections: int, ours: str, _theirs: str) -> None:
    """Connect, and go away at once."""
    print("begun", flush=True)
    while True:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.setblocking(False)
                sock.connect(ours)
            except OSError:
                pass


def halves(connections: int, ours: str, _theirs: str) -> None:
    """Send large messages but for their last byte."""
    region = Region(ARGUMENT, bytearray(2 << 20), writable=True)
    message = frame(Ioctl(1, ALLOC_GREF, ARGUMENT, [region]), 2)[:-1]
    socks = []
    for _ in range(connections):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(ours)
        sock.setblocking(False)
        socks.append((sock, memoryview(message)))
    print("begun", flush=True)
    while True:
        kept = []
        for sock, left in socks:
            try:
                kept.append((sock, left[sock.send(left) :] if left else left))
            except BlockingIOError:
                kept.append((sock, left))
            except OSError:  # dropped: come again
                sock.close()
                fresh = socket.socket(socket.AF_UNIX)
                try:
                    fresh.connect(ours)
                except OSError:
                    fresh.close()
                    continue
                fresh.setblocking(False)
                kept.append((fresh, memoryview(message)))
        socks = kept


def listings(connections: int, ours: str, theirs: str) -> None:
    """List the grants of the whole machine, as its owner may, while there are very many."""
    accomplice, domain = gntalloc.current_domain(theirs), gntalloc.current_domain(ours)
    segments = [accomplice.share(domain.domid, pages=1000) for _ in range(connections // 1000)]
    with closing(ControlClient(os.path.dirname(ours))) as control:
        print("begun", flush=True)
        while segments:
            control.order("grants")


def closings(connections: int, ours: str, _theirs: str) -> None:
    """Open very many files and connections, and leave them all at once, again and again."""
    print("begun", flush=True)
    while True:
        child = os.fork()
        if not child:
            domain = gntalloc.current_domain(ours)
            files = [domain.devices.open("gntalloc") for _ in range(connections)]
            socks = [socket.socket(socket.AF_UNIX) for _ in files]
            for sock in socks:
                sock.connect(ours)
            os._exit(0)
        os.waitpid(child, 0)


def busy(_connections: int, _ours: str, _theirs: str) -> None:
    """Attack nobody: use a processor."""
    print("begun", flush=True)
    while True:
        pass


def _store(address: str) -> str:
    folder, domid = os.path.split(address)
    return store_path(folder, int(domid))


ATTACKS: dict[str, Callable[[int, str, str], None]] = {
    "copy": lambda *how: copy(*how, refused=False),
    "refused copy": lambda *how: copy(*how, refused=True),
    "notes": notes,
    "allocations": allocations,
    "waits": waits,
    "chains": chains,
    "transactions": transactions,
    "maps": maps,
    "big maps": big_maps,
    "locks": locks,
    "knocks": knocks,
    "halves": halves,
    "listings": listings,
    "closings": closings,
    "busy": busy,
}


def main() -> None:
    name, connections, ours, theirs = sys.argv[1:]
    ATTACKS[name](int(connections), ours, theirs)


if __name__ == "__main__":
    main()
