"""Serve one program's call channel. Each message is a call of the program, answered in turn."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Any

from gntalloc.abi.evtchn import PORT
from gntalloc.abi.gntalloc import AllocGref
from gntalloc.abi.gntdev import grant_refs
from gntalloc.drivers.chardev import Plan
from gntalloc.drivers.gntalloc import Allocated
from gntalloc.errors import DeviceError, GntallocError
from gntalloc.machine.speaker import Dropped
from gntalloc.machine.stream import MessageStream
from gntalloc.maps import PAGE_SIZE, PROT_READ, PROT_WRITE
from gntalloc.steps import finish_steps
from gntalloc.wire.memory import MessageCaller, Region
from gntalloc.wire.messages import (
    VERSION,
    Attach,
    Hello,
    Holders,
    HoldersAnswer,
    Ioctl,
    IoctlAnswer,
    MapAnswer,
    Mmap,
    Notify,
    Open,
    Piece,
    Read,
    Share,
    ShareAnswer,
    Show,
    ShowAnswer,
    Write,
    decode,
    encode,
    frame_reply,
    kind_of,
)
from gntalloc.wire.stream import Garbage

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from gntalloc.drivers.chardev import File
    from gntalloc.holders import Loan
    from gntalloc.machine.doors import Peer
    from gntalloc.machine.homes import Homes
    from gntalloc.machine.machine import Guest
    from gntalloc.machine.waits import Waits
    from gntalloc.steps import Steps
    from gntalloc.wire.stream import Message

    CarryOut = Callable[[Plan], Steps[list[Loan[Any]]]]
    Handler = Callable[["Connection", Message, Any], Steps[None] | None]
    Handlers = Mapping[int, tuple[type, Handler]]

__all__ = ["Connection", "handlers_with", "pieces_of_plan"]

log = logging.getLogger("gntalloc.machine")

_AT_ONCE = 16  # pages of a map that takes no steps


def pieces_of_plan(plan: Plan, loans: list[Loan[Any]]) -> tuple[Piece, ...]:
    """Say of each piece of a plan in which of these loans it is, from where, and how much."""
    if len(loans) == 1:
        return tuple([Piece(0, piece.offset, piece.pages * PAGE_SIZE) for piece in plan.pieces])
    place = {loan.extent: at for at, loan in enumerate(loans)}
    return tuple([Piece(place[piece.extent], piece.offset, piece.pages * PAGE_SIZE) for piece in plan.pieces])


class Connection(MessageStream):
    """Serve the call channel of one process in a domain.

    Args:
        sock: the socket to the process.
        guest: the domain.
        peer: the process.
        homes: the homes of open files.
        waits: the waits for releases.
        carry_out: makes descriptions for a plan, in steps.
        handlers: see `handlers_with`.
    """

    def __init__(
        self,
        sock: socket.socket,
        guest: Guest,
        peer: Peer,
        *,
        homes: Homes,
        waits: Waits,
        carry_out: CarryOut,
        handlers: Handlers,
    ) -> None:
        super().__init__(sock, guest.disposal)
        self.guest = guest
        self.peer = peer
        self.pid = peer.pid
        """The process that it speaks for. A supervisor names that process."""
        self.by_offset = False
        """Whether that process makes its maps itself, at the offset that it asks for."""
        self._homes = homes
        self._waits = waits
        self._carry_out = carry_out
        self._handlers = handlers
        self._files: dict[int, File] = {}
        self._next_handle = 1
        self._ended: list[Callable[[], None]] = []

    def serve(self, message: Message) -> Steps[None] | None:
        """Answer one message of the program, or give the steps to that."""
        kind, serve = self._handlers.get(message.kind, (None, None))
        if kind is None or serve is None:
            raise Dropped(f"it sent a message of kind {message.kind}, and there is none")
        try:
            steps = serve(self, message, decode(kind, message.payload))
        except GntallocError as error:
            self._refuse(message, error)
        except MemoryError:
            self._refuse(message, _no_memory())
        except Garbage as error:
            raise Dropped(f"what it sent is no message: {error}") from None
        else:
            return None if steps is None else self._go_through(message, steps)
        return None

    def _go_through(self, message: Message, steps: Steps[None]) -> Steps[None]:
        try:
            yield from steps
        except GntallocError as error:
            self._refuse(message, error)
        except MemoryError:
            self._refuse(message, _no_memory())

    def _refuse(self, message: Message, error: GntallocError) -> None:
        log.debug("domain %d, pid %d: %s", self.guest.domid, self.pid, error)
        self.answer(message, error=error.errno or errno.EIO, why=str(error))

    def when_ended(self, call: Callable[[], None]) -> None:
        """Have `call` called when the program is gone."""
        self._ended.append(call)

    def close(self) -> None:
        """See `Speaker`."""
        super().close()
        for call in self._ended:
            call()

    def file(self, handle: int) -> File:
        """Find a file by its handle on this channel.

        Raises:
            DeviceError: EBADF: there is no such file, or it is closed.
        """
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

    def _hello(self, message: Message, hello: Hello) -> None:
        if hello.version != VERSION:
            why = f"this machine speaks version {VERSION} and the program {hello.version}; use one gntalloc for both"
            raise DeviceError(errno.EPROTO, why)
        self.answer(message, result=self.guest.domid)

    def _open(self, message: Message, asked: Open) -> None:
        file, programs_end = self._homes.open(self.guest, asked.name, asked.flags, opener=self.pid)
        for handle in [handle for handle, known in self._files.items() if known.closed]:
            del self._files[handle]
        with programs_end:
            self.answer(message, result=self._handle(file), descriptors=[programs_end.fileno()])

    def _show(self, message: Message, asked: Show) -> None:
        file = self._homes.shown(self.guest, asked.inode, asked.token)
        self.answer(message, result=self._handle(file), body=encode(ShowAnswer(file.flags, file.driver.name)))

    def _ioctl(self, message: Message, asked: Ioctl) -> Steps[None] | None:
        error, why, result = 0, "", 0
        try:
            caller = MessageCaller(asked.regions, process=self.pid, by_offset=self.by_offset)
            work = self.file(asked.handle).begin_ioctl(asked.request, asked.address, caller)
            if not isinstance(work, int):
                return self._ioctl_in_steps(message, asked, work)
            result = work
        except DeviceError as refusal:  # bytes that were written before it failed stay written, as in Linux
            error, why = self._refused(refusal)
        self.answer(message, error=error, why=why, result=result, body=_answer_of(asked.regions))
        return None

    def _ioctl_in_steps(self, message: Message, asked: Ioctl, steps: Steps[int]) -> Steps[None]:
        error, why, result = 0, "", 0
        try:
            result = yield from steps
        except DeviceError as refusal:
            error, why = self._refused(refusal)
        self.answer(message, error=error, why=why, result=result, body=_answer_of(asked.regions))

    def _mmap(self, message: Message, asked: Mmap) -> Steps[None] | None:
        return _at_once_if_small(asked.length, self._mmap_in_steps(message, asked))

    def _mmap_in_steps(self, message: Message, asked: Mmap) -> Steps[None]:
        file = self.file(asked.handle)
        work = file.begin_mmap(asked.offset, asked.length, prot=asked.prot, shared=bool(asked.shared))
        plan = work if isinstance(work, Plan) else (yield from work)
        loans = yield from self._describe(plan)
        mark = plan.record.mark if plan.locks else 0
        self._answer_with(message, 0, MapAnswer(mark, pieces_of_plan(plan, loans)), loans)

    def _describe(self, plan: Plan) -> Steps[list[Loan[Any]]]:
        """Make the descriptions of a map, for the process that this is for."""
        plan.record.process = self.pid
        return self._carry_out(plan)

    def _share(self, message: Message, asked: Share) -> Steps[None] | None:
        return _at_once_if_small(asked.pages * PAGE_SIZE, self._share_in_steps(message, asked))

    def _share_in_steps(self, message: Message, asked: Share) -> Steps[None]:
        file, driver = self.file(asked.handle), self.guest.gntalloc
        if file.driver is not driver:
            raise DeviceError(errno.ENOTTY, f"{file.driver.name} shares no pages; gntalloc does")
        made = driver.allocate(file, AllocGref(asked.domid, asked.flags, asked.pages, 0))
        index, refs = made if isinstance(made, Allocated) else (yield from made)
        try:
            work = file.begin_mmap(index, asked.pages * PAGE_SIZE, prot=PROT_READ | PROT_WRITE, shared=True)
            plan = work if isinstance(work, Plan) else (yield from work)
            plan.record.ends = not asked.keep
            loans = yield from self._describe(plan)
        except BaseException:  # the program's end, too
            driver.take_back(file, index, asked.pages)
            raise
        mark = plan.record.mark if plan.locks else 0
        self._answer_with(message, index, ShareAnswer(mark, plan.pieces[0].offset, refs), loans)

    def _attach(self, message: Message, asked: Attach) -> Steps[None] | None:
        return _at_once_if_small(len(asked.refs) * (PAGE_SIZE // 4), self._attach_in_steps(message, asked))

    def _attach_in_steps(self, message: Message, asked: Attach) -> Steps[None]:
        file, driver = self.file(asked.handle), self.guest.gntdev
        if file.driver is not driver:
            raise DeviceError(errno.ENOTTY, f"{file.driver.name} maps no grants; gntdev does")
        entry = driver.note(file, grant_refs(asked.granter, asked.refs))
        try:
            prot = PROT_READ | PROT_WRITE if asked.writable else PROT_READ
            work = file.begin_mmap(entry.first * PAGE_SIZE, entry.count * PAGE_SIZE, prot=prot, shared=True)
            plan = work if isinstance(work, Plan) else (yield from work)
            plan.record.ends = not asked.keep
            plan.record.place(asked.place)
            loans = yield from self._describe(plan)
        except BaseException:  # the program's end, too
            driver.forget(file, entry)
            raise
        self._answer_with(message, entry.first * PAGE_SIZE, MapAnswer(0, pieces_of_plan(plan, loans)), loans)

    def _notify(self, message: Message, told: Notify) -> None:
        try:
            file = self.file(told.handle)
        except DeviceError:
            return  # it was closed meanwhile, and its port with it
        if file.driver is self.guest.evtchn:
            self.guest.evtchn.ring(file, PORT.pack(told.port))

    def _answer_with(
        self, message: Message, result: int, answer: MapAnswer | ShareAnswer, loans: list[Loan[Any]]
    ) -> None:
        """Answer, and close the machine's copies of these descriptors."""
        data = frame_reply(answer, message.kind, message.id, result=result, descriptors=len(loans))
        try:
            self.send(data, [loan.descriptor for loan in loans])
        finally:
            for loan in loans:
                loan.close()

    def _read(self, message: Message, asked: Read) -> None:
        data = self.file(asked.handle).read(asked.size)
        self.answer(message, result=len(data), body=data)

    def _write(self, message: Message, asked: Write) -> None:
        self.answer(message, result=self.file(asked.handle).write(asked.data))

    def _holders(self, message: Message, asked: Holders) -> Steps[None] | None:
        return _at_once_if_small(asked.pages * PAGE_SIZE, self._holders_in_steps(message, asked))

    def _holders_in_steps(self, message: Message, asked: Holders) -> Steps[None]:
        file = self.file(asked.handle)
        driver = self.guest.gntalloc
        if file.driver is not driver:
            raise DeviceError(errno.EINVAL, "only pages of gntalloc have holders")
        held, mapped_by = yield from driver.holders(file, asked.start, asked.pages)
        body = encode(HoldersAnswer(tuple(mapped_by)))
        if not (asked.wait and held):
            self.answer(message, result=held, body=body)
            return
        with self._waits.wait_released(self.guest, file, asked.start, asked.pages) as programs_end:
            self.answer(message, result=held, body=body, descriptors=[programs_end.fileno()])

    def _refused(self, refusal: DeviceError) -> tuple[int, str]:
        log.debug("domain %d, pid %d: %s", self.guest.domid, self.pid, refusal)
        return refusal.errno or errno.EIO, str(refusal)


_HANDLERS: dict[type, Handler] = {
    Hello: Connection._hello,  # noqa: SLF001  its own
    Open: Connection._open,  # noqa: SLF001
    Show: Connection._show,  # noqa: SLF001
    Ioctl: Connection._ioctl,  # noqa: SLF001
    Mmap: Connection._mmap,  # noqa: SLF001
    Share: Connection._share,  # noqa: SLF001
    Attach: Connection._attach,  # noqa: SLF001
    Notify: Connection._notify,  # noqa: SLF001
    Read: Connection._read,  # noqa: SLF001
    Write: Connection._write,  # noqa: SLF001
    Holders: Connection._holders,  # noqa: SLF001
}


def handlers_with(more: Mapping[type, Handler]) -> Handlers:
    """Give the function that serves each kind of message, by its number: a connection's own kinds, and `more`."""
    return {kind_of(kind): (kind, handler) for kind, handler in {**_HANDLERS, **more}.items()}


def _at_once_if_small(length: int, steps: Steps[None]) -> Steps[None] | None:
    """Do the steps of a map of few pages at once. Of more, give them back."""
    if length > _AT_ONCE * PAGE_SIZE:
        return steps
    finish_steps(steps)
    return None


def _no_memory() -> DeviceError:
    return DeviceError(errno.ENOMEM, "the machine has no memory left for this call; free some, or raise its limits")


def _written(regions: list[Region]) -> list[Region]:
    return [region for region in regions if region.written]


def _answer_of(regions: list[Region]) -> bytes:
    written = _written(regions)
    return encode(IoctlAnswer(written)) if written else b""
