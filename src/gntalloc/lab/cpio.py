"""Write archives in cpio's `newc` format, which the kernel unpacks into an initramfs.

The kernel takes several archives one after the other, compressed or not. So the images hold one with
Debian's files, and every boot appends one of its own with ours.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

__all__ = ["Archive"]

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"

# A disk is made of sectors, and between two archives only zeros may stand.
_SECTOR = 512


@dataclass
class Archive:
    """Make a cpio archive: add to it, then `finish`."""

    _data: bytearray = field(default_factory=bytearray)
    _directories: set[str] = field(default_factory=set)
    _entries: int = 0

    def file(self, path: str, content: bytes, *, mode: int = 0o644, mtime: int = 0) -> None:
        """Add a file, and the directories above it."""
        self._parents(path)
        self._add(path, stat.S_IFREG | mode, content, mtime=mtime)

    def directory(self, path: str) -> None:
        """Add an empty directory, and those above it."""
        self._parents(path.rstrip("/") + "/.")

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._parents(path)
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int) -> None:
        """Add a device node: /dev/console must be there before anything could be mounted over /dev."""
        self._parents(path)
        self._add(path, stat.S_IFCHR | 0o600, b"", device=(major, minor))

    def finish(self) -> bytes:
        """Close the archive, padded so that another may follow and so that it can be a disk."""
        self._add(_TRAILER, 0, b"")
        self._pad(_SECTOR)
        return bytes(self._data)

    def _parents(self, path: str) -> None:
        parts = path.strip("/").split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            directory = "/".join(parts[:depth])
            if directory not in self._directories:
                self._directories.add(directory)
                self._add(directory, stat.S_IFDIR | 0o755, b"")

    def _add(self, path: str, mode: int, content: bytes, *, mtime: int = 0, device: tuple[int, int] = (0, 0)) -> None:
        self._entries += 1
        name = path.strip("/").encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # inode, mode, uid, gid, links, mtime, size, device of the file (2), device it is (2), name, checksum
        numbers = (self._entries, mode, 0, 0, links, mtime, len(content), 0, 0, *device, len(name), 0)
        self._data += _MAGIC + b"".join(b"%08X" % number for number in numbers) + name
        self._pad(4)
        self._data += content
        self._pad(4)

    def _pad(self, size: int) -> None:
        self._data += bytes(-len(self._data) % size)
