"""`gntalloc disk`: as people type it, and with the real clients of NBD."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from struct import pack
from typing import TYPE_CHECKING

import pytest
from tests.cli.disks import CONTENT, PATIENCE, SIZE, Shell, client, end, ready

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gntalloc import Machine


@pytest.fixture
def disk(make_machine: Callable[..., Machine], tmp_path: Path) -> Iterator[Shell]:
    """Domains 0 and 1. Nothing is served yet."""
    with ExitStack() as stack:
        yield Shell(make_machine(), tmp_path, stack)


def test_info(disk: Shell) -> None:
    disk.served("--sector-size", "1024", "--disk", "xvdb")
    told = json.loads(disk("info", "--json").stdout)
    assert (told["number"], told["size"], told["sector_size"], told["read_only"]) == (51728, SIZE, 1024, False)
    assert told["features"]["flush"]
    shown = disk("info", "--disk", "xvdb").stdout.decode()
    assert "3145728 (3.0 MiB)" in shown
    assert "read only             no" in shown


@pytest.mark.parametrize("way", ["map", "copy"])
def test_all_of_it_and_parts(disk: Shell, way: str) -> None:
    disk.served("--way", way)
    assert disk("read").stdout == CONTENT
    assert disk("read", "--offset", "1M", "--length", "1000", "out").returncode == 0
    assert (disk.folder / "out").read_bytes() == CONTENT[1 << 20 : (1 << 20) + 1000]
    new = CONTENT[::-1]
    (disk.folder / "new").write_bytes(new)
    assert disk("write", "new").returncode == 0
    assert disk.image.read_bytes() == new
    assert disk("write", "--offset", "512K", stdin=b"not a sector").returncode == 0
    expected = new[: 512 << 10] + b"not a sector" + new[(512 << 10) + 12 :]
    assert disk.image.read_bytes() == expected
    assert disk("write", "--offset", "2M", "--length", "7", "new").returncode == 0
    assert disk.image.read_bytes() == expected[: 2 << 20] + new[:7] + expected[(2 << 20) + 7 :]


def test_to_pipes(disk: Shell) -> None:
    """A copy of a disk by two of these; and who reads a part only is no reason to complain."""
    disk.served()
    command = "set -o pipefail; {0} read | {0} write; {0} read | head -c 5; {0} read | sha256sum".format(
        f"{sys.executable} -m gntalloc disk"
    )
    done = subprocess.run(
        ["bash", "-c", command], env=disk.machine.environ(1), capture_output=True, timeout=PATIENCE, check=True
    )
    assert done.stdout == CONTENT[:5] + hashlib.sha256(CONTENT).hexdigest().encode() + b"  -\n"
    assert b"Traceback" not in done.stderr


def test_what_is_wrong_is_said_and_has_its_exit_status(disk: Shell) -> None:
    nothing = {name: value for name, value in os.environ.items() if name != "GNTALLOC_DOMAIN"}
    cases: list[tuple[tuple[str, ...], int, str]] = [
        (("info",), 3, "it has: none"),
        (("info", "-w", "x"), 2, "--timeout"),
        (("read", "--disk", "sda"), 2, "xvda to xvdp"),
        (("read", "--offset", "1X"), 2, "64K"),
        (("nbd",), 2, "--socket PATH or --port PORT"),
        (("nbd", "--socket", ""), 2, "--socket '' is no path"),
        (("nbd", "--socket", "/tmp/" + "x" * 120), 1, "x: AF_UNIX path too long"),
        (("read", "--length", "9" * 5000), 2, "is no number of bytes"),
        (("write", "missing"), 2, "missing"),
    ]
    for words, status, text in cases:
        done = disk(*words)
        assert (done.returncode, text in done.stderr.decode()) == (status, True), (words, done)
    done = disk("info", env=nothing)
    assert (done.returncode, b"$GNTALLOC_DOMAIN" in done.stderr) == (3, True)
    served = disk.served("--read-only")
    kept = disk.folder / "kept"
    kept.write_bytes(b"what was here")
    cases = [
        (("read", "--offset", "4M"), 1, "it has 3145728"),
        (("read", "--length", "3145729"), 1, "it has 3145728"),
        (("read", "--offset", "4M", "kept"), 1, "it has 3145728"),
        (("read", "--length", "4M", "kept"), 1, "it has 3145728"),
        (("read", "--disk", "xvdb", "kept"), 3, "has no disk 51728"),
        (("read", "/nowhere/out"), 1, "/nowhere/out: No such file"),
        (("write", "--offset", "100"), 2, "no sector begins there"),
        (("write", "disk.img"), 1, "read-only"),
        (("nbd", "--socket", "/nowhere/s"), 1, "/nowhere/s: No such file"),
    ]
    for words, status, text in cases:
        done = disk(*words)
        assert (done.returncode, text in done.stderr.decode()) == (status, True), (words, done)
        assert b"Traceback" not in done.stderr
    assert kept.read_bytes() == b"what was here"
    done = disk("serve", "--for", "1", "disk.img", domid=0)
    assert (done.returncode, b"has a disk 51712 already" in done.stderr) == (1, True)
    done = disk("serve", "--for", "5", "disk.img", domid=0)
    assert (done.returncode, b"there is no domain 5" in done.stderr) == (1, True)
    done = disk("serve", "--for", "0", "disk.img", domid=1)  # only domain 0 may
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert end(served, signal.SIGTERM) == 0


def test_more_than_there_is_room_for_is_not_written(disk: Shell) -> None:
    disk.served()
    (disk.folder / "long").write_bytes(b"x" * (SIZE + 1))
    assert disk("write", "long").returncode == 1
    assert disk.image.read_bytes() == CONTENT
    done = disk("write", "--offset", "3144704", stdin=b"y" * 2000)  # 1 KiB before the end
    assert (done.returncode, b"it has" in done.stderr) == (1, True)
    assert disk.image.read_bytes() == CONTENT


def test_ctrl_c(disk: Shell) -> None:
    """The backend closes in order, detaches what it attached, and says 130; so does a reader of a disk that hangs."""
    served = disk.served()
    reader = disk.start("read", "--length", "1")
    assert reader.wait(PATIENCE) == 0
    served.send_signal(signal.SIGSTOP)
    waiting = disk.start("info", "-w", "30")
    zero = disk.machine.domain(0)
    while zero.store.read_text("/local/domain/1/device/vbd/51712/state") != "1":  # it has come to wait
        assert waiting.poll() is None
    zero.close()
    zero.devices.close()
    assert end(waiting, signal.SIGINT) == 130
    served.send_signal(signal.SIGCONT)
    assert end(served, signal.SIGINT) == 130
    assert disk("info").returncode == 3  # detached


def test_progress_is_shown_on_a_terminal_only(disk: Shell) -> None:
    disk.served()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gntalloc", "disk", "read", "out"]
    done = subprocess.run(command, env=disk.machine.environ(1), stderr=theirs, cwd=disk.folder, check=True, timeout=50)
    assert done.returncode == 0
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:
        pass
    os.close(ours)
    assert "disk →".encode() in shown
    assert disk("read", "out").stderr == b""


# NBD, with other people's clients.


def test_nbdinfo(disk: Shell) -> None:
    disk.served("--sector-size", "4096")
    address = disk.exported("--port", "0", "--name", "the disk", "--read-only")
    told = json.loads(client(disk, "nbdinfo", "--json", address))
    assert told["protocol"] == "newstyle-fixed"
    (export,) = told["exports"]
    assert (export["export-name"], export["export-size"]) == ("the disk", SIZE)
    assert (export["is_read_only"], export["can_flush"], export["can_multi_conn"]) == (True, True, True)
    assert export["block_size_minimum"] == 4096
    listed = json.loads(client(disk, "nbdinfo", "--json", "--list", address))
    assert [each["export-name"] for each in listed["exports"]] == ["the disk"]


def test_nbdcopy_there_and_back(disk: Shell) -> None:
    disk.served()
    address = disk.exported("--socket", "sock et")
    client(disk, "nbdcopy", address, "out.img")
    assert (disk.folder / "out.img").read_bytes() == CONTENT
    (disk.folder / "new.img").write_bytes(CONTENT[::-1])
    client(disk, "nbdcopy", "--flush", "new.img", address)
    assert disk.image.read_bytes() == CONTENT[::-1]


def test_qemu_img_and_qemu_io(disk: Shell) -> None:
    disk.served()
    address = disk.exported("--socket", "sock")
    client(disk, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", address, "out.qcow2")
    client(disk, "qemu-img", "compare", address, "out.qcow2")
    io = ["-c", "write -P 7 4k 100k", "-c", "read -P 7 4k 100k", "-c", "discard 1M 64k", "-c", "read -P 0 1M 64k"]
    more = ["-c", "aio_write -P 9 2M 64k", "-c", "aio_write -P 8 2112k 64k", "-c", "aio_flush", "-c", "flush"]
    out = client(disk, "qemu-io", "-f", "raw", *io, *more, address)
    assert b"failed" not in out
    expected = bytearray(CONTENT)
    expected[4096 : 104 << 10] = b"\7" * (100 << 10)
    expected[1 << 20 : (1 << 20) + (64 << 10)] = bytes(64 << 10)
    expected[2 << 20 : (2 << 20) + (128 << 10)] = b"\x09" * (64 << 10) + b"\x08" * (64 << 10)
    assert disk.image.read_bytes() == expected


def test_an_export_whose_backend_dies_and_comes_back_goes_on(disk: Shell) -> None:
    served = disk.served()
    address = disk.exported("--socket", "sock", "--patience", "30")
    served.kill()
    served.wait(PATIENCE)
    copying = subprocess.Popen(
        ["nbdcopy", address, "out.img"] if shutil.which("nbdcopy") else ["true"], cwd=disk.folder
    )
    disk.served("--attached")
    assert copying.wait(PATIENCE) == 0
    if shutil.which("nbdcopy"):
        assert (disk.folder / "out.img").read_bytes() == CONTENT


def test_an_export_whose_backend_is_gone_for_good_ends(disk: Shell) -> None:
    served = disk.served()
    export = disk.start("nbd", "--socket", "sock", "--patience", "0")
    address = ready(export).split(" is at ")[1].split(";")[0]
    served.kill()
    served.wait(PATIENCE)
    with socket.socket(socket.AF_UNIX) as plain:
        plain.connect(str(disk.folder / "sock"))
        plain.sendall(pack(">I", 3) + pack(">8sII", b"IHAVEOPT", 1, 0) + pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 512))
        while plain.recv(4096):
            pass
    assert export.wait(PATIENCE) == 1
    assert "it died" in export.communicate(timeout=20)[1]
    assert not (disk.folder / "sock").exists(), address


def test_a_socket_that_somebody_listens_on_is_left_alone(disk: Shell) -> None:
    disk.served()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(disk.folder / "sock"))
        other.listen()
        done = disk("nbd", "--socket", "sock")
        assert (done.returncode, b"Address already in use" in done.stderr) == (1, True)
    disk.exported("--socket", "sock")  # now nobody does


def test_an_export_ends_by_ctrl_c(disk: Shell) -> None:
    disk.served()
    export = disk.start("nbd", "--socket", "sock")
    ready(export)
    assert end(export, signal.SIGINT) == 130
    assert not (disk.folder / "sock").exists()
