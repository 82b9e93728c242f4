"""The machine's log waits for nobody, and is no longer a second than a person can read."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pty
import socket
import subprocess
import sys
import termios
import threading
import time
from typing import TYPE_CHECKING

import pytest

from gntalloc import clock
from gntalloc.guest.control import ControlClient
from gntalloc.machine import logbook
from gntalloc.machine.logbook import LINES_A_KIND, LINES_A_SECOND, Logbook, Outlet
from gntalloc.places import store_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE = 30.0


def fill(descriptor: int) -> int:
    """Write until there is no room, without a change of the description that others share."""
    with open(f"/proc/self/fd/{descriptor}", "wb", buffering=0, opener=_never_waits) as full:
        size = 0
        for chunk in (65536, 1):
            with contextlib.suppress(BlockingIOError):
                while written := full.write(b"x" * chunk):
                    size += written
        return size


def _never_waits(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def drain(descriptor: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += os.read(descriptor, size - len(data))
    return data


# The outlet, each way of it.


@pytest.fixture(params=["pipe", "terminal", "socket", "pipe that cannot be opened again"])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """A reader and a writer, of each thing that standard error can be."""
    if request.param == "terminal":
        reader, writer = pty.openpty()
        attributes = termios.tcgetattr(writer)
        attributes[1] &= ~termios.OPOST
        termios.tcsetattr(writer, termios.TCSANOW, attributes)
    elif request.param == "socket":
        one, other = socket.socketpair()
        reader, writer = one.detach(), other.detach()
    else:
        reader, writer = os.pipe()
    if request.param == "pipe that cannot be opened again":
        real = os.open

        def refuse(path: str, flags: int, *rest: int) -> int:
            if path == f"/proc/self/fd/{writer}" and sys._getframe(1).f_code.co_filename == logbook.__file__:
                raise PermissionError(13, "Permission denied")
            return real(path, flags, *rest)

        monkeypatch.setattr(os, "open", refuse)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def fill_any(writer: int) -> int:
    try:
        return fill(writer)
    except OSError:  # a socket cannot be opened
        size = 0
        with socket.socket(fileno=os.dup(writer)) as sock, contextlib.suppress(BlockingIOError):
            while True:
                size += sock.send(b"x" * 1000, socket.MSG_DONTWAIT)
        return size


def test_an_outlet_never_waits_and_goes_on_when_there_is_room(ends: tuple[int, int]) -> None:
    reader, writer = ends
    mode = fcntl.fcntl(writer, fcntl.F_GETFL)
    outlet = Outlet(writer)
    assert outlet.put("before\n")
    assert drain(reader, 7) == b"before\n"
    size = fill_any(writer)
    while outlet.put("there was a little room for this\n"):
        size += 33
    for _ in range(100):
        outlet.put("no room for this\n" * 10)
    drain(reader, min(size, 4096))
    while not outlet.put("after\n"):
        drain(reader, 1024)
    os.set_blocking(reader, False)
    rest = b""
    with contextlib.suppress(BlockingIOError):
        while data := os.read(reader, 65536):
            rest += data
    assert rest.endswith(b"after\n"), rest[-100:]
    assert fcntl.fcntl(writer, fcntl.F_GETFL) == mode, "the description is shared, and was changed"


def test_an_outlet_to_nobody(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    outlet = Outlet(writer)
    assert not outlet.put("nobody reads this\n")
    os.close(writer)
    assert Outlet(writer).put("closed\n")
    with open(tmp_path / "file", "w+b") as file:
        file.write(b"before\n")
        file.flush()
        assert Outlet(file.fileno()).put("after\n")
        assert (tmp_path / "file").read_bytes() == b"before\nafter\n"


def test_a_long_line_has_a_beginning_and_an_end() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as read, open(writer, "wb", buffering=0) as write:
        Outlet(write.fileno()).put("begin " + "x" * 100_000 + " end\n")
        data = read.read(65536)
    assert data.startswith(b"begin xx")
    assert data.endswith(b"xx end\n")
    assert len(data) <= 4096


# The bound.


class Desk:
    """A logger with a logbook on a pipe, and a clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 100.0
        monkeypatch.setattr(clock, "now", lambda: self.time)
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.book = Logbook(Outlet(self.writer))
        self.log = logging.getLogger("test of the log book")
        self.log.propagate = False
        self.log.setLevel(logging.DEBUG)
        self.log.handlers = [self.book]

    def lines(self) -> list[str]:
        data = b""
        with contextlib.suppress(BlockingIOError):
            while more := os.read(self.reader, 1 << 20):
                data += more
        return data.decode().splitlines()


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    desk = Desk(monkeypatch)
    yield desk
    desk.book.close()
    os.close(desk.reader)
    os.close(desk.writer)


def test_a_kind_has_a_few_lines_a_second_and_the_rest_is_counted(desk: Desk) -> None:
    for number in range(35_000):
        desk.log.info("refused pid %d: %s", number, "it is a stranger's")
    assert desk.lines() == [f"refused pid {number}: it is a stranger's" for number in range(LINES_A_KIND)]
    desk.time += 1
    desk.log.info("something else")
    left_out = 35_000 - LINES_A_KIND
    assert desk.lines() == [
        f"({left_out} more lines were left out like this one: refused pid 0: it is a stranger's)",
        "something else",
    ]


def test_a_noisy_domain_drowns_no_other(desk: Desk) -> None:
    for _ in range(1000):
        desk.log.debug("domain %d, pid %d: %s", 1, 7, "noise")
    desk.log.debug("domain %d, pid %d: %s", 2, 8, "quiet")
    desk.log.warning("a message could not be served")
    assert desk.lines()[LINES_A_KIND:] == ["domain 2, pid 8: quiet", "a message could not be served"]


def test_all_kinds_have_a_bound_together(desk: Desk) -> None:
    for number in range(100_000):
        desk.log.debug("domain %d, pid %d: %s", number, 1, "noise")
    assert len(desk.lines()) == LINES_A_SECOND
    assert len(desk.book._written) <= LINES_A_SECOND
    desk.time += 1
    desk.log.debug("next")
    said = desk.lines()
    assert said[-1] == "next"
    assert len(said) <= 102
    assert f"({100_000 - LINES_A_SECOND} more lines were left out of other kinds)" in said


def test_what_was_left_out_is_said_at_the_end(desk: Desk) -> None:
    for _ in range(LINES_A_KIND + 5):
        desk.log.info("again")
    desk.book.close()
    assert desk.lines()[-1] == "(5 more lines were left out like this one: again)"


def test_lines_for_which_there_was_no_room_are_counted(desk: Desk) -> None:
    fill(desk.writer)
    for number in range(50):
        desk.log.info(f"no room for {number}")  # noqa: G004  a kind of its own
    os.read(desk.reader, 1 << 20)
    desk.log.info("there is room again")
    assert desk.lines() == ["(50 lines were left out: there was no room for them)", "there is room again"]


# Real machines.


def test_a_machine_whose_log_nobody_reads_serves(tmp_path: Path) -> None:
    """Standard error is a pipe that was full before the machine began. Every request fails, and each is logged."""
    reader, writer = os.pipe()
    fill(writer)
    script = (
        "import errno, os, gntalloc\n"
        "from gntalloc.errors import GntallocError\n"
        "with gntalloc.Machine(verbose=True) as machine:\n"
        "    domain = machine.domain(1)\n"
        "    for _ in range(3000):\n"
        "        try:\n"
        "            domain.map(2, [77])\n"
        "        except GntallocError:\n"
        "            pass\n"
        "    print(machine.statistics().pages)\n"
    )
    with open(reader, "rb", buffering=0), open(writer, "wb", buffering=0) as full:
        program = subprocess.run(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=full, timeout=PATIENCE, check=False
        )
    assert program.stdout == b"0\n"


@pytest.mark.parametrize("read", [False, True])
def test_a_flood_of_refused_programs(read: bool, tmp_path: Path) -> None:
    """A machine in the foreground, by the command line: thousands of programs knock and are refused."""
    folder = tmp_path / "machine"
    reader, writer = os.pipe()
    if not read:
        fill(writer)
    arguments = [sys.executable, "-m", "gntalloc", "machine", "--name", str(folder), "-v"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=writer)
    said = bytearray()
    thread = threading.Thread(target=lambda: said.extend(_all_of(reader)))
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if b"runs as pid" in line:
                break
        if read:
            thread.start()
        begun = time.monotonic()
        knocks = 5000
        for _ in range(knocks):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(store_path(str(folder), 1))
                sock.sendall(b"\xff" * 16)
                sock.settimeout(PATIENCE)
                with contextlib.suppress(ConnectionResetError):
                    sock.recv(1)
        seconds = time.monotonic() - begun
        control = ControlClient(str(folder))
        assert control.order("statistics")["pid"] == process.pid
        control.close()
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)
        os.close(writer)
        if read:
            thread.join(PATIENCE)
        os.close(reader)
    if read:
        lines = said.decode().splitlines()
        dropped = [line for line in lines if "it sent is no message" in line and "left out" not in line]
        assert len(dropped) <= (seconds + 2) * LINES_A_KIND
        left_out = [int(line.partition("(")[2].split()[0]) for line in lines if "more lines were left out" in line]
        assert sum(left_out) + len(dropped) >= knocks, lines[-5:]


def _all_of(descriptor: int) -> bytes:
    data = b""
    while more := os.read(descriptor, 65536):
        data += more
    return data
