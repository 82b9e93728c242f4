"""What is tested here: a letterbox in one granted page. Its owner reads, another domain writes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import gntalloc

_LENGTH = struct.Struct("=I")
LONGEST = 4096 - _LENGTH.size


class Letterbox:
    """The owner's end. Tell the writer `grant`, and the number of `bell`."""

    def __init__(self, domain: gntalloc.Domain, writer: int) -> None:
        self.bell = domain.events.bind(writer)
        try:
            self._pages = domain.share(writer, writable=True)
        except BaseException:
            self.bell.close()  # half a letterbox is none
            raise
        self.grant = self._pages.grant

    def wait(self, timeout: float) -> bytes:
        """The next letter."""
        self.bell.wait(timeout=timeout)
        (length,) = _LENGTH.unpack_from(self._pages.memory)  # read once: the writer may change it meanwhile
        if length > LONGEST:
            raise ValueError(f"a letter of {length} bytes was announced; the page holds {LONGEST}")
        return bytes(self._pages.memory[_LENGTH.size : _LENGTH.size + length])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pages.close()
        self.bell.close()


def post(domain: gntalloc.Domain, grant: gntalloc.Grant, bell: int, letter: bytes) -> None:
    """The writer's end."""
    with domain.map(grant) as mapped, domain.events.connect(grant.granter, bell) as port:
        mapped.memory[_LENGTH.size : _LENGTH.size + len(letter)] = letter
        _LENGTH.pack_into(mapped.memory, 0, len(letter))
        port.notify()
