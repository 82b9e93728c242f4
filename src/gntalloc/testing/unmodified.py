"""A program that knows nothing of us, under `gntalloc run`, to be named, killed, and ended with all it has left.

    test ── run ── supervisor ── PROGRAM ── its children

`run` is the child that the test sees: it ends as the program ends. What the program has left in the background goes on
then, as after a shell; all of it are descendants of the supervisor, which collects orphans and ends with the last.
"""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gntalloc.clock import Deadline
from gntalloc.descriptors import receive_with
from gntalloc.errors import GntallocError, TimedOut

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gntalloc.domain import Domain

__all__ = ["Unmodified", "main"]

__tracebackhide__ = True  # for pytest: what is raised here is about the caller's program

_PATIENCE = 30.0  # seconds, against hangs
_NAP = 5  # milliseconds
# -I -S: the environment is the program's, and nothing of it is for us.
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from gntalloc.testing.unmodified import main; main()"


class Unmodified:
    """A command in `domain`, which has begun.

    Args:
        domain: of a machine.
        command: the program, looked for in PATH, and its arguments.
        options: for subprocess.Popen, of the program.

    Attributes:
        process: the subprocess.Popen of `run`.
        pid: of the program.

    Raises:
        FileNotFoundError: there is no such program.
        GntallocError: it could not be started; the text says why.
        TimedOut: it has not begun.
    """

    def __init__(self, domain: Domain, command: Sequence[str], options: dict[str, Any]) -> None:
        _see_that_it_is_there(command[0], options)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                where = json.dumps(sys.path), str(theirs.fileno()), str(domain.domid), os.path.dirname(domain.address)
                passed = (*options.pop("pass_fds", ()), theirs.fileno())
                call = [sys.executable, "-I", "-S", "-c", _CHILD, *where, *command]
                self.process = subprocess.Popen(call, pass_fds=passed, **options)
            try:
                self._hear_of_it(ours, command[0])
            except BaseException:
                self.process.kill()  # and the supervisor ends what has begun
                self.process.wait()
                raise

    def _hear_of_it(self, news: socket.socket, name: str) -> None:
        """Wait until the program has begun."""
        news.settimeout(_PATIENCE)
        try:
            data, descriptors = receive_with(news, 65536, 2)
        except TimeoutError:
            raise TimedOut(f"{name} has not begun within {_PATIENCE:g} s") from None
        if not data:
            raise GntallocError(f"{name} could not be started; what it has written to standard error says why")
        told = json.loads(data)
        if "failed" in told:
            raise GntallocError(told["errno"], told["failed"])
        self.pid, self._supervisor = told["pid"], told["supervisor"]
        self._descriptors = descriptors  # of both processes; numbers may be another's when they have ended

    def send_signal(self, number: int) -> None:
        """To the program itself. It may have ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptors[0], number)

    def close(self) -> None:
        """End the program and all that it has left. Can be repeated.

        Raises:
            TimedOut: something did not end.
        """
        if not self._descriptors:
            return
        supervisor = self._descriptors[1]
        deadline = Deadline(_PATIENCE)
        while not _has_ended(supervisor, _NAP):  # it does when nobody is left
            for process in _kill_descendants(self._supervisor):
                gone = _has_ended(process, deadline.milliseconds)
                os.close(process)
                if not gone:
                    raise TimedOut(f"something that pid {self.pid} has started was killed, and does not end")
            if deadline.expired:
                raise TimedOut(f"what pid {self.pid} has started goes on starting others, and does not end")
        self.process.wait(_PATIENCE)
        while self._descriptors:
            os.close(self._descriptors.pop())


def _see_that_it_is_there(program: str, options: dict[str, Any]) -> None:
    """Look for it as `run` will.

    Raises:
        FileNotFoundError, PermissionError: as of Popen.
    """
    path = os.path.join(options.get("cwd") or "", program) if "/" in program else program
    if shutil.which(path, path=options["env"].get("PATH")) is not None:
        return
    if os.path.exists(path) and "/" in program:
        raise PermissionError(errno.EACCES, "this is no program that may be executed", path)
    where = "there is no such program" if "/" in program else "there is no such program in PATH"
    raise FileNotFoundError(errno.ENOENT, f"{where}; build it first, or give its whole path", program)


def _kill_descendants(ancestor: int) -> list[int]:
    """With SIGKILL, from the top. Gives a descriptor of each."""
    parents = {int(name): _parent(name) for name in os.listdir("/proc") if name.isdecimal()}
    found = [ancestor]
    for each in found:  # which grows meanwhile
        found += [pid for pid, parent in parents.items() if parent == each]
    killed = []
    for pid in found[1:]:
        with suppress(ProcessLookupError):
            killed.append(os.pidfd_open(pid))
            if _parent(str(pid)) == parents[pid]:
                signal.pidfd_send_signal(killed[-1], signal.SIGKILL)
            else:  # the number has become another's
                os.close(killed.pop())
    return killed


def _has_ended(process: int, timeout: float | None) -> bool:
    """Wait so many milliseconds for the end of the process that this is a descriptor of."""
    waiting = select.poll()
    waiting.register(process, select.POLLIN)
    return bool(waiting.poll(timeout))


def _parent(pid: str) -> int:
    """-1: it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[1])
    except OSError:
        return -1


# In the child.


def main() -> None:
    """Be `gntalloc run`, and tell the test what has begun."""
    from gntalloc.run.launcher import run

    number, domid, folder, *command = sys.argv[2:]
    news = socket.socket(fileno=int(number))
    news.set_inheritable(False)
    waited_for = True

    def begun(pid: int, process: int, supervisor: int) -> None:
        nonlocal waited_for
        waited_for = False
        other = os.pidfd_open(supervisor)
        told = json.dumps({"pid": pid, "supervisor": supervisor}).encode()
        with suppress(OSError):
            socket.send_fds(news, [told], [process, other])
        os.close(other)
        news.close()

    try:
        status = run(command, domid=int(domid), machine=folder, begun=begun)
    except GntallocError as error:
        if not waited_for:
            sys.exit(f"gntalloc run: {error}")
        news.send(json.dumps({"failed": str(error), "errno": error.errno}).encode())
        sys.exit(1)
    sys.exit(status)
