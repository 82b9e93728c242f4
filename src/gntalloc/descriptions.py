"""Ask the kernel about open file descriptions of a memory file: locks, leases, and another one of the same file.

A program says where it has mapped a memory file by a lock on its own description, far beyond the file's end: of a map
with mark M, the bytes M + (address / page) up to its end. It takes the lock before it closes the descriptor. The kernel
keeps the lock for as long as a piece of the map is left, and tells the machine of it.

Sources: fcntl(2), memfd_create(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

__all__ = [
    "is_at",
    "is_locked",
    "is_placed",
    "lock",
    "lock_place",
    "mark_of",
    "nobody_has",
    "one_writer_has",
    "open_again",
    "see_to_rights",
]

_FLOCK = struct.Struct("=hh4xqqi4x")
_NO_LEASES = {errno.EACCES, errno.EINVAL, errno.ENOLCK}  # root gave the file away; fs.leases-enable is 0
_OWNER_MAY = 0o600  # the rights of a memory file without which its owner can neither open it nor watch it
_READ, _READ_WRITE = os.O_RDONLY | os.O_CLOEXEC, os.O_RDWR | os.O_CLOEXEC
_PAGE_SHIFT = 12
_FIRST_MARK = 1 << 62
_PAGES_OF_A_MARK = 1 << 44  # more than an address space has
_MARKS = 1 << 17


def open_again(master: int, *, writable: bool) -> int:
    """Make another open file description of a memory file, closed on exec.

    Raises:
        OSError: what open(2) answered; or another user owns the file by now.
    """
    path, flags = f"/proc/self/fd/{master}", _READ_WRITE if writable else _READ
    try:
        return os.open(path, flags)
    except PermissionError:
        see_to_rights(master)
        return os.open(path, flags)


def see_to_rights(master: int) -> None:
    """See that the machine may open and watch a memory file. Each program that has it open may take that away.

    Raises:
        OSError: another user owns the file by now.
    """
    os.fchmod(master, os.fstat(master).st_mode | _OWNER_MAY)


def lock(descriptor: int, byte: int, *, exclusive: bool) -> int | None:
    """Lock a byte, and return it. None: a hostile lock is in the way.

    Raises:
        OSError: what fcntl(2) answered.
    """
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    except BlockingIOError:
        return None
    return byte


def is_locked(master: int, byte: int, *, exclusive: bool, length: int = 1) -> bool | None:
    """Say whether another description has locked one of these bytes. None: the kernel does not say just now.

    A question about an exclusive lock sees no shared ones, so a peer's shared locks cannot pose as the granter's.
    """
    kind = fcntl.F_RDLCK if exclusive else fcntl.F_WRLCK
    try:
        answer = fcntl.fcntl(master, fcntl.F_OFD_GETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, length, 0))
    except OSError:
        return None
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def mark_of(number: int) -> int:
    """Give the mark of map `number`. Of two maps with the same mark, more than a hundred thousand were made between."""
    return _FIRST_MARK + number % _MARKS * _PAGES_OF_A_MARK


def lock_place(descriptor: int, mark: int, address: int, length: int) -> None:
    """Say that the pages of this description are mapped at `address`, in a map of `length` bytes in all.

    Raises:
        OSError: what fcntl(2) answered.
    """
    start = mark + (address >> _PAGE_SHIFT)
    place = os.SEEK_SET, start, max(1, length >> _PAGE_SHIFT), 0
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, *place))
    except OSError as error:
        if error.errno != errno.EBADF:  # it can only be read
            raise
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, *place))


def is_placed(master: int, mark: int) -> bool:
    """Say whether a description that can be written is mapped somewhere, with this mark."""
    return bool(is_locked(master, mark, exclusive=True, length=_PAGES_OF_A_MARK))


def is_at(master: int, mark: int, address: int) -> bool:
    """Say whether `address` is in a map with this mark."""
    return bool(is_locked(master, mark + (address >> _PAGE_SHIFT), exclusive=False))


def one_writer_has(master: int) -> bool | None:
    """Say whether there is just one description beside memfd_create's own, and it is one that can be written.

    None: this computer, or root, lets nobody ask; then locks decide.
    """
    return _lease_is_free(master, fcntl.F_WRLCK)


def nobody_has(master: int, *, readers: bool) -> bool | None:
    """Say whether there is no description beside memfd_create's own. None: as above.

    Args:
        master: that description.
        readers: whether there may be one that can only be read. A lease for readers does not see it.
    """
    if not readers:
        return _lease_is_free(master, fcntl.F_RDLCK)
    try:
        ours = open_again(master, writable=True)
    except OSError:
        return False  # there is no descriptor to find out: ask again later
    try:
        return one_writer_has(master)
    finally:
        os.close(ours)


def _lease_is_free(master: int, kind: int) -> bool | None:
    """Ask for a lease, and give it back.

    The kernel does not count memfd_create's own description among the readers and writers of its file. It takes this
    one for a writer all the same, and so grants a lease for writers while there is just one other.
    """
    try:
        fcntl.fcntl(master, fcntl.F_SETLEASE, kind)
    except OSError as error:
        return None if error.errno in _NO_LEASES else False  # False: it is held, or there is no memory to find out
    try:
        fcntl.fcntl(master, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        pass  # the next look takes it back
    return True
