"""One program's call channel: each message is a call of it, answered in turn."""

from __future__ import annotations

import errno
import logging
import os
import struct
from typing import TYPE_CHECKING, cast

from gntalloc import wire
from gntalloc.abi.gntalloc import ALLOC_GREF, DEALLOC_GREF
from gntalloc.abi.gntdev import MAP_GRANT_REF, UNMAP_GRANT_REF
from gntalloc.drivers.chardev import MessageCaller, Region
from gntalloc.errors import DeviceError, GntallocError
from gntalloc.machine.channel import Channel, Dropped
from gntalloc.machine.home import identity_of
from gntalloc.machine.served import Served, may_be_served
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from gntalloc.calls.listener import Call
    from gntalloc.drivers.chardev import File, Loan, Plan, Record
    from gntalloc.machine.machine import Guest
    from gntalloc.machine.server import Server

__all__ = ["Connection"]

log = logging.getLogger("gntalloc.machine")

_MANY_UNPLACED = 64
_UNASKED = 0xFFFFFFFF  # the number of messages that answer nothing
_INDEX, _INDEX_AT = struct.Struct("=Q"), 8  # in the arguments of ALLOC_GREF and MAP_GRANT_REF
_INVERSE = {ALLOC_GREF: DEALLOC_GREF, MAP_GRANT_REF: UNMAP_GRANT_REF}
_RANGE = struct.Struct("=QI4x")  # the arguments of the other two


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
        piece = plan.pieces[0]
        return wire.PIECE.pack(0, piece.offset, piece.pages * PAGE_SIZE)
    place = {loan.extent: at for at, loan in enumerate(loans)}
    return b"".join(
        wire.PIECE.pack(place[piece.extent], piece.offset, piece.pages * PAGE_SIZE) for piece in plan.pieces
    )


class Connection(Channel):
    """The call channel of one process in a domain."""

    def __init__(self, sock: socket.socket, server: Server, guest: Guest, pid: int, uid: int) -> None:
        super().__init__(sock)
        self.guest = guest
        self.pid = pid  # whom it speaks for, and where they map: see BEHALF
        self._by_offset = False
        self.served: Served | None = None  # the run that it is the supervisor of, if we serve that
        self._uid = uid
        self._server = server
        self._files: dict[int, File] = {}
        self._next_handle = 1
        self._unplaced: dict[int, tuple[Record, int]] = {}  # and whose it is
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
            wire.SERVE: self._serve_calls,
            wire.BEHALF: self._behalf,
            wire.KEEP: self._keep,
            wire.HOME: self._home,
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
        self.end_serving()
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
        file, programs_end = self._server.homes.open(self.guest, name, flags, opener=self.pid)
        self._forget_closed()
        with programs_end:
            self._answer(message, result=self._handle(file), descriptors=[programs_end.fileno()])

    def _forget_closed(self) -> None:
        for handle in [handle for handle, file in self._files.items() if file.closed]:
            del self._files[handle]

    def _show(self, message: wire.Message, descriptors: list[int]) -> None:
        file = self._server.homes.file_of(self.guest, identity_of(descriptors[0])) if descriptors else None
        if file is None:
            raise DeviceError(errno.EBADF, f"this is no open device file of domain {self.guest.domid}")
        body = wire.SHOW_REPLY.pack(file.flags) + file.driver.name.encode()
        self._answer(message, result=self._handle(file), body=body)

    def _ioctl(self, message: wire.Message, descriptors: list[int]) -> None:
        handle, request, address = wire.IOCTL_REQUEST.unpack_from(message.payload)
        regions = _regions(message.payload, wire.IOCTL_REQUEST.size)
        error, why, result = 0, "", 0
        try:
            caller = MessageCaller(regions, process=self.pid, by_offset=self._by_offset)
            result = self._file(handle).ioctl(request, address, caller)
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
            log.debug("domain %d, pid %d: %s", self.guest.domid, self.pid, refusal)
            error, why = refusal.errno or errno.EIO, str(refusal).encode()
        else:
            plan.record.place(self.pid, place)
            confirm = plan.confirm
            number = self._expect_placing(plan.record, self.pid) if confirm else 0
            pieces = _pieces(plan, loans)
        head = wire.IOCTL_MMAP_REPLY.pack(error, len(why), number, confirm, len(pieces) // wire.PIECE.size)
        body = head + why + pieces + _written(regions)
        self._answer_with(message, result, body, loans)

    def _mmap(self, message: wire.Message, descriptors: list[int]) -> None:
        handle, prot, shared, offset, length = wire.MMAP_REQUEST.unpack_from(message.payload)
        plan = self._file(handle).mmap(offset, length, prot=prot, shared=bool(shared))
        loans = self._server.machine.carry_out(plan)
        confirm = plan.confirm or plan.locate
        number = self._expect_placing(plan.record, self.pid) if confirm else 0
        self._answer_with(message, number, wire.CONFIRM.pack(confirm) + _pieces(plan, loans), loans)

    def _expect_placing(self, record: Record, process: int) -> int:
        number = self._next_record
        self._next_record += 1
        if len(self._unplaced) >= self._many_unplaced:  # mapped, and unmapped without a word
            self._unplaced = {old: (record, pid) for old, (record, pid) in self._unplaced.items() if record.loans}
            self._many_unplaced = 2 * len(self._unplaced) + _MANY_UNPLACED
        self._unplaced[number] = record, process
        self.notes_expected = len(self._unplaced)
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
        record, process = self._unplaced.pop(number, (None, 0))
        if record is None:
            return
        if record.loans:
            record.place(process, address)
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
        with self._server.homes.wait_released(driver, file, index, count) as programs_end:
            self._answer(message, result=held, body=body, descriptors=[programs_end.fileno()])

    # A run's supervisor.

    def _serve_calls(self, message: wire.Message, descriptors: list[int]) -> None:
        (namespace,) = wire.SERVE_REQUEST.unpack_from(message.payload)
        if self.served is not None or not descriptors or not may_be_served(self._uid, namespace, descriptors[0]):
            self._answer(message)
            return
        self.served = Served(self._server, self, os.dup(descriptors[0]))
        try:
            self._answer(message, result=1, descriptors=[self.served.notes])
        finally:
            os.close(self.served.notes)

    def _behalf(self, message: wire.Message, descriptors: list[int]) -> None:
        self.pid, by_offset = wire.BEHALF_REQUEST.unpack_from(message.payload)
        self._by_offset = bool(by_offset)

    def _keep(self, message: wire.Message, descriptors: list[int]) -> None:
        (handle,) = wire.KEEP_REQUEST.unpack_from(message.payload)
        self._server.homes.keep(self._file(handle), descriptors)
        self._answer(message)

    def _home(self, message: wire.Message, descriptors: list[int]) -> None:
        (handle,) = wire.HOME_REQUEST.unpack_from(message.payload)
        self._answer(message, descriptors=[self._server.homes.kept(self._file(handle))])

    def have_placed(self, call: Call, plan: Plan, process: int) -> None:
        """The supervisor shall answer this mmap with these pages."""
        loans = self._server.machine.carry_out(plan)
        confirm = plan.confirm or plan.locate
        number = self._expect_placing(plan.record, process) if confirm else 0
        head = wire.BROUGHT_HEAD.pack(wire.PLACE, confirm, number) + call.encode()
        try:
            self._bring(call, head + _pieces(plan, loans), [loan.descriptor for loan in loans])
        finally:
            for loan in loans:
                loan.close()

    def hand_over(self, call: Call) -> None:
        """The supervisor shall answer this call and all that follow, those that we have taken already among them."""
        assert self.served is not None
        served = self.served
        left: Call | None = call
        while left is not None:
            self._bring(left, wire.BROUGHT_HEAD.pack(wire.TAKE_OVER, 0, 0) + left.encode(), ())
            left = served.take_back()
        self.end_serving()

    def _bring(self, call: Call, payload: bytes, descriptors: Sequence[int]) -> None:
        try:
            self.send(wire.encode(wire.BROUGHT, _UNASKED, payload, len(descriptors)), descriptors)
        except Dropped as reason:
            if self.served is not None:
                self.served.fail(call)
            self._server.drop(self, str(reason))
        else:
            if self.wants_to_send:
                self._server.plan(self)

    def end_serving(self) -> None:
        """Take no more calls."""
        served, self.served = self.served, None
        if served is not None:
            served.close()
