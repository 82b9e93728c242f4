"""How an end wakes the other, and how it sleeps.

Always there is the port of an event channel, as libxenvchan has it: it also rings when the peer dies. Between two of
our own ends on one computer there may be a *direct* bell beside it: a connected pair of sockets, so that a wake-up does
not go through the machine, and the end of a process is heard at once. Both have names in the abstract namespace, and
the server takes only the client whose name it was told in the shared page. Sending never waits: a peer that does not
read has enough there to wake up from. No end takes descriptors there: see unasked.py.

One thread sleeps for all: what it hears is told to those who wait beside it.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
from struct import Struct
from typing import TYPE_CHECKING

from gntalloc import waits
from gntalloc.errors import Closed
from gntalloc.unasked import Disposal, Inlet, refuse

if TYPE_CHECKING:
    from gntalloc.guest.events import Port

__all__ = ["Bells"]

_TIME = Struct("@ll")  # struct timeval
_STRANGERS = 8  # that may have connected before the client did
_DIRECT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Bells:
    """The bells of one end. `news` changes with each that rang."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._own = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._listening: waits.Socket | None = None
        self._direct: waits.Socket | None = None
        self._inlet: Inlet | None = None  # of the direct bell
        self._disposal = Disposal()
        self._direct_number = -1
        self._limit = -1  # microseconds that its recv waits; not known yet
        self.hung_up = False  # the peer's process has closed its direct bell, or ended
        self._epoll = waits.epoll()
        self._epoll.register(self._own, select.EPOLLIN)
        self._epoll.register(port.fileno(), select.EPOLLIN)
        self._sleeping = threading.Lock()  # held by the thread that sleeps for all
        self._changed = threading.Condition(threading.Lock())
        self._beside = 0  # threads that wait until the one that sleeps tells them
        self._closing = False
        self.news = 0

    def offer_direct(self) -> bytes:
        """Open a server's socket. Gives its name, for the client; empty if there is none."""
        listening = self._socket()
        if listening is None:
            return b""
        listening.setblocking(False)
        listening.listen(_STRANGERS)
        self._listening = listening
        return bytes(listening.getsockname())

    def connect_direct(self, name: bytes) -> bytes:
        """Connect a client to it. Gives this end's name, for the server; empty if it cannot be reached from here."""
        if len(name) < 2 or name[0]:
            return b""
        direct = self._socket()
        if direct is None:
            return b""
        direct.setblocking(False)
        try:
            direct.connect(name)
        except OSError:  # in another network namespace, or on another computer
            direct.close()
            return b""
        self.use(direct)
        return bytes(direct.getsockname())

    def accept_direct(self, name: bytes) -> None:
        """Use the connection of the client of that name, which the client made before it published the name."""
        listening = self._listening
        if listening is None:
            return
        with listening, contextlib.suppress(OSError):
            for _ in range(_STRANGERS):
                direct, whose = listening.accept()
                if name and whose == name:
                    self.use(direct)
                    break
                Inlet(direct, self._disposal).close()
        self._listening = None

    def _socket(self) -> waits.Socket | None:
        made = waits.Socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        refuse(made)  # before anybody can connect
        try:
            made.bind(b"")  # the kernel finds a name
        except OSError:
            made.close()
            return None
        return made

    def use(self, direct: waits.Socket) -> None:
        """Have a direct bell, which is connected."""
        direct.setblocking(True)
        self._direct = direct
        self._inlet = Inlet(direct, self._disposal)
        self._direct_number = direct.fileno()
        self._epoll.register(direct, select.EPOLLIN)

    def ring(self) -> None:
        """Wake the peer."""
        direct = self._direct
        if direct is not None:
            try:
                direct.send(b"!", _DIRECT)
                return
            except BlockingIOError:
                return  # it has not heard the last ones yet
            except OSError:
                pass  # it is gone
        self._port.notify()

    def ring_both(self) -> None:
        """Wake the peer by all means: this end goes."""
        if self._direct is not None:
            self.ring()
        self._port.notify()

    def ring_own(self) -> None:
        """Wake who sleeps here, for good: this end closes."""
        self._closing = True
        with contextlib.suppress(OSError):
            os.eventfd_write(self._own, 1)
        if self._direct is not None:
            with contextlib.suppress(OSError):
                self._direct.shutdown(socket.SHUT_RD)

    def sleep(self, seen: int, left: float | None) -> None:
        """Until a bell has rung since `news` was `seen`, or `left` seconds have passed. Spurious ends may be.

        Raises:
            MachineGone: no more bells will ring.
        """
        if not self._sleeping.acquire(False):
            with self._changed:
                self._beside += 1  # before looking: who sleeps moves `news` first, and then looks for us
                if self.news == seen:
                    self._changed.wait(left)
                self._beside -= 1
        elif self.news != seen:
            self._sleep_no_more()  # and not just release: somebody may have begun to wait beside us meanwhile
        else:
            try:
                if self._direct_number < 0 or left == 0 or waits.patched():
                    self._hear(left)
                else:  # on the direct bell alone, in one system call: it also tells of the peer's end, as the port does
                    self._limit_to(left)
                    self._take_direct(0)
            finally:
                self._sleep_no_more()

    def _hear(self, timeout: float | None) -> None:
        """Take what rings, or rings within `timeout` seconds. One thread at a time: who holds `_sleeping`."""
        for descriptor, _ in waits.ready(self._epoll, timeout):
            if descriptor == self._direct_number:
                self._take_direct(socket.MSG_DONTWAIT)
            elif descriptor == self._own:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._own)
            else:
                self._port.take_and_rearm()

    def _sleep_no_more(self) -> None:
        self.news += 1
        self._sleeping.release()
        if self._beside:
            with self._changed:
                self._changed.notify_all()

    def _limit_to(self, timeout: float | None) -> None:
        """How long the direct bell's recv waits, from now on."""
        limit = 0 if timeout is None else max(1, math.ceil(timeout * 1e6))  # 0 is for ever
        if limit != self._limit:
            assert self._direct is not None
            self._direct.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIME.pack(*divmod(limit, 1_000_000)))
            self._limit = limit

    def _take_direct(self, flags: int) -> None:
        """One wake-up: hardly ever are there two, and then the next look finds it."""
        inlet = self._inlet
        assert inlet is not None
        try:
            heard = inlet.receive(1, flags)
        except BlockingIOError:
            return
        except OSError:  # or Unasked: such a peer is not listened to there any more
            heard = b""
        if not heard and not self._closing:  # the end, and not by `ring_own`
            self.hung_up = True
            self._epoll.unregister(self._direct_number)
            self._direct_number = -1

    def hear_now(self) -> None:
        """Take what rings, and let those know who wait here. If a thread sleeps here, it hears that by itself."""
        if self._sleeping.acquire(False):
            try:
                self._hear(0)
            finally:
                self._sleep_no_more()

    @property
    def port(self) -> Port:
        """The port whose bells they are."""
        return self._port

    @property
    def direct(self) -> waits.Socket | None:
        """The direct bell, if there is one."""
        return self._direct

    def let_go(self) -> None:
        """Close this process's descriptors. Bells and port are for another process, which has them too."""
        self._close_own()
        self._port.let_go()

    def fileno(self) -> int:
        """Readable while something rings.

        Raises:
            Closed: after `close`.
        """
        if self._epoll.closed:
            raise Closed("the channel is closed, and rings no more; connect again")
        return self._epoll.fileno()

    def close(self) -> None:
        """Take them down. Who slept has been woken before, and is gone."""
        self._close_own()
        self._port.close()

    def _close_own(self) -> None:
        self._epoll.close()
        if self._own >= 0:
            os.close(self._own)
            self._own = -1
        for each in self._direct, self._listening:
            if each is not None:
                Inlet(each, self._disposal).close()
        self._direct = self._listening = self._inlet = None
