"""Run `gntalloc list`."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from typing import Any

import click

from gntalloc.cli.show import table
from gntalloc.cli.types import MACHINE
from gntalloc.errors import MachineGone, NoMachine
from gntalloc.guest.books import GrantedPage, Statistics
from gntalloc.guest.control import ControlClient
from gntalloc.guest.grant import Grant
from gntalloc.places import machine_folder, machines

__all__ = ["command"]


@click.command()
@click.argument("name", required=False, type=MACHINE)
@click.option("--json", "as_json", is_flag=True, help="One JSON object: machine -> its statistics and grants.")
def command(name: str | None, as_json: bool) -> None:
    """List the machines of this user, or the one called NAME: domains, and every grant.

    A machine that a program made for itself with gntalloc.Machine() is called of-PID-NUMBER.
    """
    found: dict[str, dict[str, Any]] = {}
    read: dict[str, tuple[Statistics, list[GrantedPage]]] = {}
    for each in [name] if name else machines():
        control = ControlClient(machine_folder(each))
        try:
            found[each] = {"statistics": control.order("statistics"), "grants": control.order("grants")}
            read[each] = Statistics.of(found[each]["statistics"]), list(map(GrantedPage.of, found[each]["grants"]))
        except (NoMachine, MachineGone):
            if name:
                raise
        finally:
            control.close()
    if as_json:
        print(json.dumps(found))
        return
    if not found:
        print(
            "no machine runs; start one with `gntalloc machine`, or in Python with gntalloc.Machine()", file=sys.stderr
        )
    for each, (statistics, grants) in read.items():
        _show(each, statistics, grants)


def _show(name: str, statistics: Statistics, grants: list[GrantedPage]) -> None:
    domains = [
        (
            str(domain.domid),
            str(domain.uid),
            f"{domain.pages_in_use} of {domain.limit}",
            str(domain.references),
            str(domain.files),
        )
        for domain in statistics.domains
    ]
    title = f"machine {name}, pid {statistics.pid}: {statistics.pages} pages"
    table(("domain", "uid", "pages in use", "references", "open files"), domains, title=title)
    if not grants:
        print("nothing is granted")
        return
    rows = [_row(list(group)) for _, group in groupby(grants, _alike)]
    table(("granter", "peer", "references", "rights", "by pid", "mapped by", "state", "age"), rows)


def _alike(grant: GrantedPage) -> tuple[Any, ...]:
    """Give what neighbours must have alike to be shown in one row."""
    fields = ("granter", "peer", "writable", "opener", "mapped_by", "held", "users")
    return (*(getattr(grant, field) for field in fields), int(grant.age))


def _row(group: list[GrantedPage]) -> tuple[str, ...]:
    first = group[0]
    _, refs, _ = str(Grant(0, tuple(grant.ref for grant in group), writable=False)).split(":")
    state = "granted" if first.users else "released, still held"
    return (
        str(first.granter),
        str(first.peer),
        refs,
        "rw" if first.writable else "ro",
        str(first.opener),
        ", ".join(map(str, first.mapped_by)) or "-",
        state,
        f"{first.age:.0f} s",
    )
