"""Take Debian's kernel and hypervisor out of their wrapping.

A vmlinuz unpacks itself on real hardware. Xen and xl unpack it in their own code, and each takes seconds for that on an
emulated processor. The ELF file inside boots just as well.
"""

from __future__ import annotations

import lzma
import struct
import zlib

from gntalloc.lab.errors import BuildFailed, explain

__all__ = ["gunzipped", "unwrapped"]

# Linux's Documentation/x86/boot.rst: offsets in the setup header.
_SETUP_SECTORS = 0x1F1
_PAYLOAD = 0x248
_HEADER_ENDS = 0x250

_XZ = b"\xfd7zXZ"
_GZIP = b"\x1f\x8b"
_ELF = b"\x7fELF"

# Bytes of a kernel or a hypervisor, unpacked. Debian's have a tenth of that.
_LARGEST = 512 << 20
_WITH_HEADER = 31  # zlib's word for gzip's format


def unwrapped(image: bytes) -> bytes:
    """Take the ELF file out of a bzImage. An image that is packed in another way is given back as it is.

    Raises:
        BuildFailed: it is no bzImage, or what is in it cannot be unpacked.
    """
    if len(image) < _HEADER_ENDS:
        raise _broken("kernel", f"it has {len(image)} bytes")
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    # The boot sector comes on top of the number of sectors. Nought means four, in very old kernels.
    begin = ((image[_SETUP_SECTORS] or 4) + 1) * 512 + offset
    packed = image[begin : begin + length]
    unpacked = b""
    if packed.startswith(_XZ):
        unpacked = _inflated(lzma.LZMADecompressor(memlimit=_LARGEST), packed, "kernel")
    elif packed.startswith(_GZIP):
        unpacked = gunzipped(packed, "kernel")
    return unpacked if unpacked.startswith(_ELF) else image


def gunzipped(packed: bytes, what: str) -> bytes:
    """Unpack a gzip file.

    Args:
        packed: the file.
        what: it is, for the error.

    Raises:
        BuildFailed: it cannot be unpacked, or not in reasonable memory.
    """
    return _inflated(zlib.decompressobj(_WITH_HEADER), packed, what)


def _inflated(inflating: lzma.LZMADecompressor | zlib._Decompress, packed: bytes, what: str) -> bytes:
    try:
        unpacked = inflating.decompress(packed, _LARGEST)
    except (lzma.LZMAError, zlib.error) as error:
        raise _broken(what, str(error)) from None
    if not inflating.eof:
        raise _broken(what, "it is cut off" if len(unpacked) < _LARGEST else f"it has more than {_LARGEST} bytes")
    return unpacked


def _broken(what: str, why: str) -> BuildFailed:
    return BuildFailed(explain(f"unpack the {what}", why, "Remove the lab's folder of packages, and build again"))
