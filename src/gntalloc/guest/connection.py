"""A program's line to the machine: one request, one reply, at most one at a time.

One channel a process. A child made by fork must not read its parent's replies, so it opens a channel of its own at its
first call; `generation` tells a device file that it has to show itself anew. The same happens after any call that did
not come to its end (Ctrl-C, a deadline): the channel is closed, and the next call opens another one.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from gntalloc import waits
from gntalloc.errors import DeviceError, MachineBroke, MachineGone
from gntalloc.wire.messages import MORE, NOBODY, VERSION, Hello, decode, frame
from gntalloc.wire.stream import MAX_DESCRIPTORS, REPLY, Decoder, Garbage, decode_reply

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gntalloc.wire.stream import Message

__all__ = ["Answer", "Descriptor", "MachineConnection"]

M = TypeVar("M")

DEADLINE = 30.0  # seconds for a reply: the machine never waits for anybody, so this is the machine stopped
_CHUNK = 65536
_SHORT = 2048  # bytes: nearly every answer is shorter
_LARGEST_DOMID = 0xFFFF
_MOST_UNASKED = 4096  # messages that are kept, or that come before an answer
_TIMEVAL = struct.Struct("@ll")
_TRUNCATED = int(socket.MSG_CTRUNC)  # as numbers: flag by flag they cost as much as the call
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)
_NOW = int(socket.MSG_DONTWAIT)
_SOCKET_LEVEL, _RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)
_SPACE_FOR_DESCRIPTORS = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)


class Descriptor:
    """A descriptor that was received: closed exactly once, at the latest when nobody has it any more."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        """Give the number; the descriptor stays this object's."""
        return self._number

    def detach(self) -> int:
        """Give the number up: the caller closes the descriptor."""
        number, self._number = self._number, -1
        return number

    def close(self) -> None:
        """Close it, if it is still ours."""
        number = self.detach()
        if number >= 0:
            os.close(number)

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        if self._number >= 0:  # `os` may be gone, where the interpreter ends
            _close(self.detach())


class Answer:
    """What came back.

    Attributes:
        error: an errno; 0 if nothing was refused.
        why: the reason.
        result: a number; of each kind another.
        body: more, for `read`.
        descriptors: what came along.
    """

    __slots__ = ("body", "descriptors", "error", "result", "why")

    def __init__(self, payload: bytes, descriptors: list[Descriptor]) -> None:
        self.error, self.why, self.result, self.body = decode_reply(payload)
        self.descriptors = descriptors

    def read(self, kind: type[M]) -> M:
        """Take the body apart.

        Raises:
            MachineBroke: it is no such answer.
        """
        try:
            return decode(kind, self.body)
        except Garbage as error:
            raise MachineBroke(f"the machine's answer cannot be read: {error}; use one gntalloc for both") from None

    def number(self, most: int = 0x7FFFFFFF) -> int:
        """Give the result, which is from 0 to `most`.

        Raises:
            MachineBroke: it is not.
        """
        if not 0 <= self.result <= most:
            raise MachineBroke(f"the machine's answer has the result {self.result}; use one gntalloc for both")
        return self.result

    def descriptor(self) -> Descriptor:
        """Give the one descriptor that came along.

        Raises:
            MachineBroke: there is none.
        """
        if not self.descriptors:
            raise MachineBroke("the machine's answer lacks a descriptor; use one gntalloc for both")
        return self.descriptors[0]


class MachineConnection:
    """Calls to the socket at `path`, or over `sock` if that is given and then never anew.

    What the machine says by itself may come at any time, also before the answer to a call. It is kept for `hear` if
    `hears` is set, and else thrown away.
    """

    def __init__(self, path: str, *, sock: waits.Socket | None = None, hello: bool = True) -> None:
        self.path = path
        self.generation = 0
        self.live = -1
        """The generation of the channel, while it is open. -1: the next call has to connect."""
        self.lock = threading.RLock()
        self.domid = -1
        self.hears = False
        self._unasked: deque[tuple[Message, list[Descriptor]]] = deque()  # kept also when the channel is closed
        self._sock = sock
        self._once = sock is not None
        if sock is not None:
            _set_deadline(sock)
        self._hello = hello
        self._begin()
        _channels.add(self)

    def call(self, message: tuple[Any, ...], descriptors: Sequence[int] = ()) -> Answer:
        """Ask, and wait for the answer.

        Raises:
            DeviceError: the machine's errno and its reason.
            MachineGone, MachineBroke: see `ask`.
        """
        answer = self.ask(message, descriptors)
        if answer.error:
            raise DeviceError(answer.error, answer.why)
        return answer

    def ask(self, message: tuple[Any, ...], descriptors: Sequence[int] = ()) -> Answer:
        """Ask, and wait for the answer, which may be a refusal.

        Raises:
            MachineGone: there is nobody to ask, or no answer came in time.
            MachineBroke: what came is no answer.
        """
        with self.lock:
            if self._sock is None:
                self.connect()
            try:
                try:
                    number = self._send(message, descriptors)
                except (BrokenPipeError, ConnectionResetError):
                    number = self._number  # it hung up on us; it may have said why
                came, received = self._receive(number)
                return Answer(came.payload, received)
            except OSError as error:
                self.close()
                raise self._gone(error) from error
            except Garbage as error:
                self.close()
                raise self._broke(error) from None
            except BaseException:
                self.close()
                raise

    def call_in_parts(self, message: tuple[Any, ...], most: int) -> bytes:
        """Ask for what may be long, and put the bodies of all parts of the answer together.

        Raises:
            DeviceError: the machine's errno and its reason.
            MachineGone: see `ask`.
            MachineBroke: see `ask`; or the answer has more than `most` bytes.
        """
        with self.lock:
            answer = self.call(message)
            body = bytearray(answer.body)
            while answer.result == MORE:
                try:
                    if len(body) > most:
                        raise Garbage(f"an answer has more than {most} bytes")
                    answer = Answer(*self._receive_part())
                except Garbage as error:
                    self.close()
                    raise self._broke(error) from None
                except OSError as error:
                    self.close()
                    raise self._gone(error) from error
                except BaseException:
                    self.close()
                    raise
                if answer.error:
                    raise DeviceError(answer.error, answer.why)
                body += answer.body
            return bytes(body)

    def tell(self, message: tuple[Any, ...]) -> None:
        """Say something and wait for nothing. It is served in its turn.

        Raises:
            MachineGone: there is nobody to tell.
        """
        with self.lock:
            if self._sock is None:
                self.connect()
            try:
                self._send(message, ())
            except OSError as error:
                self.close()
                raise self._gone(error) from error
            except BaseException:  # it may be half sent
                self.close()
                raise

    def hear(self, generation: int) -> tuple[Message, list[Descriptor]] | None:
        """Take the next message that the machine sent unasked. It never waits. None: there is none, for now.

        Raises:
            MachineGone: the channel of that generation is gone, and all that came over it has been heard.
            DeviceError: EMFILE likewise; there was no room for the descriptors of the next one.
            MachineBroke: likewise; what came is no message.
        """
        with self.lock:
            try:
                while not self._unasked:
                    if self.generation != generation:
                        raise ConnectionResetError(errno.ECONNRESET, "it hung up")
                    if not self._messages:
                        self._fill(_NOW)
                    while self._messages:
                        self._keep(*self._next())
            except BlockingIOError:
                return None
            except Garbage as error:
                self.close()
                raise self._broke(error) from None
            except OSError as error:
                if self.generation == generation:
                    self.close()
                raise self._gone(error) from error
            return self._unasked.popleft()

    def has_heard(self, generation: int) -> bool:
        """Whether `hear` has something to give or to raise that came with an answer, and not by itself."""
        return bool(self._unasked) or self._sock is None or self.generation != generation

    def fileno(self) -> int:
        """To wait for."""
        assert self._sock is not None
        return self._sock.fileno()

    def connect(self) -> None:
        """Open the channel if it is not.

        Raises:
            NoMachine: it never was there.
            MachineGone: it was.
        """
        if self._sock is not None:
            return
        if self._once:
            raise MachineGone("the machine has ended, or this object was closed; start another machine")
        sock = waits.Socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _set_deadline(sock)
        try:
            sock.connect(self.path)
        except OSError as error:
            sock.close()
            if self.generation:
                raise self._gone(error) from error
            from gntalloc.guest.absence import nobody_answers  # only where something is wrong

            raise nobody_answers(self.path, error) from error
        self._sock = sock
        self._begin()
        if self._hello:
            try:
                self.domid = self.call(Hello(VERSION)).number(_LARGEST_DOMID)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Close the channel. The next call opens another one, if it can."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            self.live = -1
            self._descriptors.clear()  # of an answer that did not come whole

    def __del__(self) -> None:
        if getattr(self, "_sock", None) is not None:
            self.close()

    def _begin(self) -> None:
        if self._sock is not None:
            self.generation += 1
            self.live = self.generation
        self._decoder = Decoder()
        self._messages: deque[Message] = deque()
        self._descriptors: deque[Descriptor] = deque()
        self._number: int = 0

    def _send(self, message: tuple[Any, ...], descriptors: Sequence[int]) -> int:
        assert self._sock is not None
        self._number = (self._number + 1) & 0xFFFFFFFF
        data = frame(message, self._number, len(descriptors))
        if descriptors:
            rights = (_SOCKET_LEVEL, _RIGHTS, array.array("i", descriptors))
            sent = self._sock.sendmsg([data], [rights])
            self._sock.sendall(data[sent:])
        else:
            self._sock.sendall(data)
        return self._number

    def _receive(self, number: int) -> tuple[Message, list[Descriptor]]:
        """Receive the answer to this call."""
        assert self._sock is not None
        for _ in range(_MOST_UNASKED):
            while not self._messages:
                self._fill()
            message, descriptors = self._next()
            if message.kind & REPLY and message.id in (number, NOBODY):
                return message, descriptors
            self._keep(message, descriptors)
        raise Garbage(f"{_MOST_UNASKED} messages came instead of an answer")

    def _receive_part(self) -> tuple[bytes, list[Descriptor]]:
        message, descriptors = self._receive(self._number)
        return message.payload, descriptors

    def _next(self) -> tuple[Message, list[Descriptor]]:
        """Take the first message that is whole, with its descriptors."""
        message = self._messages[0]
        count = message.descriptors
        while len(self._descriptors) < count:
            self._fill()
        self._messages.popleft()
        if count <= 1:  # as nearly always
            return message, [self._descriptors.popleft()] if count else []
        return message, [self._descriptors.popleft() for _ in range(count)]

    def _keep(self, message: Message, descriptors: list[Descriptor]) -> None:
        """Keep a message that is not the answer to a waiting call."""
        if self.hears and not message.kind & REPLY:
            if len(self._unasked) >= _MOST_UNASKED:
                raise Garbage(f"more than {_MOST_UNASKED} messages came unasked")
            self._unasked.append((message, descriptors))

    def _fill(self, how: int = 0) -> None:
        if self._sock is None:
            raise ConnectionResetError(errno.ECONNRESET, "it hung up")
        size = _CHUNK if self._decoder.in_the_middle else _SHORT
        data, controls, flags, _ = self._sock.recvmsg(size, _SPACE_FOR_DESCRIPTORS, _CLOSE_ON_EXEC | how)
        for level, kind, content in controls:
            if level == _SOCKET_LEVEL and kind == _RIGHTS:
                numbers = array.array("i", content[: len(content) // 4 * 4])
                self._descriptors.extend(map(Descriptor, numbers))
        if flags & _TRUNCATED:
            raise OSError(errno.EMFILE, "this program has no descriptors left for what the machine sent")
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "it hung up")
        self._messages.extend(self._decoder.feed(data))

    def _broke(self, error: Garbage) -> MachineBroke:
        return MachineBroke(f"what answers at {self.path} speaks otherwise: {error}; use one gntalloc for both")

    def _gone(self, error: OSError) -> OSError:
        if error.errno == errno.EMFILE:
            return DeviceError(errno.EMFILE, f"{error.strerror}; close some, or raise RLIMIT_NOFILE")
        if isinstance(error, BlockingIOError):
            return MachineGone(f"the machine at {self.path} did not answer for {DEADLINE:.0f} s; is it stopped?")
        return MachineGone(
            f"the machine at {self.path} is gone ({error.strerror}). Pages that are mapped stay valid until they are "
            f"unmapped; start a machine there again, and what finds it by name is served again"
        )

    def after_fork_in_child(self) -> None:
        """Leave the channel to the parent: this is a copy of its descriptor, and of a lock that may be held."""
        self.lock = threading.RLock()
        self.close()
        self._unasked.clear()


def _set_deadline(sock: waits.Socket) -> None:
    # Not settimeout: that asks poll(2) before every call. When the time is over the call fails with EAGAIN.
    seconds, fraction = divmod(DEADLINE, 1)
    limit = _TIMEVAL.pack(int(seconds), int(fraction * 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


_channels: weakref.WeakSet[MachineConnection] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for channel in list(_channels):
        channel.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
