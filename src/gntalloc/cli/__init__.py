"""The command line: `gntalloc`, and `python -m gntalloc`. One thin command per file, imported when it is called.

Exit codes: 0 ok, 1 failed, 2 usage, 3 no machine or device, 130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from gntalloc.errors import GntallocError, NoMachine, PeerClosed

__all__ = ["main"]

# Name of the command -> one line for `gntalloc --help`, kept here so that help imports no command.
COMMANDS = {
    "demo": "Two domains share pages here and now: a file goes across, and a peer misbehaves.",
    "run": "Run a program in a domain: it finds /dev/xen there, and is told of nothing else.",
    "machine": "Run a machine in the foreground, for programs to join by name.",
    "list": "Every machine, domain and grant: who granted, who maps, what is still held.",
    "limit": "Show or set how many pages a domain may have granted at once.",
    "cat": "Netcat between domains: standard input and output through a channel.",
    "disk": "Read and write a disk that another domain serves, serve one, or export it as NBD.",
    "doctor": "What this computer has and lacks, and what to do about it.",
    "lab": "Boot a real Xen in QEMU and run a command in it.",
}


class LazyGroup(click.Group):
    """A group whose commands live in the module of the same name, as `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table, which goes from first use to last."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the one command that is asked for."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Invoke it. A peer that has closed is EPIPE, which click would take for the end of our own output."""
        try:
            return super().invoke(ctx)
        except PeerClosed as error:
            print(f"gntalloc: {error}", file=sys.stderr)
            ctx.exit(1)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gntalloc", message="gntalloc %(version)s")
def group() -> None:
    """Xen's grant allocation, on real Xen or on any Linux without it."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with a code that means something."""
    # Streams that were closed are None. Nobody reads them, and that is all there is to it.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  until we end
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        code = group.main(arguments, prog_name="gntalloc", standalone_mode=False)
    except click.exceptions.Exit as end:
        code = end.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader of our output left: say nothing, and keep the interpreter from trying to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except NoMachine as error:
        print(f"gntalloc: {error}", file=sys.stderr)
        code = 3
    except GntallocError as error:
        print(f"gntalloc: {error}", file=sys.stderr)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
