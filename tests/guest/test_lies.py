"""A machine whose answers cannot be: what a program gets is one of our errors, and no other."""

from __future__ import annotations

import contextlib
import os
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from liar import Liar, change

from gntalloc import GntallocError, Grant, current_domain
from gntalloc.embed import Machine
from gntalloc.guest import connection
from gntalloc.guest.books import GrantedPage, OpenFile, Statistics
from gntalloc.guest.connection import Answer
from gntalloc.guest.control import ControlClient
from gntalloc.wire.messages import FORMS
from gntalloc.xenstore.client import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gntalloc import SharedPages

ROUNDS = int(os.environ.get("GNTALLOC_LIES", "10"))


@pytest.fixture(scope="module")
def real() -> Iterator[Machine]:
    with Machine(limit=4096) as machine:
        for domid in (1, 2):
            machine.domain(domid).devices.close()
        yield machine


def use_everything(path: str, machine: Machine) -> None:
    """Each call of a domain's once, whatever became of the one before. The memory is left alone."""
    while (domain := in_peace(lambda: current_domain(path))) is None:
        pass
    peer = machine.domain(2)
    with contextlib.ExitStack() as stack:
        stack.callback(peer.devices.close)
        stack.callback(peer.close)
        stack.callback(domain.devices.close)
        stack.callback(in_peace, domain.close)

        def kept(make: Callable[[], Any]) -> Any:
            thing = in_peace(make)
            if thing is not None:
                stack.callback(in_peace, thing.close)
            return thing

        for_us = peer.share(1, pages=2, writable=True)
        stack.callback(for_us.close)
        port_of_peer = stack.enter_context(peer.events.bind(1))
        for writable in (True, False):
            shared = kept(partial(domain.share, 2, pages=3, writable=writable))
            if shared is not None:
                ask_of(shared)
        kept(lambda: domain.map(for_us.grant))
        kept(lambda: domain.map(2, [1 << 20], timeout=0))
        port = kept(lambda: domain.events.bind(2))
        if port is not None:
            in_peace(port.notify)
            in_peace(lambda: port.wait(timeout=0))
            in_peace(port.rearm)
        other = kept(lambda: domain.events.connect(2, port_of_peer.number))
        if other is not None:
            in_peace(other.notify)
            in_peace(lambda: other.wait(timeout=0))
        file = kept(lambda: domain.devices.open("gntalloc"))
        if file is not None:
            again = in_peace(lambda: domain.devices.reopen("gntalloc", os.dup(file.fileno())))
            if again is not None:
                kept(lambda: domain.share(2, file=again))
        in_peace(lambda: domain.limit)
        in_peace(lambda: setattr(domain, "limit", 4096))
        store = kept(lambda: Store(f"{path}.store", timeout=0.2))
        if store is not None:
            in_peace(lambda: store.write("data/x", "1"))
            in_peace(lambda: store.read("data/x"))
            in_peace(lambda: store.list("data"))
            in_peace(lambda: store.get_permissions("data/x"))
            watch = kept(lambda: store.watch("data"))
            if watch is not None:
                in_peace(lambda: watch.wait(timeout=0))
        books(os.path.dirname(path))


def ask_of(shared: SharedPages) -> None:
    in_peace(lambda: shared.held)
    in_peace(lambda: shared.mapped_by)
    in_peace(lambda: os.close(shared.released_descriptor() or os.dup(0)))
    in_peace(lambda: shared.notify_when_unmapped(clear=0))
    in_peace(lambda: str(Grant.parse(str(shared.grant))))


def books(folder: str) -> None:
    control = ControlClient(folder)
    try:
        in_peace(lambda: Statistics.of(control.order("statistics")))
        for kind, name in (GrantedPage, "grants"), (OpenFile, "files"):
            entries = in_peace(partial(control.order, name))
            for entry in entries if isinstance(entries, list) else ():
                in_peace(partial(kind.of, entry))
    finally:
        control.close()


def in_peace(call: Callable[[], Any]) -> Any:
    """None instead of one of our errors."""
    try:
        return call()
    except GntallocError:
        return None


@pytest.mark.parametrize("part", range(4))
def test_only_our_errors_come_of_lies(
    real: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(connection, "DEADLINE", 0.1)
    for number in range(part * ROUNDS, (part + 1) * ROUNDS):
        chance = random.Random(number)
        folder = tmp_path / str(number)
        folder.mkdir()
        with Liar(real.folder, folder, ("1", "1.store", "control"), chance) as liar:
            try:
                use_everything(liar.path, real)
            except Exception as error:
                error.add_note(f"seed {number}")
                raise


@pytest.mark.parametrize("kind", FORMS)
def test_any_bytes_are_an_answer_or_machine_broke(kind: type) -> None:
    chance = random.Random(1)
    for _ in range(500):
        with contextlib.suppress(GntallocError):
            Answer(b"\0" * 16 + change(chance.randbytes(chance.randrange(100)), chance), []).read(kind)
