"""A guest's end of the tests with disks: our BlockDevice, whose backend is dom0's kernel.

    python3 front.py WHAT NUMBER [MORE…]        NUMBER of the disk, as 51792

What each does stands below. All print what the test compares, and end with 0 if all was as it must be.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import gntalloc
from gntalloc.errors import DeviceError, PeerClosed
from gntalloc.frontend.blkfront import BlockDevice

PATIENCE = 120.0
CHUNK = 1 << 20


def disk(number: str, patience: float = 0.0) -> BlockDevice:
    return BlockDevice(gntalloc.current_domain(), int(number), timeout=PATIENCE, patience=patience)


def kit(number: str, original: str) -> None:
    """All that any backend must do. The disk has that file's content at first, and in the end."""
    content = Path(original).read_bytes()
    with disk(number) as drive:
        content = content[: drive.size]
        for check in import_module("kit").CHECKS:  # which lies beside this file here
            check(drive, content)
            drive.write(0, content, timeout=PATIENCE)
            print(check.__name__)
        drive.flush(timeout=PATIENCE)


def put(number: str, image: str) -> None:
    """The whole image, from the disk's beginning on."""
    with disk(number) as drive, open(image, "rb") as file:
        at = 0
        while piece := file.read(CHUNK):
            at += drive.write(at, piece, timeout=PATIENCE)
        drive.flush(timeout=PATIENCE)


def get(number: str, image: str) -> None:
    """The whole disk into a file; its sum."""
    sum_ = hashlib.sha256()
    with disk(number) as drive, open(image, "wb") as file:
        for at in range(0, drive.size, CHUNK):
            piece = drive.read(at, min(CHUNK, drive.size - at), timeout=PATIENCE)
            sum_.update(piece)
            file.write(piece)
    print(sum_.hexdigest())


def about(number: str) -> None:
    """What it says of itself, and what it answers to a write and to a discard of its first 64 KiB."""
    with disk(number) as drive:
        said = {"size": drive.size, "read_only": drive.read_only, "features": drive.features._asdict()}
        first = drive.read(0, 1 << 16, timeout=PATIENCE)
        for name, ask in (("write", lambda: drive.write(0, first)), ("discard", lambda: drive.discard(0, 1 << 16))):
            try:
                ask()
            except DeviceError as error:
                said[name] = errno.errorcode[error.errno or 0]
            else:
                said[name] = "done"
        drive.flush(timeout=PATIENCE)
        said["first"] = hashlib.sha256(first).hexdigest()
        said["then"] = hashlib.sha256(drive.read(0, 1 << 16, timeout=PATIENCE)).hexdigest()
        print(json.dumps(said))
        _let_dom0_look()


def _let_dom0_look() -> None:
    """At what the backend counts, which it forgets when its frontend leaves."""
    domain = gntalloc.current_domain()
    look = f"/local/domain/{domain.domid}/data/look"
    with domain.store.watch(look) as watch:
        domain.store.write(look, "please")
        while domain.store.read_text(look) == "please":
            watch.wait(timeout=PATIENCE)


RECORD = 64 << 10
SHARE = 64  # records of each process


def record(number: int) -> bytes:
    """What is written there."""
    return random.Random(number).randbytes(RECORD)


def killed(number: str, rounds: str) -> None:
    """A process that writes and flushes is killed, another takes over and goes on; this one is the last, and looks.

    All that was flushed must be there. Each writes where none has written, so that there is no doubt about the rest.
    """
    flushed: list[int] = []
    for share in range(int(rounds)):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _write_for_ever(number, range(share * SHARE, (share + 1) * SHARE), write)
        os.close(write)
        last = [int.from_bytes(os.read(read, 2), "little") for _ in range(3)][-1]
        time.sleep(random.random() / 50)  # somewhere in the next writes
        os.kill(child, signal.SIGKILL)
        while said := os.read(read, 2):  # flushed before the signal came
            last = int.from_bytes(said, "little")
        os.close(read)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        flushed += range(share * SHARE, last + 1)
    with disk(number) as drive:
        for each in flushed:
            assert drive.read(each * RECORD, RECORD, timeout=PATIENCE) == record(each), f"record {each} was flushed"
    print(len(flushed))


def _write_for_ever(number: str, records: range, tell: int) -> NoReturn:
    with disk(number) as drive:
        for each in records:
            drive.write(each * RECORD, record(each))
            if each % 4 == 3:
                drive.flush()
                os.write(tell, each.to_bytes(2, "little"))
        signal.pause()
        os._exit(1)


def busy(number: str) -> None:
    """Write and read at random until data/enough is there, whatever the backend does meanwhile. How many times."""
    domain = gntalloc.current_domain()
    enough = f"/local/domain/{domain.domid}/data/enough"
    domain.store.write(enough, "")
    chance = random.Random(5)
    with disk(number, patience=PATIENCE) as drive:
        model = bytearray(drive.read(0, drive.size, timeout=PATIENCE))
        times = 0
        while not domain.store.read_text(enough):
            length = chance.randrange(1, 600) * 512
            at = chance.randrange((drive.size - length) // 512) * 512
            model[at : at + length] = data = chance.randbytes(length)
            drive.write(at, data, timeout=PATIENCE)
            at = chance.randrange(drive.size - length)
            assert drive.read(at, length, timeout=PATIENCE) == model[at : at + length]
            times += 1
        drive.flush(timeout=PATIENCE)
    with disk(number) as drive:
        assert drive.read(0, drive.size, timeout=PATIENCE) == model
    print(times)


def detached(number: str) -> None:
    """Read until the toolstack takes the disk away. What that raises."""
    with disk(number) as drive:
        try:
            while True:
                drive.read(0, 1 << 16, timeout=PATIENCE)
        except PeerClosed as closed:
            print(type(closed).__name__)


if __name__ == "__main__":
    {do.__name__: do for do in (kit, put, get, about, killed, busy, detached)}[sys.argv[1]](*sys.argv[2:])
