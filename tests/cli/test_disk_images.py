"""`gntalloc disk` and its images: what is refused, who else may use one, and what NBD's clients make of holes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from tests.cli.disks import PATIENCE, Shell, client, end, ready

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gntalloc import Machine

LARGE = 512 << 20
DATA = random.Random(1).randbytes(1 << 20)
AT = 100 << 20


@pytest.fixture
def disk(make_machine: Callable[..., Machine], tmp_path: Path) -> Iterator[Shell]:
    with ExitStack() as stack:
        yield Shell(make_machine(), tmp_path, stack)


def refused(disk: Shell, *words: str) -> str:
    """What `serve` says. The disk is not attached afterwards."""
    ended = disk("serve", "--for", "1", *words, str(disk.image), domid=0)
    assert ended.returncode == 1, ended
    assert ended.stdout == b""
    assert disk("info", "--timeout", "0").returncode == 3
    return ended.stderr.decode()


def make_sparse(disk: Shell) -> None:
    with disk.image.open("wb") as file:
        file.truncate(LARGE)
        file.seek(AT)
        file.write(DATA)


def test_an_odd_image_is_refused_and_padded_on_request(disk: Shell) -> None:
    disk.image.write_bytes(b"x" * 1000)
    assert "1000 bytes, which are no whole sectors of 512: the last 488" in refused(disk)
    serving = disk.served("--pad")
    assert disk("read").stdout == b"x" * 1000 + bytes(24)
    end(serving, signal.SIGINT)
    assert disk.image.stat().st_size == 1000
    serving = disk.served("--pad", "--read-only")
    assert disk("read", "--offset", "900").stdout == b"x" * 100 + bytes(24)
    end(serving, signal.SIGINT)
    serving = disk.served("--pad")
    assert disk("write", "--offset", "512", stdin=b"y" * 512).returncode == 0
    end(serving, signal.SIGINT)
    assert disk.image.read_bytes() == b"x" * 512 + b"y" * 512


def test_another_format_is_refused_with_a_hint_and_served_on_demand(disk: Shell) -> None:
    disk.image.unlink()
    client(disk, "qemu-img", "create", "-f", "qcow2", str(disk.image), "1M")
    told = refused(disk)
    assert "qcow2" in told
    assert "qemu-nbd" in told
    assert "--format raw" in told
    disk.served("--format", "raw", "--pad")
    assert disk("read", "--length", "4").stdout == b"QFI\xfb"


def test_one_image_is_not_lent_to_two_domains(disk: Shell) -> None:
    serving = disk.served()
    for words in ([], ["--read-only"]):
        told = disk("serve", "--for", "1", "--disk", "xvdb", *words, str(disk.image), domid=0)
        assert told.returncode == 1
        assert f"process {serving.pid} " in told.stderr.decode()
    end(serving, signal.SIGKILL)
    again = disk.start("serve", "--for", "1", "--disk", "xvdb", "--read-only", str(disk.image), domid=0)
    assert "read-only" in ready(again)
    both = disk.start("serve", "--for", "1", "--disk", "xvdc", "--read-only", str(disk.image), domid=0)
    assert "read-only" in ready(both)
    assert "to read" in disk("serve", "--for", "1", "--disk", "xvdd", str(disk.image), domid=0).stderr.decode()


def test_qemus_tools_leave_a_served_image_alone(disk: Shell) -> None:
    disk.served()
    for words in (
        ["qemu-img", "convert", "-f", "raw", "-O", "raw", str(disk.image), str(disk.folder / "copy.img")],
        ["qemu-img", "resize", "-f", "raw", str(disk.image), "4M"],
        ["qemu-io", "-f", "raw", "-c", "write 0 512", str(disk.image)],
    ):
        if shutil.which(words[0]) is None:
            pytest.skip(f"there is no {words[0]} (apt install qemu-utils)")
        ended = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert "lock" in ended.stderr, (words, ended)


def test_a_sparse_disk_is_read_without_its_holes(disk: Shell) -> None:
    make_sparse(disk)
    serving = disk.served()
    address = disk.exported("--socket", "sock")
    told = json.loads(client(disk, "nbdinfo", "--map", "--json", address))
    assert [(each["offset"], each["length"], each["type"]) for each in told] == [
        (0, AT, 3),
        (AT, len(DATA), 0),
        (AT + len(DATA), LARGE - AT - len(DATA), 3),
    ]
    mapped = json.loads(
        client(disk, "qemu-img", "map", "--output=json", "--image-opts", f"driver=nbd,path={disk.folder}/sock")
    )
    assert [(each["start"], each["data"]) for each in mapped] == [(0, False), (AT, True), (AT + len(DATA), False)]
    client(disk, "nbdcopy", address, "copy.img")
    client(disk, "qemu-img", "convert", "-f", "raw", "-O", "raw", address, "converted.img")
    for name in ("copy.img", "converted.img"):
        path = disk.folder / name
        assert path.stat().st_blocks * 512 < 16 << 20, name
        client(disk, "cmp", str(disk.image), str(path))
    assert serving.poll() is None
    end(serving, signal.SIGINT)
    assert serving.stderr is not None
    answered = int(serving.stderr.read().split(" requests")[0])
    assert answered < 500  # a disk without holes to tell of takes 4096 for one copy


@pytest.mark.parametrize("to", ["file", "pipe"])
def test_holes_are_not_read_by_read(disk: Shell, to: str) -> None:
    make_sparse(disk)
    serving = disk.served()
    where = ["--offset", str(AT - 4096), "--length", "64M"]
    if to == "file":
        assert disk("read", *where, "part.img").returncode == 0
        assert (disk.folder / "part.img").stat().st_blocks * 512 < 16 << 20
        copied = (disk.folder / "part.img").read_bytes()
    else:
        copied = disk("read", *where).stdout
    assert copied == (bytes(4096) + DATA).ljust(64 << 20, b"\0")
    assert disk("read", "--length", "1M", "end.img").returncode == 0
    assert (disk.folder / "end.img").read_bytes() == bytes(1 << 20)  # it ends with a hole, and has its length
    end(serving, signal.SIGINT)
    assert serving.stderr is not None
    assert int(serving.stderr.read().split(" requests")[0]) < 100


def test_zeroes_take_no_room(disk: Shell) -> None:
    disk.served()
    address = disk.exported("--socket", "sock")
    info = json.loads(client(disk, "nbdinfo", "--json", address))["exports"][0]
    assert info["can_zero"]
    assert info["can_fast_zero"]
    assert info["can_trim"]
    assert "base:allocation" in info["contexts"]
    before = disk.image.stat().st_blocks
    client(disk, "qemu-io", "-f", "raw", "-d", "unmap", "-c", "write -z -u 1M 1M", "-c", "read -P 0 1M 1M", address)
    assert disk.image.stat().st_blocks < before
    client(disk, "qemu-io", "-f", "raw", "-c", "write -z 1M 1M", "-c", "read -P 0 1M 1M", address)
    assert disk.image.stat().st_blocks >= before
    client(disk, "nbdcopy", "--destination-is-zero", "--allocated", address, "null:")


def test_a_disk_that_grows_is_larger_for_the_next_client(disk: Shell) -> None:
    disk.served()
    address = disk.exported("--socket", "sock")
    os.truncate(disk.image, LARGE)
    deadline = time.monotonic() + PATIENCE
    while (size := json.loads(client(disk, "nbdinfo", "--json", address))["exports"][0]["export-size"]) != LARGE:
        assert time.monotonic() < deadline, size
    client(disk, "qemu-io", "-f", "raw", "-c", f"write -P 5 {LARGE - 512} 512", address)
    with disk.image.open("rb") as file:
        file.seek(-512, os.SEEK_END)
        assert file.read() == b"\5" * 512


FULL = 'mount -t tmpfs -o size=1M none "$0" && truncate -s 8M "$0/disk.img" && exec "$@" "$0/disk.img"'


def test_a_full_disk_is_named_to_a_client(disk: Shell) -> None:
    """A file system of 1 MiB, in a mount namespace of the backend's own."""
    full = disk.folder / "full"
    full.mkdir()
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run(
        [*words, 'mount -t tmpfs none "$0"', str(full)], capture_output=True, timeout=PATIENCE, check=False
    ).returncode:
        pytest.skip("no file system can be mounted here, not even in a namespace")
    serving = subprocess.Popen(
        [*words, FULL, str(full), sys.executable, "-m", "gntalloc", "disk", "serve", "--for", "1"],
        env=disk.machine.environ(0),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        ready(serving)
        told = disk("write", stdin=bytes(4 << 20))
        assert told.returncode == 1
        assert "no room left" in told.stderr.decode()
        address = disk.exported("--socket", "sock")
        if shutil.which("qemu-io") is None:
            pytest.skip("there is no qemu-io (apt install qemu-utils)")
        written = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 4M 2M", "-c", "read -P 0 0 512", address],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            cwd=disk.folder,
        )
        assert "No space left on device" in written.stdout + written.stderr
        assert "read 512/512" in written.stdout
    finally:
        serving.kill()
        serving.communicate(timeout=PATIENCE)
