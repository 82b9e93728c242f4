"""A machine that lies: what a real one answers goes through here, and some of it is changed on the way."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
from functools import partial
from struct import Struct
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Liar", "change"]

_HEADER = Struct("=IHHI")
_STORE_HEADER = Struct("=IIII")  # type, request, transaction, length
_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)


def change(data: bytes, chance: random.Random) -> bytes:
    """The same with some bytes changed, cut off, added, or all of them new."""
    changed = bytearray(data)
    how = chance.randrange(6)
    if how == 0:
        return chance.randbytes(chance.randrange(80))
    if how == 1:
        return data[: chance.randrange(len(data) + 1)]
    if how == 2:
        return data + chance.randbytes(chance.randrange(1, 60))
    if how == 3 and len(data) >= 8:
        at, size = chance.randrange(len(data) - 7), chance.choice((1, 2, 4, 8))
        changed[at : at + size] = (chance.choice(_EXTREMES) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        return bytes(changed)
    for _ in range(chance.randrange(1, 6)):
        if changed:
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


class Liar:
    """Stands at sockets in `folder`, in front of those of a real machine, and changes one answer in `one_in`."""

    def __init__(self, real: str, folder: Path, names: tuple[str, ...], chance: random.Random, one_in: int = 4) -> None:
        self._real, self._folder, self._chance, self._one_in = real, folder, chance, one_in
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.path = str(folder / names[0])
        for name in names:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(folder / name))
            listener.listen(50)
            self._start(partial(self._accept, listener, name))
            self._sockets.append(listener)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        for sock in self._sockets:
            sock.close()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket, name: str) -> None:
        while True:
            try:
                theirs, _ = listener.accept()
            except OSError:
                return
            ours = socket.socket(socket.AF_UNIX)
            self._sockets += [theirs, ours]
            try:
                ours.connect(os.path.join(self._real, name))
            except OSError:
                theirs.shutdown(socket.SHUT_RDWR)
                continue
            lie = self._lie_of_the_store if name.endswith(".store") else self._lie
            self._start(partial(self._pass, theirs, ours))
            self._start(partial(self._pass, ours, theirs, lie))

    def _pass(self, source: socket.socket, target: socket.socket, lie: Callable[[bytes], bytes] | None = None) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, descriptors, _, _ = socket.recv_fds(source, 1 << 20, 253)
                if not data:
                    break
                if lie is not None and not self._chance.randrange(self._one_in):
                    data = lie(data)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
                sent = target.sendmsg([data], rights) if data else 0
                for descriptor in descriptors:
                    os.close(descriptor)
                target.sendall(data[sent:])
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _lie(self, data: bytes) -> bytes:
        """Mostly in a frame that is right, or nothing behind the frame would ever be reached."""
        if len(data) < _HEADER.size or not self._chance.randrange(8):
            return change(data, self._chance)
        length, kind, descriptors, number = _HEADER.unpack_from(data)
        payload = change(data[_HEADER.size : _HEADER.size + length], self._chance)
        if not self._chance.randrange(8):
            descriptors = self._chance.choice((0, 1, 2))
        return _HEADER.pack(len(payload), kind, descriptors, number) + payload + data[_HEADER.size + length :]

    def _lie_of_the_store(self, data: bytes) -> bytes:
        """The same, of xenstore's frames."""
        if len(data) < _STORE_HEADER.size or not self._chance.randrange(8):
            return change(data, self._chance)
        *head, length = _STORE_HEADER.unpack_from(data)
        if not self._chance.randrange(8):
            head[self._chance.randrange(3)] = self._chance.choice((0, 16, 1 << 31))
        end = _STORE_HEADER.size + length
        payload = change(data[_STORE_HEADER.size : end], self._chance)[:4096]
        return _STORE_HEADER.pack(*head, len(payload)) + payload + data[end:]
