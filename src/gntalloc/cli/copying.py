"""Copy between a disk and a file, by pieces, and tell of errors of files."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gntalloc.errors import GntallocError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc.frontend.blkfront import BlockDevice

__all__ = ["copy_in", "copy_out", "length_from", "telling_of"]

_PIECE = 4 << 20  # bytes at a time


def length_from(disk: BlockDevice, offset: int, length: int | None) -> int:
    """Give the number of bytes to copy from `offset` on.

    Raises:
        GntallocError: EINVAL: so many are not on the disk.
    """
    left = disk.size - offset
    if left < 0 or (length is not None and length > left):
        what = f"{'anything' if length is None else f'{length} bytes'} at {offset} is not on the disk"
        raise GntallocError(errno.EINVAL, f"{what}: it has {disk.size}; see --offset and --length")
    return left if length is None else length


def copy_out(
    disk: BlockDevice, offset: int, length: int, target: int, show: Callable[[int], None], *, sparse: bool
) -> None:
    """Copy a part of a disk. Its holes are not read. If the target is `sparse`, they are holes there too."""
    buffer = memoryview(bytearray(min(_PIECE, length)))
    at = 0
    while at < length:
        for extent in disk.extents(offset + at, length - at):
            end = at + extent.length
            if extent.hole and sparse:
                os.lseek(target, extent.length, os.SEEK_CUR)
                at = end
            while at < end:
                piece = buffer[: min(_PIECE, end - at)]
                if extent.hole:
                    piece[:] = bytes(len(piece))
                else:
                    disk.readinto(offset + at, piece)
                _write_all(target, piece)
                at += len(piece)
                show(at)
            show(at)
    if sparse:
        os.ftruncate(target, length)


def copy_in(disk: BlockDevice, offset: int, length: int | None, source: int, show: Callable[[int], None]) -> None:
    """Copy a file to a disk, so many bytes or up to its end. Bytes of the last sector that are not written stay.

    Raises:
        GntallocError: EINVAL: the disk has no room for all. The bytes that had room are written.
    """
    most = length_from(disk, offset, length)
    done = 0
    buffer = memoryview(bytearray(_PIECE))
    while count := _read_all(source, buffer[: min(_PIECE, most - done)] if length is not None else buffer):
        length_from(disk, offset + done, count)  # a pipe may have more than the disk has room for
        whole = -(-count // disk.sector_size) * disk.sector_size
        if whole != count:
            disk.readinto(offset + done + count, buffer[count:whole])
        disk.write(offset + done, buffer[:whole])
        done += count
        show(done)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read_all(descriptor: int, buffer: memoryview) -> int:
    """Fill the buffer as far as bytes come, and return their number."""
    done = 0
    while done < len(buffer) and (count := os.readv(descriptor, [buffer[done:]])):
        done += count
    return done


@contextmanager
def telling_of(path: str) -> Iterator[None]:
    """Put the name of a file into the kernel's errors about it."""
    try:
        yield
    except (GntallocError, BrokenPipeError):
        raise
    except OSError as error:
        raise GntallocError(error.errno or errno.EIO, f"{path}: {error.strerror or error}") from None
