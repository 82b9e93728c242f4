"""Be the supervisor's process: join the machine, start the program, serve it, and collect children that end.

The process blocks all signals, has no streams, and is in a session of its own. So neither the terminal nor a signal to
the program's group ends it before the program. It ends when no process is left under the filter.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import socket
from typing import Any, NoReturn

from gntalloc.errors import GntallocError, NoMachine
from gntalloc.libc import PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, libc
from gntalloc.places import store_path
from gntalloc.run.join import join, tidy
from gntalloc.run.program import LIMITS, CannotExecute, Program, signal_descriptor, start
from gntalloc.run.supervisor import Supervisor
from gntalloc.syscalls.listener import Listener

__all__ = ["be_the_supervisor", "let_go"]

_NOT_FOUND, _NOT_EXECUTABLE = 127 << 8, 126 << 8
_UMASK = 0o022
_LAST_STREAM = 2


def be_the_supervisor(program: Program, news: socket.socket, process: int, machine: str, domid: int) -> NoReturn:
    """Be the supervisor until the end. `news` goes to `run`, which tells the shell; `process` is a descriptor of it."""
    run = _Run(news, process)
    try:
        _be_free_of_the_caller()
        run.begin(program, machine, domid)
        run.serve()
    except GntallocError as error:
        run.tell(failed=str(error), errno=error.errno, no_machine=isinstance(error, NoMachine))
    except CannotExecute as refusal:
        run.tell(say=f"{program.path} cannot be executed: {_why(program, refusal.code)}")
        run.tell(ended=_NOT_FOUND if refusal.code == errno.ENOENT else _NOT_EXECUTABLE)
    except OSError as error:
        what = f"the supervisor cannot work: {error.strerror or error}; `gntalloc doctor` may know why"
        run.tell(failed=what, errno=error.errno or errno.EIO, no_machine=False)
    except BaseException as error:
        run.tell(failed=f"the supervisor failed: {error!r}", errno=errno.EIO, no_machine=False)
    finally:
        os._exit(0)


class _Run:
    """Live through one run, from its beginning to the end of its last process."""

    def __init__(self, news: socket.socket, run: int) -> None:
        self._news: socket.socket | None = news  # None: `run` has ended
        self._run = run
        self._stopped = False
        self._child = -1
        self._ended = False
        self._poll = select.poll()

    def tell(self, **what: Any) -> None:
        """Tell `run` something."""
        if self._news is not None:
            try:
                self._news.send(json.dumps(what).encode())
            except OSError:
                pass

    def begin(self, program: Program, machine: str, domid: int) -> None:
        """Join the machine, and start the program.

        Raises:
            GntallocError, CannotExecute: see `join` and `start`.
        """
        self._standing, path = join(machine, domid)  # our place in the domain, for as long as we live
        self._folder = os.path.dirname(path)
        self._supervisor = Supervisor(
            path, say=lambda text: self.tell(say=text), explain=program.verbose, all_opens=program.all_opens
        )
        store = store_path(os.path.dirname(path), self._supervisor.files.domid)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._children = signal_descriptor([signal.SIGCHLD])
        environment = {"GNTALLOC_DOMAIN": path, "XENSTORED_PATH": store}
        self._child, descriptor = start(program, environment, self._announce)
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        self._listener = Listener(descriptor)
        self._supervisor.begin(self._listener, mark=program.mark, died=self._saw_the_end)
        _stand_apart()

    def _announce(self, child: int) -> None:
        """Tell `run` that signals to it are the program's from now on."""
        self._process = os.pidfd_open(child)
        assert self._news is not None
        socket.send_fds(self._news, [json.dumps({"started": child}).encode()], [self._process])

    def serve(self) -> None:
        """Serve the run until no process of it is left."""
        listener = self._listener.fileno()
        assert self._news is not None
        news = self._news.fileno()
        for descriptor in (self._children, news):
            self._poll.register(descriptor, select.POLLIN)
        self._supervisor.hear()  # a call may have come together with the answer that the machine serves
        machine = -1
        while True:
            machine = self._wait_for_calls(listener, machine)
            for descriptor, events in self._poll.poll():
                if descriptor == listener:
                    if events & select.POLLIN:
                        self._supervisor.serve()
                    elif events & (select.POLLHUP | select.POLLERR):
                        self._wait_for_the_end()
                        return
                elif descriptor == machine:
                    self._supervisor.hear()
                elif descriptor == self._children:
                    os.read(self._children, 4096)
                    self._collect()
                elif descriptor == news:
                    self._run_has_ended()

    def _wait_for_calls(self, listener: int, before: int) -> int:
        """Wait for calls of the program, and for the machine. Return the machine's descriptor, -1 if it has none.

        `before` is the descriptor that the machine had.
        """
        supervisor = self._supervisor
        # Otherwise the machine takes the calls, and only the end is seen here.
        self._poll.register(listener, select.POLLIN if supervisor.serves else 0)
        machine = supervisor.machine
        if machine != before:
            if before >= 0:
                self._poll.unregister(before)
            if machine >= 0:
                self._poll.register(machine, select.POLLIN)
        return machine

    def _run_has_ended(self) -> None:
        """Kill the program if it still runs: a signal that killed `run` was meant for it."""
        assert self._news is not None
        self._poll.unregister(self._news)
        self._news.close()
        self._news = None
        if not self._ended:
            try:
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
            except OSError:
                pass

    def _wait_for_the_end(self) -> None:
        """Wait for the program's status, which may come a moment after the last process left the filter."""
        while not self._ended:
            self._saw_the_end(*os.waitpid(self._child, 0))
        if self._standing is not None:
            tidy(self._folder)

    def _collect(self) -> None:
        """Collect news of children: the program stops or ends, and others were left to us."""
        while True:
            try:
                child, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return
            if not child:
                return
            if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
                if child == self._child:
                    self._stop(stopped=os.WIFSTOPPED(status))
            else:
                self._saw_the_end(child, status)

    def _saw_the_end(self, child: int, status: int) -> None:
        if child == self._child and not self._ended:
            self._ended = True
            self.tell(ended=status)
            self._stop(stopped=False)

    def _stop(self, *, stopped: bool) -> None:
        """Let `run` stop or go on. It is done here and not by `run` itself, which keeps the order of events."""
        if stopped or self._stopped:
            self._stopped = stopped
            try:
                signal.pidfd_send_signal(self._run, signal.SIGSTOP if stopped else signal.SIGCONT)
            except OSError:
                pass  # it has ended


def _be_free_of_the_caller() -> None:
    """Drop the caller's signals, limits and files: they are for the program, not for us or a machine that we start."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for limit in LIMITS:
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))
    os.umask(_UMASK)


def _why(program: Program, code: int) -> str:
    if code == errno.ENOENT and os.path.exists(program.path):
        return "what its first line (#!) names, or its loader, is not there"
    if code == errno.EACCES and os.path.isdir(program.path):
        return "it is a folder"
    return os.strerror(code)


def _stand_apart() -> None:
    """Leave the session and streams of the program and the terminal."""
    # A group of its own in the same session would not do. A process of one group that has its parent in another ties
    # the two together. We would be such a tie, and when the last one goes while a member of the group is stopped, the
    # kernel hangs up on the group (SIGHUP to all of it).
    os.setsid()
    os.chdir("/")
    let_go(0, 1, 2)


def let_go(*streams: int) -> None:
    """Close these streams, and any other descriptor that we were started with.

    They are the program's: when it has closed a pipe, the pipe's other end must see that. Our own descriptors are all
    close-on-exec.
    """
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for stream in streams:
        os.dup2(nothing, stream)
    os.close(nothing)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            if descriptor > _LAST_STREAM and os.get_inheritable(descriptor):
                os.close(descriptor)
        except OSError:
            pass  # the descriptor that listdir used
