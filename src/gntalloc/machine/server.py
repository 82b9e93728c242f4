"""Serve a machine at its sockets: put its parts together, make and end domains, and run the loop.

There is one thread. Every wait is in one epoll; no send and no receive ever blocks. `turns` decides what is served
when.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import socket
import time
from typing import TYPE_CHECKING

from gntalloc import clock
from gntalloc.errors import DeviceError, GntallocError
from gntalloc.libc import trim
from gntalloc.machine.connection import Connection, handlers_with
from gntalloc.machine.control import Control, Pending
from gntalloc.machine.doors import Doors
from gntalloc.machine.faults import Faults
from gntalloc.machine.homes import Homes
from gntalloc.machine.lifetime import Visits
from gntalloc.machine.loop import Loop
from gntalloc.machine.orders import orders_of
from gntalloc.machine.store import StoreFront
from gntalloc.machine.supervision import Supervision
from gntalloc.machine.turns import OWN, Turns
from gntalloc.machine.waits import Waits
from gntalloc.places import domain_path
from gntalloc.steps import batches
from gntalloc.unasked import Disposal

if TYPE_CHECKING:
    from gntalloc.machine.doors import Peer
    from gntalloc.machine.machine import Guest, Machine
    from gntalloc.steps import Steps

__all__ = ["MAX_CONNECTIONS", "Server"]

log = logging.getLogger("gntalloc.machine")

MAX_CONNECTIONS = 1024
"""The most connected programs of one domain, so that it cannot use up the machine's descriptors."""
_DROPPED_AT_ONCE = 8  # speakers of a domain that ends
_MANY_ROUNDS = 1000  # after which there may be memory to be given back
_SETTLING = 0.001  # seconds of a round
_AFTER_A_FAULT = 0.01  # seconds, lest a fault that stays takes a whole processor
_FEW_PAGES = 4096
_QUIET = 0.25  # seconds without a message, until that is done
_LEAVING = 0.05  # seconds between looks whether a run is coming in


class Server:
    """Serve the machine with its sockets in `folder`, which must exist and be empty."""

    def __init__(self, machine: Machine, folder: str) -> None:
        self.machine = machine
        machine.later = self._later
        self.folder = folder
        self.stopping = False
        self.loop = Loop()
        self.turns = Turns(self.loop, self._settle)
        self.homes = Homes(self.turns, machine)
        self._waits = Waits()
        self._rounds = 0  # since memory was given back
        self._disposal = Disposal()  # of what comes over control channels
        self._news_of_waits = self._news_of_pages = False
        self.loop.watch(self._waits.fileno(), self._note_waits)
        self.loop.watch(machine.frames.fileno(), self._note_pages)
        self._faults = Faults(machine)
        self.visits = Visits(
            folder,
            is_there=lambda domid: domid in machine.guests and not machine.guests[domid].ending,
            create=lambda domid: self.create(domid, uid=os.getuid()),
            destroy=self.destroy,
            settle=machine.settle,
        )
        self._store = StoreFront(machine.store, self.turns)
        supervision = Supervision(self.turns, self.homes, self._open_store, machine.carry_out)
        self._handlers = handlers_with(supervision.handlers)
        self._orders = orders_of(
            machine, self._store, self.visits, self._faults, create=self.create, destroy=self.destroy
        )
        self._doors = Doors(self.turns, folder, self._disposal)
        self._doors.open_control(self._let_in_control)

    # Domains.

    def create(self, domid: int, *, uid: int, limit: int | None = None) -> str:
        """Make a domain and its sockets, and return the path of the first.

        Raises:
            GntallocError: EEXIST: there is one of that number.
        """
        guest = self.machine.create(domid, uid=uid, limit=limit)
        self.turns.open_account(domid, uid)
        try:
            self._doors.open_domain(guest, self._let_in, self._let_in_to_store)
        except GntallocError:
            self.turns.close_account(domid)
            self.machine.destroy(domid)
            raise
        self._store.settle()  # tells the domains that watch
        return domain_path(self.folder, domid)

    def destroy(self, domid: int) -> Pending:
        """Begin to end a domain. No program comes in any more, its programs are disconnected, its files close.

        A small domain has ended when this returns. Of a large one the rest is done in steps.

        Raises:
            GntallocError: ESRCH: there is none of that number, or it is ending already.
        """
        guest = self.machine.guest(domid)
        if guest.ending:
            raise GntallocError(errno.ESRCH, f"domain {domid} is being ended already")
        guest.ending = True
        self._doors.shut_domain(domid)
        self.visits.forget(domid)
        pending = Pending()
        self.turns.do(OWN, self._end(guest, pending))
        return pending

    def _end(self, guest: Guest, pending: Pending) -> Steps[None]:
        try:
            theirs = [each for each in self.turns if isinstance(each, Connection) and each.guest is guest]
            for connections in batches(theirs, _DROPPED_AT_ONCE):
                for connection in connections:
                    self.turns.drop(connection, "its domain was destroyed")
                yield
            yield from self.homes.close_those_of(guest)
            yield from self.machine.begin_to_destroy(guest.domid)
            self._store.deliver()  # hangs up on its programs
            self.turns.close_account(guest.domid)
            self._store.settle()  # tells the domains that watch
        finally:
            pending.done = True

    # The loop.

    def run(self) -> None:
        """Serve until `stopping` is set."""
        while not self.stopping:
            try:
                self._serve_a_round()
            except Exception:
                log.exception("a round could not be served to its end")  # a fault of ours: the machine goes on
                time.sleep(_AFTER_A_FAULT)

    def _serve_a_round(self) -> None:
        patience = self._patience()
        self._rounds += 1
        untidy = self._rounds >= _MANY_ROUNDS
        if untidy and not 0 <= patience < _QUIET:
            patience = _QUIET
        if not self.loop.hear(patience) and untidy and patience == _QUIET:
            self._rounds = 0
            self._tidy_up()
        if self._faults.late:
            self._faults.serve()
        self.turns.serve()
        if self.visits.over:
            self.stopping = self.visits.may_end()

    def _tidy_up(self) -> None:
        """Give memory back to the computer. With few pages the collector is quick, and gives back some of its own."""
        if self.machine.frames.pages <= _FEW_PAGES:
            gc.collect()
        trim()

    def close(self) -> None:
        """Disconnect all programs, and remove the sockets from the folder."""
        self.turns.close()
        self._doors.close()
        self.homes.close()
        self._waits.close()
        self.loop.close()
        self.machine.frames.close()

    def adopt_control(self, sock: socket.socket, *, until_left: bool = False) -> None:
        """Take orders from `sock`, and end when it does, or with `until_left` when no visitor is left."""
        control = Control(sock, self._orders, self._disposal)
        if until_left:
            self.visits.wait_for(control)
        self._add_control(control, ends_the_machine=not until_left)

    def _patience(self) -> float:
        """Give the seconds until there is work that no descriptor tells of. -1: there is none."""
        patience = self.turns.patience()
        if patience == 0:
            return 0.0
        pages = self.machine.frames.patience()
        if patience is None and not (self._faults.late or self.visits.over):  # as nearly always
            return -1.0 if pages is None else pages
        leaving = _LEAVING if self.visits.over else None
        waits = (patience, pages, self._faults.patience(), leaving)
        return min(wait for wait in waits if wait is not None)

    def _settle(self) -> None:
        """Take in the maps and waits that programs have given up."""
        if self._news_of_waits:
            self._news_of_waits = False
            self._waits.settle()
        heard, self._news_of_pages = self._news_of_pages, False
        if heard or self.machine.frames.restless:
            self.machine.settle(heard=heard, until=clock.now() + _SETTLING)
            self.homes.keep_no_longer()

    def _later(self, domid: int, work: Steps[None]) -> None:
        self.turns.do(domid, work)

    def _note_waits(self, _events: int) -> None:
        self._news_of_waits = True

    def _note_pages(self, _events: int) -> None:
        self._news_of_pages = True

    # Programs that come in.

    def _let_in(self, sock: socket.socket, guest: Guest, peer: Peer) -> None:
        there = guest.connections
        if there >= MAX_CONNECTIONS:
            raise DeviceError(errno.EMFILE, f"{there} programs are connected to domain {guest.domid}; end some")
        guest.descriptors.take(1, errno.EMFILE, "a connection")
        guest.connections += 1

        def ended() -> None:
            guest.connections -= 1
            guest.descriptors.give(1)

        connection = Connection(
            sock,
            guest,
            peer,
            homes=self.homes,
            waits=self._waits,
            carry_out=self.machine.carry_out,
            handlers=self._handlers,
        )
        try:
            self.turns.add(connection, guest.domid, ended)
        except DeviceError:
            ended()
            raise

    def _let_in_control(self, sock: socket.socket) -> None:
        self._add_control(Control(sock, self._orders, self._disposal), ends_the_machine=False)

    def _add_control(self, control: Control, *, ends_the_machine: bool) -> None:
        def ended() -> None:
            self._faults.calm(control)
            self.visits.leave(control)
            if ends_the_machine:
                self.stopping = True

        self.turns.add(control, OWN, ended)

    def _let_in_to_store(self, sock: socket.socket, guest: Guest, peer: Peer) -> None:
        self._connect_to_store(sock, guest, peer.pid)

    def _connect_to_store(self, sock: socket.socket, guest: Guest, pid: int) -> None:
        guest.descriptors.take(1, errno.EMFILE, "a connection to xenstore")
        try:
            self._store.connect(sock, guest.domid, pid, guest.disposal, ended=lambda: guest.descriptors.give(1))
        except DeviceError:
            guest.descriptors.give(1)
            raise

    def _open_store(self, guest: Guest, *, opener: int) -> socket.socket:
        """Make a connection to xenstore, as process `opener` of this domain, and return the program's end.

        Raises:
            DeviceError: EMFILE: the machine has no descriptors left, or too many programs are connected.
        """
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise DeviceError(errno.EMFILE, f"the machine has no descriptors left: {error.strerror}") from None
        try:
            self._connect_to_store(ours, guest, opener)
        except DeviceError:
            ours.close()
            theirs.close()
            raise
        return theirs
