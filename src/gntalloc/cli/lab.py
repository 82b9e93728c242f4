"""Run `gntalloc lab`: a real Xen in QEMU."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
import termios
import tty
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gntalloc.cli.labelled import Labelled, plain
from gntalloc.cli.types import SECONDS, Number
from gntalloc.clock import now
from gntalloc.lab import Lab, LabError, Outcome
from gntalloc.lab.apt import DEFAULT_KEYRING, Mirrors
from gntalloc.lab.boot import GUEST_MEMORY, TIMEOUT
from gntalloc.lab.build import RELEASE, Report, build
from gntalloc.lab.images import Images
from gntalloc.lab.session import GUESTS, Terminal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["command"]

_guest = click.option("--guest", type=click.Choice(GUESTS), help="Also boot a guest of this kind, and run in it.")
_timeout = click.option(
    "--timeout",
    type=SECONDS,
    default=TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="Seconds for the boot and the command.",
)
_memory = click.option(
    "--memory", type=Number(1, 1 << 20), default=GUEST_MEMORY, show_default=True, metavar="MIB", help="Of the guest."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one machine-readable result instead.")


@click.group()
def command() -> None:
    """Boot a real Xen in QEMU and run a command in it.

    The lab is made from Debian's own packages: hypervisor, dom0, PV and PVH guests, with the kernel's gntalloc, gntdev
    and evtchn drivers. It needs no root and no hardware virtualisation, and nothing but QEMU on this machine.
    """


@command.command("build")
@click.option("--release", default=RELEASE, show_default=True, help="Debian release.")
@click.option("--mirror", envvar="GNTALLOC_LAB_MIRROR", metavar="URL", help="Debian mirror. [default: this machine's]")
@click.option(
    "--security-mirror",
    envvar="GNTALLOC_LAB_SECURITY_MIRROR",
    metavar="URL",
    help="Mirror of the security updates. [default: the mirror's address with -security]",
)
@click.option(
    "--keyring",
    type=click.Path(path_type=Path),
    default=DEFAULT_KEYRING,
    show_default=True,
    help="Debian's public keys.",
)
@click.option("--with", "extra", multiple=True, metavar="PACKAGE", help="Add a package to the images. Repeatable.")
@click.option("--force", is_flag=True, help="Make the images even if these versions are there.")
@_json
def build_command(
    release: str,
    mirror: str | None,
    security_mirror: str | None,
    keyring: Path,
    extra: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Make the images, once: some 100 MB to download."""
    mirrors = Mirrors(mirror.rstrip("/"), security_mirror or f"{mirror.rstrip('/')}-security") if mirror else None
    started = now()
    with _progress() as report:
        images, made = build(report, release=release, mirrors=mirrors, keyring=keyring, extra=list(extra), force=force)
    if as_json:
        print(json.dumps(_described(images) | {"made": made}, indent=2))
        return
    versions = images.manifest
    print(f"Xen {versions.xen}, Linux {versions.linux}, Debian {versions.release}")
    print(f"made in {now() - started:.0f} s: {images.folder}" if made else f"already there: {images.folder}")


@command.command("info")
@_json
def info_command(as_json: bool) -> None:
    """Show which images `lab run` would boot."""
    described = _described(Images.current("show the lab's images"))
    if as_json:
        print(json.dumps(described, indent=2))
        return
    for name in ("folder", "release", "xen", "linux", "kernel"):
        print(f"{name:8} {described[name]}")
    print(f"packages {len(described['packages'])} (all with --json)")


@command.command("run", context_settings={"allow_interspersed_args": False})
@_guest
@click.option("--pair", is_flag=True, help="Run two commands together, given as --in-guest and --in-dom0.")
@click.option("--in-guest", metavar="COMMAND", help="The guest's command of a pair, quoted as for a shell.")
@click.option("--in-dom0", metavar="COMMAND", help="Dom0's command of a pair, quoted as for a shell.")
@click.option(
    "--file",
    "files",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Bring a file or folder into the command's working directory. Repeatable.",
)
@click.option("--fetch", multiple=True, metavar="PATH", help="Bring files out afterwards. Repeatable, * allowed.")
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="The folder for files that --fetch brings.  [default: here]",
)
@_timeout
@_memory
@_json
@click.argument("arguments", nargs=-1, metavar="[--] COMMAND…")
def run_command(
    guest: str | None,
    pair: bool,
    in_guest: str | None,
    in_dom0: str | None,
    files: tuple[Path, ...],
    fetch: tuple[str, ...],
    into: Path,
    timeout: float,
    memory: int,
    as_json: bool,
    arguments: tuple[str, ...],
) -> None:
    """Boot, run COMMAND in dom0 or in a guest, and exit with its status.

    This project's package is there: `python3 -m gntalloc` and `import gntalloc` work in every domain.

    \b
    gntalloc lab run -- xl info
    gntalloc lab run --guest pvh --file test.py --fetch result.json -- python3 test.py
    gntalloc lab run --pair --guest pv --file peer.py --in-guest 'python3 peer.py' --in-dom0 'xl list'
    """  # noqa: D301  the backslash is click's
    commands = _commands(guest, pair, in_guest, in_dom0, arguments)
    labelled = Labelled(list(commands))
    show = _silent if as_json else labelled if pair else plain
    started = now()
    try:
        lab = Lab.find()
        _announce(commands)
        outcomes = lab.run_together(commands, files=files, fetch=fetch, timeout=timeout, memory=memory, on_output=show)
    except LabError as error:
        if as_json:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}, indent=2))
        raise
    finally:
        labelled.finish()
    for outcome in outcomes.values():
        _keep(outcome.files, into)
    failed = next((outcome.exit_status for outcome in outcomes.values() if outcome.exit_status), 0)
    if as_json:
        print(json.dumps(_reported(outcomes, failed, now() - started), indent=2))
    # In a pair a file may come from either side.
    missing = set.intersection(*(set(outcome.missing) for outcome in outcomes.values()))
    if missing:
        print(f"gntalloc: fetch {', '.join(sorted(missing))}: there is no such file in the lab", file=sys.stderr)
    raise click.exceptions.Exit(failed or int(bool(missing)))


@command.command("shell")
@_guest
@_memory
def shell_command(guest: str | None, memory: int) -> None:
    """Boot, and open a shell in dom0 or in a guest. Leave it with `exit`."""
    if not sys.stdin.isatty():
        raise click.UsageError("a shell needs a terminal; for a single command take `gntalloc lab run`")
    domain = guest or "dom0"
    lab = Lab.find()
    _announce({domain: ["sh"]})
    with lab.boot([guest] if guest else [], memory=memory) as session, _raw_terminal() as terminal:
        outcome = session.run(
            ["sh", "-l"],
            domain,
            environment={"TERM": os.environ.get("TERM", "linux"), "PS1": f"{domain}:\\w# "},
            timeout=math.inf,
            on_output=plain,
            terminal=terminal,
        )
    raise click.exceptions.Exit(outcome.exit_status)


def _commands(
    guest: str | None, pair: bool, in_guest: str | None, in_dom0: str | None, arguments: tuple[str, ...]
) -> dict[str, list[str]]:
    """Find the domain of each command."""
    if not pair:
        if in_guest or in_dom0:
            raise click.UsageError("--in-guest and --in-dom0 are for --pair")
        if not arguments:
            raise click.UsageError("no command to run: gntalloc lab run -- COMMAND…")
        return {guest or "dom0": list(arguments)}
    if not (in_guest and in_dom0) or arguments:
        raise click.UsageError("--pair takes its commands from --in-guest 'COMMAND' and --in-dom0 'COMMAND'")
    return {guest or "pvh": shlex.split(in_guest), "dom0": shlex.split(in_dom0)}


def _keep(files: dict[str, bytes], into: Path) -> None:
    for name, content in files.items():
        path = into / name
        # The lab's programs are the user's own, but a name must not lead out of the folder all the same.
        if not path.resolve().is_relative_to(into.resolve()):
            raise LabError(f"fetch {name}: its name leads out of {into}. Give the file another name.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _reported(outcomes: dict[str, Outcome], exit_status: int, seconds: float) -> dict[str, Any]:
    return {
        "exit_status": exit_status,
        "seconds": round(seconds, 3),
        "commands": {
            domain: asdict(outcome) | {"files": sorted(outcome.files)} for domain, outcome in outcomes.items()
        },
    }


def _described(images: Images) -> dict[str, Any]:
    return {"folder": str(images.folder)} | asdict(images.manifest)


def _silent(_domain: str, _stream: int, _data: bytes) -> None:
    """Show nothing: with --json the output is in the result."""


def _announce(commands: Mapping[str, object]) -> None:
    """Tell a person, and no program, why nothing happens for a while."""
    if sys.stderr.isatty():
        guests = [domain for domain in commands if domain != "dom0"]
        with_guest = f" and a {guests[0]} guest, about 30 s" if guests else ", about 12 s"
        print(f"booting Xen{with_guest} …", file=sys.stderr)


@contextmanager
def _raw_terminal() -> Iterator[Terminal]:
    """Hand every key to the lab, Ctrl-C included."""
    descriptor = sys.stdin.fileno()

    def size() -> tuple[int, int]:
        columns, rows = shutil.get_terminal_size()
        return rows, columns

    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield Terminal(descriptor, size)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextmanager
def _progress() -> Iterator[Report]:
    """Show progress: a bar on a terminal, a line for each step elsewhere."""
    if not sys.stderr.isatty():
        steps: set[str] = set()

        def line(step: str, _part: float | None) -> None:
            if step not in steps:
                steps.add(step)
                print(step, file=sys.stderr, flush=True)

        yield line
        return

    from rich.console import Console  # late: only a terminal needs it
    from rich.progress import Progress, TaskID

    tasks: dict[str, TaskID] = {}
    with Progress(console=Console(stderr=True)) as progress:

        def bar(step: str, part: float | None) -> None:
            if step not in tasks:
                for earlier in tasks.values():
                    progress.update(earlier, total=1, completed=1)
                tasks[step] = progress.add_task(step, total=None if part is None else 1.0)
            if part is not None:
                progress.update(tasks[step], completed=part)

        yield bar
