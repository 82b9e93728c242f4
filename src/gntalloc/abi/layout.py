"""Describe a kernel struct: a named tuple that knows how C lays it out.

    class DeallocGref(KernelStruct, NamedTuple("DeallocGref", [("index", int), ("count", int)])):
        LAYOUT = Struct("=QI4x")

    request = DeallocGref(index=0, count=1).pack()     # 16 bytes
    DeallocGref.unpack_from(request).count             # 1

Not ctypes: packing with `struct` is twice as fast, checks ranges, and works on any buffer without an address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    from struct import Struct

    from typing_extensions import Buffer  # known to every type checker, installed or not

__all__ = ["Field", "KernelStruct"]

Field = tuple[str, int, int]
"""Name of a field in C, its offset and its size in bytes."""


class KernelStruct(tuple[int, ...]):
    """Give a named tuple the layout of a kernel struct, without its trailing array. Each field is one integer."""

    __slots__ = ()

    C_NAME: ClassVar[str]
    """The struct's name in the kernel's header, without the word `struct`."""

    LAYOUT: ClassVar[Struct]
    """Everything before a trailing array, in the machine's byte order and with the padding spelled out."""

    SIZE: ClassVar[int]
    """What C's sizeof says. Larger than LAYOUT.size where C declares a trailing array of one element."""

    FIELDS: ClassVar[tuple[Field, ...]]
    """Every field C has, named padding and the trailing array included."""

    def pack(self) -> bytes:
        """Make the LAYOUT.size bytes of this struct. A value out of its field's range is a struct.error."""
        return self.LAYOUT.pack(*self)

    @classmethod
    def unpack_from(cls, buffer: Buffer, offset: int = 0) -> Self:
        """Read one struct out of a buffer that holds at least LAYOUT.size bytes after `offset`."""
        return cls(*cls.LAYOUT.unpack_from(buffer, offset))
