"""Serve a machine in the foreground: `gntalloc machine`."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
from typing import TYPE_CHECKING, Any

from gntalloc.claims import claim, sweep, take_away
from gntalloc.errors import GntallocError, MachineGone, NoMachine
from gntalloc.guest.books import Statistics
from gntalloc.guest.control import ControlClient
from gntalloc.machine.logbook import keep_log
from gntalloc.machine.process import make_server, protect_and_provide, stop_on_signals
from gntalloc.places import domain_path, machine_folder, make_top_folder

if TYPE_CHECKING:
    from gntalloc.machine.logbook import Outlet

__all__ = ["serve"]


def serve(name: str, domains: dict[int, int], settings: dict[str, Any], *, verbose: bool) -> list[int]:
    """Serve until a signal comes. Return the signals that came.

    Args:
        name: of the machine.
        domains: the uid of each domain to make, by its number.
        settings: see `make_server`.
        verbose: say why each request that fails does.
    """
    outlet = keep_log(logging.DEBUG if verbose else logging.INFO, "%(asctime)s %(message)s")
    folder, claimed = _fresh_folder(name)
    try:
        return _run(folder, name, domains, settings, outlet)
    finally:
        os.close(claimed)
        with contextlib.suppress(GntallocError):
            take_away(folder)


def _run(folder: str, name: str, domains: dict[int, int], settings: dict[str, Any], errors: Outlet) -> list[int]:
    protect_and_provide()
    server = make_server(folder, settings)
    came = stop_on_signals(server, signal.SIGTERM, signal.SIGINT)
    try:
        for domid, uid in domains.items():
            server.create(domid, uid=uid)
            print(f"domain {domid}, for uid {uid}: GNTALLOC_DOMAIN={domain_path(folder, domid)}")
        print(f"machine {name!r} runs as pid {os.getpid()}; Ctrl-C ends it", flush=True)
        with contextlib.redirect_stderr(errors):
            server.run()
    finally:
        server.close()
    return came


def _fresh_folder(name: str) -> tuple[str, int]:
    """Make the folder of a machine, and give the descriptor of its lock too."""
    folder = machine_folder(name)
    if "/" not in name:
        make_top_folder()
    try:
        if os.path.lexists(folder):
            _see_that_nobody_is_there(folder, name)
            take_away(folder)  # a killed machine may have left it
        sweep()
        os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
        return folder, claim(folder)
    except GntallocError:
        raise
    except OSError as error:
        why = f"{folder} cannot be made, for the machine's sockets: {error.strerror}; choose another --name"
        raise GntallocError(error.errno or errno.EIO, why) from None


def _see_that_nobody_is_there(folder: str, name: str) -> None:
    control = ControlClient(folder)
    try:
        pid = Statistics.of(control.order("statistics")).pid
    except NoMachine as error:
        if error.errno in {errno.EACCES, errno.EPERM}:
            raise
        return
    except MachineGone:
        return  # it ends just now
    finally:
        control.close()
    raise GntallocError(
        errno.EEXIST, f"a machine {name!r} runs already, as pid {pid}; use it, or choose another --name"
    )
