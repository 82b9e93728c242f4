"""The device files of a domain of the machine."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import termios
from array import array
from struct import Struct
from typing import TYPE_CHECKING, Any

from gntalloc import waits
from gntalloc.abi.evtchn import DEVICE as EVTCHN
from gntalloc.abi.evtchn import LEAST_RING, PORT, RESET
from gntalloc.abi.gntalloc import FLAG_WRITABLE
from gntalloc.descriptions import lock_place
from gntalloc.errors import Closed, DeviceError, GntallocError, MachineBroke, MachineGone
from gntalloc.guest.connection import Answer, Descriptor, MachineConnection
from gntalloc.guest.control import ControlClient
from gntalloc.guest.devices import Attached, Holders, Shared, end_of
from gntalloc.guest.showing import show
from gntalloc.maps import PAGE_SIZE, PROT_READ, PROT_WRITE, Mapping
from gntalloc.wire.memory import MAX_REGIONS, Region
from gntalloc.wire.messages import (
    Attach,
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
    Write,
)
from gntalloc.wire.messages import Holders as HoldersRequest
from gntalloc.wire.stream import MAX_PAYLOAD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gntalloc.guest.devices import Buffer
    from gntalloc.xenstore.client import Store

__all__ = ["MachineDevices", "MachineFile"]

# Where an ioctl's argument lies, as far as the driver is told: any page but the first will do.
ARGUMENT_ADDRESS = 0x10000
_INT = Struct("=i")
_MASK = (1 << 64) - 1  # of a register: how a call's negative numbers reach a kernel
# What a message can carry of an argument. A driver finds no memory beyond that, and says EFAULT if it gets so far.
_LONGEST_ARGUMENT = MAX_PAYLOAD - 4096 - 16 * MAX_REGIONS
_LARGEST_HANDLE, _LARGEST_INDEX = 0xFFFFFFFF, (1 << 63) - 1
_REFERENCE = 4  # bytes
_MOST_MEMORY = _LONGEST_ARGUMENT - 16384  # an argument that points to memory is short


class MachineDevices:
    """The devices of the domain whose socket is at `path`."""

    def __init__(self, path: str) -> None:
        self.address = path
        self._channel = MachineConnection(path)
        with self._channel.lock:
            self._channel.connect()

    @property
    def domid(self) -> int:
        """The number of the domain."""
        return self._channel.domid

    @property
    def limit(self) -> int:
        """Pages the domain may have in use at once. Only the machine's owner may ask."""
        limit = self._control().order("get_limit", domid=self.domid)
        if type(limit) is not int:
            raise MachineBroke(f"the machine says that the limit is {limit!r:.40}; use one gntalloc for both")
        return limit

    @limit.setter
    def limit(self, pages: int) -> None:
        self._control().order("set_limit", domid=self.domid, limit=pages)

    def destroy(self) -> None:
        """End the domain. Only the machine's owner may."""
        self._control().order("destroy", domid=self.domid)

    def open(self, name: str, flags: int = os.O_RDWR) -> MachineFile:
        """Open a device file.

        Raises:
            DeviceError: ENOENT there is no such device.
        """
        kind = _FILES.get(name, MachineFile)
        try:
            return kind(self._channel, name, flags)
        except MachineGone:
            if not self.is_back():
                raise
        return kind(self._channel, name, flags)

    def is_back(self) -> bool:
        """Whether a machine answers, after MachineGone: one that was started again, with this domain in it."""
        with self._channel.lock:
            try:
                self._channel.connect()
            except GntallocError:
                return False
        return True

    def reopen(self, name: str, descriptor: int) -> MachineFile:
        """See `Devices`: its home is shown with the first call."""
        return _FILES.get(name, MachineFile)(self._channel, name, descriptor=descriptor)

    def close(self) -> None:
        """Hang up. The next call connects again."""
        self._channel.close()

    def open_store(self) -> Store:
        """Open a connection of its own to xenstore.

        Raises:
            NoMachine: there is none.
        """
        from gntalloc.xenstore.client import Store  # only who asks pays for it

        return Store(f"{self.address}.store")

    def _control(self) -> ControlClient:
        return ControlClient(os.path.dirname(self.address))


class MachineFile:
    """An open device file: its *home*, a descriptor whose last copy's end is the driver's release.

    One that is given as a `descriptor` is open already.
    """

    def __init__(self, channel: MachineConnection, name: str, flags: int = os.O_RDWR, *, descriptor: int = -1) -> None:
        self.name = name
        self._channel = channel
        self._home: Descriptor | None = None
        if descriptor >= 0:
            self._home, self._handle, self._generation = Descriptor(descriptor), 0, -1
            return
        with channel.lock:
            answer = channel.call(Open(flags, name))
            self._home = answer.descriptor()
            self._handle = answer.number(_LARGEST_HANDLE)
            self._generation = channel.generation

    def ioctl(
        self, request: int, argument: bytearray | bytes | None, *, memory: Sequence[tuple[int, Buffer]] = ()
    ) -> int:
        """See `DeviceFile`."""
        there = dict(memory)
        if sum(map(len, there.values())) > _MOST_MEMORY or len(there) >= MAX_REGIONS:
            most = f"{MAX_REGIONS - 1} buffers of {_MOST_MEMORY} bytes together"
            why = f"more memory than {most} goes with request {request:#010x}; make several calls"
            raise DeviceError(errno.E2BIG, why)
        address = 0
        if argument is not None:
            address = ARGUMENT_ADDRESS
            there[address] = memoryview(argument)[: _LONGEST_ARGUMENT - sum(map(len, there.values()))]
        regions = [Region(at, bytearray(data), writable=not memoryview(data).readonly) for at, data in there.items()]
        answer = self._ask(Ioctl, request & 0xFFFFFFFF, address, regions)
        if answer.body:
            _write_back(there, answer.read(IoctlAnswer).written)
        if answer.error:
            raise DeviceError(answer.error, answer.why)
        return answer.number()

    def share(self, domid: int, count: int, *, writable: bool, times: int = 1, keep: bool = False) -> Shared:
        """See `DeviceFile`. One message: the machine goes on to the mmap by itself."""
        mapping = self._reserve(count * PAGE_SIZE * times, PROT_READ | PROT_WRITE)
        index = None
        try:
            answer = self._call(Share, domid, FLAG_WRITABLE if writable else 0, count, keep)
            made, index = answer.read(ShareAnswer), answer.number(_LARGEST_INDEX)
            if len(made.refs) != _REFERENCE * count:
                raise MachineBroke("the machine's answer has another number of references; use one gntalloc for both")
            self._place(mapping, (Piece(0, made.offset, count * PAGE_SIZE),) * times, answer.descriptors, made.mark)
        except BaseException:
            self._undo(mapping, index, count, kept=keep)
            raise
        return Shared(index, tuple(memoryview(made.refs).cast("I")), mapping)

    def attach(self, granter: int, refs: Sequence[int], *, writable: bool, keep: bool = False) -> Attached:
        """See `DeviceFile`. One message, as of `share`."""
        mapping = self._reserve(len(refs) * PAGE_SIZE, PROT_READ | PROT_WRITE if writable else PROT_READ)
        index = None
        try:
            answer = self._call(Attach, granter, writable, keep, mapping.address, array("I", refs).tobytes())
            made, index = answer.read(MapAnswer), answer.number(_LARGEST_INDEX)
            self._place(mapping, made.pieces, answer.descriptors, made.mark)
        except BaseException:
            self._undo(mapping, index, len(refs), kept=keep)
            raise
        return Attached(index, mapping)

    def _reserve(self, length: int, prot: int) -> Mapping:
        try:
            return Mapping(length, prot=prot, name=("a map of", self.name))
        except (OSError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            todo = "unmap some, or raise ulimit -v or vm.max_map_count"
            raise DeviceError(
                errno.ENOMEM, f"{length} bytes cannot be mapped in this process: {why}; {todo}"
            ) from error

    def _undo(self, mapping: Mapping, index: int | None, count: int, *, kept: bool) -> None:
        mapping.close()
        if index is not None:
            try:
                self.end(index, count, kept=kept)
            except GntallocError:
                pass  # the machine is gone, and they with it

    def end(self, index: int, count: int, *, kept: bool) -> None:
        """See `DeviceFile`. What is not kept went with its map: the machine sees that."""
        if kept:
            self.ioctl(*end_of(self.name, index, count))

    def notify(self, port: int) -> None:
        """See `DeviceFile`."""
        channel = self._channel
        with channel.lock:
            self._connect()
            channel.tell(Notify(self._handle, port))

    def mmap(self, offset: int, length: int, *, prot: int, shared: bool = True, times: int = 1) -> Mapping:
        """See `DeviceFile`."""
        answer = self._call(Mmap, prot, shared, offset & _MASK, length & _MASK)
        made = answer.read(MapAnswer)
        name = f"the map of {self.name} at index {offset:#x}"
        try:
            mapping = Mapping(length * times, prot=prot, name=name)
        except OSError as error:
            raise DeviceError(error.errno, f"{name} could not be made: {error.strerror}") from error
        try:
            self._place(mapping, made.pieces * times, answer.descriptors, made.mark, shared=shared)
        except BaseException:
            mapping.close()
            raise
        return mapping

    def _place(
        self,
        mapping: Mapping,
        pieces: Sequence[Piece],
        descriptors: list[Descriptor],
        mark: int,
        *,
        shared: bool = True,
    ) -> None:
        """Put what came where it belongs, and lock the place.

        Raises:
            DeviceError: the errno of mmap(2) or fcntl(2).
            MachineBroke: what came belongs nowhere.
        """
        at = 0
        try:
            for place, start, size in pieces:
                if place >= len(descriptors) or not size or size % PAGE_SIZE or at + size > mapping.length:
                    raise MachineBroke(f"the machine's pieces do not fit {mapping}; use one gntalloc for both")
                mapping.place(at, size, descriptors[place].fileno(), start, shared=shared)
                at += size
            if at != mapping.length:
                raise MachineBroke(f"the machine's pieces do not fill {mapping}; use one gntalloc for both")
            if mark:
                for descriptor in descriptors:
                    lock_place(descriptor.fileno(), mark, mapping.address, mapping.length)
        except MachineBroke:
            raise
        except (OSError, OverflowError, struct.error) as error:
            code = error.errno if isinstance(error, OSError) else errno.EIO
            raise DeviceError(code, f"{mapping} could not be made: {error}") from error
        finally:
            for descriptor in descriptors:
                descriptor.close()

    def read(self, size: int) -> bytes:
        """See `DeviceFile`."""
        return self._call(Read, size).body

    def write(self, data: bytes) -> int:
        """See `DeviceFile`."""
        return self._call(Write, bytes(data)).number(len(data))

    def holders(self, index: int, count: int, *, wait: bool = False) -> Holders:
        """See `DeviceFile`."""
        answer = self._call(HoldersRequest, wait, index, count)
        released = answer.descriptors[0].detach() if answer.descriptors else None
        return Holders(bool(answer.result), answer.read(HoldersAnswer).mapped_by, released)

    def fileno(self) -> int:
        """Give the file's home, to be kept or passed on. Only that of evtchn can be polled, read and written."""
        return self._open_home().fileno()

    def close(self) -> None:
        """Close it. Mappings stay."""
        if self._home is not None:
            self._home.close()
            self._home = None

    @property
    def lost(self) -> bool:
        """Whether the machine or the domain that this was opened in has ended."""
        return self._home is not None and waits.hung_up(self._home.fileno())

    def _gone(self) -> MachineGone:
        return MachineGone(
            f"the domain that opened this {self.name} file, at {self._channel.path}, has ended, and with it what was "
            "made there; make it anew, from the same Domain if that is there again"
        )

    def _open_home(self) -> Descriptor:
        if self._home is None:
            raise Closed(f"this {self.name} file is closed; open it again")
        return self._home

    def _call(self, kind: Any, *fields: Any) -> Answer:
        """Send a message about this file, whose handle comes before the other fields.

        Raises:
            DeviceError: the machine's errno and its reason.
        """
        answer = self._ask(kind, *fields)
        if answer.error:
            raise DeviceError(answer.error, answer.why)
        return answer

    def _ask(self, kind: Any, *fields: Any) -> Answer:
        channel = self._channel
        with channel.lock:
            if self._home is None or channel.live != self._generation:
                self._connect()
            return channel.ask(kind(self._handle, *fields))

    def _connect(self) -> None:
        """Have a channel on which the machine knows this file."""
        home = self._open_home()
        channel = self._channel
        if channel.live < 0:
            channel.connect()
        if channel.generation != self._generation:  # a new channel: say which file this is
            self._show(home)

    def _show(self, home: Descriptor) -> None:
        channel = self._channel
        try:
            self._handle = show(channel, home.fileno()).number(_LARGEST_HANDLE)
        except DeviceError as refusal:
            if refusal.errno == errno.EBADF:  # that machine, or that domain, is not the one that opened it
                raise self._gone() from None
            raise
        self._generation = channel.generation


class EvtchnFile(MachineFile):
    """An open file of evtchn: its events are on its home."""

    def ioctl(
        self, request: int, argument: bytearray | bytes | None, *, memory: Sequence[tuple[int, Buffer]] = ()
    ) -> int:
        """See `DeviceFile`."""
        if request == RESET:
            self._empty()
        return super().ioctl(request, argument, memory=memory)

    def read(self, size: int) -> bytes:
        """See `DeviceFile`. Events are on the home already, so the machine is only asked where it may know better.

        That is: were events lost? And has something happened of which it has not heard yet (a munmap, a close, a port
        written back a moment ago)? Before it answers anything it has heard of all that was before.
        """
        size = min(size, PAGE_SIZE) & -PORT.size
        if not size:
            return b""
        if _waiting(self.fileno()) >= LEAST_RING:  # with fewer there none was lost
            self._call(Read, size)
        try:
            return self._take(size)
        except DeviceError as error:
            if error.errno != errno.EAGAIN:
                raise
        self._call(Read, size)
        return self._take(size)

    def write(self, data: bytes) -> int:
        """See `DeviceFile`. Ports go over the home, which the machine looks at before it serves any later call."""
        ports = bytes(data[: min(len(data), PAGE_SIZE) & -PORT.size])
        if not ports:
            return 0
        try:
            return os.write(self.fileno(), ports)
        except BlockingIOError:  # the real device never says so: the machine has not looked for long, so wait for it
            return self._call(Write, ports).number(len(ports))
        except OSError as error:
            raise self._error("written", error) from error

    def _take(self, size: int) -> bytes:
        try:
            events = os.read(self.fileno(), size)
        except OSError as error:
            raise self._error("read", error) from error
        if not events:
            raise self._gone()
        return events

    def _empty(self) -> None:
        """Throw away the events on the home, which the machine cannot take back."""
        with waits.Socket(fileno=os.dup(self.fileno())) as home:
            while _waiting(home.fileno()):
                try:
                    home.recv(PAGE_SIZE, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break  # another reader was faster

    def _error(self, what: str, error: OSError) -> OSError:
        if error.errno in {errno.EPIPE, errno.ECONNRESET}:
            return self._gone()
        return DeviceError(error.errno, f"{self.name} cannot be {what}: {error.strerror}")


_FILES: dict[str, type[MachineFile]] = {EVTCHN: EvtchnFile}


def _waiting(home: int) -> int:
    """How many events are there to read."""
    size: int = _INT.unpack(fcntl.ioctl(home, termios.FIONREAD, bytes(_INT.size)))[0]
    return size // PORT.size


def _write_back(there: dict[int, Buffer], written: list[Region]) -> None:
    """Put what a driver wrote where it belongs.

    Raises:
        MachineBroke: that is no memory of this call's.
    """
    for region in written:
        buffer = there.get(region.address)
        if buffer is None or len(region.data) > len(buffer):
            raise MachineBroke("the machine's answer writes where nothing was asked; use one gntalloc for both")
        memoryview(buffer).cast("B")[: len(region.data)] = region.data
