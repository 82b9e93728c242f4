"""Show results: tables and progress on a terminal, plain lines elsewhere. rich is imported only if needed."""

from __future__ import annotations

import sys
import textwrap
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gntalloc.clock import now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["bytes_text", "progress", "table"]

_FEW = 3  # so many columns can be folded and read on any terminal


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print rows of cells: a rich table on a terminal, columns of plain text elsewhere."""
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console(highlight=False)
        if len(headings) > _FEW and console.width < _narrowest(headings, rows):
            _stack(headings, rows, title, console.width)
            return
        shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(headings))
        for heading in headings:
            shown.add_column(heading, overflow="fold")
        for row in rows:
            shown.add_row(*map(Text, row))
        console.print(shown)
        return
    if title:
        print(title)
    lines = [list(headings), *map(list, rows)] if any(headings) else [list(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _narrowest(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Count the columns of the terminal that a table needs to have whole headings and words."""
    words = [list(headings), *([max(cell.split(), key=len, default="") for cell in row] for row in rows)]
    return sum(max(map(len, column)) + 2 for column in zip(*words, strict=True)) + 2


def _stack(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str | None, width: int) -> None:
    """Print a line for each cell, for terminals that are too narrow for columns."""
    if title:
        print(title)
    label = max(map(len, headings)) + 2
    for row in rows:
        print()
        for heading, cell in zip(headings, row, strict=True):
            lines = textwrap.wrap(cell, max(width - label, 8)) or [""]
            for first, line in zip((heading, *[""] * (len(lines) - 1)), lines, strict=True):
                print(f"{first:{label}}{line}".rstrip())


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show how many bytes of `total` are done, on standard error if that is a terminal. Give the function to call."""
    if not sys.stderr.isatty():
        yield lambda _done: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        shown = now()

        def update(done: int) -> None:
            nonlocal shown
            moment = now()
            if moment - shown >= 0.1 or done == total:  # drawing costs more than moving
                bar.update(task, completed=done)
                shown = moment

        yield update


def bytes_text(count: float) -> str:
    """Write a number of bytes for people: 1536 as 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
