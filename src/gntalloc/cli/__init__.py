"""Run the command line: `gntalloc`, and `python -m gntalloc`. Each command has a thin file, imported when it is called.

This module ends all commands alike: it explains errors and chooses the exit status. docs/command-line.md has the table.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from typing import Any, TextIO

import click
from click.shell_completion import CompletionItem

from gntalloc import __version__
from gntalloc.errors import GntallocError, NoMachine, PeerClosed, TimedOut

__all__ = ["FAILED", "INTERRUPTED", "NOBODY", "RUN_FAILED", "TIME_OVER", "USAGE", "explain", "main"]

FAILED = 1
USAGE = 2
NOBODY = 3  # no machine, no domain, no device
TIME_OVER = 124
RUN_FAILED = 125  # `gntalloc run` itself, and not its program
INTERRUPTED = 130

_LAST_STREAM = 2

# Name of the command -> one line for `gntalloc --help`, kept here so that help imports no command.
COMMANDS = {
    "demo": "Share pages between two domains here and now: a file goes across, and a peer misbehaves.",
    "run": "Run an unmodified program in a domain: it finds /dev/xen there.",
    "machine": "Run a machine in the foreground, for programs to join by name.",
    "list": "List machines, domains and grants: their granters and mappers, and pages still held.",
    "limit": "Show or set how many pages a domain may have granted at once.",
    "cat": "Connect standard input and output to a channel: netcat between domains.",
    "disk": "Read and write a disk that another domain serves, serve one, or export it as NBD.",
    "doctor": "Check what this computer has and lacks, and say what to do about it.",
    "lab": "Boot a real Xen in QEMU and run a command in it.",
}


class LazyGroup(click.Group):
    """Import each command only when it is called, from the module of its name, where it is `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order of the table, which goes from first use to last."""
        return [*COMMANDS]  # `list` is a module here, once it is imported

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the one command that is asked for."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Invoke a command. A peer that has closed is EPIPE, which click would take for the end of our own output."""
        try:
            return super().invoke(ctx)
        except PeerClosed as error:
            ctx.exit(explain(error))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete names of commands from the table, so that a key press imports one command at most."""
        if not incomplete.startswith("-"):
            return [CompletionItem(name, help=what) for name, what in COMMANDS.items() if name.startswith(incomplete)]
        return super().shell_complete(ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="gntalloc %(version)s")
def group() -> None:
    """Share pages between domains by Xen's grant allocation, on real Xen or on any Linux without it."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, and exit with the status that docs/command-line.md gives."""
    _provide_streams()
    output = sys.stdout  # click puts another in its place when the reader has left
    try:
        outcome = group.main(arguments, prog_name="gntalloc", standalone_mode=False)
        code = outcome if isinstance(outcome, int) else 0
        output.flush()
    except SystemExit as end:
        code = _flushed(output, end)
    except BaseException as error:
        code = _flushed(output, SystemExit(explain(error)))
    sys.exit(code)


def _flushed(output: TextIO, end: SystemExit) -> int:
    """Give a command's own exit status, unless its output cannot be written."""
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
    try:
        output.flush()
    except Exception as error:
        return explain(error)
    return code


def _provide_streams() -> None:
    """Replace closed streams, and let no character that a terminal lacks be an error.

    A read from a replaced stream gets nothing, and a write goes nowhere. No file that is opened from now on can take
    its number; one that a library has opened before may have it, so a replaced stream has a number of its own.
    """
    while (nothing := _nothing()) <= _LAST_STREAM:
        pass
    os.close(nothing)
    sys.stdin = sys.stdin or os.fdopen(_nothing(), encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(_nothing(), "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    given = sys.stdout
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Output(1 if given else _nothing(), "w", closefd=False)),
        encoding=given.encoding if given else "utf-8",
        errors="backslashreplace",
        line_buffering=os.isatty(1),
    )


def _nothing() -> int:
    """Open a descriptor that gives nothing and takes all. In a sandbox there may be no /dev/null."""
    try:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return os.memfd_create("nothing", os.MFD_CLOEXEC)


class _Output(io.FileIO):
    """Be standard output, with errors that say that they are its own."""

    def write(self, data: Any) -> int:
        """See `FileIO`."""
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _CannotWrite(
                error.errno or errno.EIO, f"standard output cannot be written: {error.strerror}"
            ) from None


class _CannotWrite(GntallocError):
    """Our output cannot be written."""


def explain(error: BaseException) -> int:
    """Say on standard error what went wrong, in one sentence if possible. Return the exit status."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, click.Abort | KeyboardInterrupt):
        _say("interrupted")
        return INTERRUPTED
    if isinstance(error, _CannotWrite | BrokenPipeError):
        _forget_output()
    if isinstance(error, BrokenPipeError) and not isinstance(error, GntallocError):
        return FAILED  # the reader of our output has left
    _say(f"gntalloc: {_text(error)}")
    if isinstance(error, NoMachine):
        return NOBODY
    if isinstance(error, TimedOut):
        return TIME_OVER
    if isinstance(error, ValueError) and not isinstance(error, GntallocError):
        return USAGE  # an argument of the API, which was one of the command line's
    return FAILED


def _text(error: BaseException) -> str:
    if isinstance(error, GntallocError | ValueError):
        return str(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory; see `ulimit -v`, and a container's limit"
    if isinstance(error, OSError):
        where = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        return f"{' and '.join(where) or 'the computer'}: {error.strerror or error}"
    if os.environ.get("GNTALLOC_TRACEBACK"):
        raise error
    kind = type(error).__name__
    return f"this is a fault of gntalloc's: {kind}: {error}. Please report it, with what GNTALLOC_TRACEBACK=1 shows"


def _forget_output() -> None:
    """Drop output that could not be written, so that the interpreter does not try once more as it ends."""
    nothing = _nothing()
    try:
        os.dup2(nothing, sys.stdout.fileno())
    except (OSError, ValueError):
        pass  # it is no file
    finally:
        os.close(nothing)


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass  # standard error cannot be written either
