"""Run `gntalloc demo [FILE]`."""

from __future__ import annotations

import json
import os
import stat
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from gntalloc.cli.show import bytes_text, progress, table
from gntalloc.cli.types import Number
from gntalloc.demo.scenes import GRANTEE, GRANTER, Scene, grantee, play
from gntalloc.demo.stream import Outcome, Sender
from gntalloc.descriptors import open_files
from gntalloc.embed import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["command"]

MADE = 256 << 20  # bytes, when no file is given


@click.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, readable=True))
@click.option("--pages", default=512, show_default=True, type=Number(1, 1000), help="Size of the ring.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(file: str | None, pages: int, as_json: bool) -> None:
    """Stream FILE from one domain to another through granted pages, then let a peer misbehave.

    There are three processes: the machine, the granter (this one) and the grantee. Without FILE, 256 MiB are made up.
    """
    say: Callable[[str], None] = (lambda _text: None) if as_json else lambda text: print(text, flush=True)
    with ExitStack() as stack:
        machine = stack.enter_context(Machine())
        alice = machine.domain(GRANTER)
        sender = stack.enter_context(Sender(alice, GRANTEE, pages=pages))
        process = grantee(machine, "stream", sender.text, silent=True)
        stack.callback(process.wait)
        stack.callback(process.kill)
        what = f"{file}" if file else f"{bytes_text(MADE)} made here"
        say(f"machine  pid {machine.pid}, it keeps the books; no data goes through it")
        say(f"granter  pid {os.getpid()}, domain {GRANTER}: sends {what}")
        say(f"grantee  pid {process.pid}, domain {GRANTEE}: was told only: {sender.text}")
        fill, total = _source(file, stack)
        seen: dict[str, list[str]] = {}

        def look() -> None:
            seen["mapped by"] = [f"domain {domid}" for domid in sender.mapped_by]
            seen["in common"] = _in_common(process.pid)

        with progress("granter → grantee", total) as moved:
            outcome = sender.send(fill, here=look, moved=moved, alive=lambda: process.poll() is None)
        sender.close()
        if not as_json:
            _show(outcome, sender.pages, seen)
        scenes = []
        for number, scene in enumerate(play(machine), 1):
            scenes.append(scene)
            if not as_json:
                _show_scene(number, scene)
    good = outcome.sent == outcome.received and not seen["in common"] and not outcome.read_bytes
    good = good and all(line.as_it_must_be for scene in scenes for line in scene.lines)
    if as_json:
        print(json.dumps(_as_json(outcome, scenes)))
    elif good:
        say("\nThe digests agree, and the kernel kept every promise.")
    if not good:
        print("gntalloc: something above is not as it must be; please report it with this output", file=sys.stderr)
        sys.exit(1)


def _show(outcome: Outcome, pages: int, seen: dict[str, list[str]]) -> None:
    in_common = ", ".join(seen["in common"]) or "none"
    rows = [
        ("granted", f"{pages} pages ({bytes_text(pages * 4096)}) to domain {GRANTEE}"),
        ("mapped", f"by {', '.join(seen['mapped by'])}, as the kernel counts it"),
        ("moved", f"{outcome.moved} bytes through them, in {outcome.seconds:.2f} s"),
        ("rate", f"{bytes_text(outcome.moved / max(outcome.seconds, 1e-9))}/s, both sides hashing"),
        ("moved any other way", f"{outcome.read_bytes} bytes; descriptors in common: {in_common}"),
        ("SHA-256 sent", outcome.sent),
        ("SHA-256 received", outcome.received),
    ]
    table(("", ""), rows)


def _show_scene(number: int, scene: Scene) -> None:
    lines = [("ok" if line.as_it_must_be else "WRONG", line.deed, line.answer) for line in scene.lines]
    table(("", "what is done", "what the answer is"), lines, title=f"\n{number}. {scene.title}")


def _source(file: str | None, stack: ExitStack) -> tuple[Callable[[memoryview], int], int | None]:
    """Give the function that fills the pages, and the number of bytes if that is known."""
    if file is not None:
        source = stack.enter_context(open(file, "rb", buffering=0))  # noqa: SIM115  the stack closes it
        status = os.fstat(source.fileno())
        return lambda buffer: source.readinto(buffer) or 0, status.st_size if stat.S_ISREG(status.st_mode) else None
    block = os.urandom(1 << 20)
    made = 0

    def fill(buffer: memoryview) -> int:
        nonlocal made
        size = min(len(buffer), MADE - made, len(block))
        buffer[:size] = block[:size]
        if size >= 8:
            buffer[:8] = made.to_bytes(8, "little")  # no two blocks are alike
        made += size
        return size

    return fill, MADE


def _in_common(pid: int) -> list[str]:
    """List pipes, sockets and files that this process and that one both have open: other ways for bytes to go."""
    return sorted(set(open_files()) & set(open_files(pid)) - {"/dev/null"})


def _as_json(outcome: Outcome, scenes: list[Scene]) -> dict[str, Any]:
    told = [{"title": scene.title, "lines": [line._asdict() for line in scene.lines]} for scene in scenes]
    return {**outcome._asdict(), "scenes": told}
