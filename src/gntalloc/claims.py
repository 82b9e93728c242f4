"""Claim a machine's folder by a lock, and take away folders and locks that are nobody's.

A machine has its folder locked (flock) for as long as its process lives. The kernel takes the lock off when the process
ends, in whatever way. So a folder that can be locked is nobody's, however young it is:

* The process that makes a folder locks it then, and looks whether it is still there. If another has taken it away in
  between, it makes it again.
* The process that takes a folder away locks it before, and keeps the lock until it is gone.

A lock file beside a folder (see `places.lock_path`) is taken away in the same way, if there is no such folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time

from gntalloc.errors import GntallocError
from gntalloc.places import clear_folder, control_path, lock_path, top_folder

__all__ = ["claim", "open_lock", "stays", "sweep", "take_away", "take_away_lock"]

_LOCK = lock_path("")
_TRIES, _NAP = 200, 0.01  # of a folder that is being taken away just now


def claim(folder: str) -> int:
    """Make the folder of a machine, locked. Its parent is there. Give the descriptor that has the lock.

    Raises:
        FileExistsError: it is there already.
        OSError: it cannot be made.
    """
    os.mkdir(folder, 0o700)
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            if _locks(descriptor) and stays(descriptor, folder):
                return descriptor
            os.close(descriptor)
        # Another process takes it for nobody's, which it was for a moment, and takes it away.
        time.sleep(_NAP)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
    raise FileExistsError(errno.EEXIST, "another machine is starting there", folder)


def open_lock(path: str) -> int:
    """Open a lock file, made if it is not there. It is not locked yet.

    Raises:
        OSError: it cannot be opened; ELOOP: a symbolic link is there.
        GntallocError: EACCES it is another user's, who could keep it locked for ever, or it is no plain file.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
        return descriptor
    os.close(descriptor)
    raise GntallocError(errno.EACCES, f"{path} is no lock of yours; have the machine in a folder of yours")


def stays(descriptor: int, path: str) -> bool:
    """Say whether `path` still leads to what `descriptor` has open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def sweep() -> list[str]:
    """Take away what killed machines have left in this user's folder of machines. Give the names of what is gone."""
    top = top_folder()
    try:
        if os.lstat(top).st_uid != os.getuid():
            return []
        names = sorted(os.listdir(top))
    except OSError:
        return []
    gone = []
    for name in names:
        with contextlib.suppress(GntallocError):  # there is more in it than a machine's sockets
            if not name.endswith(_LOCK) and take_away(os.path.join(top, name)):
                gone.append(name)
    return gone + [name for name in names if name.endswith(_LOCK) and take_away_lock(os.path.join(top, name))]


def take_away(folder: str) -> bool:
    """Take away a machine's folder, if it is nobody's. False: it is some machine's, or it is not there.

    Raises:
        GntallocError: something else is in it, so it is no machine's folder; or it cannot be removed.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise GntallocError(error.errno or errno.EIO, f"{folder} cannot be cleared: {error.strerror}") from None
    try:
        if not (_locks(descriptor) and stays(descriptor, folder)) or _answers(folder):
            return False
        clear_folder(folder)
    finally:
        os.close(descriptor)
    return True


def take_away_lock(path: str) -> bool:
    """Take away a lock file that nobody holds, if the folder that it is for is not there."""
    if os.path.lexists(path[: -len(_LOCK)]):
        return False
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size or not _locks(descriptor):
            return False
        if os.path.lexists(path[: -len(_LOCK)]) or not stays(descriptor, path):
            return False  # the process that had the lock has started a machine
        os.unlink(path)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _answers(folder: str) -> bool:
    """Whether a machine is there all the same: one of an older version, which locks nothing."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(control_path(folder))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            pass  # its queue is full, or the path is too long to tell
    return True
