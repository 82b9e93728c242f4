"""Image: what a backend serves, a file or a block device: opened, understood and locked; read and written by pieces.

It is served as it is, byte for byte. So an image of another format, which a frontend would find a disk of nonsense, is
refused; and so is one that does not end with a sector, whose end nobody could read.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.errors import DeviceError
from gntalloc.frontend.extents import MOST, Extent
from gntalloc.frontend.imagelock import lock
from gntalloc.libc import failure, libc

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["FORMATS", "Full", "Image"]

FORMATS = ("auto", "raw")
"""How to take an image: look whether it is a raw one, or know that it is."""
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_PUNCH_HOLE_KEEP_SIZE = 3


class Full(Exception):
    """There is no room for what was to be written: the file system is full, or a quota of its user is used up."""


class _Magic(NamedTuple):
    """How an image of another format begins, and what it is called."""

    offset: int
    text: bytes
    name: str
    packed: bool = False


_MAGIC = (
    _Magic(0, b"QFI\xfb", "qcow2"),
    _Magic(0, b"QED\0", "qed"),
    _Magic(0, b"KDMV", "vmdk"),
    _Magic(0, b"COWD", "vmdk"),
    _Magic(0, b"# Disk DescriptorFile", "vmdk"),
    _Magic(0, b"vhdxfile", "vhdx"),
    _Magic(0, b"conectix", "vpc"),
    _Magic(64, b"\x7f\x10\xda\xbe", "vdi"),
    _Magic(0, b"WithoutFreeSpace", "parallels"),
    _Magic(0, b"WithouFreSpacExt", "parallels"),
    _Magic(0, b"\x1f\x8b\x08", "gzip", packed=True),
    _Magic(0, b"\xfd7zXZ\0", "xz", packed=True),
    _Magic(0, b"\x28\xb5\x2f\xfd", "zstd", packed=True),
    _Magic(0, b"BZh", "bzip2", packed=True),
)


class Image:
    """An open image. Not for several threads.

    Args:
        path: of the file or block device.
        read_only: open it so.
        unit: bytes of a sector.
        pad: serve a file that ends within a sector, as if zeros followed. It grows when its last sector is written.
        form: one of FORMATS.

    Raises:
        DeviceError: EINVAL it is neither file nor block device, of another format, or has no whole sectors.
        Busy: another process uses it, and one of the two would write.
        OSError: the kernel does not let us open or lock it.

    Attributes:
        size: bytes served. See `look`.
        sparse: whether it can have holes.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, read_only: bool, unit: int, pad: bool = False, form: str = "auto"
    ) -> None:
        self._path = os.fspath(path)
        self._unit = unit
        self._pad = pad
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise DeviceError(errno.EINVAL, f"{self._path} is neither a file nor a block device; serve one of those")
        self.sparse = stat.S_ISREG(kind)
        if pad and not self.sparse:
            raise DeviceError(
                errno.EINVAL, f"{self._path} is a block device, which cannot be padded; copy it to a file"
            )
        self._file = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            if form != "raw":
                self._check_format()
            self.size = self._measured()
            if left := self._end() % unit if not pad else 0:
                raise DeviceError(errno.EINVAL, self._odd(left))
            lock(self._file, self._path, writable=not read_only)
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Close it, which takes the locks off."""
        os.close(self._file)

    def look(self) -> bool:
        """Whether its size has changed; `size` is the new one then. What is no whole sector does not count."""
        before, self.size = self.size, self._measured()
        return self.size != before

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill the views, one after the other.

        Raises:
            OSError: EIO it ends before them, or whatever the kernel says.
        """
        length = sum(map(len, views))
        done = os.preadv(self._file, views, offset)
        while done < length:
            more = self._move_rest(os.preadv, views, offset, done)
            if not more:
                self._fill(views, done, length, offset)
                return
            done += more

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write the views, one after the other.

        Raises:
            Full: there is no room; some of it may be written.
            OSError: whatever the kernel says.
        """
        length = sum(map(len, views))
        try:
            done = os.pwritev(self._file, views, offset)
            while done < length:  # why it was less, the kernel says with the rest
                done += self._move_rest(os.pwritev, views, offset, done)
        except OSError as error:
            raise _judged(error) from None

    def flush(self) -> None:
        """Make safe what was written. Raises as `write`."""
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise _judged(error) from None

    def discard(self, offset: int, length: int) -> None:
        """Give a piece back to the file system; it reads as zeros.

        Raises:
            OSError: EOPNOTSUPP its file system has no holes.
        """
        if libc.fallocate(self._file, _PUNCH_HOLE_KEEP_SIZE, offset, length):
            raise failure()

    def extents(self, offset: int) -> list[Extent]:
        """List the data and holes from a sector on, MOST of them or up to the end."""
        found: list[Extent] = []
        at = offset
        while at < self.size and len(found) < MOST:
            data = self._seek(at, os.SEEK_DATA)
            begin = data if data == self.size else data // self._unit * self._unit
            if begin > at:
                found.append(Extent(begin - at, hole=True))
                at = begin
                continue
            end = -(-self._seek(data, os.SEEK_HOLE) // self._unit) * self._unit
            found.append(Extent(end - at, hole=False))
            at = end
        return found

    def _seek(self, offset: int, what: int) -> int:
        try:
            return min(os.lseek(self._file, offset, what), self.size)
        except OSError as error:
            if error.errno != errno.ENXIO:  # there is no more of it
                raise
            return self.size

    def _end(self) -> int:
        return os.lseek(self._file, 0, os.SEEK_END)

    def _measured(self) -> int:
        end = self._end()
        return (end + (self._unit - 1 if self._pad else 0)) // self._unit * self._unit

    def _move_rest(
        self, move: Callable[[int, Sequence[memoryview], int], int], views: Sequence[memoryview], offset: int, done: int
    ) -> int:
        """Read or write what is left of the views after their first `done` bytes. How many bytes were."""
        rest = _after(views, done)
        try:
            return move(self._file, rest, offset + done)
        finally:
            for view in rest:  # or the pages could not be given back while an error is under way
                view.release()

    def _fill(self, views: Sequence[memoryview], done: int, length: int, offset: int) -> None:
        """Fill what follows the end of a padded file, within its last sector, with zeros."""
        if not self._pad or length - done >= self._unit:
            raise OSError(errno.EIO, f"{self._path} ends at {offset + done}")
        for view in _after(views, done):
            view[:] = bytes(len(view))
            view.release()

    def _check_format(self) -> None:
        head = os.pread(self._file, 512, 0)
        for magic in _MAGIC:
            if head.startswith(magic.text, magic.offset):
                break
        else:
            return
        if magic.packed:
            todo = "unpack it first"
        else:
            todo = "convert it (qemu-img convert -O raw), or serve what qemu-nbd shows of it"
        raise DeviceError(
            errno.EINVAL,
            f"{self._path} is no raw image but a {magic.name} one, whose bytes are not the disk's: {todo}; "
            "or insist with --format raw",
        )

    def _odd(self, left: int) -> str:
        end = self._end()
        return (
            f"{self._path} has {end} bytes, which are no whole sectors of {self._unit}: the last {left} could not be "
            f"reached; add {self._unit - left} (truncate -s {end - left + self._unit}), or use --pad"
        )


def _judged(error: OSError) -> Exception:
    return Full(error.strerror) if error.errno in _FULL else error


def _after(views: Sequence[memoryview], done: int) -> list[memoryview]:
    """Drop the first `done` bytes of the views."""
    rest = []
    for view in views:
        if done < len(view):
            rest.append(view[done:])
        done = max(0, done - len(view))
    return rest
