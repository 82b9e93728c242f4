"""Hold the link of an agent: to the host through a virtio port, or to dom0 through the console."""

from __future__ import annotations

import os
import threading
import tty

from .messages import LineDecoder, Message, StreamDecoder, to_line, to_stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Link", "console", "port"]

_READ = 64 * 1024


class Link:
    """Hold one end of a link. Any thread may send; one thread receives."""

    def __init__(
        self,
        descriptor: int,
        encode: Callable[[Message], bytes],
        decode: Callable[[bytes], Iterator[Message | bytes]],
    ) -> None:
        self._descriptor = descriptor
        self._encode = encode
        self._decode = decode
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Send all of a message, and wait as long as the other side takes."""
        left = memoryview(self._encode(message))
        with self._lock:
            while left:
                left = left[os.write(self._descriptor, left) :]

    def receive(self) -> Iterator[Message | bytes]:
        """Yield messages and (on a console) other lines as they come, until the other side is gone."""
        while True:
            try:
                data = os.read(self._descriptor, _READ)
            except OSError:  # EIO: a console whose domain has ended
                return
            if not data:
                return
            yield from self._decode(data)


def port(path: str) -> Link:
    """Open a virtio port: a clean stream of bytes."""
    return Link(os.open(path, os.O_RDWR | os.O_CLOEXEC), to_stream, StreamDecoder().feed)


def console(path: str) -> Link:
    """Open a console, or in dom0 the terminal that stands for a guest's console."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    tty.setraw(descriptor)
    return Link(descriptor, to_line, LineDecoder().feed)
