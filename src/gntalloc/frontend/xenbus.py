"""xenbus: how the two ends of a device come together and part, by one number each in xenstore.

Each end owns a folder and writes its `state` there; it watches the other's. `TABLE` says who may go where, and when;
`draw` makes the table of the documentation from it.

An end that fails says why in a node beside its folder: /local/domain/<domid>/error/<its folder>/error. Whoever waits
for it in vain is told what stands there, if it may read it.

Sources: Xen's public io/xenbus.h for the numbers; Linux's drivers/xen/xenbus and xen-blkback for who moves when.
"""

from __future__ import annotations

import contextlib
import errno
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.clock import Deadline
from gntalloc.digits import whole_number
from gntalloc.errors import Closed, DeviceError, PeerClosed, TimedOut
from gntalloc.xenstore.errors import Denied, NoNode, StoreError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from gntalloc.xenstore.client import Store, Transaction

__all__ = ["BACK", "FRONT", "TABLE", "End", "State", "Step", "StepRefused", "draw", "may"]

_LOOK_AGAIN = 0.25  # seconds: how soon a thread that waits sees that it was given up


class State(IntEnum):
    """What an end says of itself. The numbers are Xen's."""

    UNKNOWN = 0  # it says nothing: there is no node
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8

    def __str__(self) -> str:
        return f"{int(self)} ({self.name.replace('_', ' ').capitalize()})"


FRONT, BACK = "frontend", "backend"


class StepRefused(ValueError):
    """An end cannot go from where it is to there. Either it is a mistake, or somebody else has moved it."""


class Step(NamedTuple):
    """`side` may go from a state to another, when that holds."""

    side: str
    state: State
    to: State
    when: str


_S = State
TABLE = (
    Step(FRONT, _S.UNKNOWN, _S.INITIALISING, "the toolstack has made the device"),
    Step(FRONT, _S.INITIALISING, _S.INITIALISED, "its ring, its port and what it can do are published"),
    Step(FRONT, _S.INITIALISING, _S.CLOSING, "it gives up"),
    Step(FRONT, _S.INITIALISING, _S.CLOSED, "nobody drives it"),
    Step(FRONT, _S.INITIALISED, _S.CONNECTED, "the backend is connected, and what it offers was read"),
    Step(FRONT, _S.INITIALISED, _S.CLOSING, "it gives up, or takes over from one that died"),
    Step(FRONT, _S.INITIALISED, _S.CLOSED, "it was taken from its driver"),
    Step(FRONT, _S.CONNECTED, _S.CLOSING, "no request is outstanding; or it takes over from one that died"),
    Step(FRONT, _S.CONNECTED, _S.CLOSED, "it was taken from its driver"),
    Step(FRONT, _S.CONNECTED, _S.RECONFIGURING, "it asks for a change of what is attached (PCI)"),
    Step(FRONT, _S.RECONFIGURING, _S.CONNECTED, "the backend is reconfigured"),
    Step(FRONT, _S.RECONFIGURING, _S.CLOSING, "it gives up"),
    Step(FRONT, _S.CLOSING, _S.CLOSED, "the backend closes too"),
    Step(FRONT, _S.CLOSED, _S.INITIALISING, "it begins anew, the backend being closed"),
    Step(BACK, _S.UNKNOWN, _S.INITIALISING, "the toolstack has made the device"),
    Step(BACK, _S.INITIALISING, _S.INIT_WAIT, "what a frontend must know beforehand is published"),
    Step(BACK, _S.INITIALISING, _S.CLOSING, "it cannot serve"),
    Step(BACK, _S.INITIALISING, _S.CLOSED, "the frontend is not there yet"),
    Step(
        BACK,
        _S.INIT_WAIT,
        _S.CONNECTED,
        "the frontend is initialised; its ring is mapped, and what is offered published",
    ),
    Step(BACK, _S.INIT_WAIT, _S.CLOSING, "the frontend gives up, or its ring is of no use"),
    Step(BACK, _S.INIT_WAIT, _S.CLOSED, "the frontend has closed"),
    Step(BACK, _S.CONNECTED, _S.CLOSING, "the frontend is closing, or has broken the ring"),
    Step(BACK, _S.CONNECTED, _S.CLOSED, "the frontend has closed; or the backend takes over from one that died"),
    Step(BACK, _S.CONNECTED, _S.RECONFIGURED, "the frontend has asked for it (PCI)"),
    Step(BACK, _S.RECONFIGURED, _S.CONNECTED, "the frontend is connected again"),
    Step(BACK, _S.RECONFIGURED, _S.CLOSING, "the frontend is closing"),
    Step(BACK, _S.CLOSING, _S.CLOSED, "the ring is unmapped, and the port closed"),
    Step(BACK, _S.CLOSED, _S.INIT_WAIT, "the frontend is initialising again"),
)
"""Who may go where. To stay is always allowed."""

_ALLOWED = frozenset((step.side, step.state, step.to) for step in TABLE)


def may(side: str, state: State, to: State) -> bool:
    """Whether an end of that side may go from one state to the other."""
    return state == to or (side, state, to) in _ALLOWED


def draw() -> str:
    """Draw the table as Markdown, for docs/frontends.md."""
    lines = ["| who | from | to | when |", "|---|---|---|---|"]
    lines += [f"| {step.side} | {step.state} | {step.to} | {step.when} |" for step in TABLE]
    return "\n".join(lines) + "\n"


class End:
    """One end of a device, and how it sees the other.

    Args:
        store: the xenstore of the domain that this end is in.
        side: FRONT or BACK.
        folder: this end's, in full.
        other: the other's.

    Attributes:
        given_up: set by another thread: `wait` is to end soon.
    """

    def __init__(self, store: Store, side: str, folder: str, other: str) -> None:
        self.store = store
        self.side = side
        self.folder = folder
        self.other = other
        self.given_up = False

    @property
    def state(self) -> State:
        """This end's state, as it stands in xenstore."""
        return self._state(self.folder)

    @property
    def peer(self) -> State:
        """The other's state. What is no state is UNKNOWN; what is not there, too."""
        return self._state(self.other)

    def go(self, to: State, nodes: Mapping[str, object] | None = None) -> None:
        """Change this end's state, and publish what goes with it, in one transaction.

        Args:
            to: may be where it is already: the other end is told again.
            nodes: names in this end's folder, and their values.

        Raises:
            StepRefused: the table does not know that step.
            DeviceError: ENODEV the device was detached.
        """

        def write(tree: Transaction) -> None:
            state = self._state(self.folder, tree)
            if state == State.UNKNOWN:
                raise DeviceError(errno.ENODEV, f"{self.folder} was detached: its state is gone from xenstore")
            if not may(self.side, state, to):
                raise StepRefused(f"a {self.side} cannot go from {state} to {to}; see the table in docs/frontends.md")
            for name, value in (nodes or {}).items():
                tree.write(f"{self.folder}/{name}", str(value))
            tree.write(f"{self.folder}/state", str(int(to)))

        self.store.transact(write)

    def wait(
        self, wanted: Collection[State], *, timeout: float | None, unless: Collection[State] = (State.UNKNOWN,)
    ) -> State:
        """Wait until the other end is in one of the states.

        Args:
            wanted: which.
            timeout: seconds; None waits for ever.
            unless: states from which it will not come there.

        Raises:
            TimedOut: it was not; the text says where it is, and what it complains of.
            PeerClosed: it went to one of `unless`.
            Closed: another thread has `given_up`.
        """
        deadline = Deadline(timeout)
        with self.store.watch(f"{self.other}/state") as watch:
            while True:
                watch.drain()  # before looking: what comes after that is news
                state = self.peer
                if state in wanted:
                    return state
                where = "is gone from xenstore" if state == State.UNKNOWN else f"is in state {state}"
                told = f"{self.other} {where}, where {' or '.join(map(str, wanted))} was waited for"
                if state in unless:
                    raise PeerClosed(f"{told}{self._complaint()}")
                if deadline.expired:
                    raise TimedOut(
                        f"{told} for {timeout} s{self._complaint()}; see that something serves it, or wait longer"
                    )
                if self.given_up:
                    raise Closed(f"{told}, and it was closed here meanwhile")
                with contextlib.suppress(TimedOut):
                    watch.wait(timeout=deadline.within(_LOOK_AGAIN))

    def read(self, name: str) -> str | None:
        """Read what the other end has published under a name. None: nothing, or not for this domain."""
        return self._read(f"{self.other}/{name}")

    def number(self, name: str, default: int = 0, most: int = (1 << 64) - 1) -> int:
        """Read the same as a number. Text that is no number from 0 to `most` counts as nothing."""
        text = self.read(name)
        number = None if text is None else whole_number(text, most)
        return default if number is None else number

    def complain(self, why: str, reader: int) -> None:
        """Say why this end fails, where the other domain, and people, can read it."""
        node = _error_node(self.folder)
        with contextlib.suppress(StoreError):  # the rights to it are the toolstack's to give
            self.store.write(node, why)
            owner = self.folder.split("/")[3]
            self.store.set_permissions(node, (f"n{owner}", f"r{reader}"))

    def complaint(self) -> str | None:
        """Read what the other end has said of its failure, if that may be read."""
        return self._read(_error_node(self.other))

    def forget_complaint(self) -> None:
        """Remove this end's complaint: it works again."""
        with contextlib.suppress(StoreError):
            self.store.remove(_error_node(self.folder))

    def _complaint(self) -> str:
        why = self.complaint()
        return f"; it says: {why}" if why else ""

    def _state(self, folder: str, tree: Store | Transaction | None = None) -> State:
        text = self._read(f"{folder}/state", tree)
        return State(int(text)) if text is not None and text in _STATES else State.UNKNOWN

    def _read(self, path: str, tree: Store | Transaction | None = None) -> str | None:
        try:
            return (tree or self.store).read_text(path)
        except (NoNode, Denied):
            return None


_STATES = frozenset(str(int(state)) for state in State)


def _error_node(folder: str) -> str:
    """/local/domain/1/device/vbd/5 complains at /local/domain/1/error/device/vbd/5/error."""
    parts = folder.split("/")
    return "/".join((*parts[:4], "error", *parts[4:], "error"))
