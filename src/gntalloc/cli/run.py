"""`gntalloc run`."""

from __future__ import annotations

import os
import sys

import click

import gntalloc.run
from gntalloc.cli import RUN_FAILED, explain
from gntalloc.cli.types import LARGEST_DOMID, MACHINE, DomidType
from gntalloc.run.launcher import run

__all__ = ["command"]


def _print_suppressions(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        print(os.path.join(os.path.dirname(gntalloc.run.__file__), "valgrind.supp"))
        ctx.exit()


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--machine",
    type=MACHINE,
    default="default",
    show_default=True,
    help="The machine to join; started if it does not run.",
)
@click.option(
    "--domid",
    type=DomidType(LARGEST_DOMID, lambda given: given.get("machine") or "default"),
    metavar="DOMID",
    required=True,
    help="The domain; made if it is not there.",
)
@click.option("--userns", is_flag=True, help="A user namespace for the program: other domains cannot reach into it.")
@click.option("--all-opens", is_flag=True, help="Serve opens for reading only too, and private maps; costs some time.")
@click.option(
    "--valgrind-suppressions",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_suppressions,
    help="Print the path of a file for valgrind --suppressions=, and end.",
)
@click.argument("program", nargs=-1, required=True, metavar="-- PROGRAM [ARGUMENT]...", type=click.UNPROCESSED)
def command(domid: int, machine: str, userns: bool, all_opens: bool, program: tuple[str, ...]) -> None:
    """Run a program in a domain, as it is: it finds /dev/xen/gntalloc, gntdev and evtchn there.

    The program and all that it starts are served. Streams, folder, signals and job control are the program's, and so is
    the exit status: 126 if PROGRAM cannot be executed, 127 if it is not there, 125 if it could not be run in a domain.
    A machine that is started for this ends with the last run in it.
    """
    try:
        sys.exit(run(program, domid=domid, machine=machine, userns=userns, all_opens=all_opens))
    except OSError as error:
        explain(error)
        sys.exit(RUN_FAILED)
