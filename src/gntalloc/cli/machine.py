"""`gntalloc machine`."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pwd
import signal
import sys
from typing import Any

import click

from gntalloc.cli.types import MACHINE, MOST_PAGES, Number
from gntalloc.digits import whole_number
from gntalloc.errors import GntallocError, MachineGone, NoMachine
from gntalloc.guest.control import ControlClient
from gntalloc.machine.process import make_server, protect_and_provide, stop_on_signals
from gntalloc.places import clear_folder, domain_path, machine_folder, make_top_folder

__all__ = ["command"]

_LARGEST_UID = 0xFFFF_FFFE


def _domains(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[int, int]]:
    """`2`, or `2:uid=bob` -> (domid, uid)."""
    return [_domain(value) for value in values]


def _domain(value: str) -> tuple[int, int]:
    number, colon, rest = value.partition(":")
    key, _, user = rest.partition("=")
    domid = whole_number(number)
    if domid is None or (colon and (key != "uid" or not user)):
        raise click.BadParameter(f"{value[:200]!r} is no domain; write 2, or 2:uid=bob")
    return domid, _uid(user) if user else os.getuid()


def _uid(user: str) -> int:
    uid = whole_number(user, _LARGEST_UID)
    if uid is not None:
        return uid
    try:
        return pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):
        raise click.BadParameter(f"there is no user {user[:200]!r} on this computer") from None


@click.command()
@click.option("--name", type=MACHINE, default="default", show_default=True, help="What programs call it.")
@click.option(
    "--domain",
    "domains",
    multiple=True,
    callback=_domains,
    metavar="DOMID[:uid=USER]",
    help="Make it; may be repeated.",
)
@click.option("--limit", default=1024, show_default=True, type=Number(0, MOST_PAGES), help="Pages, of each domain.")
@click.option("--behaviour", type=click.Choice(["ours", "linux"]), default="ours", show_default=True)
@click.option("--strict", is_flag=True, help="Refuse grants of no pages, with unknown flags, or for no other domain.")
@click.option("-v", "--verbose", is_flag=True, help="Say why each request that fails does.")
def command(name: str, domains: list[tuple[int, int]], limit: int, behaviour: str, strict: bool, verbose: bool) -> None:
    """Run a machine in the foreground until Ctrl-C.

    Programs join it with GNTALLOC_DOMAIN=NAME/DOMID in their environment. Without --domain there are 1 and 2.
    """
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(message)s")
    folder = _fresh_folder(name)
    try:
        came = _run(folder, name, domains, {"limit": limit, "behaviour": behaviour, "strict": strict})
    finally:
        with contextlib.suppress(GntallocError):
            clear_folder(folder)
    if signal.SIGINT in came:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _run(folder: str, name: str, domains: list[tuple[int, int]], settings: dict[str, Any]) -> list[int]:
    """Serve until a signal comes; which."""
    protect_and_provide()
    server = make_server(folder, settings)
    came = stop_on_signals(server, signal.SIGTERM, signal.SIGINT)
    try:
        for domid, uid in domains or ((1, os.getuid()), (2, os.getuid())):
            server.create(domid, uid=uid)
            print(f"domain {domid}, for uid {uid}: GNTALLOC_DOMAIN={domain_path(folder, domid)}")
        print(f"machine {name!r} runs as pid {os.getpid()}; Ctrl-C ends it", flush=True)
        server.run()
    finally:
        server.close()
    return came


def _fresh_folder(name: str) -> str:
    folder = machine_folder(name)
    if "/" not in name:
        make_top_folder()
    try:
        if os.path.lexists(folder):
            _see_that_nobody_is_there(folder, name)
            clear_folder(folder)  # of one that was killed
        os.makedirs(folder, mode=0o700)
    except GntallocError:
        raise
    except OSError as error:
        why = f"{folder} cannot be made, for the machine's sockets: {error.strerror}; choose another --name"
        raise GntallocError(error.errno or errno.EIO, why) from None
    return folder


def _see_that_nobody_is_there(folder: str, name: str) -> None:
    control = ControlClient(folder)
    try:
        pid = control.order("statistics")["pid"]
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
