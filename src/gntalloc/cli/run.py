"""Run `gntalloc run`."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

import gntalloc.run
from gntalloc.cli import RUN_FAILED, explain
from gntalloc.cli.types import LARGEST_DOMID, MACHINE, SECONDS, DomidType
from gntalloc.places import MACHINE_VARIABLE
from gntalloc.run.launcher import run

if TYPE_CHECKING:
    from gntalloc.run.pair import Outcome

__all__ = ["command"]

_IN = re.compile(r"--in-([0-9]{1,5})(?:=(.*))?", re.DOTALL)
_PATIENCE = 10.0


class _RunCommand(click.Command):
    """Take `--in-7 COMMAND` for `--in 7 COMMAND`, with any domain's number."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Command`."""
        end = args.index("--") if "--" in args else len(args)
        words: list[str] = []
        for word in args[:end]:
            found = _IN.fullmatch(word)
            if found is None:
                words.append(word)
            else:
                words += ["--in", found[1]] if found[2] is None else ["--in", found[1], found[2]]
        return super().parse_args(ctx, words + args[end:])


def _print_suppressions(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        print(os.path.join(os.path.dirname(gntalloc.run.__file__), "valgrind.supp"))
        ctx.exit()


@click.command(cls=_RunCommand, context_settings={"allow_interspersed_args": False})
@click.option(
    "--machine",
    type=MACHINE,
    help="The machine to join; started if it does not run.  [default: $GNTALLOC_MACHINE, else default]",
)
@click.option(
    "--domid",
    type=DomidType(LARGEST_DOMID, lambda given: given.get("machine") or os.environ.get(MACHINE_VARIABLE) or "default"),
    metavar="DOMID",
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
    help="Print where the file for `valgrind --suppressions` is, and exit.",
)
@click.option("-v", "--verbose", is_flag=True, help="Say why each failing call fails, and which are not served.")
@click.option(
    "--pair", is_flag=True, help="Run programs in several domains of a fresh machine, each given by --in-DOMID."
)
@click.option(
    "--in",
    "pairs",
    nargs=2,
    multiple=True,
    type=(DomidType(LARGEST_DOMID, lambda _given: None), str),
    metavar="DOMID COMMAND",
    help="With --pair, also as --in-1 COMMAND: a domain's program, quoted as for a shell. The server's comes first.",
)
@click.option(
    "--patience",
    default=_PATIENCE,
    show_default=True,
    type=SECONDS,
    help="With --pair: seconds until a client is started even if no server waits for it.",
)
@click.option("--timeout", type=SECONDS, help="With --pair: seconds for all; then they are ended, with status 124.")
@click.option("--json", "as_json", is_flag=True, help="With --pair: print one machine-readable result instead.")
@click.argument("program", nargs=-1, metavar="-- PROGRAM [ARGUMENT]...", type=click.UNPROCESSED)
def command(
    *,
    domid: int | None,
    machine: str | None,
    userns: bool,
    all_opens: bool,
    verbose: bool,
    pair: bool,
    pairs: tuple[tuple[int, str], ...],
    patience: float,
    timeout: float | None,
    as_json: bool,
    program: tuple[str, ...],
) -> None:
    """Run an unmodified program in a domain: it finds /dev/xen/gntalloc, gntdev and evtchn there.

    The program and all that it starts are served. Streams, folder, signals and job control are the program's, and so is
    the exit status: 126 if PROGRAM cannot be executed, 127 if it is not there, 125 if it could not be run in a domain.
    A machine that is started for this ends with the last run in it.

    \b
        gntalloc run --domid 1 -- ./server
        gntalloc run --pair --in-1 './server 2' --in-2 './client 1'

    With --pair the machine is a fresh one. A client is started when a server waits for it in xenstore. Each line has
    its domain's number in front. The exit status is that of the first that failed, and no process is left afterwards.
    """  # noqa: D301  the backslash is click's
    options = [flag for flag, on in (("--userns", userns), ("--all-opens", all_opens), ("-v", verbose)) if on]
    if pair:
        if domid is not None or machine is not None or program:
            raise click.UsageError("--pair takes its programs from --in-DOMID 'COMMAND', and has a machine of its own")
        _run_pair(_commands(pairs), options, patience=patience, timeout=timeout, as_json=as_json)
    if pairs or timeout is not None or as_json:
        raise click.UsageError("--in-DOMID, --timeout and --json are for --pair")
    if domid is None or not program:
        raise click.UsageError("say in which domain to run what: gntalloc run --domid 1 -- PROGRAM")
    machine = machine or os.environ.get(MACHINE_VARIABLE) or "default"
    try:
        sys.exit(run(program, domid=domid, machine=machine, userns=userns, all_opens=all_opens, verbose=verbose))
    except OSError as error:
        explain(error)
        sys.exit(RUN_FAILED)


def _commands(pairs: tuple[tuple[int, str], ...]) -> dict[int, list[str]]:
    commands: dict[int, list[str]] = {}
    for domid, text in pairs:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise click.UsageError(f"--in-{domid} {text!r} is no command: {error}") from None
        if domid in commands or not words:
            raise click.UsageError(f"--in-{domid}: one command for each domain, and not an empty one")
        commands[domid] = words
    if len(commands) < 2:
        raise click.UsageError("--pair needs two programs: --in-1 './server' --in-2 './client'")
    return commands


def _run_pair(
    commands: dict[int, list[str]], options: list[str], *, patience: float, timeout: float | None, as_json: bool
) -> NoReturn:
    from gntalloc.cli.labelled import Labelled
    from gntalloc.run.pair import run_pair

    written: dict[str, dict[int, bytes]] = {str(domid): {1: b"", 2: b""} for domid in commands}

    def keep(domain: str, stream: int, data: bytes) -> None:
        written[domain][stream] += data

    labelled = Labelled(list(written))
    try:
        status, outcomes = run_pair(
            commands,
            show=keep if as_json else labelled,
            options=options,
            patience=patience,
            timeout=timeout,
        )
    except OSError as error:
        explain(error)
        sys.exit(RUN_FAILED)
    finally:
        labelled.finish()
    if as_json:
        print(json.dumps(_reported(status, outcomes, written), indent=2))
    sys.exit(status)


def _reported(status: int, outcomes: dict[int, Outcome], written: dict[str, dict[int, bytes]]) -> dict[str, Any]:
    return {
        "exit_status": status,
        "programs": {
            str(domid): {
                "exit_status": outcome.status,
                "seconds": round(outcome.seconds, 3),
                "output": written[str(domid)][1].decode(errors="replace"),
                "errors": written[str(domid)][2].decode(errors="replace"),
            }
            for domid, outcome in outcomes.items()
        },
    }
