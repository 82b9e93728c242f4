"""Run `gntalloc machine`."""

from __future__ import annotations

import errno
import os
import pwd
import signal
import sys
from typing import Any, NoReturn

import click

from gntalloc.cli import explain
from gntalloc.cli.types import MACHINE, MOST_PAGES, SECONDS, Number
from gntalloc.digits import whole_number
from gntalloc.errors import GntallocError

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
    from gntalloc.cli.foreground import serve  # the machine itself, which around a command is a process of its own

    settings = {"limit": limit, "behaviour": behaviour, "strict": strict}
    came = serve(name or "default", made, settings, verbose=verbose)
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
