"""Ask the kernel about open file descriptions of a memory file: locks, leases, and another one of the same file.

Sources: fcntl(2), memfd_create(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

__all__ = ["is_locked", "lease_is_free", "lock", "open_again", "see_to_rights"]

_FLOCK = struct.Struct("=hh4xqqi4x")
_NO_LEASES = {errno.EACCES, errno.EINVAL, errno.ENOLCK}  # root gave the file away; fs.leases-enable is 0
_OWNER_MAY = 0o600  # the rights of a memory file without which its owner can neither open it nor watch it


def open_again(descriptor: int, flags: int) -> int:
    """Make another open file description of the same file, closed on exec.

    Raises:
        OSError: what open(2) answered.
    """
    return os.open(f"/proc/self/fd/{descriptor}", flags | os.O_CLOEXEC)


def see_to_rights(master: int) -> None:
    """See that the machine may open and watch a memory file. Each program that has it open may take that away.

    Raises:
        OSError: another user owns the file by now.
    """
    mode = os.fstat(master).st_mode
    if mode & _OWNER_MAY != _OWNER_MAY:
        os.fchmod(master, mode | _OWNER_MAY)


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


def is_locked(master: int, byte: int, *, exclusive: bool) -> bool | None:
    """Say whether another description has locked a byte. None: the kernel does not say just now.

    A question about an exclusive lock sees no shared ones, so a peer's shared locks cannot pose as the granter's.
    """
    kind = fcntl.F_RDLCK if exclusive else fcntl.F_WRLCK
    try:
        answer = fcntl.fcntl(master, fcntl.F_OFD_GETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    except OSError:
        return None
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def lease_is_free(master: int) -> bool | None:
    """Say whether no other description is left. None: this computer, or root, lets nobody ask; then locks decide."""
    try:
        fcntl.fcntl(master, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return None if error.errno in _NO_LEASES else False  # False: it is held, or there is no memory to find out
    try:
        fcntl.fcntl(master, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        pass  # the next look takes it back
    return True
