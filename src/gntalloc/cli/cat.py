"""Run `gntalloc cat`: netcat between domains."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import click

from gntalloc.cli.show import progress
from gntalloc.cli.types import ADDRESS, SECONDS, DomidType, Number
from gntalloc.domain import current_domain
from gntalloc.vchan.pump import LINGER, pump

__all__ = ["command"]


def _machine_of(given: dict[str, Any]) -> str | None:
    """Find the machine that was named so far: by --domain, or as for every program."""
    address = given.get("domain") or os.environ.get("GNTALLOC_DOMAIN") or ""
    return os.path.dirname(address) or None


@click.command()
@click.option("-l", "--listen", is_flag=True, help="Be the server: wait for a client in domain PEER.")
@click.option(
    "-d",
    "--domain",
    type=ADDRESS,
    metavar="DOMAIN",
    help="The domain to be in, as NAME/DOMID; otherwise as for every program.",
)
@click.option("-w", "--timeout", type=SECONDS, help="Seconds to wait for the peer; for ever if not given.")
@click.option(
    "--size", default=1 << 20, show_default=True, type=Number(0, 1 << 24), help="With -l: bytes of each ring."
)
@click.option(
    "--linger",
    default=LINGER,
    show_default=True,
    type=SECONDS,
    help="Seconds to wait for the answer of a C program that has read everything.",
)
@click.argument("peer", metavar="PEER", type=DomidType(0xFFFF, _machine_of))
@click.argument("path", metavar="PATH")
def command(
    *, listen: bool, domain: str | None, timeout: float | None, size: int, linger: float, peer: int, path: str
) -> None:
    """Connect standard input and output to a program in domain PEER, through a vchan at PATH in xenstore.

    \b
        gntalloc cat -l 2 files | tar -x           in domain 1
        tar -c folder | gntalloc cat 1 files       in domain 2

    PATH is a name, or a whole path, which begins with /. The other end may be any program that speaks libxenvchan. The
    command ends when both directions have ended and everything was read; then the exit status is 0.
    """  # noqa: D301  the backslash is click's
    here = current_domain(domain)
    moved = 0
    lock = threading.Lock()
    if listen:
        with here.listen(peer, path, size=size) as listener:
            channel = listener.accept(timeout=timeout)
    else:
        channel = here.connect(peer, path, timeout=timeout)
    with channel, progress(f"domain {here.domid} ⇄ {peer}", None) as show:

        def count(more: int) -> None:
            nonlocal moved
            with lock:
                moved += more
                show(moved)

        source, sink = sys.stdin.fileno(), sys.stdout.fileno()
        if os.isatty(sink):  # the bytes that arrive are seen there
            pump(channel, source, sink, linger=linger)
        else:
            pump(channel, source, sink, linger=linger, moved=count, received=_close_output)


def _close_output() -> None:
    """Close our output, since the peer writes no more. Our input may go on."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)
