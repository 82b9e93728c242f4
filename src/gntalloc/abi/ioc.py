"""Make ioctl numbers as Linux does: 2 bits of direction, 14 of size, 8 of type, 8 of number.

Source: the kernel's UAPI asm-generic/ioctl.h, which x86, Arm and RISC-V use unchanged. (MIPS, PowerPC and
SPARC divide the bits otherwise; Linux runs on Xen on none of them.)

The numbers of the Xen devices have no direction although data goes both ways, and they still have the size of the
struct. So the devices do not know a number that was made with the usual direction bits.
"""

from __future__ import annotations

__all__ = ["NONE", "READ", "WRITE", "ioc", "size_of"]

NUMBER_BITS = 8
TYPE_BITS = 8
SIZE_BITS = 14

TYPE_SHIFT = NUMBER_BITS
SIZE_SHIFT = TYPE_SHIFT + TYPE_BITS
DIRECTION_SHIFT = SIZE_SHIFT + SIZE_BITS

NONE = 0
WRITE = 1
READ = 2


def ioc(direction: int, kind: str, number: int, size: int) -> int:
    """Make the request number of an ioctl, as C's `_IOC(direction, kind, number, size)` does.

    Args:
        direction: NONE, READ, WRITE or READ | WRITE, seen from the program.
        kind: the driver's letter, such as "G".
        number: which of the driver's ioctls, 0 to 255.
        size: bytes of the argument, below 16384.
    """
    return direction << DIRECTION_SHIFT | size << SIZE_SHIFT | ord(kind) << TYPE_SHIFT | number


def size_of(request: int) -> int:
    """Give the size of the argument that a request number names, in bytes."""
    return request >> SIZE_SHIFT & (1 << SIZE_BITS) - 1
