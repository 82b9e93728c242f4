"""Pairs of channels: both ends in this process, in two domains; or the client in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc import Domain, Machine
    from gntalloc.vchan.channel import Channel

PATIENCE = 20.0
PROLOGUE = "import gntalloc, os, sys, time\nchannel = gntalloc.current_domain().connect(1, 'test', timeout=20)\n"


@pytest.fixture
def pair(alice: Domain, bob: Domain) -> Iterator[Callable[..., tuple[Channel, Channel]]]:
    """Makes a server's and a client's end. Settings are those of `listen`, those of `connect` in `client`."""
    with ExitStack() as stack:

        def make(client: dict[str, Any] | None = None, **settings: Any) -> tuple[Channel, Channel]:
            with alice.listen(2, "test", **settings) as listener, ThreadPoolExecutor(1) as other:
                future = other.submit(bob.connect, 1, "test", timeout=PATIENCE, **(client or {}))
                server = stack.enter_context(listener.accept(timeout=PATIENCE))
                return server, stack.enter_context(future.result(PATIENCE))

        yield make


@pytest.fixture
def with_program(machine: Machine, alice: Domain) -> Iterator[Callable[..., tuple[Channel, subprocess.Popen[str]]]]:
    """Starts a program in domain 2, whose `channel` is the other end of the one that is returned."""
    with ExitStack() as stack:

        def start(program: str, **settings: Any) -> tuple[Channel, subprocess.Popen[str]]:
            with alice.listen(2, "test", **settings) as listener:
                command = [sys.executable, "-W", "ignore", "-c", PROLOGUE + program]
                process = subprocess.Popen(
                    command, env=machine.environ(2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
                stack.callback(process.communicate)
                stack.callback(process.kill)
                return stack.enter_context(listener.accept(timeout=PATIENCE)), process

        yield start
