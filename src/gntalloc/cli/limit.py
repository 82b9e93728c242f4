"""`gntalloc limit`."""

from __future__ import annotations

import click

from gntalloc.guest.control import ControlClient
from gntalloc.places import machine_folder

__all__ = ["command"]


@click.command()
@click.argument("domain", metavar="NAME/DOMID")
@click.argument("pages", required=False, type=click.IntRange(0))
def command(domain: str, pages: int | None) -> None:
    """Show how many pages a domain may have granted at once, or set it to PAGES.

    Less than are in use frees nothing; the domain is refused until enough are free.
    """
    name, _, domid = domain.rpartition("/")
    if not name or not domid.isdigit():
        raise click.UsageError(f"{domain!r} is no domain; write the machine's name and the domid, as in default/1")
    control = ControlClient(machine_folder(name))
    try:
        if pages is not None:
            control.order("set_limit", domid=int(domid), limit=pages)
        print(control.order("get_limit", domid=int(domid)))
    finally:
        control.close()
