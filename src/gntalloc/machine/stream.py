"""Move a program's messages in and the machine's replies out, in order.

The machine never blocks on a program. It sends with MSG_DONTWAIT. A reply that does not go out at once is kept, and no
further message of that program is served before it has gone. A program that leaves a message half sent, or does not
read, is dropped after a while. Its files live on with their homes.
"""

from __future__ import annotations

import os
import socket
from array import array
from collections import deque
from typing import TYPE_CHECKING

from gntalloc import clock
from gntalloc.machine.loop import NOT_NOW, READABLE, WRITABLE
from gntalloc.machine.speaker import MESSAGES_A_TURN, RUNNABLE, STALLING, Dropped
from gntalloc.unasked import Inlet, Unasked
from gntalloc.wire.stream import MAX_DESCRIPTORS, Decoder, Garbage, encode_reply

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from gntalloc.machine.speaker import Speaker
    from gntalloc.unasked import Disposal
    from gntalloc.wire.stream import Message

__all__ = ["MessageStream"]

STALL = 10.0  # seconds without progress until a program is dropped
_BYTES_A_TURN = 1024  # more than a correct program sends at once, if its messages are short
_BYTES_OF_A_LONG_ONE = 65536
_SOCKET_LEVEL, _RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)
_NEVER_WAIT = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)  # as numbers: flag by flag they cost as much as the call


class MessageStream:
    """Move messages to and from one program without blocking: a `Speaker`. `serve` answers one message.

    Args:
        sock: the socket to the program.
        disposal: closes descriptors that come though none are due.
    """

    def __init__(self, sock: socket.socket, disposal: Disposal) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.inbox: deque[Message] = deque()
        self.companion: Speaker | None = None
        self._inlet = Inlet(sock, disposal)
        self._decoder = Decoder()
        self._outbox: deque[tuple[bytes, Sequence[int]]] = deque()
        self._stalled_since: float | None = None
        self.weight = 0
        self._admitted = 0  # so many messages of the inbox
        self._rest: Generator[None] | None = None  # the pieces of the message that is served in part

    def serve(self, message: Message) -> Generator[None] | None:
        """Answer one message, or give the pieces in which it is answered."""
        raise Dropped("nobody listens")

    def fileno(self) -> int:
        """See `Speaker`."""
        return self.sock.fileno()

    @property
    def standing(self) -> int:
        """See `Speaker`. A program that has sent enough waits for answers first."""
        if self._outbox:
            wanted = WRITABLE
        elif self.inbox or self._rest is not None:
            wanted = RUNNABLE
        else:
            wanted = READABLE
        return wanted if self._stalled_since is None else wanted | STALLING

    @property
    def wants_to_send(self) -> bool:
        """Whether replies wait for the program to read."""
        return bool(self._outbox)

    def stalled(self, now: float) -> bool:
        """See `Speaker`."""
        return self._stalled_since is not None and now - self._stalled_since > STALL

    def receive(self, events: int) -> None:
        """Take the bytes that have come.

        Raises:
            Dropped: the program is gone, or the bytes are no message.
        """
        try:
            size = _BYTES_A_TURN
            if self._decoder.in_the_middle:
                size = min(max(size, self._decoder.missing), _BYTES_OF_A_LONG_ONE)
            data = self._inlet.receive(size)
        except Unasked as error:
            raise Dropped(str(error)) from None
        except OSError as error:
            if error.errno in NOT_NOW:
                return
            raise Dropped(f"it cannot be read any more: {error.strerror}") from None
        if not data:
            raise Dropped("it went away")
        if self.weight or len(data) > _BYTES_A_TURN:
            self.weight += len(data)
        try:
            for message in self._decoder.feed(data):
                if message.descriptors:
                    raise Dropped("it announced descriptors, and the machine takes none")
                self.inbox.append(message)
        except Garbage as error:
            raise Dropped(f"what it sent is no message: {error}") from None
        self._judge()

    def admit(self) -> None:
        """See `Speaker`."""
        self._admitted = len(self.inbox)

    def take_turn(self, until: float) -> None:
        """See `Speaker`.

        Raises:
            Dropped: the program is gone.
        """
        if self._rest is not None:
            self._go_on(self._rest, until)
        for _ in range(min(self._admitted, MESSAGES_A_TURN)):
            if self._outbox or self._rest is not None:
                break
            rest = self._serve_next()
            if rest is not None:
                self._go_on(rest, until)
            if clock.now() >= until:
                break
        self._judge()

    def _serve_next(self) -> Generator[None] | None:
        """Serve the next message. Return the pieces in which the rest of it is served, if there is a rest."""
        message = self.inbox.popleft()
        self._admitted -= 1
        if self.weight:
            more = self.inbox or self._decoder.in_the_middle
            self.weight = max(0, self.weight - len(message.payload)) if more else 0
        self._rest = self.serve(message)
        return self._rest

    def _go_on(self, rest: Generator[None], until: float) -> None:
        """Serve pieces of the message that is served in part: one piece, and more until then."""
        try:
            next(rest)
            while not self._outbox and clock.now() < until:
                next(rest)
        except StopIteration:
            self._rest = None
        except BaseException:
            self._rest = None
            raise

    def answer(
        self,
        message: Message,
        *,
        error: int = 0,
        why: str = "",
        result: int = 0,
        body: bytes = b"",
        descriptors: Sequence[int] = (),
    ) -> None:
        """Answer a message, or keep the answer for later. The descriptors may be closed afterwards.

        Raises:
            Dropped: the program is gone.
        """
        count = len(descriptors)
        data = encode_reply(message.kind, message.id, error=error, why=why, result=result, body=body, descriptors=count)
        self.send(data, descriptors)

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send bytes, or keep them for later. The descriptors may be closed afterwards.

        Raises:
            Dropped: the program is gone.
        """
        # Descriptors travel with bytes: all but the last part go with one byte of the message each.
        while len(descriptors) > MAX_DESCRIPTORS:
            self._send_part(data[:1], descriptors[:MAX_DESCRIPTORS])
            data, descriptors = data[1:], descriptors[MAX_DESCRIPTORS:]
        self._send_part(data, descriptors)
        if self._outbox:
            self._judge()

    def _send_part(self, data: bytes, descriptors: Sequence[int]) -> None:
        sent = 0 if self._outbox else self._try_to_send(data, descriptors)
        if sent == len(data):
            return
        try:
            keep = [os.dup(descriptor) for descriptor in descriptors] if not sent else []
        except OSError as error:
            raise Dropped(f"its reply cannot be kept until it reads: {error.strerror}") from None
        self._outbox.append((data[sent:], keep))

    def _try_to_send(self, data: bytes, descriptors: Sequence[int]) -> int:
        try:
            if descriptors:
                rights = (_SOCKET_LEVEL, _RIGHTS, array("i", descriptors))
                return self.sock.sendmsg((data,), (rights,), _NEVER_WAIT)
            return self.sock.send(data, _NEVER_WAIT)
        except OSError as error:
            if error.errno in NOT_NOW:
                return 0
            raise Dropped(f"it cannot be written to any more: {error.strerror}") from None

    def flush(self) -> None:
        """Send the replies that wait, as far as they go.

        Raises:
            Dropped: the program is gone.
        """
        while self._outbox:
            data, descriptors = self._outbox[0]
            sent = self._try_to_send(data, descriptors)
            if not sent:
                break
            for descriptor in descriptors:
                os.close(descriptor)
            self._stalled_since = None
            if sent < len(data):
                self._outbox[0] = (data[sent:], ())
            else:
                self._outbox.popleft()
        self._judge()

    def close(self) -> None:
        """Disconnect the program, and drop the replies that were meant for it."""
        rest, self._rest = self._rest, None
        if rest is not None:
            rest.close()
        self.weight = 0
        for _, meant in self._outbox:
            for descriptor in meant:
                os.close(descriptor)
        self.inbox.clear()
        self._outbox.clear()
        self._inlet.close()

    def _judge(self) -> None:
        if not self._outbox and (self.inbox or not self._decoder.in_the_middle):
            self._stalled_since = None
        elif self._stalled_since is None:
            self._stalled_since = clock.now()
