"""A file system whose program does not answer: a real one, over /dev/fuse, with one file in it.

Sources: the kernel's UAPI header linux/fuse.h for numbers and layouts, mount(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import threading
from contextlib import contextmanager
from struct import Struct
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["FLUSH", "GETATTR", "SilentFiles", "silent_files"]

LOOKUP, FORGET, GETATTR, OPEN, RELEASE, FLUSH, INIT, INTERRUPT, BATCH_FORGET = 1, 2, 3, 14, 18, 25, 26, 36, 42
_IN = Struct("=IIQQIIII")  # length, opcode, unique, node, user, group, process, more
_OUT = Struct("=IiQ")  # length, error, unique
_ATTRIBUTES = Struct("=QQQQQQIIIIIIIIII")
_ENTRY = Struct("=QQQQII")  # node, generation, how long both hold, in seconds and nanoseconds
_INIT_ANSWER = Struct("=IIIIHHIIHHII24x")
_ROOT, _FILE = 1, 2
_FOR_EVER = 1 << 30  # seconds
_MNT_FORCE, _MNT_DETACH = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class SilentFiles:
    """The file system's program, in a thread. It leaves some requests about its file unanswered.

    Attributes:
        path: of the file. It can be opened by anybody who may reach it.
        left: the requests of these kinds that were left unanswered, by kind.
    """

    def __init__(self, folder: Path, unanswered: set[int]) -> None:
        self.path = str(folder / "file")
        self.left = dict.fromkeys(unanswered, 0)
        self._folder = str(folder)
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self._over = os.eventfd(0, os.EFD_CLOEXEC)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        if _libc.mount(b"silent", os.fsencode(folder), b"fuse", 0, options):
            code = ctypes.get_errno()
            self._close()
            raise OSError(code, f"a FUSE file system cannot be mounted: {os.strerror(code)}")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        """Let all who wait go on, with an error."""
        self.end()
        self._thread.join(20)
        self._close()

    def end(self) -> None:
        """End all requests."""
        os.eventfd_write(self._over, 1)
        _libc.umount2(os.fsencode(self._folder), _MNT_FORCE | _MNT_DETACH)

    def _close(self) -> None:
        os.close(self._device)
        os.close(self._over)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        poll.register(self._over, select.POLLIN)
        while self._over not in dict(poll.poll()):
            try:
                request = os.read(self._device, 1 << 17)
            except OSError as error:
                if error.errno in {errno.EAGAIN, errno.ENOENT, errno.EINTR}:
                    continue
                return
            _, kind, unique, node, *_ = _IN.unpack_from(request)
            if kind in self.left and node == _FILE:
                self.left[kind] += 1
            elif kind not in {FORGET, BATCH_FORGET, INTERRUPT}:
                code, answer = self._answer(kind, node, request[_IN.size :])
                os.write(self._device, _OUT.pack(_OUT.size + len(answer), -code, unique) + answer)

    def _answer(self, kind: int, node: int, body: bytes) -> tuple[int, bytes]:
        if kind == INIT:
            return 0, _INIT_ANSWER.pack(7, 31, 1 << 16, 0, 16, 12, 1 << 16, 1, 0, 0, 0, 0)
        if kind == LOOKUP:
            if body != b"file\0":
                return errno.ENOENT, b""
            known = 0 if GETATTR in self.left else _FOR_EVER  # so that it is asked for, or never
            return 0, _ENTRY.pack(_FILE, 0, _FOR_EVER, known, 0, 0) + _attributes(_FILE)
        if kind == GETATTR:
            return 0, Struct("=QII").pack(_FOR_EVER, 0, 0) + _attributes(node)
        if kind == OPEN:
            return 0, Struct("=QII").pack(1, 0, 0)
        if kind in {RELEASE, FLUSH}:
            return 0, b""
        return errno.ENOSYS, b""


def _attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o666
    return _ATTRIBUTES.pack(node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


@contextmanager
def silent_files(folder: Path, *unanswered: int) -> Iterator[SilentFiles]:
    """Mount one at this folder, which is made. Where FUSE cannot be used the test is left out."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or os.geteuid():
        pytest.skip("this needs /dev/fuse, and root to mount what it serves")
    folder.mkdir()
    try:
        files = SilentFiles(folder, set(unanswered))
    except PermissionError as error:
        pytest.skip(f"{error}: a container may forbid it")
    try:
        yield files
    finally:
        files.close()
