"""Stand for the program towards the shell that called `run`.

    shell ── run ── supervisor ── PROGRAM ── its children

`run` hands on signals that were sent to it, and ends as the program ends. The supervisor stops `run` when the program
stops, and lets it go on when the program goes on. The program is in the shell's process group, so the terminal's
signals reach it directly.

The supervisor is the program's parent, since where Yama guards ptrace only an ancestor may read a program's memory. It
lives until the last process of the run has ended; `run` does not wait for that.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from gntalloc.descriptors import receive_with
from gntalloc.errors import GntallocError, NoMachine
from gntalloc.run.children import adopt_orphans, children, send, status_of
from gntalloc.run.process import be_the_supervisor, let_go
from gntalloc.run.program import Program, signal_descriptor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["NOT_FOUND", "end_by", "run"]

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # exit statuses, as of a shell

_SIGNAL_INFO = struct.Struct("=I4xiI112x")  # struct signalfd_siginfo: number, code, sender
_FROM_A_PROCESS = 0  # codes up to here: kill(2) and the like; the terminal's signals have a higher one
_NOT_HANDED_ON = {signal.SIGCHLD, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
_DEADLY = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}

_STREAMS = 3


def run(
    command: Sequence[str],
    *,
    domid: int,
    machine: str = "default",
    userns: bool = False,
    all_opens: bool = False,
    begun: Callable[[int, int, int], None] | None = None,
    verbose: bool = False,
) -> int:
    """Run `command` in a domain, and return its exit status. If a signal ended it, this process ends by it too.

    Args:
        command: the program, looked for in PATH, and its arguments.
        domid: the domain, made if it is not there.
        machine: the machine's name, or the path of its folder; started if it does not run.
        userns: give the program a user namespace of its own, so that other domains' programs of the same user cannot
            reach into it.
        all_opens: serve opens for reading only too, and private maps. It costs all programs some time.
        begun: called when there is a process for the program, with its pid, a descriptor of it, and its supervisor's
            pid.
        verbose: say on standard error why each failing call fails, and which calls cannot be served.

    Raises:
        GntallocError: the program could not be started.
    """
    path = command[0] if "/" in command[0] else shutil.which(command[0])
    if path is None:
        return _not_found(command[0])
    _see_to_proc()
    _occupy_streams()
    every = signal.valid_signals()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, every)
    signals = signal_descriptor(every)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    adopt_orphans()  # in case the supervisor is killed
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    run = os.pidfd_open(os.getpid())
    try:
        supervisor = os.fork()
    except OSError as error:
        ours.close()
        theirs.close()
        os.close(run)
        os.close(signals)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise GntallocError(
            error.errno or errno.EAGAIN, f"no process can be started: {error.strerror}; `ulimit -u` may be too low"
        ) from None
    if not supervisor:
        ours.close()
        program = Program(path, list(command), mask, userns=userns, all_opens=all_opens, verbose=verbose)
        be_the_supervisor(program, theirs, run, machine, domid)
    theirs.close()
    os.close(run)
    let_go(0, 1)  # messages go to standard error
    try:
        status = _accompany(ours, signals, supervisor, begun)
    finally:
        ours.close()
        os.close(signals)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if os.WIFSIGNALED(status):
        end_by(os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


def _not_found(name: str) -> int:
    """Say why a program cannot be run. Return the exit status, as a shell's."""
    if found := shutil.which(name, os.F_OK):
        _say(f"{found} cannot be executed: {os.strerror(errno.EACCES)}")
        return NOT_EXECUTABLE
    _say(f"there is no program {name!r} in PATH")
    return NOT_FOUND


def _accompany(
    news: socket.socket, signals: int, supervisor: int, begun: Callable[[int, int, int], None] | None
) -> int:
    """Stand for the program until it ends, and return its wait status."""
    poll = select.poll()
    poll.register(news, select.POLLIN)
    poll.register(signals, select.POLLIN)
    process = -1
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == signals:
                try:
                    number, code, sender = _SIGNAL_INFO.unpack(os.read(signals, _SIGNAL_INFO.size))
                except BlockingIOError:
                    continue  # a stop takes back a SIGCONT that waits, and the other way round
                if process < 0 and number in _DEADLY:
                    return int(number)  # before there is a program the signal is for `run`
                sent = code <= _FROM_A_PROCESS and sender != supervisor  # the supervisor's is not for it
                if process >= 0 and sent and number not in _NOT_HANDED_ON:
                    send(process, number)
                continue
            data, descriptors = receive_with(news, 65536, 1)
            if not data:
                _end_all_that_is_left()
                return signal.SIGKILL  # the supervisor was killed, and the program with it
            what: dict[str, Any] = json.loads(data)
            if "started" in what:
                (process,) = descriptors
                os.set_inheritable(process, False)
                if begun is not None:
                    begun(what["started"], process, supervisor)
            elif "say" in what:
                _say(what["say"])
            elif "failed" in what:
                raise (NoMachine if what["no_machine"] else GntallocError)(what["errno"], what["failed"])
            elif "ended" in what:
                return int(what["ended"])


def _end_all_that_is_left() -> None:
    """End all that the program had started. It is ours since the supervisor is dead, and no process would serve it."""
    while children := _children():  # their children become ours when they have ended
        for child in children:
            send(child, signal.SIGKILL)
        for child in children:
            os.waitid(os.P_PIDFD, child, os.WEXITED)
            os.close(child)


def _children() -> list[int]:
    """Find each child that is under the filter: the machine is not."""
    filters = int(status_of("self")["Seccomp_filters"])
    return children(lambda _pid, status: int(status["Seccomp_filters"]) > filters)


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(f"gntalloc run: {text}", file=sys.stderr, flush=True)


def _see_to_proc() -> None:
    try:
        ours = os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        ours = False
    if not ours:
        raise GntallocError(
            errno.ENOENT,
            "/proc is not mounted, or shows the processes of another namespace: mount -t proc proc /proc "
            "(unshare --mount-proc)",
        )


def _occupy_streams() -> None:
    """Occupy closed streams, so that they stay closed for the program, and no file that is opened next takes one."""
    while (nothing := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) < _STREAMS:
        pass
    os.close(nothing)


def end_by(number: int) -> NoReturn:
    """End this process by signal `number`, without a memory image of our own."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)
