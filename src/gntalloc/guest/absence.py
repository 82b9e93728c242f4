"""Say why nobody answers at a machine's socket: no machine, a dead one, no such domain, or somebody else's."""

from __future__ import annotations

import errno
import os
import pwd
import socket

from gntalloc import waits
from gntalloc.digits import whole_number
from gntalloc.errors import NoMachine
from gntalloc.places import control_path, domids, top_folder

__all__ = ["nobody_answers"]

_MAKE = "Use one of these, or have it made: `gntalloc machine --domain`, `gntalloc run`, Machine.domain() in Python"
_START = "start one with `gntalloc machine`, or use gntalloc.Machine() in Python"


def nobody_answers(path: str, error: OSError) -> NoMachine:
    """Build the error to raise where connecting to `path` failed with `error`. It has the same errno."""
    return NoMachine(error.errno or errno.EINVAL, _reason(path, error))


def _reason(path: str, error: OSError) -> str:
    folder, socket_name = os.path.split(path)
    if error.errno in {errno.EACCES, errno.EPERM}:
        return _not_for_us(path, folder, socket_name)
    if error.errno == errno.ENOENT and socket_name != "control" and os.path.isdir(folder):
        there = domids(folder)
        if there and _answers(folder):
            has = f"machine {_called(folder)} answers and has domains {', '.join(map(str, there))}"
            return f"{has}; there is no domain {socket_name}. {_MAKE}"
    if error.errno == errno.ECONNREFUSED:
        return f"no machine answers at {path}: what is there was left by one that has ended; {_START}"
    why = error.strerror or str(error)
    return f"no machine answers at {path or repr(path)} ({why}); {_START}"


def _not_for_us(path: str, folder: str, socket_name: str) -> str:
    owner = _owner(folder) or _owner(path) or "another user"  # a domain's socket is its user's
    if socket_name == "control":
        return f"the machine at {folder} is {owner}'s, and takes orders of its owner only; ask as that user, or as root"
    asked = f"domain {socket_name} of the machine at {folder}" if whole_number(socket_name) is not None else path
    return (
        f"{asked} is {owner}'s, and not open to you (Permission denied). Its owner makes one for you with "
        f"`gntalloc machine --name FOLDER --domain DOMID:uid={os.getuid()}`, in a folder that you may enter"
    )


def _owner(path: str) -> str:
    """Name of whoever made it; nothing if that cannot be seen."""
    try:
        uid = os.stat(path).st_uid
    except OSError:
        parent = os.path.dirname(path)
        return _owner(parent) if parent != path and parent not in {"", "/", "/tmp", "/run"} else ""
    if uid == os.getuid():
        return ""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _called(folder: str) -> str:
    """Name a machine: by its word in the folder of machines, by its path elsewhere."""
    parent, name = os.path.split(folder)
    return name if parent == top_folder() else folder


def _answers(folder: str) -> bool:
    with waits.Socket(socket.AF_UNIX) as sock:
        sock.settimeout(1)
        try:
            sock.connect(control_path(folder))
        except PermissionError:
            return True  # it is another user's, who may have made domains for us
        except OSError:
            return False
    return True
