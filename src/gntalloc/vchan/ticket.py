"""Ticket: an end of a channel on its way to another process of its domain.

    ticket = channel.detach()                   in the process that has the channel
    with gntalloc.adopt(ticket) as channel:     in the one that shall have it

It gets there by fork, pickled by multiprocessing, or over a Unix socket. What it holds are descriptors: of the device
file that has the pages, of the port, of the direct bell. They are the end: it lives as long as some process has them,
and if nobody is left the peer is told of a death. Each process closes its own copy of the ticket.

One adopts: of an eventfd that all copies share, the first takes the one there is.
"""

from __future__ import annotations

import json
import os
import socket
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from gntalloc.descriptors import receive_with
from gntalloc.errors import Busy, Closed, GntallocError, PeerGone
from gntalloc.unclosed import warn_unclosed
from gntalloc.vchan.end import End, Progress
from gntalloc.vchan.pages import Area, Areas, ChannelPages
from gntalloc.vchan.role import SERVER

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Held", "Tells", "Ticket"]

_LENGTH = Struct("=I")
_LONGEST = 1 << 20  # bytes of what is told: rings of 16 MiB have 8192 references


class Tells(NamedTuple):
    """What is to be known of the end."""

    address: str
    server: bool
    peer: int
    port: int
    spin: float
    sizes: tuple[int, int]  # of the left ring and the right one
    areas: Areas
    progress: Progress

    @classmethod
    def parse(cls, text: bytes) -> Tells:
        """Read what `json.dumps` made of one."""
        address, server, peer, port, spin, sizes, areas, progress = json.loads(text)
        header, left, right, directory = map(_area, areas)
        if header is None:
            raise ValueError("it tells of no page")
        where = Areas(header, left, right, directory)
        return cls(address, server, peer, port, spin, (sizes[0], sizes[1]), where, Progress(*progress))


def _area(values: list[Any] | None) -> Area | None:
    if values is None:
        return None
    at, granter, refs, writable, mirrored = values
    return Area(at, granter, tuple(refs), writable, mirrored)


class Held(NamedTuple):
    """The descriptors. `direct` is -1 if there is no such bell."""

    claim: int
    file: int
    port: int
    direct: int


class Ticket:
    """Made by `Channel.detach`, for `gntalloc.adopt`. To be closed, or used in a `with`, in each process that has it.

    Attributes:
        pages: mapped, in the process that detached and in its children; None elsewhere.
    """

    def __init__(self, tells: Tells, held: Held, pages: ChannelPages | None = None) -> None:
        self.tells = tells
        self.held = held
        self.pages = pages
        self._sent = False
        self._closed = False

    @classmethod
    def of(cls, end: End, address: str) -> Ticket:
        """Take an end out of its channel: its pages stay mapped until the ticket is closed."""
        pages, bells = end.pages, end.bells
        left, right = (end.reader, end.writer) if end.role.reads_left else (end.writer, end.reader)
        tells = Tells(
            address,
            end.role is SERVER,
            end.peer,
            bells.port.number,
            end.spin,
            (left.size, right.size),
            pages.areas(),
            end.progress(),
        )
        held = [os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)]
        try:
            held += [os.dup(pages.file.fileno())]
            held += [os.dup(bells.port.fileno())]
            held += [-1 if bells.direct is None or bells.hung_up else os.dup(bells.direct.fileno())]
        except OSError:  # none left: the channel stays as it is
            for number in held:
                os.close(number)
            raise
        bells.let_go()
        return cls(tells, Held(*held), pages)

    def claim(self) -> None:
        """Be the one that adopts it.

        Raises:
            Busy: another was.
            Closed: this copy is closed.
        """
        self._check_open()
        try:
            os.eventfd_read(self.held.claim)
        except BlockingIOError:
            raise Busy(f"{self!r} cannot be adopted: it was already, by this process or another") from None

    def give_claim_back(self) -> None:
        """Give the claim back: the ticket could not be adopted, and another process may try."""
        os.eventfd_write(self.held.claim, 1)

    def send(self, sock: socket.socket) -> None:
        """Send it over a Unix socket, for `Ticket.receive` in a process of the same domain."""
        self._check_open()
        text = json.dumps(self.tells).encode()
        descriptors = [number for number in self.held if number >= 0]
        socket.send_fds(sock, [_LENGTH.pack(len(text))], descriptors)
        sock.sendall(text)
        self._sent = True

    @classmethod
    def receive(cls, sock: socket.socket) -> Ticket:
        """Receive what `send` sent. The other end of the socket is trusted, as a program of the same domain.

        Raises:
            PeerGone: it has closed the socket.
            GntallocError: what came is no ticket.
        """
        head, numbers = receive_with(sock, _LENGTH.size, len(Held._fields))
        try:
            if not head:
                raise PeerGone("no ticket came: the other end of the socket was closed")
            if len(head) < _LENGTH.size or not 3 <= len(numbers) <= 4 or _LENGTH.unpack(head)[0] > _LONGEST:
                raise GntallocError(
                    "what came over the socket is no ticket; both ends take turns with `send`, `receive`"
                )
            left, text = _LENGTH.unpack(head)[0], b""
            while len(text) < left:
                piece = sock.recv(left - len(text))
                if not piece:
                    raise PeerGone("a ticket came in part: the other end of the socket was closed")
                text += piece
            try:
                tells = Tells.parse(text)
            except (ValueError, TypeError) as error:
                raise GntallocError(f"what came over the socket is no ticket: {error}") from None
        except BaseException:
            for number in numbers:
                os.close(number)
            raise
        return cls(tells, Held(*numbers, *[-1] * (4 - len(numbers))))

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing import reduction  # whoever pickles it has it already

        self._check_open()
        duplicates = [reduction.DupFd(number) if number >= 0 else None for number in self.held]
        self._sent = True
        return _unpickle, (json.dumps(self.tells), duplicates)

    @property
    def closed(self) -> bool:
        """Whether this copy is."""
        return self._closed

    def close(self) -> None:
        """Let go of this process's copy. Can be repeated. If no process has another, the peer sees a death."""
        if self._closed:
            return
        self._closed = True
        pages, self.pages = self.pages, None
        if pages is not None:
            if self._sent:
                # Its receiver maps anew. The end of this map of a client's pages would be news for the peer.
                pages.break_promise()
            pages.close_rings()
            pages.close_page()
        for number in self.held:
            if number >= 0:
                os.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, _warn: Callable[[object], bool] = warn_unclosed) -> None:
        if not getattr(self, "_closed", True) and _warn(self):
            self.close()

    def __repr__(self) -> str:
        return f"<{'closed ' if self._closed else ''}Ticket of the channel with domain {self.tells.peer}>"

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"{self!r} cannot be used any more; this process has let go of it")


def _unpickle(text: str, duplicates: list[Any]) -> Ticket:
    return Ticket(Tells.parse(text.encode()), Held(*(-1 if each is None else each.detach() for each in duplicates)))
