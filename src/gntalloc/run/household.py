"""Keep a fresh machine with lasting domains around programs that are started here.

    gntalloc machine --domain 1 --domain 2 -- COMMAND      one program, `run_around`
    gntalloc run --pair --in-1 … --in-2 …                  one for each domain, run/pair.py

The programs find the machine through their environment: $GNTALLOC_MACHINE is what `gntalloc run` joins inside. When the
block ends, all processes that were started in it end, also those left in the background, and so does the machine.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import struct
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from gntalloc.clock import Deadline
from gntalloc.embed import Machine
from gntalloc.errors import GntallocError
from gntalloc.places import MACHINE_VARIABLE
from gntalloc.run.children import adopt_orphans, children, send
from gntalloc.run.program import signal_descriptor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["NOT_EXECUTABLE", "NOT_FOUND", "TIME_OVER", "CannotStart", "Household", "run_around"]

TIME_OVER, NOT_EXECUTABLE, NOT_FOUND = 124, 126, 127
"""Exit statuses, as of timeout(1) and of a shell."""

_HANDED_ON = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
_CHANGED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores them
_SIGNAL_INFO = struct.Struct("=I4xiI112x")  # struct signalfd_siginfo: number, code, sender
_FROM_A_PROCESS = 0  # codes up to here: kill(2) and the like; the terminal's signals reach all processes by themselves
_GRACE = 2.0  # seconds between SIGTERM and SIGKILL for the processes that are left
_NAP = 0.01


class CannotStart(GntallocError):
    """A program cannot be started; `status` is the exit status that a shell would have."""

    status = NOT_EXECUTABLE


class Household:
    """Own a machine, and the processes started here that live in it. Use it in a `with`, in the main thread.

    Args:
        domains: the domains to make, each with the uid of the user whose programs may enter it.
        settings: the Machine's.

    Attributes:
        machine: the Machine.
        ended: the wait status of each process that has ended, by pid.
    """

    def __init__(self, domains: Mapping[int, int], **settings: Any) -> None:
        self.machine = Machine(**settings)
        self.ended: dict[int, int] = {}
        self._started: set[int] = set()
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*_HANDED_ON, signal.SIGCHLD})
        self._signals = signal_descriptor({*_HANDED_ON, signal.SIGCHLD})
        self._poll = select.poll()
        self._poll.register(self._signals, select.POLLIN)
        self._readers: dict[int, Callable[[], None]] = {}
        adopt_orphans()
        try:
            for domid, uid in domains.items():
                domain = self.machine.domain(domid, uid=uid)
                domain.devices.close()
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """The environment that puts a program's `gntalloc run`, `list` and so on into this machine."""
        return {**os.environ, MACHINE_VARIABLE: self.machine.folder}

    def start(self, command: Sequence[str], *, stdout: int = 1, stderr: int = 2) -> int:
        """Start a program, and return its pid.

        Args:
            command: the program, looked for in PATH, and its arguments.
            stdout: the descriptor that becomes its standard output.
            stderr: the descriptor that becomes its standard error.

        Raises:
            CannotStart: it is not there, or cannot be executed.
        """
        try:
            pid = os.posix_spawnp(
                command[0],
                list(command),
                self.environment,
                file_actions=[(os.POSIX_SPAWN_DUP2, stdout, 1), (os.POSIX_SPAWN_DUP2, stderr, 2)],
                setsigmask=self._mask,
                setsigdef=_CHANGED_BY_PYTHON,
            )
        except OSError as error:
            refusal = CannotStart(error.errno or errno.EIO, f"{command[0]} cannot be started: {error.strerror}")
            refusal.status = NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE
            raise refusal from None
        self._started.add(pid)
        return pid

    def watch(self, descriptor: int, read: Callable[[], None]) -> None:
        """Call `read` whenever `descriptor` is readable, in `wait`."""
        self._readers[descriptor] = read
        self._poll.register(descriptor, select.POLLIN)

    def unwatch(self, descriptor: int) -> None:
        """Stop watching `descriptor`."""
        if self._readers.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)

    def wait(self, done: Callable[[], bool], *deadlines: Deadline) -> bool:
        """Serve the watched descriptors, and hand signals on to the programs, until `done`.

        False: a deadline came first.

        Args:
            done: asked after each event.
            deadlines: the first of them counts.
        """
        while not done():
            if any(deadline.expired for deadline in deadlines):
                return False
            left = min((each.milliseconds for each in deadlines if each.milliseconds is not None), default=None)
            for descriptor, _ in self._poll.poll(None if left is None else left + 1):
                if descriptor == self._signals:
                    self._hear_signal()
                elif descriptor in self._readers:
                    self._readers[descriptor]()
        return True

    def signal(self, number: int) -> None:
        """Send a signal to the programs that were started here and have not ended."""
        for pid in self._started - self.ended.keys():
            with suppress(ProcessLookupError):
                os.kill(pid, number)  # no other process collects it, so the number is still its own

    def end(self) -> None:
        """End every process that is left: by SIGTERM, and after a while by SIGKILL."""
        for number, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
            deadline = Deadline(patience)
            while (left := self._left()) and not deadline.expired:
                for process in left:
                    send(process, number)
                    os.close(process)
                time.sleep(_NAP)
                self._collect()
            for process in left:
                os.close(process)

    def close(self) -> None:
        """End every process that is left, and the machine. The call can be repeated."""
        if self._signals < 0:
            return
        self.end()
        self.machine.close()
        os.close(self._signals)
        self._signals = -1
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _left(self) -> list[int]:
        return children(lambda pid, _status: pid != self.machine.pid)

    def _hear_signal(self) -> None:
        try:
            number, code, _ = _SIGNAL_INFO.unpack(os.read(self._signals, _SIGNAL_INFO.size))
        except BlockingIOError:
            return
        if number == signal.SIGCHLD:
            self._collect()
        elif code <= _FROM_A_PROCESS:
            self.signal(number)

    def _collect(self) -> None:
        """Collect the children that have ended, adopted orphans too. The machine's Popen collects the machine."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if found is None or found.si_pid == self.machine.pid:
                    return
                pid, status = os.waitpid(found.si_pid, 0)
            except ChildProcessError:
                return
            self.ended[pid] = status


def run_around(
    command: Sequence[str], domains: Mapping[int, int], *, timeout: float | None = None, **settings: Any
) -> int:
    """Run a command inside a fresh machine, and return its wait status, or 124 << 8 if its time was over.

    Args:
        command: the program and its arguments.
        domains: see Household.
        timeout: seconds for the command. None: for ever.
        settings: the Machine's.

    Raises:
        CannotStart: the command cannot be started.
        GntallocError: the machine cannot be started.
    """
    with Household(domains, **settings) as household:
        pid = household.start(command)
        if not household.wait(lambda: pid in household.ended, Deadline(timeout)):
            print(f"gntalloc: {command[0]} did not end within {timeout:g} s, and is ended", file=sys.stderr, flush=True)
            return TIME_OVER << 8
    return household.ended[pid]
