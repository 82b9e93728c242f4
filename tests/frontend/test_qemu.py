"""A stock backend without Xen: Debian's QEMU under `gntalloc run`, in domain 0, serves our frontend from an image.

It is the QEMU that a Xen dom0 runs for its guests' disks. It has found the device in xenstore, where we have written
what a toolstack writes, and copies with GRANT_COPY.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.frontend.kit import CHECKS, read_for_ever

from gntalloc import PeerClosed, PeerDied
from gntalloc.frontend.blkfront import BlockDevice
from gntalloc.frontend.nodes import Device, attach, detach
from gntalloc.frontend.xenbus import State
from gntalloc.testing import two_domains

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc import Domain, Machine

PATIENCE = 40.0
SIZE = 3 << 20
DEVICE = Device("vbd", 51712, 1, 0, "qdisk")
BINARY = Path("usr/libexec/xen-qemu-system-i386")
UNPACKED = Path(__file__).parents[2] / "build" / "qemu-system-xen"


def qemu() -> str:
    """Where it is. Where there is none that runs here, the tests are skipped."""
    for folder in (Path("/"), UNPACKED):
        path = folder / BINARY
        if (
            path.exists()
            and subprocess.run([path, "--version"], capture_output=True, check=False, timeout=50).returncode == 0
        ):
            return str(path)
    pytest.skip("there is no QEMU for Xen (Debian's package qemu-system-xen, installed or unpacked by .ci/run)")


class Stock:
    """QEMU as the backend of one image."""

    def __init__(self, machine: Machine, dom0: Domain, guest: Domain, image: Path, stack: ExitStack) -> None:
        self.machine, self.dom0, self.guest, self.image = machine, dom0, guest, image
        self._stack = stack

    def attach(self, content: bytes, mode: str = "w", what: str = "disk") -> None:
        """As libxl does for a disk that QEMU shall serve."""
        self.image.write_bytes(content)
        front = {"virtual-device": str(DEVICE.number), "device-type": what}
        back = {
            "dev": "xvda",
            "device-type": what,
            "type": "qdisk",
            "params": f"aio:{self.image}",
            "mode": mode,
            "removable": "0",
            "bootable": "1",
            "discard-enable": "1",
            "direct-io-safe": "0",
        }
        attach(self.dom0.store, DEVICE, front, back)
        self._stack.callback(detach, self.dom0.store, DEVICE)

    def start(self) -> subprocess.Popen[bytes]:
        """QEMU, in domain 0, as the device model of domain 1."""
        folder = os.path.dirname(self.machine.environ(0)["GNTALLOC_DOMAIN"])
        run = [sys.executable, "-m", "gntalloc", "run", "--machine", folder, "--domid", "0", "--"]
        options = "-machine xenpv -xen-attach -xen-domid 1 -nodefaults -display none -serial none -monitor none"
        process = subprocess.Popen([*run, qemu(), *options.split()], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._stack.callback(process.communicate)
        self._stack.callback(process.kill)
        return process

    def open(self) -> BlockDevice:
        return self._stack.enter_context(BlockDevice(self.guest, timeout=PATIENCE))


@pytest.fixture
def stock(machine_for_disks: Machine, tmp_path: Path) -> Iterator[Stock]:
    with two_domains(machine_for_disks) as (guest, _), ExitStack() as stack:
        dom0 = machine_for_disks.domain(0)
        stack.callback(dom0.devices.close)
        stack.callback(dom0.close)
        yield Stock(machine_for_disks, dom0, guest, tmp_path / "disk.img", stack)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(stock: Stock, check: Callable[[BlockDevice, bytes], None]) -> None:
    content = random.Random(7).randbytes(SIZE)
    stock.attach(content)
    stock.start()
    disk = stock.open()
    check(disk, content)
    disk.flush(timeout=PATIENCE)
    expected = disk.read(0, disk.size, timeout=PATIENCE)
    disk.close()
    assert stock.image.read_bytes() == expected


def test_16_mib_by_digest_and_one_frontend_after_another(stock: Stock) -> None:
    content = random.Random(8).randbytes(16 << 20)
    stock.attach(content)
    stock.start()
    for _ in range(2):
        with stock.open() as disk:
            assert (disk.size, disk.read_only, disk.features.flush) == (16 << 20, False, True)
            read = disk.read(0, disk.size, timeout=PATIENCE)
            assert hashlib.sha256(read).digest() == hashlib.sha256(content).digest()
            disk.write(4096, content[: 100 << 10], timeout=PATIENCE)
            disk.flush(timeout=PATIENCE)
            content = content[:4096] + content[: 100 << 10] + content[4096 + (100 << 10) :]
            assert stock.image.read_bytes() == content


def test_discarded_sectors_are_zero(stock: Stock) -> None:
    content = random.Random(9).randbytes(SIZE)
    stock.attach(content)
    stock.start()
    disk = stock.open()
    assert disk.features.discard
    disk.discard(1 << 20, 64 << 10, timeout=PATIENCE)
    assert disk.read(1 << 20, 64 << 10, timeout=PATIENCE) == bytes(64 << 10)
    assert disk.read(0, 1 << 20, timeout=PATIENCE) == content[: 1 << 20]


def test_a_read_only_disk(stock: Stock) -> None:
    content = random.Random(10).randbytes(SIZE)
    stock.attach(content, "r", "cdrom")
    stock.start()
    disk = stock.open()
    assert disk.read_only
    assert disk.read(0, SIZE, timeout=PATIENCE) == content


def test_killed_while_it_reads_and_started_again(stock: Stock) -> None:
    content = random.Random(11).randbytes(SIZE)
    stock.attach(content)
    process = stock.start()
    disk = stock.open()
    assert disk.read(0, 4096, timeout=PATIENCE) == content[:4096]
    process.kill()  # the run, which takes QEMU along
    process.wait(PATIENCE)
    with pytest.raises((PeerDied, PeerClosed)):
        read_for_ever(disk)
    stock.dom0.store.write(f"{DEVICE.back}/state", str(int(State.INITIALISING)))  # QEMU takes up no other
    stock.start()
    disk.reconnect(timeout=PATIENCE)
    assert disk.read(0, SIZE, timeout=PATIENCE) == content
