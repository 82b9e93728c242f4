"""Speak to the machine for a supervisor: open files, known by their homes; ioctl; mmap; and the calls it hands over.

A supervisor is a program in the domain like any other, with one call channel. It holds only the machine's number of an
open file. The home is the program's alone, so the program's last close(2) is the release.

The machine may be another user's. So its answers are written into the program only where the program's call said so.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.abi.gntdev import MAP_GRANT_REF
from gntalloc.descriptors import inode_of_socket
from gntalloc.errors import DeviceError, MachineBroke
from gntalloc.guest.connection import Descriptor, MachineConnection
from gntalloc.guest.showing import is_home, show
from gntalloc.maps import PAGE_SIZE
from gntalloc.syscalls.arguments import regions_of
from gntalloc.syscalls.listener import Call
from gntalloc.syscalls.memory import Memory
from gntalloc.syscalls.serving import is_shared
from gntalloc.syscalls.threads import fetch, is_traced
from gntalloc.wire.form import Piece
from gntalloc.wire.messages import (
    PLACE,
    Behalf,
    Home,
    Ioctl,
    IoctlAnswer,
    Keep,
    Lend,
    MapAnswer,
    Mmap,
    Open,
    Serve,
    ShowAnswer,
    decode,
)
from gntalloc.wire.messages import Brought as BroughtMessage
from gntalloc.wire.stream import Garbage

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.run.debugged import Swaps
    from gntalloc.run.explain import Explainer

__all__ = ["Files", "OpenFile", "Piece", "Plan"]

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: process, user, group
_LARGEST_HANDLE = 0xFFFFFFFF
_MOST_KNOWN = 4096  # files remembered; the home of a forgotten one is shown to the machine again


class OpenFile(NamedTuple):
    """Name an open device file: its number on our channel, and its device."""

    handle: int
    name: str
    generation: int  # of the channel
    inode: int  # of its home
    away: bool = False  # the descriptor is now the pages' memory, and not its home: see run/debugged.py


class Plan(NamedTuple):
    """Say what an mmap shall make. `descriptors` are to be closed when it is made."""

    pieces: tuple[Piece, ...]
    descriptors: list[Descriptor]
    mark: int  # see `descriptions.lock_place`; 0: the place is not locked
    length: int  # of the map
    file: OpenFile | None = None  # where it is known


class Brought(NamedTuple):
    """Hold a call that the machine hands over.

    It is to be answered with `plan`. None: it is to be served, and so are all that follow.
    """

    call: Call
    plan: Plan | None


class Files:
    """Give `syscalls.serving` the device files of the domain whose socket is at `path`.

    Args:
        path: the domain's socket.
        place: carries out an mmap with a plan, and answers it.
        waits: says whether the caller of a call still waits, so that its memory is still its own.

    Raises:
        NoMachine: nobody answers there.
    """

    def __init__(self, path: str, place: Callable[[Call, Plan], None], waits: Callable[[Call], bool]) -> None:
        self.channel = MachineConnection(path)
        self.channel.connect()
        self.explainer: Explainer | None = None
        """The one that is told of ioctls that fail."""
        self.swaps: Swaps | None = None
        """The descriptors that were replaced."""
        self._place = place
        self._waits = waits
        self._memory = Memory()
        self._store = f"{path}.store"
        self._known: dict[int, OpenFile] = {}
        self._sockets = os.fstat(self.channel.fileno()).st_dev  # the file system of all sockets
        self._speaks_for = (0, False, 0)  # process, by offset, generation of the channel
        self._served = 0  # the generation of the channel over which calls are handed over

    @property
    def domid(self) -> int:
        """The number of the domain."""
        return self.channel.domid

    def open(self, process: int, name: str, flags: int) -> Descriptor:
        """Open a device, and return the home.

        Raises:
            DeviceError: the machine's errno. All methods here raise it so.
        """
        self._speak_for(process)
        answer = self.channel.call(Open(flags, name))
        home = answer.descriptor()
        inode = os.fstat(home.fileno()).st_ino
        self._remember(OpenFile(answer.number(_LARGEST_HANDLE), name, self.channel.generation, inode))
        return home

    def open_store(self, process: int) -> socket.socket | None:
        """Connect to the domain's xenstore. To the machine the connection is this process's own, not `process`'s."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(self._store)
        except OSError as error:
            sock.close()
            raise DeviceError(errno.ENODEV, f"xenstore does not answer: {error.strerror}") from None
        return sock

    def find(self, thread: int, descriptor: int, identity: tuple[int, int]) -> OpenFile | None:
        """Find the file whose home that is, if it is one of this domain."""
        device, inode = identity
        if device != self._sockets:
            return self._find_away(thread, descriptor, inode)
        file = self._known.get(inode)
        if file is not None and file.generation == self.channel.generation:
            return file
        if not is_home(self.channel, inode):
            return None
        home = Descriptor(fetch(thread, descriptor))
        try:
            return self._show(home.fileno(), inode) if inode_of_socket(home.fileno()) == inode else None
        finally:
            home.close()

    def _find_away(self, thread: int, descriptor: int, inode: int) -> OpenFile | None:
        handle = self.swaps.find(thread, descriptor, inode) if self.swaps is not None else None
        if handle is None:
            return None
        known = (file for file in self._known.values() if file.handle == handle)
        file = next((file for file in known if file.generation == self.channel.generation), None)
        return file and file._replace(away=True)

    def _bring_back(self, call: Call, process: int, descriptor: int, file: OpenFile) -> None:
        """Put the device back where the pages' memory is, if no mmap is looking there."""
        assert self.swaps is not None
        if self.swaps.free(process):
            home = self.channel.call(Home(file.handle)).descriptor()
            self.swaps.bring_back(call, descriptor, home.fileno())
            self._remember(file._replace(inode=os.fstat(home.fileno()).st_ino, away=False))
            home.close()

    def keep(self, file: OpenFile) -> None:
        """Have the machine keep the file open, though the program has no home of it for a while."""
        self.channel.call(Keep(file.handle))

    def _show(self, home: int, inode: int) -> OpenFile | None:
        try:
            answer = show(self.channel, home)
        except DeviceError:
            return None
        file = OpenFile(answer.number(_LARGEST_HANDLE), answer.read(ShowAnswer).name, self.channel.generation, inode)
        self._remember(file)
        return file

    def name(self, file: OpenFile) -> str:
        """Give the name of the device."""
        return file.name

    def ioctl(self, call: Call, process: int, file: OpenFile) -> int:
        """Carry out an ioctl: its result, or a negative errno.

        The bytes that the driver wrote go back to the program, also if the driver failed after that.
        """
        thread, (descriptor, request, address, *_) = call.thread, call.arguments
        if file.away:
            self._bring_back(call, process, descriptor & 0xFFFFFFFF, file)
        request &= 0xFFFFFFFF
        self._speak_for(process, by_offset=request == MAP_GRANT_REF and is_traced(thread))
        regions = regions_of(file.name, request, address, self._memory, thread)
        answer = self.channel.ask(Ioctl(file.handle, request, address, regions))
        if answer.error == errno.EBADF:  # it is closed, or another file has that inode now
            self._known.pop(file.inode, None)
        if answer.error and self.explainer is not None:
            self.explainer.refused_ioctl(call, file.name, request, answer.error, answer.why)
        result = -answer.error if answer.error else answer.result
        written = answer.read(IoctlAnswer).written
        ours = {(region.address, len(region.data)) for region in regions if region.writable}
        if any((region.address, len(region.data)) not in ours for region in written):
            raise DeviceError(errno.EIO, "the machine answers with memory that this call does not name")
        if written and not self._waits(call):
            return result  # the caller will not hear of it
        for region in written:
            if self._memory.write(thread, region.address, bytes(region.data)) < len(region.data):
                result = -errno.EFAULT  # it was writable a moment ago: another thread of the program has changed that
        return result

    def map(self, call: Call, process: int, file: OpenFile) -> None:
        """Carry out an mmap."""
        _address, length, prot, flags, descriptor, offset = call.arguments
        if file.away:
            self._bring_back(call, process, descriptor & 0xFFFFFFFF, file)
        self._speak_for(process)
        answer = self.channel.call(Mmap(file.handle, prot & 0xFFFFFFFF, is_shared(flags), offset, length))
        mark, pieces = answer.read(MapAnswer)
        if sum(piece.length for piece in pieces) != _whole_pages(length) or any(
            piece.descriptor >= len(answer.descriptors) for piece in pieces
        ):
            raise DeviceError(errno.EIO, "the machine answers with another map than was asked for")
        self._place(call, Plan(pieces, answer.descriptors, mark, _whole_pages(length), file))

    # Calls that the machine serves or hands over.

    def have_served(self, listener: int) -> Descriptor | None:
        """Ask the machine to serve these calls. Return the notes it takes of them (syscalls/listener.py), if it does.

        Another user's machine is not asked: the process that has the listener can do anything with the program.
        """
        if self._user_of_the_machine() != os.geteuid():
            return None
        namespace = os.stat("/proc/self/ns/pid").st_ino
        self._served, self.channel.hears = self.channel.generation, True
        lent = self.channel.call(Lend(namespace))
        if not lent.result:
            return None
        with socket.socket(fileno=lent.descriptor().detach()) as line:
            socket.send_fds(line, [b"!"], [listener])
        answer = self.channel.call(Serve())
        return answer.descriptor() if answer.result else None

    def _user_of_the_machine(self) -> int:
        with socket.socket(fileno=os.dup(self.channel.fileno())) as sock:
            _, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return int(user)

    def brought(self) -> Brought | None:
        """Take the next call that the machine hands over, without waiting. None: there is none for now.

        Raises:
            MachineGone: it has ended, or its line to us has. All that it had handed over before has been given.
            DeviceError: EMFILE: likewise, as we have no room for the descriptors that it handed over.
            MachineBroke: the message cannot be read.
        """
        heard = self.channel.hear(self._served)
        if heard is None:
            return None
        message, descriptors = heard
        try:
            brought = decode(BroughtMessage, message.payload)
        except Garbage as error:
            raise MachineBroke(f"what the machine hands over cannot be read: {error}") from None
        call = Call.decode(brought.call)
        if brought.what != PLACE:
            return Brought(call, None)
        plan = Plan(brought.pieces, descriptors, brought.mark, _whole_pages(call.arguments[1]))
        return Brought(call, plan)

    def has_brought(self) -> bool:
        """Say whether `brought` has something to give or to raise that the channel's descriptor does not tell."""
        return self.channel.has_heard(self._served)

    def _speak_for(self, process: int, *, by_offset: bool = False) -> None:
        if self._speaks_for != (process, by_offset, self.channel.live):  # closed: it connects, and tells the new one
            self.channel.tell(Behalf(process, by_offset))
            self._speaks_for = process, by_offset, self.channel.live

    def _remember(self, file: OpenFile) -> None:
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[file.inode] = file


def _whole_pages(length: int) -> int:
    return -(-length // PAGE_SIZE) * PAGE_SIZE
