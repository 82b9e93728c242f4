"""Take Debian's kernel out of its wrapping.

A vmlinuz unpacks itself on real hardware. Xen and xl unpack it in their own code, and each takes seconds for that on an
emulated processor. The ELF file inside boots just as well.
"""

from __future__ import annotations

import lzma
import struct
import zlib

__all__ = ["unwrapped"]

# Linux's Documentation/x86/boot.rst: offsets in the setup header.
_SETUP_SECTORS = 0x1F1
_PAYLOAD = 0x248

_XZ = b"\xfd7zXZ"
_GZIP = b"\x1f\x8b"
_ELF = b"\x7fELF"


def unwrapped(image: bytes) -> bytes:
    """Take the ELF file out of a bzImage. An image that is packed in another way is given back as it is."""
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    # The boot sector comes on top of the number of sectors. Nought means four, in very old kernels.
    begin = ((image[_SETUP_SECTORS] or 4) + 1) * 512 + offset
    packed = image[begin : begin + length]
    unpacked = b""
    if packed.startswith(_XZ):
        unpacked = lzma.LZMADecompressor().decompress(packed)
    elif packed.startswith(_GZIP):
        unpacked = zlib.decompressobj(31).decompress(packed)
    return unpacked if unpacked.startswith(_ELF) else image
