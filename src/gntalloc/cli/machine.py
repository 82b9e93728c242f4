"""Run `gntalloc machine`."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pwd
import signal
import sys
from typing import Any, NoReturn

import click

from gntalloc.claims import claim, sweep, take_away
from gntalloc.cli import explain
from gntalloc.cli.types import MACHINE, MOST_PAGES, SECONDS, Number
from gntalloc.digits import whole_number
from gntalloc.errors import GntallocError, MachineGone, NoMachine
from gntalloc.guest.books import Statistics
from gntalloc.guest.control import ControlClient
from gntalloc.machine.logbook import Outlet, keep_log
from gntalloc.machine.process import make_server, protect_and_provide, stop_on_signals
from gntalloc.places import domain_path, machine_folder, make_top_folder

__all__ = ["command"]

_LARGEST_UID = 0xFFFF_FFFE


def _domains(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[int, int]]:
    """Read `2` or `2:uid=bob` as (domid, uid)."""
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


class _MachineCommand(click.Command):
    """Take a COMMAND only after --, so that a mistyped option runs nothing."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Command`."""
        dashed = "--" in args
        rest = super().parse_args(ctx, args)
        program = ctx.params.get("program")
        if program and not dashed:
            ctx.fail(f"got unexpected argument {program[0]!r}; a command to run comes after --")
        return rest


@click.command(cls=_MachineCommand, context_settings={"allow_interspersed_args": False})
@click.option(
    "--name", type=MACHINE, help="Its name for programs.  [default: default; with COMMAND: a name of its own]"
)
@click.option(
    "--domain",
    "domains",
    multiple=True,
    callback=_domains,
    metavar="DOMID[:uid=USER]",
    help="A domain to make; may be repeated.",
)
@click.option("--limit", default=1024, show_default=True, type=Number(0, MOST_PAGES), help="Pages, of each domain.")
@click.option("--behaviour", type=click.Choice(["ours", "linux"]), default="ours", show_default=True)
@click.option("--strict", is_flag=True, help="Refuse grants of no pages, with unknown flags, or for no other domain.")
@click.option("--timeout", type=SECONDS, help="Seconds for COMMAND; then it is ended, with status 124.")
@click.option("-v", "--verbose", is_flag=True, help="Say why each failing request fails.")
@click.argument("program", nargs=-1, metavar="[-- COMMAND [ARGUMENT]...]", type=click.UNPROCESSED)
def command(
    *,
    name: str | None,
    domains: list[tuple[int, int]],
    limit: int,
    behaviour: str,
    strict: bool,
    timeout: float | None,
    verbose: bool,
    program: tuple[str, ...],
) -> None:
    """Run a machine in the foreground until Ctrl-C, or around COMMAND until that ends.

    Programs join it with GNTALLOC_DOMAIN=NAME/DOMID in their environment. Without --domain it has the domains 1 and 2.

    Around COMMAND the machine is a fresh one. `gntalloc run --domid 1 -- PROGRAM` inside joins it, since
    GNTALLOC_MACHINE names it there. Its domains last until COMMAND has ended. Then every program that COMMAND has left
    running is ended too, and so is the machine. The exit status is COMMAND's.
    """
    made = dict(domains or ((1, os.getuid()), (2, os.getuid())))
    if domains and len(made) < len(domains):
        raise GntallocError(errno.EEXIST, "a domain was named twice; each --domain has a number of its own")
    if program:
        if name is not None:
            raise click.UsageError("--name is for a machine that others join; one around COMMAND has its own name")
        settings = {"limit": limit, "behaviour": behaviour, "strict": strict, "verbose": verbose}
        _run_around(program, made, timeout, settings)
    if timeout is not None:
        raise click.UsageError("--timeout is for COMMAND; a machine without one runs until Ctrl-C")
    name = name or "default"
    outlet = keep_log(logging.DEBUG if verbose else logging.INFO, "%(asctime)s %(message)s")
    folder, claimed = _fresh_folder(name)
    try:
        came = _run(folder, name, made, {"limit": limit, "behaviour": behaviour, "strict": strict}, outlet)
    finally:
        os.close(claimed)
        with contextlib.suppress(GntallocError):
            take_away(folder)
    if signal.SIGINT in came:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _run_around(
    program: tuple[str, ...], domains: dict[int, int], timeout: float | None, settings: dict[str, Any]
) -> NoReturn:
    from gntalloc.run.household import CannotStart, run_around  # only a machine around a command needs it
    from gntalloc.run.launcher import end_by

    try:
        status = run_around(program, domains, timeout=timeout, **settings)
    except CannotStart as refusal:
        explain(refusal)
        sys.exit(refusal.status)
    if os.WIFSIGNALED(status):
        end_by(os.WTERMSIG(status))
    sys.exit(os.waitstatus_to_exitcode(status))


def _run(folder: str, name: str, domains: dict[int, int], settings: dict[str, Any], errors: Outlet) -> list[int]:
    """Serve until a signal comes, and return the signals that came."""
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
