"""A program's memory as a driver sees it, strict: everything that was not put there is a hole."""

from __future__ import annotations

import errno

from gntalloc.errors import DeviceError

__all__ = ["FakeMemory"]

__tracebackhide__ = True  # for pytest: what is raised here is about the caller's program


class FakeMemory:
    """A `Caller`: stretches of memory with holes between them, and a fault on demand.

    Like the kernel's copies, a write that meets a hole has written what lies before it; a read gives all or nothing.

    Args:
        fail_at: which copy, the first being 1, is answered with EFAULT whatever it asks for.
        process: whose memory it is.
    """

    def __init__(self, *, fail_at: int | None = None, process: int = 0, by_offset: bool = False) -> None:
        self.process = process
        self.by_offset = by_offset
        self.fail_at = fail_at
        self.copies: list[tuple[str, int, int]] = []  # "read" or "write", address, size
        self._stretches: dict[int, tuple[bytearray, bool]] = {}

    def put(self, address: int, data: bytes, *, writable: bool = True) -> bytearray:
        """Have `data` at `address` from now on. The bytearray returned shows what is written there later."""
        memory = bytearray(data)
        self._stretches[address] = memory, writable
        return memory

    def read(self, address: int, size: int) -> bytes:
        """copy_from_user."""
        self._count("read", address, size)
        found = bytearray()
        while len(found) < size:
            memory, start, _ = self._find(address + len(found))
            found += memory[start : start + size - len(found)]
        return bytes(found)

    def write(self, address: int, data: bytes) -> None:
        """copy_to_user."""
        self._count("write", address, len(data))
        written = 0
        while written < len(data):
            memory, start, writable = self._find(address + written)
            if not writable:
                raise DeviceError(errno.EFAULT, f"the memory at {address + written:#x} is read-only")
            size = min(len(data) - written, len(memory) - start)
            memory[start : start + size] = data[written : written + size]
            written += size

    def _count(self, kind: str, address: int, size: int) -> None:
        self.copies.append((kind, address, size))
        if len(self.copies) == self.fail_at:
            raise DeviceError(errno.EFAULT, f"copy {self.fail_at}, a {kind} of {size} bytes, was told to fail")

    def _find(self, address: int) -> tuple[bytearray, int, bool]:
        for first, (memory, writable) in self._stretches.items():
            if first <= address < first + len(memory):
                return memory, address - first, writable
        raise DeviceError(errno.EFAULT, f"there is no memory at {address:#x}")
