"""Run `gntalloc limit`."""

from __future__ import annotations

import click

from gntalloc.cli.types import DOMAIN, MOST_PAGES, MachineDomain, Number
from gntalloc.guest.control import ControlClient
from gntalloc.places import machine_folder

__all__ = ["command"]


@click.command()
@click.argument("domain", metavar="NAME/DOMID", type=DOMAIN)
@click.argument("pages", required=False, type=Number(0, MOST_PAGES))
def command(domain: MachineDomain, pages: int | None) -> None:
    """Show how many pages a domain may have granted at once, or set it to PAGES.

    A limit below the pages in use frees nothing: the domain gets no more pages until fewer are in use.
    """
    control = ControlClient(machine_folder(domain.machine))
    try:
        if pages is not None:
            control.order("set_limit", domid=domain.domid, limit=pages)
        print(control.order("get_limit", domid=domain.domid))
    finally:
        control.close()
