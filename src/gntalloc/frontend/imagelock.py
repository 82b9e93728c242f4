"""Locks on an image, so that nobody writes what somebody else uses. QEMU's own, so that it is excluded too.

They are OFD locks on single bytes, all of them shared: one byte for each thing that a user does with the image, and one
for each that it does not bear from others. Whoever has set its own looks whether anybody else has set one that does not
go together with them. So any number may read, or one may write and nobody else does anything. (QEMU's tools bear a
writer when they read; we do not bear that they do.)

They go with the open file, also when its process is killed. The kernel does not tell whose an OFD lock is; which
processes have the file open with such locks on it stands in /proc, for those that may be looked into.

Source: QEMU's block/file-posix.c for the bytes; docs/system/images.rst for the rules.
"""

from __future__ import annotations

import fcntl
import os
from struct import Struct
from typing import TYPE_CHECKING

from gntalloc.errors import Busy

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["lock"]

_FLOCK = Struct("=hh4xqqi4x")  # struct flock: type, whence, start, length, process
_DOES, _BEARS_NOT = 100, 200  # the first byte of each kind
_READ, _WRITE, _RESIZE = 0, 1, 3  # added to them


def lock(file: int, path: str, *, writable: bool) -> None:
    """Set our locks on an open file: to read it, or to read and write it. They go when it is closed.

    Raises:
        Busy: somebody else uses it in a way that does not go together with that; the text says who, if it can be seen.
        OSError: its file system has no locks.
    """
    does = {_READ, _WRITE} if writable else {_READ}
    bears_not = {_READ, _WRITE, _RESIZE} if writable else {_WRITE, _RESIZE}
    for byte in [*(_DOES + what for what in does), *(_BEARS_NOT + what for what in bears_not)]:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    if any(_is_set(file, _DOES + what) for what in (_WRITE, _RESIZE)):
        told = "has it open to write"
    elif writable and _is_set(file, _DOES + _READ):
        told = "has it open to read"
    elif any(_is_set(file, _BEARS_NOT + what) for what in does):
        told = "wants it for itself"
    else:
        return
    how = "read and written" if writable else "read"
    raise Busy(f"{path} cannot be {how} here: {_who(file)} {told}; end that first, or use a copy")


def _is_set(file: int, byte: int) -> bool:
    """Whether another open file has a lock on that byte."""
    answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _who(file: int) -> str:
    """Name the processes that hold such a lock on the same file by another open file.

    No file of another process is looked at itself: a file on FUSE may never answer. The kernel lists the locks.
    """
    from pathlib import Path  # only for the error

    locked = _locked(Path("/proc/self/fdinfo") / str(file))
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            numbers = os.listdir(process / "fdinfo")
            mine = process.name == str(os.getpid())
            if any(_locked(process / "fdinfo" / each) & locked for each in numbers if not (mine and int(each) == file)):
                found.append(f"process {process.name} ({(process / 'comm').read_text().strip()})")
        except OSError:
            continue  # it has ended, or is somebody else's
    return " and ".join(found) or "a process that cannot be seen from here"


def _locked(path: Path) -> set[str]:
    """Name the files that an open file has OFD locks on, by device and inode. It is one file, or none.

    A line there is: lock: 1: OFDLCK ADVISORY READ -1 00:1d:4711 100 100
    """
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return set()
    words = [line.split() for line in lines if line.startswith("lock:")]
    return {each[-3] for each in words if "OFDLCK" in each}
