"""A program that speaks to the machine by hand, and so can say what no library would."""

from __future__ import annotations

import array
import os
import socket
from struct import pack, unpack_from
from typing import TYPE_CHECKING, Self

import rawwire as wire

from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from gntalloc import Domain, Machine

ALLOC, DEALLOC = 0x00184705, 0x00104706
MAP, UNMAP = 0x00184700, 0x00104701
ARGUMENT = 0x1000
PATIENCE = 20.0


class Answer:
    """One reply, and the descriptors that came with it."""

    def __init__(self, number: int, reply: wire.Reply, descriptors: list[int]) -> None:
        self.id = number
        self.error, self.why, self.result, self.body = reply
        self.descriptors = descriptors

    def close(self) -> Self:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []
        return self


class RawClient:
    """One connection."""

    def __init__(self, where: Domain | Machine | str) -> None:
        path = where if isinstance(where, str) else getattr(where, "address", "") or f"{where.folder}/control"  # type: ignore[union-attr]
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(path)
        self._decoder = wire.Decoder()
        self._messages: list[wire.Message] = []
        self._descriptors: list[int] = []
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def request(self, kind: int, payload: bytes = b"") -> bytes:
        self._number += 1
        return wire.encode(kind, self._number, payload)

    def send(self, kind: int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> int:
        self._number += 1
        message = wire.encode(kind, self._number, payload, len(descriptors))
        if descriptors:
            sent = socket.send_fds(self.sock, [message], list(descriptors))
            message = message[sent:]
        if message:
            self.sock.sendall(message)
        return self._number

    def answer(self) -> Answer:
        while not self._messages or len(self._descriptors) < self._messages[0].descriptors:
            self._fill()
        message = self._messages.pop(0)
        descriptors = [self._descriptors.pop(0) for _ in range(message.descriptors)]
        return Answer(message.id, wire.decode_reply(message.payload), descriptors)

    def call(self, kind: int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> Answer:
        self.send(kind, payload, descriptors)
        return self.answer()

    def dropped(self) -> bool:
        """Whether the machine hangs up, sooner or later; what it sends until then is thrown away."""
        try:
            while True:
                self._fill()
        except (ConnectionError, EOFError):
            return True

    def _fill(self) -> None:
        data, controls, _, _ = self.sock.recvmsg(65536, socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC)
        for _, _, content in controls:
            self._descriptors += array.array("i", content)
        if not data:
            raise EOFError
        self._messages += self._decoder.feed(data)

    # Calls a program makes.

    def open(self, device: str) -> tuple[int, int]:
        """The handle, and the home."""
        answer = self.call(wire.OPEN, wire.OPEN_REQUEST.pack(os.O_RDWR) + device.encode())
        assert (answer.error, answer.why) == (0, "")
        return answer.result, answer.descriptors[0]

    def show(self, home: int) -> Answer:
        """Show a home, which the program holds, by what it is and by what it can do with it."""
        token = wire.make_token()
        with socket.socket(fileno=os.dup(home)) as sock:
            sock.send(token)
        return self.call(wire.SHOW, wire.SHOW_REQUEST.pack(os.fstat(home).st_ino, token))

    def ioctl(self, handle: int, request: int, argument: bytes, *, writable: bool = True) -> Answer:
        regions = wire.encode_regions([wire.Region(ARGUMENT, writable, argument)])
        return self.call(wire.IOCTL, wire.IOCTL_REQUEST.pack(handle, request, ARGUMENT) + regions)

    def alloc(self, handle: int, peer: int, count: int = 1, flags: int = 1) -> tuple[int, tuple[int, ...]]:
        answer = self.ioctl(handle, ALLOC, pack("=HHIQ", peer, flags, count, 0).ljust(max(24, 16 + 4 * count), b"\0"))
        assert (answer.error, answer.why) == (0, "")
        (region,) = wire.decode_regions(answer.body)
        _, _, _, index, *refs = unpack_from(f"=HHIQ{count}I", region.data)
        return index, tuple(refs)

    def map_refs(self, handle: int, granter: int, refs: Sequence[int]) -> int:
        array_of_refs = b"".join(pack("=II", granter, ref) for ref in refs)
        answer = self.ioctl(handle, MAP, pack("=IIQ", len(refs), 0, 0) + array_of_refs)
        assert (answer.error, answer.why) == (0, "")
        index: int = unpack_from("=Q", wire.decode_regions(answer.body)[0].data, 8)[0]
        return index

    def mmap(self, handle: int, index: int, pages: int = 1, prot: int = 3) -> Answer:
        """The answer has the descriptors; nothing is placed."""
        return self.call(wire.MMAP, wire.MMAP_REQUEST.pack(handle, prot, 1, index, pages * PAGE_SIZE))
