"""Find machines: each has a folder, with a socket for each domain and one for control.

    $XDG_RUNTIME_DIR/gntalloc/NAME/control     0600: listing, limits, making and ending domains
    $XDG_RUNTIME_DIR/gntalloc/NAME/1           domain 1
    $XDG_RUNTIME_DIR/gntalloc/NAME/2           domain 2
    $XDG_RUNTIME_DIR/gntalloc/NAME/2.store     its xenstore, which speaks xenstored's wire

Without XDG_RUNTIME_DIR it is /run/gntalloc for root and /tmp/gntalloc-UID for others.
"""

from __future__ import annotations

import errno
import os
import re
import stat

from gntalloc.digits import whole_number
from gntalloc.errors import GntallocError

__all__ = [
    "MACHINE_VARIABLE",
    "clear_folder",
    "control_path",
    "domain_path",
    "domids",
    "is_name",
    "lock_path",
    "machine_folder",
    "machines",
    "store_path",
    "top_folder",
]

MACHINE_VARIABLE = "GNTALLOC_MACHINE"
"""Names the machine that programs inside `gntalloc machine … -- COMMAND` use, unless they name another."""

LONGEST_PATH = 107  # bytes of a Unix socket's path, less its final zero
_ROOM_FOR_A_NAME = 20  # bytes: of-PID-NUMBER fits
_LONGEST_NAME = "32751.store-"  # the last character marks a socket that nobody listens on yet
_SOCKET = re.compile(r"(control|[0-9]{1,5}(\.store)?)-?")  # the names of a machine's own sockets


def top_folder() -> str:
    """Give the folder of this user's machines. It need not exist."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime) and os.path.isdir(runtime):  # XDG: a relative path is no runtime folder
        return os.path.join(runtime, "gntalloc")
    uid = os.getuid()
    return "/run/gntalloc" if uid == 0 else f"/tmp/gntalloc-{uid}"


def machine_folder(name: str) -> str:
    """Give the folder of the machine `name`: a word, or a path to have it elsewhere.

    Raises:
        GntallocError: the name cannot be a machine's, or its sockets would have too long a path; or the folder above
            was made by another user, who could then answer in the machine's place.
    """
    if not is_name(name):
        raise GntallocError(
            errno.EINVAL, f"a machine cannot be called {name[:200]!r}; give it a word, or a path with a /"
        )
    if "/" in name:
        try:
            folder = os.path.abspath(name)
        except OSError as error:  # the path is relative, and the current folder has been removed
            raise GntallocError(
                error.errno or errno.ENOENT, f"{name}: there is no current folder ({error.strerror}); give a whole path"
            ) from None
    else:
        folder = os.path.join(top_folder(), name)
        if os.path.lexists(top_folder()):
            _see_whose(top_folder())
    _see_to_length(folder, given=name)
    return folder


def is_name(name: str) -> bool:
    """Say whether it can be a machine's name: a word, or a path. The path of its folder may still be too long."""
    return bool(name) and name not in {".", ".."} and "\0" not in name


def _see_to_length(folder: str, given: str) -> None:
    over = len(os.fsencode(os.path.join(folder, _LONGEST_NAME))) - LONGEST_PATH
    if over <= 0:
        return
    asked = f"{folder} is {over} bytes too long for sockets in it (their paths have {LONGEST_PATH} at most)"
    if "/" in given or len(os.fsencode(given)) - over >= _ROOM_FOR_A_NAME:
        raise GntallocError(errno.ENAMETOOLONG, f"{asked}; choose a shorter {'path' if '/' in given else 'name'}")
    raise GntallocError(
        errno.ENAMETOOLONG,
        f"{asked}; set XDG_RUNTIME_DIR to a folder with a shorter path, such as /run/user/{os.getuid()}",
    )


def make_top_folder() -> None:
    """Make the folder of this user's machines, and see that it is this user's.

    Raises:
        GntallocError: another user owns it, or it cannot be made.
    """
    folder = top_folder()
    try:
        os.makedirs(folder, mode=0o755, exist_ok=True)
    except OSError as error:
        raise GntallocError(
            error.errno or errno.EIO,
            f"{folder} cannot be made: {error.strerror}; set XDG_RUNTIME_DIR to a folder of yours",
        ) from None
    _see_whose(folder)


def _see_whose(folder: str) -> None:
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise GntallocError(errno.EACCES, f"{folder} is not a folder of yours; set XDG_RUNTIME_DIR to one that is")


def clear_folder(folder: str) -> None:
    """Remove a machine's folder, with the sockets that a killed machine has left there, and nothing else.

    Raises:
        GntallocError: something else is in it, so it is no machine's folder; or it cannot be removed.
    """
    try:
        with os.scandir(folder) as entries:
            left = list(entries)
        for entry in left:
            if not (_SOCKET.fullmatch(entry.name) and stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode)):
                raise GntallocError(
                    errno.ENOTEMPTY,
                    f"{folder} is not a machine's folder: {entry.name!r} is there; choose another name or path",
                )
        for entry in left:
            os.unlink(entry.path)
        os.rmdir(folder)
    except GntallocError:
        raise
    except FileNotFoundError:
        pass  # it is not there, or another process removes it just now
    except OSError as error:
        raise GntallocError(error.errno or errno.EIO, f"{folder} cannot be cleared: {error.strerror}") from None


def domids(folder: str) -> list[int]:
    """List the domains that have a socket in a machine's folder, in order. Give none if it cannot be read."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return sorted(number for number in map(whole_number, names) if number is not None)


def control_path(folder: str) -> str:
    """Give the path of the control socket of the machine in `folder`."""
    return os.path.join(folder, "control")


def domain_path(folder: str, domid: int) -> str:
    """Give the path of the socket of domain `domid` of the machine in `folder`."""
    return os.path.join(folder, str(domid))


def store_path(folder: str, domid: int) -> str:
    """Give the path of the xenstore socket of domain `domid` of the machine in `folder`."""
    return os.path.join(folder, f"{domid}.store")


def lock_path(folder: str) -> str:
    """Give the path of the lock beside `folder`. A `run` holds it while it starts, joins or ends the machine there."""
    return folder + ".lock"


def machines() -> list[str]:
    """List the names of this user's machines, running or left behind, in order.

    Raises:
        GntallocError: the folder of machines cannot be read.
    """
    try:
        names = os.listdir(top_folder())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise GntallocError(
            error.errno or errno.EIO,
            f"{top_folder()}, where machines are, cannot be looked into: {error.strerror}; set XDG_RUNTIME_DIR to a "
            "folder of yours",
        ) from None
    return sorted(name for name in names if os.path.exists(control_path(os.path.join(top_folder(), name))))
