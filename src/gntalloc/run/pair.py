"""Run programs in several domains of one fresh machine, as a test of both ends of a channel needs.

The first program is the server. Each other one is started when xenstore shows its domain that a server waits for it, so
a client need not try again. The sign is a node `event-channel` that its domain may read. libxenvchan and this package
write it last of a channel's nodes.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.clock import Deadline, now
from gntalloc.places import store_path
from gntalloc.run.household import TIME_OVER, Household
from gntalloc.xenstore.client import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gntalloc.xenstore.watch import Watch

    Show = Callable[[str, int, bytes], None]

__all__ = ["Outcome", "run_pair"]

_LAST_NODE = "/event-channel"
_GRACE = 5.0  # seconds for a server to end by itself when its clients have ended
_CHUNK = 65536
_STREAMS = (1, 2)


class Outcome(NamedTuple):
    """Tell how the program of one domain ended.

    Attributes:
        status: its exit status, or 128 and the signal's number if one killed it. None: it was ended here, or never
            started.
        seconds: from the start of the pair to its end.
    """

    status: int | None
    seconds: float


def run_pair(
    commands: Mapping[int, Sequence[str]],
    *,
    show: Show,
    options: Sequence[str] = (),
    patience: float = 10.0,
    timeout: float | None = None,
) -> tuple[int, dict[int, Outcome]]:
    """Run a program in each domain. Return the status of the first that failed, and how each ended.

    Args:
        commands: program and arguments by domid, the server's first.
        show: is given the programs' output: the domain's name, 1 or 2 for the stream, bytes.
        options: more options for `gntalloc run`.
        patience: seconds to wait for a server's nodes. Afterwards the next program is started all the same.
        timeout: seconds for all programs. Afterwards the status is 124.

    Raises:
        CannotStart, GntallocError: the machine or `gntalloc run` cannot be started.
    """
    with Household(dict.fromkeys(commands, os.getuid())) as household, ExitStack() as stack:
        return _Pair(household, commands, show, options, stack).run(patience, timeout)


class _Pair:
    def __init__(
        self,
        household: Household,
        commands: Mapping[int, Sequence[str]],
        show: Show,
        options: Sequence[str],
        stack: ExitStack,
    ) -> None:
        self._household = household
        self._commands = commands
        self._show = show
        self._options = options
        self._stack = stack
        self._began = now()
        self._pids: dict[int, int] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._open: set[int] = set()  # pipes

    def run(self, patience: float, timeout: float | None) -> tuple[int, dict[int, Outcome]]:
        """See `run_pair`."""
        deadline = Deadline(timeout)
        server, *clients = self._commands
        watches = {domid: self._watch(domid) for domid in clients}
        self._start(server)
        for domid in clients:
            self._await_nodes(watches[domid], domid, server, patience, deadline)
            if self._failed() or deadline.expired:
                break
            self._start(domid)
        in_time = self._household.wait(lambda: self._is_over(clients), deadline)
        if in_time and not self._failed():
            # A server may still have output when its clients have left. One that waits for more clients is ended.
            self._household.wait(self._all_ended, Deadline(_GRACE), deadline)
        self._end_the_rest(say=in_time)
        status = self._failed() if in_time else TIME_OVER
        if not in_time:
            _say(f"the programs did not end within {timeout:g} s, and are ended")
        return status, self._outcomes

    def _start(self, domid: int) -> None:
        ends = [os.pipe2(os.O_CLOEXEC) for _ in _STREAMS]
        command = [sys.executable, "-m", "gntalloc", "run", "--domid", str(domid)]
        command += ["--machine", self._household.machine.folder, *self._options, "--", *self._commands[domid]]
        try:
            self._pids[domid] = self._household.start(command, stdout=ends[0][1], stderr=ends[1][1])
        finally:
            for stream, (reading, writing) in zip(_STREAMS, ends, strict=True):
                os.close(writing)
                self._stack.callback(os.close, reading)
                self._listen(reading, str(domid), stream)

    def _listen(self, pipe: int, name: str, stream: int) -> None:
        self._open.add(pipe)

        def read() -> None:
            data = os.read(pipe, _CHUNK)
            if data:
                self._show(name, stream, data)
            else:
                self._household.unwatch(pipe)
                self._open.discard(pipe)

        self._household.watch(pipe, read)

    def _watch(self, domid: int) -> Watch:
        store = self._stack.enter_context(Store(store_path(self._household.machine.folder, domid)))
        return self._stack.enter_context(store.watch("/"))

    def _await_nodes(self, watch: Watch, domid: int, server: int, patience: float, deadline: Deadline) -> None:
        there = False

        def look() -> None:
            nonlocal there
            while (path := watch.poll()) is not None:
                there = there or (path.endswith(_LAST_NODE) and not path.startswith(f"/local/domain/{domid}/"))

        self._household.watch(watch.fileno(), look)
        if not self._household.wait(lambda: there or self._has_ended(server), Deadline(patience), deadline):
            _say(
                f"the program in domain {server} has shown no channel to domain {domid} within {patience:g} s; the "
                "program there is started all the same"
            )
        self._household.unwatch(watch.fileno())

    def _has_ended(self, domid: int) -> bool:
        if domid not in self._outcomes and self._pids.get(domid) in self._household.ended:
            status = os.waitstatus_to_exitcode(self._household.ended[self._pids[domid]])
            seconds = now() - self._began
            self._outcomes[domid] = Outcome(status if status >= 0 else 128 - status, seconds)
        return domid in self._outcomes

    def _all_ended(self) -> bool:
        self._failed()
        return self._pids.keys() <= self._outcomes.keys() and not self._open

    def _is_over(self, clients: Sequence[int]) -> bool:
        return bool(self._failed()) or all(domid in self._outcomes for domid in clients if domid in self._pids)

    def _failed(self) -> int:
        """Give the status of the first program that failed, by time. 0: none has."""
        for domid in self._pids:
            self._has_ended(domid)
        return next((each.status for each in self._outcomes.values() if each.status), 0)

    def _end_the_rest(self, *, say: bool) -> None:
        """End the programs that still run, and take in their last output."""
        running = [domid for domid in self._pids if not self._has_ended(domid)]
        self._household.end()
        self._household.wait(lambda: not self._open, Deadline(_GRACE))
        for domid in self._commands:
            if domid in running and say:
                _say(f"the program in domain {domid} still ran when the others had ended, and is ended")
            if domid in running or domid not in self._pids:
                self._outcomes[domid] = Outcome(None, now() - self._began)


def _say(text: str) -> None:
    print(f"gntalloc: {text}", file=sys.stderr, flush=True)
