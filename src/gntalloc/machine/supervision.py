"""Serve a run's supervisor beyond its own calls, and hand calls over to it.

The machine serves the system calls of its own user's programs itself (syscalls.py), over a listener that the supervisor
lends it. The supervisor places maps, since ptrace waits for the program. It takes over all calls from the moment on
when the machine may not look into the program, or a debugger traces it.

A listener is the only descriptor that the machine takes from anybody, over a line for nothing else, and only from
programs of its own user. What is sent there and is none is closed in a thread, which may be held up.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

from gntalloc.descriptors import receive_with
from gntalloc.errors import DeviceError
from gntalloc.machine.connection import pieces_of_plan
from gntalloc.machine.speaker import Dropped
from gntalloc.machine.syscalls import Syscalls, is_listener, may_be_served
from gntalloc.wire.messages import (
    PLACE,
    TAKE_OVER,
    UNASKED,
    Behalf,
    Brought,
    Home,
    Keep,
    Lend,
    Serve,
    frame,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gntalloc.drivers.chardev import Plan
    from gntalloc.machine.connection import CarryOut, Connection, Handler
    from gntalloc.machine.homes import Homes
    from gntalloc.machine.syscalls import OpenStore
    from gntalloc.machine.turns import Turns
    from gntalloc.steps import Steps
    from gntalloc.syscalls.listener import Call
    from gntalloc.wire.stream import Message

__all__ = ["Supervision"]


class Supervision:
    """Serve the supervisors of all runs.

    Args:
        turns: the turns of programs.
        homes: the homes of open files.
        open_store: opens a connection to xenstore.
        carry_out: makes descriptions for a plan, in steps.
    """

    def __init__(self, turns: Turns, homes: Homes, open_store: OpenStore, carry_out: CarryOut) -> None:
        self._turns = turns
        self._homes = homes
        self._open_store = open_store
        self._carry_out = carry_out
        self._lines: dict[Connection, socket.socket] = {}
        self._runs: dict[Connection, _Run] = {}
        self.handlers: Mapping[type, Handler] = {
            Lend: self._lend,
            Serve: self._serve,
            Behalf: self._behalf,
            Keep: self._keep,
            Home: self._home,
        }

    def _lend(self, connection: Connection, message: Message, asked: Lend) -> None:
        guest = connection.guest
        may = may_be_served(connection.peer.uid, asked.namespace) and not guest.disposal.full
        if connection in self._lines or not may:
            connection.answer(message)
            return
        ours, theirs = guest.descriptors.socketpair("a line for a listener")
        self._lines[connection] = ours
        connection.when_ended(lambda: self._take_down(connection))
        with theirs:
            connection.answer(message, result=1, descriptors=[theirs.fileno()])

    def _take_down(self, connection: Connection) -> None:
        connection.guest.disposal.hang_up(self._lines.pop(connection))
        connection.guest.descriptors.give(1)

    def _serve(self, connection: Connection, message: Message, asked: Serve) -> None:
        listener = self._listener_of(connection)
        if listener is None:
            connection.answer(message)
            return
        run = _Run(connection, self._turns, self._carry_out)
        try:
            calls = Syscalls(connection.guest, listener, self._homes, self._open_store, run)
        except OSError as error:
            os.close(listener)
            raise DeviceError(errno.ENOMEM, f"the machine cannot serve these calls: {error.strerror}") from None
        try:
            run.begin(calls)
        except DeviceError:
            calls.close()
            os.close(calls.notes)
            raise
        self._runs[connection] = run
        connection.when_ended(lambda: self._ended(connection))
        try:
            connection.answer(message, result=1, descriptors=[calls.notes])
        finally:
            os.close(calls.notes)

    def _listener_of(self, connection: Connection) -> int | None:
        """Take the listener that was sent over the connection's line. Whatever else came there is disposed of."""
        if connection in self._runs or connection not in self._lines:
            return None
        try:
            _, descriptors = receive_with(self._lines[connection], 1, how=socket.MSG_DONTWAIT)
        except OSError:
            return None
        if len(descriptors) == 1 and is_listener(descriptors[0]):
            return descriptors[0]
        connection.guest.disposal.close(descriptors)
        return None

    def _ended(self, connection: Connection) -> None:
        self._runs.pop(connection).end()

    def _behalf(self, connection: Connection, message: Message, told: Behalf) -> None:
        connection.pid, connection.by_offset = told.process, bool(told.by_offset)

    def _keep(self, connection: Connection, message: Message, asked: Keep) -> None:
        self._homes.keep(connection.guest, connection.file(asked.handle))
        connection.answer(message)

    def _home(self, connection: Connection, message: Message, asked: Home) -> None:
        with self._homes.another(connection.file(asked.handle)) as programs_end:
            connection.answer(message, descriptors=[programs_end.fileno()])


class _Run:
    """Hand calls to the supervisor, for one run whose calls the machine serves."""

    def __init__(self, connection: Connection, turns: Turns, carry_out: CarryOut) -> None:
        self._connection = connection
        self._turns = turns
        self._carry_out = carry_out
        self._calls: Syscalls | None = None

    def begin(self, calls: Syscalls) -> None:
        """Serve these calls in turn, as long as the supervisor reads the calls that it is handed."""
        self._turns.add(calls, self._connection.guest.domid, self._forget)
        self._calls = calls
        self._connection.companion = calls

    def end(self) -> None:
        """Stop serving the run's calls."""
        if self._calls is not None:
            self._turns.drop(self._calls, "its supervisor is gone, or serves it")

    def place(self, call: Call, plan: Plan, process: int) -> Steps[None]:
        """Have the supervisor answer this mmap with these pages."""
        plan.record.process = process
        loans = yield from self._carry_out(plan)
        mark = plan.record.mark if plan.locks else 0
        brought = Brought(PLACE, mark, call.encode(), pieces_of_plan(plan, loans))
        try:
            self._bring(call, brought, [loan.descriptor for loan in loans])
        finally:
            for loan in loans:
                loan.close()

    def take_over(self, call: Call) -> None:
        """Have the supervisor answer this call, those that were taken already, and all that follow."""
        calls = self._calls
        assert calls is not None
        left: Call | None = call
        while left is not None:
            self._bring(left, Brought(TAKE_OVER, 0, left.encode(), ()), ())
            left = calls.take_back()
        self.end()

    def _bring(self, call: Call, brought: Brought, descriptors: Sequence[int]) -> None:
        connection = self._connection
        data = frame(brought, UNASKED, len(descriptors))
        try:
            connection.send(data, descriptors)
        except Dropped as reason:
            if self._calls is not None:
                self._calls.fail(call)
            self._turns.drop(connection, str(reason))
        else:
            if connection.wants_to_send:
                self._turns.plan(connection)

    def _forget(self) -> None:
        self._calls = None
        self._connection.companion = None
