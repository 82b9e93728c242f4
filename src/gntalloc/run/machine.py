"""The machine as a supervisor speaks to it: open files known by their homes, ioctl, mmap.

A supervisor is a program in the domain like any other, with one call channel. What it holds of an open file is only
what the machine calls it; the home is the program's alone, so that its last close(2) is the release.
"""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

from gntalloc import wire
from gntalloc.errors import DeviceError
from gntalloc.guest.channel import Channel, Descriptor

__all__ = ["Files", "OpenFile", "Piece", "Plan"]

_MOST_KNOWN = 4096  # files remembered; one that was forgotten shows its home again


class OpenFile(NamedTuple):
    """An open device file: what the machine calls it on our channel, and which device it is."""

    handle: int
    name: str
    generation: int  # of the channel


class Piece(NamedTuple):
    """`length` bytes of `descriptor` from `offset` on, the next part of a map."""

    descriptor: int
    offset: int
    length: int


class Plan(NamedTuple):
    """What an mmap shall make. `descriptors` are to be closed when it is made."""

    pieces: list[Piece]
    descriptors: list[Descriptor]
    record: int
    confirm: bool
    generation: int


class Files:
    """The device files of the domain whose socket is at `path`.

    Raises:
        NoMachine: nobody answers there.
    """

    def __init__(self, path: str) -> None:
        self._channel = Channel(path)
        self._channel.connect()
        self._known: dict[int, OpenFile] = {}

    @property
    def domid(self) -> int:
        """Of the domain."""
        return self._channel.domid

    def open(self, name: str, flags: int) -> Descriptor:
        """Open a device. Gives the home.

        Raises:
            DeviceError: the machine's errno. So for all of these.
        """
        answer = self._channel.call(wire.OPEN, wire.OPEN_REQUEST.pack(flags & 0xFFFFFFFF) + name.encode())
        (home,) = answer.descriptors
        self._remember(os.fstat(home.fileno()).st_ino, OpenFile(answer.result, name, self._channel.generation))
        return home

    def known(self, inode: int) -> OpenFile | None:
        """The file whose home has this inode, if it is remembered."""
        file = self._known.get(inode)
        if file is not None and file.generation != self._channel.generation:
            del self._known[inode]  # the channel broke, and the new one knows no files
            return None
        return file

    def show(self, inode: int, home: int) -> OpenFile | None:
        """Ask which file this descriptor is the home of: None if of none in this domain."""
        try:
            answer = self._channel.call(wire.SHOW, b"", [home])
        except DeviceError:
            return None
        name = answer.body[wire.SHOW_REPLY.size :].decode()
        file = OpenFile(answer.result, name, self._channel.generation)
        self._remember(inode, file)
        return file

    def forget(self, inode: int) -> None:
        """It is closed, or another file has that number now."""
        self._known.pop(inode, None)

    def ioctl(
        self, file: OpenFile, request: int, address: int, regions: list[wire.Region]
    ) -> tuple[int, list[wire.Region]]:
        """The result, or a negative errno; and the memory that the driver wrote, also if it failed after that."""
        payload = wire.IOCTL_REQUEST.pack(file.handle, request, address) + wire.encode_regions(regions)
        try:
            answer = self._channel.call(wire.IOCTL, payload)
        except DeviceError as refusal:
            return -(refusal.errno or 5), wire.decode_regions(getattr(refusal, "body", b""))
        return answer.result, wire.decode_regions(answer.body)

    def mmap(self, file: OpenFile, offset: int, length: int, *, prot: int, shared: bool) -> Plan:
        """What shall be mapped."""
        payload = wire.MMAP_REQUEST.pack(file.handle, prot, shared, offset, length)
        answer = self._channel.call(wire.MMAP, payload)
        (confirm,) = wire.CONFIRM.unpack_from(answer.body)
        pieces = [
            Piece(place, start, size) for place, start, size in wire.PIECE.iter_unpack(answer.body[wire.CONFIRM.size :])
        ]
        return Plan(pieces, answer.descriptors, answer.result, bool(confirm), self._channel.generation)

    def placed(self, plan: Plan, address: int) -> None:
        """The program has them there."""
        if plan.confirm:
            self._channel.tell(wire.PLACED, wire.PLACED_REQUEST.pack(plan.record, address), plan.generation)

    def _remember(self, inode: int, file: OpenFile) -> None:
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[inode] = file


def empty(home: int) -> None:
    """Throw away the events on a home, which the machine cannot take back."""
    with socket.socket(fileno=os.dup(home)) as sock:
        try:
            while sock.recv(4096, socket.MSG_DONTWAIT):
                pass
        except BlockingIOError:
            pass
