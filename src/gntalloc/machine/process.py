"""Run the machine as a process: as a child of `gntalloc.Machine`, or in the foreground by the command line."""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from typing import Any

from gntalloc.claims import take_away_lock
from gntalloc.errors import GntallocError
from gntalloc.libc import PR_SET_DUMPABLE, give_memory_back, libc
from gntalloc.machine.logbook import keep_log
from gntalloc.machine.machine import BEHAVIOURS, Machine
from gntalloc.machine.server import Server
from gntalloc.places import lock_path

__all__ = ["child_main", "make_server", "protect_and_provide", "stop_on_signals"]


def protect_and_provide() -> None:
    """Keep programs of the same user out of our memory, and raise the limit of descriptors as far as we may.

    Memory that was freed goes back to the computer. The collector of cycles is told to look seldom: pages come and go
    by the hundred, hardly any object is in a cycle, and its looks would find nothing.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    give_memory_back()


def make_server(folder: str, settings: dict[str, Any]) -> Server:
    """Make a machine with its control socket in `folder`.

    `settings` has limit, behaviour (a name), strict and table_frames.
    """
    behaviour = BEHAVIOURS[settings.pop("behaviour", "ours")]._replace(strict=settings.pop("strict", False))
    return Server(Machine(behaviour=behaviour, **settings), folder)


def stop_on_signals(server: Server, *numbers: signal.Signals) -> list[int]:
    """Let these signals end `run`. Return a list into which the number of each that comes is put."""
    came: list[int] = []

    def stop(number: int, _frame: object) -> None:
        came.append(number)
        server.stopping = True

    for number in numbers:
        signal.signal(number, stop)
    # The handler runs between two instructions of ours. The wake-up descriptor ends the wait in which it may have come.
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    server.loop.wake_by(reading)
    return came


def child_main(descriptor: int, folder: str, settings: str) -> None:
    """Be the child of `gntalloc.Machine`. Orders come over `descriptor`, and the machine ends at its end of file.

    With the setting `until_left` it ends when no visitor is left; with `verbose` it says why requests fail.
    """
    chosen = json.loads(settings)
    level = logging.DEBUG if chosen.pop("verbose", False) else logging.WARNING
    sys.stderr = keep_log(level, "gntalloc machine: %(message)s")
    # Ctrl-C in a terminal reaches every process in it. The parent decides whether the machine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the mask of our starter is not for us
    os.chdir("/")  # the folder where we were started may be removed
    protect_and_provide()
    until_left = chosen.pop("until_left", False)
    try:
        server = make_server(folder, chosen)
    except GntallocError as error:
        sys.exit(f"gntalloc machine: {error}")
    server.adopt_control(socket.socket(fileno=descriptor), until_left=until_left)
    stop_on_signals(server, signal.SIGTERM)
    try:
        server.run()
    finally:
        server.close()
        try:
            os.rmdir(folder)
        except OSError:
            pass  # our parent does it
        server.visits.close()
        take_away_lock(lock_path(folder))  # of a `gntalloc run` that joined
