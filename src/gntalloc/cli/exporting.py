"""Export a disk as a network block device: `gntalloc disk nbd`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gntalloc.cli.copying import telling_of
from gntalloc.cli.show import bytes_text
from gntalloc.frontend.aio import disk as open_disk
from gntalloc.frontend.nbd import NbdServer
from gntalloc.unasked import refuse

if TYPE_CHECKING:
    from gntalloc.domain import Domain

__all__ = ["export"]


async def export(
    here: Domain,
    number: int | None,
    timeout: float,  # noqa: ASYNC109  it bounds a handshake
    patience: float,
    path: str | None,
    port: int | None,
    name: str,
    *,
    read_only: bool,
) -> None:
    """Export a disk of this domain at a socket or a port, until a signal or the end of the disk."""
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(_listener(path, port or 0))
        if path:
            stack.callback(_unlink, path)
        disk = await stack.enter_async_context(await open_disk(here, number, timeout=timeout, patience=patience))
        server = await stack.enter_async_context(NbdServer(disk, name=name, read_only=read_only))
        await server.listen(listener)
        terminated = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, terminated.set)
        where = _uri(listener, name)
        how = "read-only " if server.read_only else ""
        print(f"{how}disk {disk.number} ({bytes_text(disk.size)}) is at {where}; Ctrl-C ends it", flush=True)
        ended = loop.create_task(terminated.wait())
        stack.callback(ended.cancel)
        either: list[asyncio.Future[Any]] = [server.failed, ended]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if server.failed.done():
            server.failed.result()


def _listener(path: str | None, port: int) -> socket.socket:
    """Make a bound socket. A socket that is there already is replaced only if nobody listens on it."""
    if path is None:
        with telling_of(f"port {port}"):
            return socket.create_server(("127.0.0.1", port))
    sock = socket.socket(socket.AF_UNIX)
    refuse(sock)
    try:
        with telling_of(path):
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.lstat(path).st_mode) and not _answers(path):
                    os.unlink(path)
            mask = os.umask(0o177)
            try:
                sock.bind(path)
            finally:
                os.umask(mask)
            sock.listen()
    except BaseException:
        sock.close()
        raise
    return sock


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _uri(listener: socket.socket, name: str) -> str:
    """Give the address where clients find the export."""
    address = listener.getsockname()
    if isinstance(address, str):
        return f"nbd+unix:///{quote(name)}?socket={quote(address)}"
    return f"nbd://{address[0]}:{address[1]}/{quote(name)}"


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True
