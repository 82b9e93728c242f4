"""Descriptors that a hostile program sends to the machine: none is closed, looked at or waited for there.

Each thing that is sent is real, and hangs while the test looks: a TCP socket that lingers, a file on FUSE whose program
does not answer. Each is sent wherever a program can send anything. Meanwhile a neighbour is served.

Without the kernel's refusal (before Linux 6.16) a few threads of the machine are held up in its place. Here an option
of sockets that no kernel has stands for that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time
from typing import TYPE_CHECKING, NoReturn

import pytest
import rawwire as wire
from fuse import FLUSH, GETATTR, silent_files
from limits import status_of
from raw_client import RawClient

from gntalloc import Machine, embed, unasked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gntalloc import Domain

    Way = Callable[[Machine, Domain, Domain], Iterator[socket.socket]]

PATIENCE = 20.0  # seconds; against hangs
FOR_EVER = 100_000  # seconds
MANY = 12  # of each thing: more than there may be threads
THIS, OLD = "this kernel", "before 6.16"


@contextlib.contextmanager
def lingering() -> Iterator[int]:
    """A TCP socket whose last close waits, since nobody reads at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        reader, _ = server.accept()
        with reader:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(65536))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, FOR_EVER))
            yield sock.detach()


@contextlib.contextmanager
def lingering_inside() -> Iterator[int]:
    """A socket with a lingering one in its queue, which nobody else has."""
    with lingering() as descriptor:
        ours, theirs = socket.socketpair()
        with ours:
            socket.send_fds(ours, [b"x"], [descriptor])
            os.close(descriptor)
            yield theirs.detach()


@contextlib.contextmanager
def large() -> Iterator[int]:
    """A memory file, whose last close gives much back."""
    descriptor = os.memfd_create("large")
    os.posix_fallocate(descriptor, 0, 1 << 28)
    yield descriptor


@contextlib.contextmanager
def nothing_special() -> Iterator[int]:
    """A pipe's end."""
    reading, writing = os.pipe()
    os.close(writing)
    yield reading


class Thing:
    """What is sent. It is made by the process that sends it."""

    def __init__(self, name: str, make: Callable[[], contextlib.AbstractContextManager[int]]) -> None:
        self.name = name
        self.make = make


@pytest.fixture(params=["lingering", "lingering inside", "large", "pipe", "FLUSH", "GETATTR"])
def thing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Thing]:
    """Each of them."""
    made = {"lingering": lingering, "lingering inside": lingering_inside, "large": large, "pipe": nothing_special}
    if request.param in made:
        yield Thing(request.param, made[request.param])
        return
    with silent_files(tmp_path / "silent", FLUSH, GETATTR) as files:

        @contextlib.contextmanager
        def on_fuse() -> Iterator[int]:
            yield os.open(files.path, os.O_RDWR)

        yield Thing(request.param, on_fuse)


@pytest.fixture(params=[THIS, OLD])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the kernel can. The machine that is started after this believes it."""
    if request.param == OLD:
        before = "import sys; sys.path.append(sys.argv[1]); import gntalloc.unasked as it; it._SO_PASSRIGHTS = 9999; "
        monkeypatch.setattr(embed, "_CHILD", before + embed._CHILD)
    else:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            if not unasked.refuse(ours):
                pytest.skip("this kernel cannot refuse descriptors: Linux 6.16 can")
    return str(request.param)


@pytest.fixture
def own_machine(kernel: str, make_machine: Callable[..., Machine]) -> Machine:
    """A machine of the test's own: it is attacked."""
    return make_machine()


def before_accept(machine: Machine, domain: Domain, peer: Domain) -> Iterator[socket.socket]:
    """The machine is stopped meanwhile, so all are in the queue before it accepts the connection."""
    yield from knocking(machine, domain.address)


def at_xenstore_before_accept(machine: Machine, domain: Domain, peer: Domain) -> Iterator[socket.socket]:
    """The same there."""
    yield from knocking(machine, f"{domain.address}.store")


def knocking(machine: Machine, path: str) -> Iterator[socket.socket]:
    """Connections that the machine has not accepted yet."""
    with stopped(machine):
        for _ in range(MANY):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
                yield sock


@contextlib.contextmanager
def stopped(machine: Machine) -> Iterator[None]:
    """Stop it, so that what is sent is in its queue and nowhere else when it goes on."""
    os.kill(machine.pid, signal.SIGSTOP)
    try:
        while status_of_process(machine.pid) != "T":
            time.sleep(0.001)
        yield
    finally:
        os.kill(machine.pid, signal.SIGCONT)


def status_of_process(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def on_call_channels(machine: Machine, domain: Domain, peer: Domain) -> Iterator[socket.socket]:
    """A connection is dropped for it, so there is one each."""
    for _ in range(MANY):
        with RawClient(domain) as client:
            assert client.call(wire.HELLO, wire.HELLO_REQUEST.pack(wire.VERSION)).error == 0
            yield client.sock


def on_control_channels(machine: Machine, domain: Domain, peer: Domain) -> Iterator[socket.socket]:
    """That is for the machine's owner."""
    for _ in range(MANY):
        with RawClient(machine) as client:
            assert client.call(wire.CONTROL, b'{"do": "grants"}').error == 0
            yield client.sock


def at_xenstore(machine: Machine, domain: Domain, peer: Domain) -> Iterator[socket.socket]:
    """A socket of xenstore's own."""
    for _ in range(MANY):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(f"{domain.address}.store")
            yield sock


def on_homes(machine: Machine, domain: Domain, peer: Domain) -> Iterator[socket.socket]:
    """Of each device."""
    with RawClient(domain) as client:
        for _ in range(MANY // 2):
            for device in ("gntalloc", "evtchn"):
                with socket.socket(fileno=client.open(device)[1]) as home:
                    yield home


def on_waits(machine: Machine, domain: Domain, peer: Domain) -> Iterator[socket.socket]:
    """For the release of pages."""
    with RawClient(domain) as client:
        handle, home = client.open("gntalloc")
        index, refs = client.alloc(handle, 2)
        with peer.map(1, refs):
            answer = client.call(wire.HOLDERS, wire.HOLDERS_REQUEST.pack(handle, 1, index, 1))
            with socket.socket(fileno=answer.descriptors[0]) as wait:
                yield wait
        os.close(home)


def on_a_line_for_listeners(machine: Machine, domain: Domain, peer: Domain) -> Iterator[socket.socket]:
    """The only place where a descriptor is due."""
    namespace = os.stat("/proc/self/ns/pid").st_ino
    for _ in range(MANY):
        with RawClient(domain) as client:
            answer = client.call(wire.LEND, wire.LEND_REQUEST.pack(namespace))
            if not answer.result:
                return  # too many were sent already
            with socket.socket(fileno=answer.descriptors[0]) as line:
                yield line
                assert client.call(wire.SERVE).result == 0


WAYS = [
    before_accept,
    at_xenstore_before_accept,
    on_call_channels,
    on_control_channels,
    at_xenstore,
    on_homes,
    on_waits,
    on_a_line_for_listeners,
]


@pytest.mark.parametrize("way", WAYS)
def test_the_machine_waits_for_none(own_machine: Machine, thing: Thing, kernel: str, way: Way) -> None:
    """The attacker is a process of its own: a process that has a silent file does not end before that answers."""
    neighbours = own_machine.domain(3), own_machine.domain(4)
    domain, peer = own_machine.domain(1), own_machine.domain(2)
    reading, writing = os.pipe()
    attacker = os.fork()
    if not attacker:
        code = b"?"
        try:
            code = send_all(own_machine, domain, peer, thing, way)
        finally:
            os.write(writing, code)
            os.kill(os.getpid(), signal.SIGKILL)  # and so closes the rest, as far as it comes
    os.close(writing)
    try:
        sent = os.read(reading, 1)
        granter, grantee = neighbours
        for _ in range(20):
            with granter.share(grantee, writable=True) as shared, grantee.map(shared.grant) as mapped:
                mapped.memory[:2] = b"hi"
                assert bytes(shared.memory[:2]) == b"hi"
        granter.store.write("data/there", "yes")
        assert granter.store.read("data/there") == b"yes"
        most = 2 * 6 if way is on_a_line_for_listeners or kernel == OLD else 0  # a disposal has two, a domain has one
        assert len(os.listdir(f"/proc/{own_machine.pid}/task")) <= 1 + most
        if way is on_a_line_for_listeners:
            assert sent == b"s"
        elif way is on_waits:
            assert sent == b"p"  # nothing can be sent there, so on no kernel any descriptor
        else:
            assert sent == (b"r" if kernel == THIS else b"s")
    finally:
        os.close(reading)
        for each in (*neighbours, domain, peer):
            each.close()
            each.devices.close()
    if thing.name not in {"FLUSH", "GETATTR"}:
        status_of(attacker)
    else:
        LEFT.append(attacker)


def send_all(machine: Machine, domain: Domain, peer: Domain, thing: Thing, way: Way) -> bytes:
    """Send one to each socket, and give it up. s: they were sent. r: they were refused. p: nothing could be sent."""
    sent = b""
    for sock in way(machine, domain, peer):
        made = thing.make()
        descriptor = made.__enter__()
        KEPT.append(made)
        sock.settimeout(PATIENCE)
        with contextlib.nullcontext() if status_of_process(machine.pid) == "T" else stopped(machine):
            try:
                socket.send_fds(sock, [b"\x80"], [descriptor])
                sent = b"s"
            except PermissionError:
                sent = b"r"
            except BrokenPipeError:
                sent = b"p"
            else:
                if thing.name not in {"FLUSH", "GETATTR"}:  # of these any close is asked for, and hangs here
                    os.close(descriptor)
    return sent


KEPT: list[object] = []  # in the attacker: the other ends, so that the things hang
LEFT: list[int] = []


@pytest.fixture(autouse=True, scope="module")
def _attackers_that_were_left() -> Iterator[None]:
    """They end with the file systems that they used."""
    yield
    for attacker in LEFT:
        status_of(attacker)


def test_one_who_sends_without_end_shuts_the_own_door_alone(
    kernel: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where descriptors cannot be refused, so many are held in the end that their domain is shut. Others go on."""
    if kernel == THIS:
        return  # they are refused, see above
    with silent_files(tmp_path / "silent", FLUSH) as files, Machine() as machine:
        domain, neighbour = machine.domain(1), machine.domain(3)
        attacker = os.fork()
        if not attacker:
            pour(domain, files.path)
        deadline = time.monotonic() + PATIENCE
        while os.path.exists(domain.address):
            assert time.monotonic() < deadline, "the door stands open"
            time.sleep(0.01)
        with neighbour.share(4):
            pass
        there = machine.statistics().descriptors
        assert there < 1024 + 3 * 253, there
        assert len(os.listdir(f"/proc/{machine.pid}/task")) <= 3
        for each in (domain, neighbour):
            each.close()
            each.devices.close()
        files.end()
    status_of(attacker)
    assert "is shut" in capfd.readouterr().err


def pour(domain: Domain, path: str) -> NoReturn:
    """Send copies of a file over ever new connections, until there is none any more."""
    try:
        descriptor = os.open(path, os.O_RDWR)
        while True:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(domain.address)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    socket.send_fds(sock, [b"x"], [descriptor] * 200)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)
