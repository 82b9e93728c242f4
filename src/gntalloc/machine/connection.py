"""One program's call channel: its messages in, replies out, in order.

The machine never blocks on a program. It sends with MSG_DONTWAIT; what does not go out at once is kept, and no further
message of that program is served before it has gone. A program that leaves a message half sent, or does not read, is
dropped after a while; its files live on with their homes.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import select
import socket
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, cast

from gntalloc import wire
from gntalloc.abi.gntalloc import ALLOC_GREF, DEALLOC_GREF
from gntalloc.abi.gntdev import MAP_GRANT_REF, UNMAP_GRANT_REF
from gntalloc.drivers.chardev import MessageCaller, Region
from gntalloc.errors import DeviceError, GntallocError
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gntalloc.drivers.chardev import File, Loan, Plan, Record
    from gntalloc.machine.machine import Guest
    from gntalloc.machine.server import Server

__all__ = ["Channel", "Connection", "Dropped"]

log = logging.getLogger("gntalloc.machine")

MESSAGES_A_TURN = 8  # then it is somebody else's turn
STALL = 10.0  # seconds without progress until a program is dropped
_BYTES_A_TURN = 65536
_DESCRIPTORS_A_MESSAGE = 8  # more than any has
_NEVER_WAIT = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)  # as numbers: flag by flag they cost as much as the call
_TRUNCATED = int(socket.MSG_CTRUNC)
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)
_SOCKET_LEVEL, _RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)
_NOTES = frozenset({wire.PLACED, wire.IOCTL | wire.UNANSWERED})
_NOTES_A_TURN = 2 * wire.MOST_UNANSWERED  # of who keeps to the rules all, and a PLACED or two that are not counted
_SPACE_FOR_DESCRIPTORS = socket.CMSG_SPACE(_DESCRIPTORS_A_MESSAGE * 4)
_MANY_UNPLACED = 64
_INDEX, _INDEX_AT = struct.Struct("=Q"), 8  # in the arguments of ALLOC_GREF and MAP_GRANT_REF
_INVERSE = {ALLOC_GREF: DEALLOC_GREF, MAP_GRANT_REF: UNMAP_GRANT_REF}
_RANGE = struct.Struct("=QI4x")  # the arguments of the other two
_NO_LINGER = struct.pack("ii", 0, 0)


class Dropped(Exception):
    """There is no way to go on with this program."""


class Channel:
    """A stream of messages to and from one program, non-blocking. `serve` answers one."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.inbox: deque[tuple[wire.Message, list[int]]] = deque()
        self._decoder = wire.Decoder()
        self._received: deque[int] = deque()  # descriptors that came, in order, of messages not whole yet
        self._outbox: deque[tuple[bytes, Sequence[int]]] = deque()
        self._stalled_since: float | None = None
        self._admitted = 0  # how many of the inbox
        self.wanted = select.EPOLLIN  # the loop's: what it waits for here
        self.queued = False  # the loop's: whether it waits for its turn

    def serve(self, message: wire.Message, descriptors: list[int]) -> None:
        """Answer one message. The descriptors are closed by the caller."""
        raise Dropped("nobody listens")

    @property
    def runnable(self) -> bool:
        """Whether a message waits and may be served."""
        return bool(self.inbox) and not self._outbox

    @property
    def wants_to_send(self) -> bool:
        """Whether replies wait for the program to read."""
        return bool(self._outbox)

    def stalled(self, now: float) -> bool:
        """Whether it has kept the machine waiting for too long."""
        return self._stalled_since is not None and now - self._stalled_since > STALL

    def waits(self) -> bool:
        """Whether it keeps the machine waiting at all."""
        return self._stalled_since is not None

    def receive(self) -> None:
        """Take what has come.

        Raises:
            Dropped: the program is gone, or what it sent is no message.
        """
        try:
            data, controls, flags, _ = self.sock.recvmsg(_BYTES_A_TURN, _SPACE_FOR_DESCRIPTORS, _CLOSE_ON_EXEC)
        except BlockingIOError:
            return
        except OSError as error:
            raise Dropped(f"it cannot be read any more: {error.strerror}") from None
        for level, kind, content in controls:
            if (level, kind) == (_SOCKET_LEVEL, _RIGHTS):
                self._received.extend(array.array("i", content[: len(content) // 4 * 4]))
        if flags & _TRUNCATED:
            raise Dropped("it sent more descriptors than any message has")
        if not data:
            raise Dropped("it went away")
        received = self._received
        try:
            for message in self._decoder.feed(data):
                if message.descriptors > len(received):
                    raise Dropped("it announced descriptors that did not come")
                self.inbox.append((message, [received.popleft() for _ in range(message.descriptors)]))
        except wire.Garbage as error:
            raise Dropped(f"what it sent is no message: {error}") from None
        if len(received) > (_DESCRIPTORS_A_MESSAGE if self._decoder.in_the_middle else 0):
            raise Dropped("it sent descriptors that belong to no message")
        self._judge()

    def admit(self) -> None:
        """What has come until now may be served at the next turn."""
        self._admitted = len(self.inbox)

    def turn(self) -> None:
        """Serve some of what was admitted.

        Raises:
            Dropped: the program is gone.
        """
        for _ in range(min(self._admitted, MESSAGES_A_TURN)):
            if self._outbox:
                break
            self._serve_next()
        self._judge()

    def take_notes(self) -> None:
        """Serve what was told before anything was asked, admitted or not: its teller may have told others since.

        Raises:
            Dropped: the program is gone.
        """
        for _ in range(_NOTES_A_TURN):
            if not self.has_notes:
                break
            self._serve_next()

    @property
    def has_notes(self) -> bool:
        """Whether `take_notes` would do anything."""
        return bool(self.inbox) and self.inbox[0][0].kind in _NOTES and not self._outbox

    def _serve_next(self) -> None:
        message, descriptors = self.inbox.popleft()
        self._admitted -= 1
        try:
            self.serve(message, descriptors)
        finally:
            for descriptor in descriptors:
                _close_foreign(descriptor)

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send, or keep for later. The descriptors may be closed afterwards.

        Raises:
            Dropped: the program is gone.
        """
        # Descriptors travel with bytes: all but the last part go with one byte of the message each.
        while len(descriptors) > wire.MAX_DESCRIPTORS:
            self._send_part(data[:1], descriptors[: wire.MAX_DESCRIPTORS])
            data, descriptors = data[1:], descriptors[wire.MAX_DESCRIPTORS :]
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
                return socket.send_fds(self.sock, [data], list(descriptors), _NEVER_WAIT)
            return self.sock.send(data, _NEVER_WAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Dropped(f"it cannot be written to any more: {error.strerror}") from None

    def flush(self) -> None:
        """Send what waits, as far as it goes.

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
        """Let go of the program, and of what was meant for it."""
        for _, descriptors in self.inbox:
            self._received.extend(descriptors)
        for descriptor in self._received:
            _close_foreign(descriptor)
        for _, meant in self._outbox:
            for descriptor in meant:
                os.close(descriptor)
        self._received.clear()
        self.inbox.clear()
        self._outbox.clear()
        self.sock.close()

    def _judge(self) -> None:
        if not self._outbox and (self.inbox or not self._decoder.in_the_middle):
            self._stalled_since = None
        elif self._stalled_since is None:
            self._stalled_since = time.monotonic()


def _close_foreign(descriptor: int) -> None:
    """Close what a program sent: where its last close(2) would wait for a network, somebody else shall wait."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:  # it is no socket
        os.close(descriptor)
        return
    with sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        except OSError:
            pass  # of a kind that does not linger


def _regions(payload: bytes, start: int) -> list[Region]:
    """What of the caller's memory came along from `start` on."""
    return [
        Region(address, cast("bytearray", data), writable=writable)
        for address, writable, data in wire.decode_regions(payload[start:])
    ]


def _written(regions: list[Region]) -> bytes:
    """What goes back of it."""
    return wire.encode_regions([wire.Region(region.address, True, region.data) for region in regions if region.written])


def _pieces(plan: Plan, loans: list[Loan]) -> bytes:
    """Which descriptor, from where, and how much, one piece after the other."""
    if len(plan.pieces) == 1:
        _, page, pages = plan.pieces[0]
        return wire.PIECE.pack(0, page * PAGE_SIZE, pages * PAGE_SIZE)
    place = {loan.extent: at for at, loan in enumerate(loans)}
    return b"".join(
        wire.PIECE.pack(place[extent], page * PAGE_SIZE, pages * PAGE_SIZE) for extent, page, pages in plan.pieces
    )


class Connection(Channel):
    """The call channel of one process in a domain."""

    def __init__(self, sock: socket.socket, server: Server, guest: Guest, pid: int) -> None:
        super().__init__(sock)
        self.guest = guest
        self.pid = pid
        self._server = server
        self._files: dict[int, File] = {}
        self._next_handle = 1
        self._unplaced: dict[int, Record] = {}
        self._many_unplaced = _MANY_UNPLACED
        self._next_record = 1
        # What the last message made. If none follows it, its answer may not have been read (no descriptors left,
        # Ctrl-C), and then nobody knows the index: it is taken off the file's list. Who has it mapped keeps it.
        self._made: tuple[File, int, bytes] | None = None
        self._kinds: dict[int, Callable[[wire.Message, list[int]], None]] = {
            wire.HELLO: self._hello,
            wire.OPEN: self._open,
            wire.SHOW: self._show,
            wire.IOCTL: self._ioctl,
            wire.MMAP: self._mmap,
            wire.IOCTL_MMAP: self._ioctl_mmap,
            wire.IOCTL | wire.UNANSWERED: self._ioctl_unanswered,
            wire.PLACED: self._placed,
            wire.READ: self._read,
            wire.WRITE: self._write,
            wire.HOLDERS: self._holders,
        }

    def serve(self, message: wire.Message, descriptors: list[int]) -> None:
        """Answer one message of the program."""
        self._made = None
        serve = self._kinds.get(message.kind)
        if serve is None:
            raise Dropped(f"it sent a message of kind {message.kind}, and there is none")
        try:
            serve(message, descriptors)
        except GntallocError as error:
            log.debug("domain %d, pid %d: %s", self.guest.domid, self.pid, error)
            self._answer(message, error=error.errno or errno.EIO, why=str(error))
        except struct.error:
            raise Dropped("it sent a message that is shorter than its kind") from None
        except wire.Garbage as error:
            raise Dropped(f"what it sent is no message: {error}") from None

    def close(self) -> None:
        """See `Channel`."""
        super().close()
        if self._made is not None:
            file, inverse, argument = self._made
            self._made = None
            try:
                file.ioctl(inverse, 0, MessageCaller([Region(0, bytearray(argument), writable=False)]))
            except DeviceError:
                pass  # it was given back by somebody who knew it

    def _answer(
        self,
        message: wire.Message,
        *,
        error: int = 0,
        why: str = "",
        result: int = 0,
        body: bytes = b"",
        descriptors: Sequence[int] = (),
    ) -> None:
        reply = wire.encode_reply(
            message.kind,
            message.id,
            error=error,
            why=why,
            result=result,
            body=body,
            descriptors=len(descriptors),
        )
        self.send(reply, descriptors)

    def _file(self, handle: int) -> File:
        file = self._files.get(handle)
        if file is None:
            raise DeviceError(errno.EBADF, f"this program has no file {handle} open in domain {self.guest.domid}")
        if file.closed:
            del self._files[handle]
            raise DeviceError(errno.EBADF, f"the file {handle} is closed")
        return file

    def _handle(self, file: File) -> int:
        for handle, known in self._files.items():
            if known is file:
                return handle
        handle = self._next_handle
        self._next_handle += 1
        self._files[handle] = file
        return handle

    # One method a kind of message.

    def _hello(self, message: wire.Message, descriptors: list[int]) -> None:
        (version,) = wire.HELLO_REQUEST.unpack_from(message.payload)
        if version != wire.VERSION:
            why = f"this machine speaks version {wire.VERSION} and the program {version}; use one gntalloc for both"
            raise DeviceError(errno.EPROTO, why)
        self._answer(message, result=self.guest.domid)

    def _open(self, message: wire.Message, descriptors: list[int]) -> None:
        (flags,) = wire.OPEN_REQUEST.unpack_from(message.payload)
        name = message.payload[wire.OPEN_REQUEST.size :].decode(errors="replace")
        file, programs_end = self._server.open(self.guest, name, flags, opener=self.pid)
        self._forget_closed()
        with programs_end:
            self._answer(message, result=self._handle(file), descriptors=[programs_end.fileno()])

    def _forget_closed(self) -> None:
        for handle in [handle for handle, file in self._files.items() if file.closed]:
            del self._files[handle]

    def _show(self, message: wire.Message, descriptors: list[int]) -> None:
        file = self._server.file_of(self.guest, descriptors[0]) if descriptors else None
        if file is None:
            raise DeviceError(errno.EBADF, f"this is no open device file of domain {self.guest.domid}")
        body = wire.SHOW_REPLY.pack(file.flags) + file.driver.name.encode()
        self._answer(message, result=self._handle(file), body=body)

    def _ioctl(self, message: wire.Message, descriptors: list[int]) -> None:
        handle, request, address = wire.IOCTL_REQUEST.unpack_from(message.payload)
        regions = _regions(message.payload, wire.IOCTL_REQUEST.size)
        error, why, result = 0, "", 0
        try:
            result = self._file(handle).ioctl(request, address, MessageCaller(regions, process=self.pid))
        except DeviceError as refusal:  # what was written before it failed stays written, as in Linux
            error, why = refusal.errno or errno.EIO, str(refusal)
            log.debug("domain %d, pid %d: %s", self.guest.domid, self.pid, refusal)
        self._answer(message, error=error, why=why, result=result, body=_written(regions))

    def _ioctl_unanswered(self, message: wire.Message, descriptors: list[int]) -> None:
        """What nobody waits for: to give pages back. If they are gone already, so much the better."""
        handle, request, address = wire.IOCTL_REQUEST.unpack_from(message.payload)
        regions = _regions(message.payload, wire.IOCTL_REQUEST.size)
        try:
            self._file(handle).ioctl(request, address, MessageCaller(regions, process=self.pid))
        except DeviceError as refusal:
            log.debug("domain %d, pid %d, unanswered: %s", self.guest.domid, self.pid, refusal)

    def _ioctl_mmap(self, message: wire.Message, descriptors: list[int]) -> None:
        """ALLOC or MAP, and what always follows it."""
        handle, request, address, prot, shared, length, place = wire.IOCTL_MMAP_REQUEST.unpack_from(message.payload)
        regions = _regions(message.payload, wire.IOCTL_MMAP_REQUEST.size)
        caller = MessageCaller(regions, process=self.pid)
        inverse = _INVERSE.get(request)
        if inverse is None:
            raise Dropped(f"it wanted to map what request {request:#010x} makes, which makes nothing to map")
        try:
            file = self._file(handle)
            result = file.ioctl(request, address, caller)
            (index,) = _INDEX.unpack(caller.read(address + _INDEX_AT, _INDEX.size))
        except DeviceError as refusal:
            log.debug("domain %d, pid %d: %s", self.guest.domid, self.pid, refusal)
            self._answer(message, error=refusal.errno or errno.EIO, why=str(refusal), body=_written(regions))
            return
        self._made = file, inverse, _RANGE.pack(index, length // PAGE_SIZE)
        error, why, number, pieces = 0, b"", 0, b""
        loans: list[Loan] = []
        confirm = False
        try:
            plan = file.mmap(index, length, prot=prot, shared=bool(shared))
            loans = self._server.machine.carry_out(plan)
        except DeviceError as refusal:
            error, why = refusal.errno or errno.EIO, str(refusal).encode()
        else:
            plan.record.place(self.pid, place)
            confirm = plan.confirm
            number = self._expect_placing(plan.record) if confirm else 0
            pieces = _pieces(plan, loans)
        head = wire.IOCTL_MMAP_REPLY.pack(error, len(why), number, confirm, len(pieces) // wire.PIECE.size)
        body = head + why + pieces + _written(regions)
        self._answer_with(message, result, body, loans)

    def _mmap(self, message: wire.Message, descriptors: list[int]) -> None:
        handle, prot, shared, offset, length = wire.MMAP_REQUEST.unpack_from(message.payload)
        plan = self._file(handle).mmap(offset, length, prot=prot, shared=bool(shared))
        loans = self._server.machine.carry_out(plan)
        confirm = plan.confirm or plan.locate
        number = self._expect_placing(plan.record) if confirm else 0
        self._answer_with(message, number, wire.CONFIRM.pack(confirm) + _pieces(plan, loans), loans)

    def _expect_placing(self, record: Record) -> int:
        number = self._next_record
        self._next_record += 1
        if len(self._unplaced) >= self._many_unplaced:  # mapped, and unmapped without a word
            self._unplaced = {old: record for old, record in self._unplaced.items() if record.loans}
            self._many_unplaced = 2 * len(self._unplaced) + _MANY_UNPLACED
        self._unplaced[number] = record
        return number

    def _answer_with(self, message: wire.Message, result: int, body: bytes, loans: list[Loan]) -> None:
        """Answer, and let go of the machine's copies of these descriptors."""
        try:
            self._answer(message, result=result, body=body, descriptors=[loan.descriptor for loan in loans])
        finally:
            for loan in loans:
                loan.close()

    def _placed(self, message: wire.Message, descriptors: list[int]) -> None:
        number, address = wire.PLACED_REQUEST.unpack_from(message.payload)
        record = self._unplaced.pop(number, None)
        if record is None:
            return
        if record.loans:
            record.place(self.pid, address)
        record.file.driver.placed(record)  # also if it was unmapped at once, and that was seen first: it was there

    def _read(self, message: wire.Message, descriptors: list[int]) -> None:
        handle, size = wire.READ_REQUEST.unpack_from(message.payload)
        data = self._file(handle).read(size)
        self._answer(message, result=len(data), body=data)

    def _write(self, message: wire.Message, descriptors: list[int]) -> None:
        (handle,) = wire.WRITE_REQUEST.unpack_from(message.payload)
        self._answer(message, result=self._file(handle).write(message.payload[wire.WRITE_REQUEST.size :]))

    def _holders(self, message: wire.Message, descriptors: list[int]) -> None:
        handle, wait, index, count = wire.HOLDERS_REQUEST.unpack_from(message.payload)
        file = self._file(handle)
        driver = self.guest.gntalloc
        if file.driver is not driver:
            raise DeviceError(errno.EINVAL, "only pages of gntalloc have holders")
        held, mapped_by = driver.holders(file, index, count)
        body = b"".join(domid.to_bytes(4, "little") for domid in mapped_by)
        if not (wait and held):
            self._answer(message, result=held, body=body)
            return
        with self._server.wait_released(driver, file, index, count) as programs_end:
            self._answer(message, result=held, body=body, descriptors=[programs_end.fileno()])
