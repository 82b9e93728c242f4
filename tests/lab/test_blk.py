"""Our BlockDevice on a real Xen: the backend is dom0's unmodified kernel driver, the toolstack is xl.

GNTALLOC_LAB=1 runs it. What is done in the guest stands in blk/front.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.frontend.kit import CHECKS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc.lab import Session

pytestmark = [
    pytest.mark.skipif(not os.environ.get("GNTALLOC_LAB"), reason="boots a real Xen: set GNTALLOC_LAB=1"),
    pytest.mark.timeout(900),
]

HERE = Path(__file__).parent
KIT = HERE.parent / "frontend" / "kit.py"
NAME, NUMBER = "xvdf", 51792
SIZE = 732 * 4096  # of what the content of a disk is compared with: the first bytes of `some-bytes`
MIB = 1 << 20


def sh(lab: Session, domain: str, *lines: str) -> str:
    """Run commands; all must succeed. What they printed."""
    outcome = lab.run(["sh", "-ec", "\n".join(lines)], domain)
    assert outcome.exit_status == 0, f"{domain}: {outcome.output}{outcome.errors}"
    return outcome.output


def front(lab: Session, guest: str, what: str, *more: object) -> list[str]:
    """Let blk/front.py do something. The lines it printed."""
    return sh(lab, guest, " ".join(["python3 front.py", what, str(NUMBER), *map(str, more)])).splitlines()


def back(lab: Session, guest: str) -> str:
    """The backend's folder."""
    return f"/local/domain/0/backend/vbd/{lab.domid(guest)}/{NUMBER}"


@contextmanager
def attached(lab: Session, guest: str, access: str = "rw") -> Iterator[str]:
    """Give disk.img of dom0 to a guest, as an operator does. Where its backend counts what it is asked for."""
    only = "-r" if access == "ro" else ""
    where = f"vdev={NAME},access={access},backendtype=phy,script=/lab/attach,target=/dev/loop5"
    sh(lab, "dom0", f"losetup {only} /dev/loop5 disk.img", f"xl block-attach {guest} format=raw,{where}")
    try:
        yield f"/sys/bus/xen-backend/devices/vbd-{lab.domid(guest)}-{NUMBER}/statistics"
    finally:
        sh(
            lab,
            "dom0",
            f"xenstore-exists {back(lab, guest)} && xl block-detach --force {guest} {NAME}",
            "until losetup -d /dev/loop5; do sleep 0.5; done",
        )


@pytest.fixture(scope="module")
def lab(xen: Session) -> Iterator[Session]:
    """Guests whose own driver leaves new disks alone."""
    for guest in ("pv", "pvh"):
        xen.put([HERE / "blk" / "front.py", KIT], guest)
        sh(xen, guest, "echo 0 >/sys/bus/xen/drivers_autoprobe")
    if xen.run(["test", "-x", "/usr/sbin/debugfs"]).exit_status:
        pytest.fail("the lab's images are from before they had e2fsprogs; make new ones: gntalloc lab build")
    yield xen
    for guest in ("pv", "pvh"):
        sh(xen, guest, "echo 1 >/sys/bus/xen/drivers_autoprobe")


@pytest.mark.parametrize("guest", ["pv", "pvh"])
def test_what_any_backend_must_do(lab: Session, guest: str) -> None:
    """The checks that our own backend has passed off Xen."""
    sh(lab, "dom0", f"head -c {SIZE} some-bytes >disk.img")
    with attached(lab, guest):
        assert front(lab, guest, "kit", "some-bytes") == [check.__name__ for check in CHECKS]
    sh(lab, "dom0", f"head -c {SIZE} some-bytes | cmp - disk.img")


SUMS = "find {} -type f | sort | xargs sha256sum"


def test_a_file_system_made_here_is_mounted_in_dom0(lab: Session) -> None:
    sh(lab, "dom0", "rm -f disk.img", "truncate -s 16M disk.img", "mkdir -p disk")
    sh(lab, "pv", "mkdir made", "cp -a some-bytes /usr/lib/python3.11/email made")
    sh(lab, "pv", "mkfs.ext4 -q -d made made.img 16M")
    with attached(lab, "pv"):
        front(lab, "pv", "put", "made.img")
        sh(lab, "dom0", "mount -t ext4 -o ro,loop disk.img disk")
        there = sh(lab, "dom0", "cd disk", SUMS.format("*"), "cd ..", "umount disk")
    here = sh(lab, "pv", "cd made", SUMS.format("*"))
    assert len(here.splitlines()) > 20
    assert here == there


def test_a_file_system_made_in_dom0_is_read_here(lab: Session) -> None:
    sh(lab, "dom0", "rm -f disk.img", "truncate -s 16M disk.img", "mkfs.ext4 -q disk.img", "mkdir -p disk")
    sh(lab, "dom0", "mount -t ext4 -o loop disk.img disk", "cp -a some-bytes /usr/lib/python3.11/json disk")
    there = sh(lab, "dom0", "cd disk", SUMS.format("*"), "cd ..", "umount disk", "sha256sum <disk.img")
    with attached(lab, "pvh", "ro"):
        (image,) = front(lab, "pvh", "get", "got.img")
    sh(lab, "pvh", "mkdir got", "debugfs -R 'rdump / got' got.img 2>&1")
    here = sh(lab, "pvh", "cd got", SUMS.format("*"))
    assert len(here.splitlines()) > 5
    assert f"{here}{image}  -\n" == there


def test_what_was_flushed_outlives_sigkill(lab: Session) -> None:
    """Three writers in turn, each killed in the middle of it; each takes over the device from a dead one."""
    sh(lab, "dom0", "rm -f disk.img", "truncate -s 16M disk.img")
    with attached(lab, "pv"):
        (flushed,) = front(lab, "pv", "killed", 3)
    assert int(flushed) >= 3 * 12


def about(lab: Session, guest: str, access: str = "rw") -> tuple[dict[str, Any], dict[str, int]]:
    """What blk/front.py has to say of the disk, and what the backend has counted meanwhile."""
    look = f"/local/domain/{lab.domid(guest)}/data/look"
    with attached(lab, guest, access) as statistics:
        count = [
            f'until [ "$(xenstore-read {look})" = please ]; do sleep 0.5; done 2>/dev/null',
            f"cd {statistics}; grep . *; xenstore-write {look} done",
        ]
        outcomes = lab.run_together(
            {guest: ["python3", "front.py", "about", str(NUMBER)], "dom0": ["sh", "-ec", "\n".join(count)]}
        )
    assert {outcome.exit_status for outcome in outcomes.values()} == {0}, outcomes
    counted = dict(line.split(":") for line in outcomes["dom0"].output.splitlines())
    return json.loads(outcomes[guest].output), {name: int(number) for name, number in counted.items()}


def test_what_linux_offers(lab: Session, some_bytes: bytes) -> None:
    """Pages that stay mapped, 64 KiB in one request, and a discard that makes a hole in the file."""
    sh(lab, "dom0", f"head -c {MIB} some-bytes >disk.img")
    first = hashlib.sha256(some_bytes[: 1 << 16]).hexdigest()
    said, counted = about(lab, "pv")
    assert (said["size"], said["read_only"], said["write"], said["discard"]) == (MIB, False, "done", "done")
    assert said["features"]["persistent"]
    assert said["features"]["indirect_segments"] == 256
    assert (counted["rd_req"], counted["wr_req"], counted["ds_req"], counted["f_req"]) == (2, 1, 1, 1)
    assert (said["first"], said["then"]) == (first, hashlib.sha256(bytes(1 << 16)).hexdigest())
    assert int(sh(lab, "dom0", "stat -c %b disk.img")) * 512 == MIB - (1 << 16)


def test_pages_that_are_mapped_for_each_request(lab: Session, some_bytes: bytes) -> None:
    """A backend that offers no persistent grants."""
    feature = "/sys/module/xen_blkback/parameters/feature_persistent"
    sh(lab, "dom0", f"head -c {MIB} some-bytes >disk.img", f"echo N >{feature}")
    try:
        said, counted = about(lab, "pvh")
    finally:
        sh(lab, "dom0", f"echo Y >{feature}")
    assert not said["features"]["persistent"]
    assert (said["write"], counted["wr_req"]) == ("done", 1)
    assert said["first"] == hashlib.sha256(some_bytes[: 1 << 16]).hexdigest()


def test_a_read_only_disk(lab: Session, some_bytes: bytes) -> None:
    sh(lab, "dom0", f"head -c {MIB} some-bytes >disk.img")
    said, counted = about(lab, "pv", "ro")
    assert (said["read_only"], said["write"], said["discard"]) == (True, "EROFS", "EROFS")
    assert said["first"] == said["then"] == hashlib.sha256(some_bytes[: 1 << 16]).hexdigest()
    assert counted["wr_req"] == counted["ds_req"] == 0


def test_taken_from_the_kernels_driver_and_given_back(lab: Session) -> None:
    """Each reads what the other has written. Linux's takes a device but once: it is given back as a new one."""
    driver, device, disk = "/sys/bus/xen/drivers/vbd", f"vbd-{NUMBER}", f"/dev/{NAME}"
    bind = [f"echo {device} >{driver}/bind", f"until [ -b {disk} ]; do sleep 0.5; done"]
    unbind = f"echo {device} >{driver}/unbind"
    sh(lab, "dom0", f"head -c {SIZE} some-bytes >disk.img")
    sh(lab, "pv", f"head -c {MIB} /dev/urandom >news", f"tail -c +{MIB + 1} some-bytes | head -c {SIZE - MIB} >olds")
    with attached(lab, "pv"):
        sh(lab, "pv", *bind, f"dd if=news of={disk} conv=fsync 2>&1", unbind)
        (read,) = front(lab, "pv", "get", "got")
        assert read == sh(lab, "pv", "cat news olds | sha256sum").split()[0]
        front(lab, "pv", "put", "olds")
    with attached(lab, "pv"):
        sh(lab, "pv", *bind, f"head -c {SIZE - MIB} {disk} | cmp - olds", unbind)


AGAIN = {
    # As libxl ends a device, but for `online`, which says that it comes back.
    "closes": ["xenstore-write {back}/state 5"],
    # Without a word to the frontend: the kernel's driver maps the ring again, and goes on where it was.
    "is loaded anew": [
        "echo {device} >/sys/bus/xen-backend/drivers/vbd/unbind",
        "echo {device} >/sys/bus/xen-backend/drivers/vbd/bind",
    ],
}


@pytest.mark.parametrize("how", AGAIN)
def test_a_backend_that_goes_and_returns(lab: Session, how: str) -> None:
    """Reads and writes under way wait for it, and nothing is lost."""
    guest = "pv"
    places = {"back": back(lab, guest), "device": f"vbd-{lab.domid(guest)}-{NUMBER}"}
    connected = 'until [ "$(xenstore-read {back}/state)" = 4 ]; do sleep 0.5; done'
    done = f"xenstore-write /local/domain/{lab.domid(guest)}/data/enough 1"
    sh(lab, "dom0", f"head -c {SIZE} some-bytes >disk.img")
    with attached(lab, guest):
        outcomes = lab.run_together(
            {
                guest: ["python3", "front.py", "busy", str(NUMBER)],
                "dom0": ["sh", "-ec", "\n".join([connected, *(AGAIN[how] + [connected]) * 2, done]).format(**places)],
            }
        )
    assert {outcome.exit_status for outcome in outcomes.values()} == {0}, outcomes
    assert int(outcomes[guest].output) > 0


def test_a_disk_that_is_detached_in_use(lab: Session) -> None:
    """As by an operator: the frontend hears of it, lets go, and xl is content."""
    sh(lab, "dom0", f"head -c {SIZE} some-bytes >disk.img")
    with attached(lab, "pvh"):
        connected = f'until [ "$(xenstore-read {back(lab, "pvh")}/state)" = 4 ]; do sleep 0.5; done'
        outcomes = lab.run_together(
            {
                "pvh": ["python3", "front.py", "detached", str(NUMBER)],
                "dom0": ["sh", "-ec", f"{connected}\nxl block-detach pvh {NAME}"],
            }
        )
        assert {outcome.exit_status for outcome in outcomes.values()} == {0}, outcomes
        assert outcomes["pvh"].output == "PeerClosed\n"
