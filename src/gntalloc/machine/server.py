"""The loop: who connects, who calls, which homes are closed, what the kernel says of mappings.

One thread. Every wait is in one epoll; no send and no receive ever blocks. Before any message is served the loop has
taken in every home that was closed and every page that was unmapped before that message was sent, so that for programs
close(2) and munmap(2) are as synchronous here as they are in a kernel. The same goes for what programs tell without
waiting for an answer: a round serves what it has received only after it has looked once more at what has come since.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from gntalloc import clock, wire
from gntalloc.errors import DeviceError, GntallocError
from gntalloc.machine.channel import Channel, Dropped
from gntalloc.machine.connection import Connection
from gntalloc.machine.control import Control
from gntalloc.machine.faults import Faults
from gntalloc.machine.homes import Homes
from gntalloc.machine.store import StoreFront
from gntalloc.machine.visits import Visits
from gntalloc.places import control_path, domain_path, store_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.machine.machine import Guest, Machine
    from gntalloc.machine.served import Served

__all__ = ["Server"]

log = logging.getLogger("gntalloc.machine")

_CREDENTIALS = struct.Struct("=iII")
_CHECK_FOR_STALLS = 1.0
_BACKLOG = 512
_LEAVING = 0.05  # seconds between looks whether nobody is coming in
_READABLE, _WRITABLE = int(select.EPOLLIN), int(select.EPOLLOUT)
_SOMETHING_CAME = int(select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR)
# Of one domain, so that it cannot use up the machine's descriptors. Files and waits have limits of their own.
MAX_CONNECTIONS = 1024


class Server:
    """The machine with its sockets in `folder`, which must exist and be empty."""

    def __init__(self, machine: Machine, folder: str) -> None:
        self.machine = machine
        self.folder = folder
        self.stopping = False
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[int], None]] = {}
        self._channels: dict[int, Channel] = {}
        self._turns: deque[Channel] = deque()  # channels with something to serve
        self.calls: deque[Served] = deque()
        """One for each call that was taken of a program that we serve ourselves, if nobody has taken it back."""
        self._slow: set[Channel] = set()  # channels that keep the machine waiting
        self._listeners: dict[str, socket.socket] = {}
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self.homes = Homes(self)
        self._closed_homes = self._closed_pages = False  # whether there is news of any
        self.watch(self.homes.fileno(), self._note_homes)
        self.watch(machine.frames.fileno(), self._note_pages)
        self.visits = Visits(self)
        self.faults = Faults(machine)
        self._store = StoreFront(machine.store)
        self.watch(self._store.fileno(), lambda _events: self._store.serve())
        self._listen(control_path(folder), 0o600, self._accept_control)

    # Domains.

    def create(self, domid: int, *, uid: int, limit: int | None = None) -> Guest:
        """Make a domain and its socket.

        Raises:
            GntallocError: EEXIST there is one of that number.
        """
        guest = self.machine.create(domid, uid=uid, limit=limit)
        # Who may come in is decided at connect, by SO_PEERCRED; the modes only keep others from knocking.
        mode = 0o600
        if uid != os.getuid():
            mode = 0o666
            os.chmod(self.folder, 0o711)
        try:
            self._listen(store_path(self.folder, domid), mode, lambda sock: self._accept_store(sock, guest))
            self._listen(domain_path(self.folder, domid), mode, lambda sock: self._accept(sock, guest))
        except GntallocError:
            if store_path(self.folder, domid) in self._listeners:
                self._stop_listening(store_path(self.folder, domid))
            self.machine.destroy(domid)
            raise
        self._store.serve()  # tells those who watch
        return guest

    def destroy(self, domid: int) -> None:
        """End a domain: nobody comes in any more, its programs are disconnected, its files close.

        Raises:
            GntallocError: ESRCH there is none of that number.
        """
        guest = self.machine.guest(domid)
        self._stop_listening(domain_path(self.folder, domid))
        self._stop_listening(store_path(self.folder, domid))
        for channel in list(self._channels.values()):
            if isinstance(channel, Connection) and channel.guest is guest:
                self.drop(channel, "its domain was destroyed")
        self.homes.close_those_of(guest)
        self.visits.forget(domid)
        self.machine.destroy(domid)
        self._store.serve()  # tells those who watch, and hangs up on its programs

    # Files.

    def open_store(self, guest: Guest, *, opener: int) -> socket.socket:
        """A connection to xenstore for process `opener` of this domain, which speaks its wire. The program's end.

        Raises:
            DeviceError: EMFILE the machine has no descriptors left, or too many programs are connected.
        """
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise DeviceError(errno.EMFILE, f"the machine has no descriptors left: {error.strerror}") from None
        try:
            self._store.connect(ours, guest.domid, opener)
        except DeviceError:
            ours.close()
            theirs.close()
            raise
        return theirs

    def store_connections(self) -> list[dict[str, Any]]:
        """For people: see `StoreFront.connections`."""
        return self._store.connections()

    # The loop.

    def run(self) -> None:
        """Serve until `stopping`."""
        while not self.stopping:
            self._hear(self._patience())
            if self.faults.late:
                self.faults.serve()
            if self._turns or self.calls:
                self._serve_round()
            else:
                self._settle()
            if self._slow:
                self._drop_the_stalled()
            if self.visits.over:
                self.stopping = self.visits.may_end()

    def _serve_round(self) -> None:
        # What is served now was sent before this second look, so the look finds all that was told before it.
        turns, calls = self._turns, self.calls
        admitted, taken = len(turns), len(calls)
        for channel in turns:
            channel.admit()
        self._hear(0)
        self._settle()
        for channel in turns:
            if channel.has_notes:
                self._let(channel, channel.take_notes)
        for _ in range(admitted):
            self._turn(turns.popleft())
        for _ in range(taken):
            calls.popleft().serve()

    def _hear(self, patience: float) -> None:
        waiting = self._ready
        for descriptor, events in self._epoll.poll(patience, len(waiting)):
            ready = waiting.get(descriptor)
            if ready is not None:
                ready(events)

    def _note_homes(self, _events: int) -> None:
        self._closed_homes = True

    def _note_pages(self, _events: int) -> None:
        self._closed_pages = True

    def close(self) -> None:
        """Disconnect everybody and take the sockets out of the folder."""
        for channel in list(self._channels.values()):
            self.drop(channel, "the machine ends")
        for path in list(self._listeners):
            self._stop_listening(path)
        self._store.close()
        self.homes.close()
        self._epoll.close()
        os.close(self._spare)
        self.machine.frames.close()

    def adopt_control(self, sock: socket.socket, *, until_left: bool = False) -> None:
        """Take orders from `sock`, and end when it does; or, `until_left`, when nobody is in the machine any more."""
        control = Control(sock, self)
        control.ends_the_machine = not until_left
        if until_left:
            self.visits.wait_for(control)
        self._add(control)

    def wake_by(self, descriptor: int) -> None:
        """Let bytes on `descriptor` end a wait."""

        def swallow(_events: int) -> None:
            os.read(descriptor, 4096)

        self.watch(descriptor, swallow)

    def _patience(self) -> float:
        if self._turns or self.calls:
            return 0.0
        if self.visits.over:
            return _LEAVING
        pages = self.machine.frames.patience()
        if not (self._slow or self.faults.late):
            return -1.0 if pages is None else pages
        stalls = _CHECK_FOR_STALLS if self._slow else None
        return min(wait for wait in (pages, self.faults.patience(), stalls) if wait is not None)

    def _settle(self) -> None:
        """Take in what programs have let go of."""
        if self._closed_homes:
            self._closed_homes = False
            self.homes.settle()
        heard, self._closed_pages = self._closed_pages, False
        if heard or self.machine.frames.restless:
            self.machine.settle(heard=heard)
            self.homes.keep_no_longer()

    # Connections.

    def _accept(self, sock: socket.socket, guest: Guest) -> None:
        pid, uid, _gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid not in {guest.uid, 0}:
            why = f"domain {guest.domid} is for uid {guest.uid}, and this program runs as {uid}"
            log.info("refused pid %d: %s", pid, why)
            self._refuse(sock, errno.EACCES, why)
            return
        there = sum(isinstance(channel, Connection) and channel.guest is guest for channel in self._channels.values())
        if there >= MAX_CONNECTIONS:
            self._refuse(sock, errno.EMFILE, f"{there} programs are connected to domain {guest.domid}; end some")
            return
        self._add(Connection(sock, self, guest, pid, uid))

    def _accept_store(self, sock: socket.socket, guest: Guest) -> None:
        pid, uid, _gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        try:
            if uid not in {guest.uid, 0}:
                raise DeviceError(errno.EACCES, f"domain {guest.domid} is for uid {guest.uid}, not for {uid}")
            self._store.connect(sock, guest.domid, pid)
        except DeviceError as why:  # xenstore's wire has no word for it
            log.info("refused a program at xenstore: %s", why)
            sock.close()

    def _refuse(self, sock: socket.socket, code: int, why: str) -> None:
        try:
            sock.send(wire.encode_reply(wire.HELLO, 0, error=code, why=why), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            pass  # it did not even wait for the answer
        sock.close()

    def _accept_control(self, sock: socket.socket) -> None:
        _pid, uid, _gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid not in {os.getuid(), 0}:
            sock.close()
            return
        self._add(Control(sock, self))

    def _add(self, channel: Channel) -> None:
        self._channels[channel.sock.fileno()] = channel
        self.watch(channel.sock.fileno(), lambda events: self._channel_ready(channel, events))

    def _channel_ready(self, channel: Channel, events: int) -> None:
        try:
            if events & _WRITABLE:
                channel.flush()
            if events & _SOMETHING_CAME:
                channel.receive()
        except Dropped as reason:
            self.drop(channel, str(reason))
            return
        if channel.runnable:
            self._queue(channel)  # and is looked at again when it has had its turn
        else:
            self.plan(channel)

    def _queue(self, channel: Channel) -> None:
        if not channel.queued:
            channel.queued = True
            self._turns.append(channel)

    def _turn(self, channel: Channel) -> None:
        channel.queued = False
        if self._let(channel, channel.turn):
            self.plan(channel)

    def _let(self, channel: Channel, serve: Callable[[], None]) -> bool:
        """Serve some messages of this channel. Whether it is still there."""
        if channel.sock.fileno() not in self._channels:
            return False
        try:
            serve()
        except Dropped as reason:
            self.drop(channel, str(reason))
            return False
        except Exception:
            # A fault of ours. The program must not wait for ever, nobody else may notice, and we want to know.
            log.exception("a message could not be served")
            self.drop(channel, "serving it failed, see above")
            return False
        return True

    def plan(self, channel: Channel) -> None:
        """What to wait for on this channel, and whether it has something to serve."""
        if channel.wants_to_send:
            wanted = _WRITABLE
        elif channel.inbox:  # who has sent enough waits for answers first
            wanted = 0
            self._queue(channel)
        else:
            wanted = _READABLE
        if wanted != channel.wanted:
            channel.wanted = wanted
            self._epoll.modify(channel.sock.fileno(), wanted)
            if isinstance(channel, Connection) and channel.served is not None:  # what it cannot be told must wait
                self._epoll.modify(channel.served.fileno(), 0 if channel.wants_to_send else _READABLE)
        if channel.waits():
            self._slow.add(channel)
        elif self._slow:
            self._slow.discard(channel)

    def drop(self, channel: Channel, why: str) -> None:
        """End a connection."""
        descriptor = channel.sock.fileno()
        if self._channels.pop(descriptor, None) is None:
            return
        log.debug("%s: %s", type(channel).__name__, why)
        self._slow.discard(channel)
        self.unwatch(descriptor)
        channel.close()
        if isinstance(channel, Control) and channel.ends_the_machine:
            self.stopping = True

    def _drop_the_stalled(self) -> None:
        now = clock.now()
        for channel in [channel for channel in self._slow if channel.stalled(now)]:
            self.drop(channel, "it left a message half sent, or a reply unread, for too long")

    # Descriptors.

    def _listen(self, path: str, mode: int, accept: Callable[[socket.socket], None]) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unheard = path + "-"
        try:
            if os.path.lexists(path):
                raise FileExistsError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            listener.bind(unheard)
            os.chmod(unheard, mode)
            listener.listen(_BACKLOG)
            os.rename(unheard, path)  # whoever sees it there may connect at once
        except OSError as error:
            listener.close()
            raise GntallocError(error.errno or errno.EIO, f"{path} cannot be listened on: {error.strerror}") from None
        listener.setblocking(False)
        self._listeners[path] = listener
        self.watch(listener.fileno(), lambda _events: self._take_in(listener, accept))

    def _stop_listening(self, path: str) -> None:
        listener = self._listeners.pop(path)
        self.unwatch(listener.fileno())
        listener.close()
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass  # somebody tidied the folder up before us

    def _take_in(self, listener: socket.socket, accept: Callable[[socket.socket], None]) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            # Out of descriptors. Take the caller in with the spare one and hang up, or it would wake us for ever.
            os.close(self._spare)
            try:
                listener.accept()[0].close()
            except OSError:
                pass  # it gave up by itself
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            return
        accept(sock)

    def watch(self, descriptor: int, ready: Callable[[int], None]) -> None:
        """Call `ready` with the events when something has come."""
        self._ready[descriptor] = ready
        self._epoll.register(descriptor, select.EPOLLIN)

    def watch_for(self, descriptor: int, events: int) -> None:
        """Call it for these events instead."""
        self._epoll.modify(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        """No more."""
        del self._ready[descriptor]
        self._epoll.unregister(descriptor)
