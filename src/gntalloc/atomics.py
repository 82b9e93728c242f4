"""Give Python the memory orders that rings in shared pages need.

A processor may let a load overtake a store before it. Two steps need a *fence* in between that forbids it: an end
publishes an index and then looks whether the peer wants to be told; an end says that it wants to be told and then looks
at the index. An end that clears the peer's bit, in a byte that the peer also writes, must do it in one step.

Setting a bit needs no atomic. An end sets bits only in the byte whose bits the other end clears: it knows what it
wants, and writes the whole byte. Only the clearing needs one.

    libatomic       any processor. fetch_and clears; a fence is a call
    x86-64 without  the bit stays. Until the peer takes it back it is told once too often: an event more, none less

On x86-64 stores are seen in their order, and so are loads. Every locked instruction is a full fence, and releasing a
lock is such an instruction. So a fence costs next to nothing there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from functools import cache
from typing import Any

from gntalloc.errors import DeviceError

__all__ = ["Atomics", "atomics", "find", "plain"]

_SEQ_CST = 5
_ORDERED = frozenset({"x86_64", "amd64"})  # processors where only a load overtakes a store


class Atomics:
    """Offer the atomic operations that this processor and this libatomic allow.

    Attributes:
        ordered: stores are seen in their order, loads too, and releasing a lock is a fence.
        clears: `take` leaves the bit cleared.
    """

    def __init__(self, *, ordered: bool, library: Any) -> None:
        self.ordered = ordered
        self.clears = library is not None
        if library is not None:
            self._fetch_and = library["__atomic_fetch_and_1"]  # as an attribute its name would be mangled
            self._fetch_and.argtypes = ctypes.c_void_p, ctypes.c_uint8, ctypes.c_int
            self._fetch_and.restype = ctypes.c_uint8
            self._thread_fence = library["atomic_thread_fence"]
            self._thread_fence.argtypes = (ctypes.c_int,)
            self._thread_fence.restype = None
        self._lock = threading.Lock()

    def fence(self) -> None:
        """Keep later loads and stores from overtaking earlier ones."""
        if self.ordered:
            with self._lock:
                pass
        else:
            self._thread_fence(_SEQ_CST)

    def take(self, memory: memoryview, offset: int, address: int, bit: int) -> bool:
        """Clear a bit of a byte, if that can be done in one step, and return whether it was set.

        Args:
            memory: where the byte is, at `offset`.
            offset: see `memory`.
            address: where `memory` begins in this process.
            bit: the value of the bit.
        """
        if self.clears:
            return bool(self._fetch_and(address + offset, ~bit & 0xFF, _SEQ_CST) & bit)
        return bool(memory[offset] & bit)


def find(machine: str, library: Any) -> Atomics:
    """Choose the way for a processor and the libatomic that was found, or None.

    Raises:
        DeviceError: ENOSYS: no way is safe.
    """
    ordered = machine.lower() in _ORDERED
    if library is None and not ordered:
        raise DeviceError(
            errno.ENOSYS,
            f"shared rings on {machine} need libatomic, which is not here; install it (Debian: apt install libatomic1)",
        )
    return Atomics(ordered=ordered, library=library)


@cache
def atomics() -> Atomics:
    """Return the way that is used here. See `find`."""
    return find(os.uname().machine, _library())


@cache
def plain() -> Atomics:
    """Return the way without libatomic, where it is safe."""
    return find(os.uname().machine, None)


def _library() -> Any:
    library = _load("libatomic.so.1")
    if library is None:
        from ctypes.util import find_library  # it starts programs to find out

        name = find_library("atomic")
        library = _load(name) if name else None
    return library


def _load(name: str) -> Any:
    try:
        library = ctypes.CDLL(name)
        library["__atomic_fetch_and_1"], library["atomic_thread_fence"]
    except (OSError, AttributeError):
        return None
    return library
