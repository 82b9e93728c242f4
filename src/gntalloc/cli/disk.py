"""Run `gntalloc disk`: use a disk of this domain, or serve one to another."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import stat
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from gntalloc.cli.copying import copy_in, copy_out, length_from, telling_of
from gntalloc.cli.show import bytes_text, progress, table
from gntalloc.cli.types import ADDRESS, LARGEST_DOMID, SECONDS, Number
from gntalloc.digits import whole_number
from gntalloc.domain import current_domain
from gntalloc.errors import DeviceError, GntallocError
from gntalloc.frontend.blkback import WAYS, Backend
from gntalloc.frontend.blkfront import BlockDevice
from gntalloc.frontend.image import FORMATS
from gntalloc.frontend.nodes import Device, attach, detach, disk_number

if TYPE_CHECKING:
    from collections.abc import Iterator


__all__ = ["command"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Read a number of bytes: 4096, 64K, 1M."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:iB)?", value, re.ASCII | re.IGNORECASE)
    number = match and whole_number(match[1])
    if match is None or number is None:
        raise click.BadParameter(f"{value[:40]!r} is no number of bytes; write 4096, 64K, 1M or 2G")
    return number * _UNITS[match[2].upper()]


def _number(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Read the number of a disk: xvda, or 51712."""
    try:
        return None if value is None else disk_number(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_domain = click.option(
    "-d",
    "--domain",
    type=ADDRESS,
    metavar="DOMAIN",
    help="The domain to be in, as NAME/DOMID; otherwise as for every program.",
)
_disk = click.option(
    "--disk", "number", callback=_number, metavar="DISK", help="The disk, as xvda or 51712; otherwise the only one."
)
_timeout = click.option(
    "-w",
    "--timeout",
    type=SECONDS,
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Seconds to wait for the backend to be there.",
)
_offset = click.option("--offset", callback=_bytes, default="0", metavar="BYTES", help="Where to begin: 4096, 64K, 1M.")


@click.group()
def command() -> None:
    """Read and write a disk that another domain serves, or serve one.

    \b
        gntalloc disk serve --for 1 disk.img        in domain 0
        gntalloc disk read backup.img               in domain 1
        qemu-img info nbd+unix:///?socket=/tmp/s    with gntalloc disk nbd --socket /tmp/s
    """  # noqa: D301  the backslash is click's


@command.command("info")
@_domain
@_disk
@_timeout
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def info_command(domain: str | None, number: int | None, timeout: float, as_json: bool) -> None:
    """Connect to a disk, and say what its backend offers."""
    with _opened(domain, number, timeout) as disk:
        facts: dict[str, Any] = {
            "number": disk.number,
            "size": disk.size,
            "sector_size": disk.sector_size,
            "physical_sector_size": disk.physical_sector_size,
            "read_only": disk.read_only,
            "largest_request": disk.largest,
            "features": disk.features._asdict(),
        }
    if as_json:
        print(json.dumps(facts))
        return
    features = facts.pop("features")
    facts["size"] = f"{facts['size']} ({bytes_text(disk.size)})"
    table(("", ""), [(name.replace("_", " "), _said(value)) for name, value in {**facts, **features}.items()])


@command.command("read")
@_domain
@_disk
@_timeout
@_offset
@click.option("--length", callback=_bytes, metavar="BYTES", help="How much; to the disk's end if not given.")
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True), default="-")
def read_command(
    domain: str | None, number: int | None, timeout: float, offset: int, length: int | None, file: str
) -> None:
    """Copy a disk, or a part of it, to FILE or to standard output."""
    with _opened(domain, number, timeout) as disk:
        length = length_from(disk, offset, length)  # before FILE loses what is in it
        with _file(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as target:
            sparse = file != "-" and stat.S_ISREG(os.fstat(target).st_mode)
            with progress(f"disk → {file}", length) as show:
                copy_out(disk, offset, length, target, show, sparse=sparse)


@command.command("write")
@_domain
@_disk
@_timeout
@_offset
@click.option("--length", callback=_bytes, metavar="BYTES", help="How much; to the file's end if not given.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True), default="-")
def write_command(
    domain: str | None, number: int | None, timeout: float, offset: int, length: int | None, file: str
) -> None:
    """Copy FILE or standard input to a disk, and flush it.

    If the input ends within a sector, the rest of that sector stays as it is.
    """
    with _opened(domain, number, timeout) as disk, _file(file, os.O_RDONLY) as source:
        if offset % disk.sector_size:
            raise click.UsageError(f"--offset {offset}: no sector begins there; they have {disk.sector_size} bytes")
        status = os.fstat(source)
        if length is None and stat.S_ISREG(status.st_mode):
            length = status.st_size - os.lseek(source, 0, os.SEEK_CUR)
        with progress(f"{file} → disk", length) as show:
            copy_in(disk, offset, length, source, show)
        disk.flush()


@command.command("serve")
@_domain
@click.option("--for", "frontend", type=Number(0, LARGEST_DOMID), required=True, metavar="DOMID", help="Whose disk.")
@click.option(
    "--disk",
    "number",
    callback=_number,
    default="xvda",
    show_default=True,
    metavar="DISK",
    help="Which.",
)
@click.option("--read-only", is_flag=True, help="Refuse writes.")
@click.option("--attached", is_flag=True, help="A toolstack has attached it, and will detach it: only serve.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="auto", show_default=True, help="Insist on raw.")
@click.option("--pad", is_flag=True, help="If FILE ends within a sector, serve zeros after its end.")
@click.option("--way", type=click.Choice(WAYS), default="map", show_default=True, help="How to reach its pages.")
@click.option("--sector-size", type=click.Choice(["512", "1024", "2048", "4096"]), default="512", show_default=True)
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
def serve_command(
    domain: str | None,
    frontend: int,
    number: int,
    read_only: bool,
    attached: bool,
    form: str,
    pad: bool,
    way: str,
    sector_size: str,
    file: str,
) -> None:
    """Be the backend: serve FILE, or a block device, as a disk of domain DOMID, until Ctrl-C.

    The disk is attached first, as a toolstack does, and detached afterwards. That is for domain 0.

    FILE is a raw image, of whole sectors. It is locked as QEMU locks images: many may read it, or one may write it.
    When it grows, its frontend is told.
    """
    here = current_domain(domain)
    device = Device("vbd", number, frontend, here.domid)
    with contextlib.ExitStack() as stack:
        if not attached:
            if here.store.exists(f"{device.front}/state") or here.store.exists(f"{device.back}/state"):
                raise GntallocError(
                    f"domain {frontend} has a disk {number} already; use another --disk, or serve that by --attached"
                )
            nodes = {"virtual-device": str(number), "device-type": "disk"}
            attach(here.store, device, nodes, {"mode": "r" if read_only else "w"})
            stack.callback(detach, here.store, device)
        settings: dict[str, Any] = {"read_only": read_only, "way": way, "sector_size": int(sector_size)}
        settings |= {"form": form, "pad": pad}
        with telling_of(file):
            backend = stack.enter_context(Backend(here, device, file, **settings))
        came = stack.enter_context(_stopped_by_signals(backend))
        how = "read-only " if backend.read_only else ""
        print(f"serving {file} ({bytes_text(backend.size)}) as {how}disk {number} of domain {frontend}; Ctrl-C ends it")
        sys.stdout.flush()
        backend.serve()
    print(f"{backend.requests} requests were answered, {backend.refused} of them with an error", file=sys.stderr)
    if signal.SIGINT in came:
        raise KeyboardInterrupt


@command.command("nbd")
@_domain
@_disk
@_timeout
@click.option("--socket", "path", type=click.Path(), metavar="PATH", help="Listen on a Unix socket.")
@click.option("--port", type=Number(0, 65535), metavar="PORT", help="Listen on a port of 127.0.0.1; 0 is any.")
@click.option("--name", default="", help="A name of the export, beside the default one.")
@click.option("--read-only", is_flag=True, help="Refuse writes.")
@click.option(
    "--patience",
    type=SECONDS,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Seconds to wait for a backend that has gone to return.",
)
def nbd_command(
    domain: str | None,
    number: int | None,
    timeout: float,
    path: str | None,
    port: int | None,
    name: str,
    read_only: bool,
    patience: float,
) -> None:
    """Export a disk as a network block device, until Ctrl-C: for qemu-img, nbdcopy, nbdinfo, or a kernel's nbd.

    A program that may open the socket may read and write the disk: programs of this user only, or with --port any
    program of this computer.
    """
    if (path is None) == (port is None):
        raise click.UsageError("give --socket PATH or --port PORT")
    if path == "":
        raise click.UsageError("--socket '' is no path; give it a name")
    path = path and os.path.abspath(path)
    import asyncio  # which no other command needs

    from gntalloc.cli.exporting import export

    with _no_device_is_3():
        asyncio.run(export(current_domain(domain), number, timeout, patience, path, port, name, read_only=read_only))


@contextmanager
def _opened(domain: str | None, number: int | None, timeout: float) -> Iterator[BlockDevice]:
    """Open a disk. Its failures are told without a traceback."""
    with _no_device_is_3(), BlockDevice(current_domain(domain), number, timeout=timeout) as disk:
        yield disk


@contextmanager
def _no_device_is_3() -> Iterator[None]:
    try:
        yield
    except DeviceError as error:
        if error.errno != errno.ENODEV:
            raise
        print(f"gntalloc: {error}", file=sys.stderr)
        sys.exit(3)


@contextmanager
def _file(path: str, flags: int) -> Iterator[int]:
    """Open a file, or a standard stream for "-", and give the descriptor."""
    if path == "-":
        stream = sys.stdin if flags == os.O_RDONLY else sys.stdout
        with telling_of("standard input" if flags == os.O_RDONLY else "standard output"):
            yield stream.fileno()
        return
    with telling_of(path):
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _said(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


@contextmanager
def _stopped_by_signals(backend: Backend) -> Iterator[list[int]]:
    """Let SIGINT and SIGTERM close the backend in order. Give the list of those that came."""
    came: list[int] = []

    def stop(number: int, _frame: object) -> None:
        came.append(number)
        backend.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
