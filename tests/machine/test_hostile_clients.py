"""Clients that are broken, slow or hostile: that one is dropped or refused, and nobody else notices."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import time
from pathlib import Path
from struct import Struct, pack
from typing import TYPE_CHECKING

import pytest
import rawwire as wire
from limits import status_of
from raw_client import ALLOC, ARGUMENT, PATIENCE, RawClient

from gntalloc import TimedOut
from gntalloc.errors import DeviceError
from gntalloc.machine import server, stream, turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc import Domain, Machine

FLOCK = Struct("=hh4xqqi4x")


@pytest.fixture(autouse=True)
def _bystander(machine: Machine, alice: Domain, bob: Domain) -> object:
    """Others work before, during and after, and never notice."""
    with alice.share(bob, writable=True) as shared, bob.map(shared.grant) as mapped:
        yield
        mapped.memory[0] = 1
        assert shared.memory[0] == 1
        with alice.share(bob) as another, bob.map(another.grant):
            pass


GARBAGE = {
    "zeros": bytes(64),
    "ones": b"\xff" * 64,
    "text": b"GET / HTTP/1.1\r\nHost: example\r\n\r\n",
    "too long": wire.HEADER.pack(wire.MAX_PAYLOAD + 1, wire.HELLO, 0, 1),
    "unknown kind": wire.encode(99, 1),
    "a reply": wire.encode(wire.HELLO | wire.REPLY, 1, bytes(4)),
    "control on a domain": wire.encode(wire.CONTROL, 1, b'{"do": "statistics"}'),
    "hello too short": wire.encode(wire.HELLO, 1, b"\0"),
    "open too short": wire.encode(wire.OPEN, 1, b"\0"),
    "ioctl too short": wire.encode(wire.IOCTL, 1, bytes(15)),
    "ioctl half a region": wire.encode(wire.IOCTL, 1, bytes(16) + bytes(15)),
    "ioctl region too short": wire.encode(wire.IOCTL, 1, bytes(16) + pack("=QII", 0, 5, 1) + b"four"),
    "mmap too short": wire.encode(wire.MMAP, 1, bytes(27)),
    "share too short": wire.encode(wire.SHARE, 1, bytes(wire.SHARE_REQUEST.size - 1)),
    "attach too short": wire.encode(wire.ATTACH, 1, bytes(wire.ATTACH_REQUEST.size - 1)),
    "attach half a reference": wire.encode(wire.ATTACH, 1, bytes(wire.ATTACH_REQUEST.size + 3)),
    "notify too short": wire.encode(wire.NOTIFY, 1, bytes(wire.NOTIFY_REQUEST.size - 1)),
    "descriptors that do not come": wire.encode(wire.SHOW, 1, b"", 1),
    "very many descriptors that do not come": wire.encode(wire.SHOW, 1, b"", 0xFFFF),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_on_a_domains_socket(alice: Domain, garbage: bytes) -> None:
    with RawClient(alice) as client:
        client.sock.sendall(garbage)
        assert client.dropped()


@pytest.mark.parametrize("pieces", [1, 7])
def test_a_message_in_small_pieces_is_a_message(alice: Domain, pieces: int) -> None:
    with RawClient(alice) as client:
        message = client.request(wire.HELLO, wire.HELLO_REQUEST.pack(wire.VERSION))
        for at in range(0, len(message), pieces):
            client.sock.sendall(message[at : at + pieces])
        assert client.answer().result == alice.domid


def test_another_version_is_told_so(alice: Domain) -> None:
    with RawClient(alice) as client:
        answer = client.call(wire.HELLO, wire.HELLO_REQUEST.pack(77))
        assert answer.error == errno.EPROTO
        assert "77" in answer.why


@pytest.mark.parametrize("kind", [wire.IOCTL, wire.MMAP, wire.READ, wire.WRITE, wire.HOLDERS])
@pytest.mark.parametrize("handle", [0, 1, 77, 0xFFFF_FFFF])
def test_a_handle_that_is_none(alice: Domain, kind: int, handle: int) -> None:
    with RawClient(alice) as client:
        answer = client.call(kind, pack("=I", handle) + bytes(12 if kind == wire.IOCTL else 24))
        assert answer.error == errno.EBADF
        assert str(handle) in answer.why


def test_a_name_that_is_none_is_not_echoed_at_length(alice: Domain) -> None:
    with RawClient(alice) as client:
        answer = client.call(wire.OPEN, wire.OPEN_REQUEST.pack(2) + b"\xff\x00" * 400_000)
        assert answer.error == errno.ENOENT
        assert "gntalloc" in answer.why
        assert len(answer.why) < 1000


def test_pipelined_requests_are_answered_in_order(alice: Domain) -> None:
    with RawClient(alice) as client:
        count = 3000
        hello = wire.HELLO_REQUEST.pack(wire.VERSION)
        client.sock.sendall(b"".join(client.request(wire.HELLO, hello) for _ in range(count)))
        assert [client.answer().id for _ in range(count)] == list(range(1, count + 1))


# Slow ones. What follows needs another patience of the machine than ten seconds.


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of the test waits for nobody any longer. It is started after this, as a fork of nothing of ours."""
    monkeypatch.setattr(stream, "STALL", 0.05)
    monkeypatch.setattr(turns, "_CHECK_FOR_STALLS", 0.02)


class InThread:
    """A real server in a thread of this process, so that its patience can be set."""

    def __init__(self, folder: Path) -> None:
        import threading

        from gntalloc.machine.machine import Machine as Core

        self.server = server.Server(Core(), str(folder))
        self.server.create(1, uid=os.getuid())
        self.path = str(folder / "1")
        self._reading, writing = os.pipe()
        self._writing = writing
        self.server.loop.wake_by(self._reading)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()

    def close(self) -> None:
        self.server.stopping = True
        os.write(self._writing, b"!")
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.server.close()
        for descriptor in (self._reading, self._writing):
            os.close(descriptor)


@pytest.fixture
def impatient(_impatient: None, tmp_path: Path) -> object:
    running = InThread(tmp_path)
    yield running
    running.close()


def test_a_client_that_stops_in_the_middle_of_a_message_is_dropped(impatient: InThread) -> None:
    with RawClient(impatient.path) as client, RawClient(impatient.path) as other:
        client.sock.sendall(client.request(wire.HELLO, bytes(4))[:-1])
        assert client.dropped()
        assert other.call(wire.HELLO, wire.HELLO_REQUEST.pack(wire.VERSION)).result == 1


def test_a_client_that_stops_after_a_message_without_an_answer_is_dropped(impatient: InThread) -> None:
    with RawClient(impatient.path) as client:
        client.sock.sendall(client.request(wire.NOTIFY, bytes(8)) + client.request(wire.HELLO, bytes(4))[:-1])
        assert client.dropped()


def test_a_client_that_sends_a_byte_now_and_then_is_dropped_too(impatient: InThread) -> None:
    with RawClient(impatient.path) as client:
        client.sock.sendall(wire.HEADER.pack(1000, wire.HELLO, 0, 1))

        def drip() -> None:
            for _ in range(1000):
                client.sock.sendall(b"x")
                select.select([], [], [], 0.01)

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            drip()


def test_a_client_that_never_reads_is_dropped(impatient: InThread) -> None:
    with RawClient(impatient.path) as client, RawClient(impatient.path) as other:
        hello = client.request(wire.HELLO, wire.HELLO_REQUEST.pack(wire.VERSION)) * 1000

        def pour() -> None:
            while True:
                client.sock.sendall(hello)

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            pour()
        assert other.call(wire.HELLO, wire.HELLO_REQUEST.pack(wire.VERSION)).result == 1


def test_a_client_that_is_only_quiet_is_not_dropped(impatient: InThread) -> None:
    with RawClient(impatient.path) as quiet, RawClient(impatient.path) as client:
        client.sock.sendall(client.request(wire.HELLO, bytes(4))[:-1])
        assert client.dropped()  # and so its patience has passed
        assert quiet.call(wire.HELLO, wire.HELLO_REQUEST.pack(wire.VERSION)).result == 1


def test_a_client_stopped_by_a_signal_in_the_middle_of_a_message(machine: Machine, alice: Domain, bob: Domain) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            client = RawClient(alice)
            client.sock.sendall(client.request(wire.HELLO, bytes(4))[:-1])
            os.write(writing, b"!")
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"!"
    os.close(reading)
    with alice.share(bob) as shared, bob.map(shared.grant):
        assert shared.mapped_by == (2,)
    os.kill(child, signal.SIGKILL)
    status_of(child)


# Descriptors.


def test_showing_what_is_no_home(alice: Domain, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with RawClient(alice) as client, ours, theirs, (tmp_path / "file").open("w") as file:
        for descriptor in (0, file.fileno(), ours.fileno(), client.sock.fileno()):
            inode = os.fstat(descriptor).st_ino
            answer = client.call(wire.SHOW, wire.SHOW_REQUEST.pack(inode, wire.make_token()))
            assert answer.error == errno.EBADF


def test_showing_a_home_of_another_domain(alice: Domain, bob: Domain) -> None:
    with RawClient(alice) as client, RawClient(bob) as other:
        _, home = other.open("gntalloc")
        assert client.show(home).error == errno.EBADF
        os.close(home)


@pytest.mark.parametrize("device", ["gntalloc", "evtchn"])
def test_a_home_is_shown_by_those_who_hold_it(alice: Domain, device: str) -> None:
    with RawClient(alice) as client, RawClient(alice) as stranger:
        handle, home = client.open(device)
        inode = os.fstat(home).st_ino
        guessed = b"\x80" * 16
        for written, token in (
            (b"", wire.make_token()),
            (b"", guessed),
            (pack("=5I", *[0x80] * 5), pack("=4I", *[0x80] * 4)),  # ports, which can be guessed
            (pack("=5I", *[0x80] * 5), pack(">4I", *[0x80] * 4)),  # the same from the second byte on
        ):
            os.write(home, written)
            answer = stranger.call(wire.SHOW, wire.SHOW_REQUEST.pack(inode, token))
            assert answer.error == errno.EACCES, (written, token)
        assert client.show(home).result == handle
        os.write(home, bytes(3000))
        shown = stranger.show(home)
        assert (shown.error, shown.body[4:]) == (0, device.encode())
        os.close(home)


def test_what_others_write_keeps_nobody_from_showing_a_home(alice: Domain) -> None:
    """So far that it can be shown at all: the machine reads a page at a time."""
    copy = alice.devices.open("gntalloc")
    writer = socket.socket(fileno=os.dup(copy.fileno()))
    with writer, contextlib.closing(copy):
        writer.setblocking(False)
        alice.devices.close()  # so the next call shows the file anew
        with contextlib.suppress(BlockingIOError):
            for _ in range(8):
                writer.send(bytes(1000))
        with pytest.raises(DeviceError) as caught:
            copy.ioctl(0, bytearray(8))
        assert caught.value.errno == errno.ENOTTY


def test_a_home_sent_through_itself_does_not_live_for_ever(machine: Machine, alice: Domain) -> None:
    """Nobody has it open any more, but its own queue: pages must not stay counted when their owner is gone."""
    with RawClient(alice) as client:
        handle, home = client.open("gntalloc")
        client.alloc(handle, 2, 3)
        with socket.socket(fileno=home) as sock:
            try:
                socket.send_fds(sock, [b"x"], [home])
            except OSError:
                pass  # so much the better
    # The fixture sees that the file is released.


def test_a_home_is_only_a_handle(alice: Domain) -> None:
    """Whatever a program does with it: what is written is lost, reading finds its end, and the file lives."""
    with RawClient(alice) as client:
        handle, home = client.open("gntalloc")
        with socket.socket(fileno=home) as sock:
            sock.setblocking(False)
            for _ in range(10):
                try:
                    sock.send(b"x" * 1000)
                except OSError:
                    break
            assert client.alloc(handle, 2)[0] == 0


def test_a_client_that_asks_for_everything_gets_no_more_than_its_share(make_machine: Callable[..., Machine]) -> None:
    """Connections and waits of one domain must not use up the machine's descriptors: others go on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    machine = make_machine()
    alice, bob = machine.domain(1), machine.domain(2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    taken: list[RawClient] = []
    waits: list[int] = []
    try:
        with alice.share(bob) as shared, bob.map(shared.grant), RawClient(alice) as client:
            handle, home = client.open("gntalloc")
            index, refs = client.alloc(handle, 2)
            with bob.map(1, refs):
                for _ in range(3000):
                    answer = client.call(wire.HOLDERS, wire.HOLDERS_REQUEST.pack(handle, 1, index, 1))
                    waits += answer.descriptors
                    if answer.error:
                        break
                assert answer.error == errno.EMFILE
                assert "wait" in answer.why
            for _ in range(3000):
                try:
                    taken.append(RawClient(alice))
                    answer = taken[-1].call(wire.HELLO, wire.HELLO_REQUEST.pack(wire.VERSION))
                except (OSError, EOFError):
                    break
                if answer.error:
                    assert answer.error == errno.EMFILE
                    break
            assert len(taken) < 3000
            with bob.share(alice):
                pass
            os.close(home)
    finally:
        for each in taken:
            each.close()
        for descriptor in waits:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for domain in (alice, bob):
            domain.close()
            domain.devices.close()


# The control socket: only its owner gets there, and may be wrong as well.


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="half"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b"1", id="a number"),
        pytest.param(b"{}", id="no order"),
        pytest.param(b'{"do": []}', id="no name"),
        pytest.param(b'{"do": "fly"}', id="unknown"),
        pytest.param(b'{"do": "destroy"}', id="too few arguments"),
        pytest.param(b'{"do": "destroy", "domid": 1, "x": 2}', id="too many arguments"),
        pytest.param(b'{"do": "destroy", "\\ud800": 2}', id="half a character"),
        pytest.param(b'{"do": "\\ud800"}', id="an order of half a character"),
        pytest.param(b'{"do": "destroy", "domid": "1"}', id="a text for a number"),
        pytest.param(b'{"do": "destroy", "domid": 999}', id="no such domain"),
        pytest.param(b'{"do": "create", "domid": 1, "uid": 0}', id="there already"),
        pytest.param(b'{"do": "create", "domid": 40000, "uid": 0}', id="no domid"),
        pytest.param(b'{"do": "create", "domid": -1, "uid": 0}', id="negative"),
        pytest.param(b'{"do": "create", "domid": true, "uid": 0}', id="a truth for a number"),
        pytest.param(b'{"do": "create", "domid": 9, "uid": 0, "limit": -1}', id="a negative limit"),
        pytest.param(b'{"do": "set_limit", "domid": 1, "limit": -1}', id="a negative new limit"),
    ],
)
def test_wrong_orders_are_refused_with_a_reason(machine: Machine, order: bytes) -> None:
    before = machine.statistics().domains
    with RawClient(machine) as client:
        answer = client.call(wire.CONTROL, order)
        assert answer.error != 0
        assert answer.why != ""
        assert client.call(wire.CONTROL, b'{"do": "grants"}').error == 0
    assert machine.statistics().domains == before


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_on_the_control_socket(machine: Machine, garbage: bytes) -> None:
    if garbage == GARBAGE["control on a domain"]:
        return
    with RawClient(machine) as client:
        client.sock.sendall(garbage)
        assert client.dropped()


def test_a_domain_whose_socket_cannot_be_made_is_not_made(machine: Machine) -> None:
    path = Path(machine.folder) / "77"
    with RawClient(machine) as client:
        order = json.dumps({"do": "create", "domid": 77, "uid": os.getuid()}).encode()
        path.touch()
        assert client.call(wire.CONTROL, order).error == errno.EADDRINUSE
        path.unlink()
        assert client.call(wire.CONTROL, order).error == 0
        assert client.call(wire.CONTROL, b'{"do": "destroy", "domid": 77}').error == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_program_of_another_user_is_refused_with_the_reason(make_machine: Callable[..., Machine]) -> None:
    from gntalloc.guest.devices.machine import MachineDevices

    machine = make_machine()
    owners = machine.domain(1)
    nobodys = machine.domain(2, uid=65534)  # opens the folder to others
    os.chmod(owners.address, 0o666)
    os.chmod(os.path.dirname(machine.folder), 0o755)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            MachineDevices(nobodys.address).open("gntalloc").close()
            for _ in range(20):
                with pytest.raises(DeviceError, match="for uid 0, and this program runs as 65534") as caught:
                    MachineDevices(owners.address)
                assert caught.value.errno == errno.EACCES
            code = 0
        finally:
            os._exit(code)
    assert status_of(child) == 0
    for domain in (owners, nobodys):
        domain.devices.close()


def test_ioctls_and_maps_of_any_numbers_are_answered(alice: Domain) -> None:
    with RawClient(alice) as client:
        handle, home = client.open("gntalloc")
        most = (1 << 64) - 1
        for index, length in ((0, 0), (most, most), (0, most), (most & ~4095, 4096), (1 << 62, 1 << 62)):
            answer = client.call(wire.MMAP, wire.MMAP_REQUEST.pack(handle, 0xFFFF_FFFF, 0xFFFF_FFFF, index, length))
            assert answer.error in {errno.EINVAL, errno.EOVERFLOW, errno.ENOENT}
            assert client.call(wire.HOLDERS, wire.HOLDERS_REQUEST.pack(handle, 1, index, length)).result == 0
        regions = wire.encode_regions([wire.Region(most - 3, True, bytes(100)), wire.Region(0, True, b"")])
        for address in (0, 1, most, most - 3, ARGUMENT):
            answer = client.call(wire.IOCTL, wire.IOCTL_REQUEST.pack(handle, ALLOC, address) + regions)
            assert answer.error in {0, errno.EFAULT}
        os.close(home)


@pytest.mark.parametrize("writable", [False, True])
def test_a_peer_that_hides_is_waited_for_while_its_granter_goes_on(alice: Domain, bob: Domain, writable: bool) -> None:
    """It has taken its lock off, and keeps the pages: `held` tells of it, though nobody knows who it is."""
    with alice.share(bob, 2, writable=writable) as shared, RawClient(bob) as client:
        handle, home = client.open("gntdev")
        request = wire.ATTACH_REQUEST.pack(handle, alice.domid, writable, 0, 0x10000) + pack("=2I", *shared.refs)
        attached = client.call(wire.ATTACH, request)
        (description,) = attached.descriptors
        fcntl.fcntl(description, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
        os.close(os.open(f"/proc/self/fd/{description}", os.O_RDONLY))  # so that the machine looks
        deadline = time.monotonic() + PATIENCE
        while shared.mapped_by:
            assert time.monotonic() < deadline, "the lock that was taken off was not missed"
        states = [shared.held]
        with pytest.raises(TimedOut, match="which hides it"):
            shared.wait_released(timeout=0.05)
        attached.close()
        shared.wait_released(timeout=PATIENCE)
        assert [*states, shared.held] == [True, False]
        os.close(home)
