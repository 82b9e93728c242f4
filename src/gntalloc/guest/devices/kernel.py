"""The device files of a real Xen domain: /dev/xen of the running kernel."""

from __future__ import annotations

import errno
import fcntl
import os
from array import array
from typing import TYPE_CHECKING

from gntalloc.abi.evtchn import NOTIFY, Notify
from gntalloc.abi.gntalloc import ALLOC_GREF, FLAG_WRITABLE, AllocGref
from gntalloc.abi.gntdev import MAP_GRANT_REF, MapGrantRef, grant_refs
from gntalloc.errors import Closed, DeviceError, NoMachine, NotKnownHere
from gntalloc.guest.devices import Attached, Shared, end_of
from gntalloc.maps import PAGE_SIZE, PROT_READ, PROT_WRITE, Mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gntalloc.guest.devices import Buffer, Holders
    from gntalloc.xenstore.client import Store

__all__ = ["KernelDevices", "KernelFile"]

FOLDER = "/dev/xen"
LIMIT = "/sys/module/xen_gntalloc/parameters/limit"

_REFERENCE = 4  # bytes
_FAULT = 1  # an address in the first page, which no process has: what ioctl(2) gets for None


class KernelDevices:
    """The devices of the domain this kernel runs in."""

    address = FOLDER

    def __init__(self) -> None:
        self._domid: int | None = None

    @property
    def domid(self) -> int:
        """The number of the domain, asked of xenstore once.

        Raises:
            NoMachine: xenstore cannot be reached.
        """
        if self._domid is None:
            from gntalloc.xenstore.client import Store

            with Store() as store:
                self._domid = store.domid
        return self._domid

    @property
    def limit(self) -> int:
        """Pages that all programs of this kernel may have in use at once."""
        with open(LIMIT) as file:
            return int(file.read())

    @limit.setter
    def limit(self, pages: int) -> None:
        with open(LIMIT, "w") as file:
            file.write(str(pages))

    def close(self) -> None:
        """There is no line to the kernel to hang up."""

    def is_back(self) -> bool:
        """See `Devices`. A kernel ends with its programs."""
        return False

    def destroy(self) -> None:
        """Refuse: a program cannot end the domain that it runs in.

        Raises:
            NotKnownHere: always.
        """
        raise NotKnownHere("a program cannot destroy the Xen domain it runs in; use the toolstack (xl destroy)")

    def open_store(self) -> Store:
        """Open a connection of its own to xenstore.

        Raises:
            NoMachine: it cannot be reached.
        """
        from gntalloc.xenstore.client import Store  # only who asks pays for it

        return Store()

    def open(self, name: str, flags: int = os.O_RDWR) -> KernelFile:
        """Open a device file.

        Raises:
            NoMachine: there is no such device, or it may not be opened.
        """
        path = os.path.join(FOLDER, name)
        try:
            return KernelFile(name, os.open(path, flags | os.O_CLOEXEC))
        except OSError as error:
            todo = "load the module xen-" + name if error.errno == errno.ENOENT else "run as root"
            raise NoMachine(error.errno, f"{path} cannot be opened: {error.strerror}; {todo}") from error

    def reopen(self, name: str, descriptor: int) -> KernelFile:
        """See `Devices`."""
        return KernelFile(name, descriptor)


class KernelFile:
    """An open device file of the kernel."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self._descriptor = descriptor

    def ioctl(
        self, request: int, argument: bytearray | bytes | None, *, memory: Sequence[tuple[int, Buffer]] = ()
    ) -> int:
        """See `DeviceFile`. The kernel finds `memory` by itself, at its address."""
        try:
            if argument is None:
                return fcntl.ioctl(self.fileno(), request, _FAULT)
            # A bytearray is changed in place; of bytes the kernel gets a copy, which nobody sees.
            if isinstance(argument, bytearray):
                result: int = fcntl.ioctl(self.fileno(), request, argument, True)
                return result
            copied: int = fcntl.ioctl(self.fileno(), request, bytearray(argument), True)
            return copied
        except OSError as error:
            raise DeviceError(error.errno, f"{self.name} refused request {request:#010x}: {error.strerror}") from error

    def share(self, domid: int, count: int, *, writable: bool, times: int = 1, keep: bool = False) -> Shared:
        """See `DeviceFile`. They stay on the file's list in any case, for SET_UNMAP_NOTIFY."""
        head = AllocGref(domid, FLAG_WRITABLE if writable else 0, count, 0).pack()
        argument = bytearray(max(AllocGref.SIZE, AllocGref.REFS_OFFSET + _REFERENCE * count))
        argument[: len(head)] = head
        self.ioctl(ALLOC_GREF, argument)
        index = AllocGref.unpack_from(argument).index
        refs = memoryview(argument)[AllocGref.REFS_OFFSET : AllocGref.REFS_OFFSET + _REFERENCE * count].cast("I")
        mapping = self._mmap_or_end(index, count, PROT_READ | PROT_WRITE, times=times)
        return Shared(index, tuple(refs), mapping)

    def attach(self, granter: int, refs: Sequence[int], *, writable: bool, keep: bool = False) -> Attached:
        """See `DeviceFile`. They stay on the file's list in any case, as of `share`."""
        argument = bytearray(MapGrantRef(len(refs), 0).pack())
        argument += grant_refs(granter, array("I", refs).tobytes())
        self.ioctl(MAP_GRANT_REF, argument)
        index = MapGrantRef.unpack_from(argument).index
        prot = PROT_READ | PROT_WRITE if writable else PROT_READ
        return Attached(index, self._mmap_or_end(index, len(refs), prot))

    def _mmap_or_end(self, index: int, count: int, prot: int, *, times: int = 1) -> Mapping:
        try:
            return self._mmap(index, count * PAGE_SIZE, prot, times=times)
        except BaseException:
            self.end(index, count, kept=True)
            raise

    def end(self, index: int, count: int, *, kept: bool) -> None:
        """See `DeviceFile`."""
        self.ioctl(*end_of(self.name, index, count))

    def notify(self, port: int) -> None:
        """See `DeviceFile`. A kernel does it at once."""
        self.ioctl(NOTIFY, Notify(port).pack())

    def mmap(self, offset: int, length: int, *, prot: int, shared: bool = True, times: int = 1) -> Mapping:
        """See `DeviceFile`."""
        return self._mmap(offset, length, prot, shared=shared, times=times)

    def _mmap(self, offset: int, length: int, prot: int, *, shared: bool = True, times: int = 1) -> Mapping:
        mapping = Mapping(length * times, prot=prot, name=f"the map of {self.name} at index {offset:#x}")
        each = mapping.length // times
        try:
            for start in range(0, mapping.length, each):
                mapping.place(start, each, self.fileno(), offset, shared=shared)
        except OSError as error:
            mapping.close()
            raise DeviceError(error.errno, f"{mapping} was refused: {error.strerror}") from error
        return mapping

    def read(self, size: int) -> bytes:
        """See `DeviceFile`."""
        try:
            return os.read(self.fileno(), size)
        except OSError as error:
            raise DeviceError(error.errno, f"{self.name} cannot be read: {error.strerror}") from error

    def write(self, data: bytes) -> int:
        """See `DeviceFile`."""
        try:
            return os.write(self.fileno(), data)
        except OSError as error:
            raise DeviceError(error.errno, f"{self.name} cannot be written: {error.strerror}") from error

    def holders(self, index: int, count: int, *, wait: bool = False) -> Holders:
        """See `DeviceFile`."""
        raise NotKnownHere(
            "real Xen does not tell a guest who maps its pages; let the peer say so: SET_UNMAP_NOTIFY with CLEAR_BYTE "
            "on its side, a byte in the page that both look at, or a vchan's close"
        )

    def fileno(self) -> int:
        """Give the descriptor."""
        if self._descriptor < 0:
            raise Closed(f"this {self.name} file is closed; open it again")
        return self._descriptor

    @property
    def lost(self) -> bool:
        """See `DeviceFile`. A kernel ends with its programs."""
        return False

    def close(self) -> None:
        """Close it. Mappings stay."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        if self._descriptor >= 0:  # `os` may be gone, where the interpreter ends
            _close(self._descriptor)
