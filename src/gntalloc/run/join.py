"""Find the machine that a `run` joins, or start it. A machine that was started so ends with the last run in it.

Runs that start at once agree by a lock beside the machine's folder: the run that has it finds a machine that answers,
or starts one. A machine without runs takes the same lock before it ends, so no run joins one that is ending.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from gntalloc.claims import claim, open_lock, stays, sweep, take_away
from gntalloc.clock import Deadline
from gntalloc.embed import start_machine
from gntalloc.errors import GntallocError, MachineGone, NoMachine
from gntalloc.guest.control import ControlClient
from gntalloc.places import control_path, domain_path, lock_path, machine_folder, make_top_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["join", "tidy"]

_STARTING, _NAP = 10.0, 0.01  # seconds for another machine that starts or ends there, and between two looks
_LEAST = (  # hard limits
    (resource.RLIMIT_NOFILE, 64, "open files (ulimit -Hn)"),
    (resource.RLIMIT_FSIZE, 1 << 20, "bytes in a file (ulimit -Hf)"),
)


def join(name: str, domid: int) -> tuple[ControlClient | None, str]:
    """Enter domain `domid` of machine `name`. Both are made if they are not there.

    Return the connection that stands for this run in the domain, and the path of the domain's socket. The domain lives
    until its last such connection ends. The connection is None if the machine is another user's, who has made the
    domain for this user.

    Raises:
        GntallocError: the domain cannot be entered; the text says why.
    """
    folder = machine_folder(name)
    path = domain_path(folder, domid)
    if os.path.exists(path) and not os.access(control_path(folder), os.W_OK):
        return None, path
    if "/" not in name:
        make_top_folder()
    with _alone(folder):
        deadline = Deadline(_STARTING)
        while True:
            control = _enter(ControlClient(folder), domid) if os.path.exists(control_path(folder)) else None
            if control is not None:
                return control, path
            with suppress(FileExistsError):  # a machine is starting there, or ending
                return _start(name, folder, domid), path
            if deadline.expired:
                raise GntallocError(
                    errno.EBUSY, f"a machine has {folder} and does not answer; end it, or choose another --machine"
                )
            time.sleep(_NAP)


def _start(name: str, folder: str, domid: int) -> ControlClient:
    """Start a machine in `folder`, and enter the domain. If that fails, nothing of the machine is left.

    Raises:
        FileExistsError: another machine has the folder.
        GntallocError: it cannot be started.
    """
    try:
        _see_to_limits()
        sweep()
        take_away(folder)  # a killed machine may have left it
        os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
        claimed = claim(folder)
        _, sock = start_machine(folder, claimed, {"until_left": True}, quiet=True)
    except FileExistsError:
        raise
    except OSError as error:
        _take_away(folder)
        if isinstance(error, GntallocError):
            raise
        why = f"the machine {name!r} cannot be started: {error.strerror}"
        raise GntallocError(error.errno or errno.EIO, why) from None
    control = _enter(ControlClient(folder, sock=sock), domid)
    if control is None:
        _take_away(folder)
        raise GntallocError(f"the machine {name!r} did not start; `gntalloc doctor` may know why")
    return control


def _see_to_limits() -> None:
    """Check this run's limits. The machine that it starts lives under them, and would end without a word."""
    for limit, least, what in _LEAST:
        _, hard = resource.getrlimit(limit)
        if hard != resource.RLIM_INFINITY and hard < least:
            raise GntallocError(
                errno.EMFILE,
                f"a machine cannot be started with a limit of {hard} {what}: it needs {least} or more. Raise it, or "
                "have the machine started by another run or by `gntalloc machine`",
            )


def tidy(folder: str) -> None:
    """Remove the files that a killed machine has left in `folder`."""
    if _nobody_answers(folder):
        with _alone(folder):
            if _nobody_answers(folder) or not os.path.exists(folder):  # no other machine was started since
                _take_away(folder)


def _take_away(folder: str) -> None:
    """Remove the files of a machine that is not there any more. The caller has its lock."""
    with suppress(GntallocError):
        take_away(folder)
    os.unlink(lock_path(folder))


def _nobody_answers(folder: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(control_path(folder))
        except ConnectionRefusedError:
            return True
        except OSError:
            pass  # it is not there, or not ours
    return False


def _enter(control: ControlClient, domid: int) -> ControlClient | None:
    """Enter the domain over `control`, and return that. None: nobody answers."""
    try:
        control.order("enter", domid=domid)
    except (NoMachine, MachineGone):
        control.close()
        return None
    return control


@contextmanager
def _alone(folder: str) -> Iterator[None]:
    path = lock_path(folder)
    while True:
        try:
            lock = open_lock(path)
        except GntallocError:
            raise
        except OSError as error:
            raise GntallocError(error.errno or errno.EIO, f"{path} cannot be locked: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not stays(lock, path):  # a machine that ended has removed it while we waited
                continue
            yield
            return
        finally:
            os.close(lock)
