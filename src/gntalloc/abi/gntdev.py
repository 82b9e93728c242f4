"""Define /dev/xen/gntdev: map pages that a peer granted, copy from and to them, and turn them into a dma-buf.

Source: the kernel's UAPI header xen/gntdev.h; the GNTCOPY flags are Xen's, from its public grant_table.h.
SET_UNMAP_NOTIFY has the same number and layout as gntalloc's: only the file it is sent to tells them apart.
"""

from __future__ import annotations

import sys
from array import array
from struct import Struct
from typing import NamedTuple, Self

from gntalloc.abi.gntalloc import UNMAP_NOTIFY_CLEAR_BYTE, UNMAP_NOTIFY_SEND_EVENT
from gntalloc.abi.ioc import NONE, ioc
from gntalloc.abi.layout import KernelStruct

__all__ = [
    "CONSTANTS",
    "COPY_DEST_GREF",
    "COPY_SOURCE_GREF",
    "DEVICE",
    "DMABUF_EXP_FROM_REFS",
    "DMABUF_EXP_WAIT_RELEASED",
    "DMABUF_IMP_RELEASE",
    "DMABUF_IMP_TO_REFS",
    "DMA_FLAG_COHERENT",
    "DMA_FLAG_WC",
    "GET_OFFSET_FOR_VADDR",
    "GRANT_COPY",
    "IOCTLS",
    "MAP_GRANT_REF",
    "SET_MAX_GRANTS",
    "SET_UNMAP_NOTIFY",
    "STRUCTS",
    "UNMAP_GRANT_REF",
    "UNMAP_NOTIFY_CLEAR_BYTE",
    "UNMAP_NOTIFY_SEND_EVENT",
    "DmabufExpFromRefs",
    "DmabufExpWaitReleased",
    "DmabufImpRelease",
    "DmabufImpToRefs",
    "ForeignPage",
    "GetOffsetForVaddr",
    "GrantCopy",
    "GrantCopySegment",
    "GrantRef",
    "MapGrantRef",
    "SetMaxGrants",
    "UnmapGrantRef",
    "UnmapNotify",
    "grant_refs",
]

DEVICE = "gntdev"
"""The name of its file in /dev/xen."""

COPY_SOURCE_GREF = 1
"""GRANT_COPY segment flag: the source is a granted page, not an address. Xen: GNTCOPY_source_gref."""

COPY_DEST_GREF = 2
"""GRANT_COPY segment flag: the destination is a granted page. Xen: GNTCOPY_dest_gref."""

DMA_FLAG_WC = 1
"""DMABUF_EXP_FROM_REFS flag: write-combining memory."""

DMA_FLAG_COHERENT = 2
"""DMABUF_EXP_FROM_REFS flag: DMA-coherent memory. Not together with WC."""


class GrantRef(KernelStruct, NamedTuple("GrantRef", [("domid", int), ("ref", int)])):
    """Name one granted page: the domain that granted it, and the reference."""

    __slots__ = ()
    C_NAME = "ioctl_gntdev_grant_ref"
    LAYOUT = Struct("=II")
    SIZE = 8
    FIELDS = (("domid", 0, 4), ("ref", 4, 4))


def grant_refs(granter: int, refs: bytes) -> bytes:
    """Make the GrantRefs of pages of one domain. `refs` are their references, each u32."""
    count = len(refs) // 4
    if count == 1:
        return granter.to_bytes(4, sys.byteorder) + refs
    named = array("I", bytes(8 * count))
    named[0::2] = array("I", [granter]) * count
    named[1::2] = array("I", refs)
    return named.tobytes()


class MapGrantRef(KernelStruct, NamedTuple("MapGrantRef", [("count", int), ("index", int)])):
    """Reserve `count` pages for the GrantRefs from REFS_OFFSET on. Answered: `index`, where to mmap them."""

    __slots__ = ()
    C_NAME = "ioctl_gntdev_map_grant_ref"
    LAYOUT = Struct("=I4xQ")
    REFS_OFFSET = 16  # where the GrantRefs begin, `count` of them
    SIZE = 24
    FIELDS = (("count", 0, 4), ("pad", 4, 4), ("index", 8, 8), ("refs", 16, 8))


class UnmapGrantRef(KernelStruct, NamedTuple("UnmapGrantRef", [("index", int), ("count", int)])):
    """Give up what MAP_GRANT_REF reserved: the same `index`, the same `count`."""

    __slots__ = ()
    C_NAME = "ioctl_gntdev_unmap_grant_ref"
    LAYOUT = Struct("=QI4x")
    SIZE = 16
    FIELDS = (("index", 0, 8), ("count", 8, 4), ("pad", 12, 4))


class GetOffsetForVaddr(
    KernelStruct, NamedTuple("GetOffsetForVaddr", [("vaddr", int), ("offset", int), ("count", int)])
):
    """Ask which mapping is at `vaddr`. The driver answers with its `offset` (index) and its `count` of pages."""

    __slots__ = ()
    C_NAME = "ioctl_gntdev_get_offset_for_vaddr"
    LAYOUT = Struct("=QQI4x")
    SIZE = 24
    FIELDS = (("vaddr", 0, 8), ("offset", 8, 8), ("count", 16, 4), ("pad", 20, 4))


class SetMaxGrants(KernelStruct, NamedTuple("SetMaxGrants", [("count", int)])):
    """Set an old limit per file. Today's kernels answer ENOTTY."""

    __slots__ = ()
    C_NAME = "ioctl_gntdev_set_max_grants"
    LAYOUT = Struct("=I")
    SIZE = 4
    FIELDS = (("count", 0, 4),)


class UnmapNotify(
    KernelStruct, NamedTuple("UnmapNotify", [("index", int), ("action", int), ("event_channel_port", int)])
):
    """Set what is done when a mapping goes: `index` names the byte, `action` the deeds. Zero forgets them."""

    __slots__ = ()
    C_NAME = "ioctl_gntdev_unmap_notify"
    LAYOUT = Struct("=QII")
    SIZE = 16
    FIELDS = (("index", 0, 8), ("action", 8, 4), ("event_channel_port", 12, 4))


class ForeignPage(KernelStruct, NamedTuple("ForeignPage", [("ref", int), ("offset", int), ("domid", int)])):
    """Name a place in a granted page: the other reading of a copy segment's `source` and `dest`."""

    __slots__ = ()
    LAYOUT = Struct("=IHH")
    SIZE = 8

    @classmethod
    def from_word(cls, word: int) -> Self:
        """Read the eight bytes of a `source` or `dest` as a granted page."""
        return cls.unpack_from(_WORD.pack(word))

    def to_word(self) -> int:
        """Make the eight bytes to put into a `source` or `dest`."""
        word: int = _WORD.unpack(self.pack())[0]
        return word


_WORD = Struct("=Q")


class GrantCopySegment(
    KernelStruct,
    NamedTuple("GrantCopySegment", [("source", int), ("dest", int), ("len", int), ("flags", int), ("status", int)]),
):
    """Copy `len` bytes within one granted page. The driver writes `status`, a GNTST code.

    `source` and `dest` are local addresses, or ForeignPage words where `flags` says so.
    """

    __slots__ = ()
    C_NAME = "gntdev_grant_copy_segment"
    LAYOUT = Struct("=QQHHh2x")
    STATUS_OFFSET = 20  # the only field that the driver writes, an i16
    SIZE = 24
    FIELDS = (
        ("source", 0, 8),
        ("source.virt", 0, 8),
        ("source.foreign.ref", 0, 4),
        ("source.foreign.offset", 4, 2),
        ("source.foreign.domid", 6, 2),
        ("dest", 8, 8),
        ("dest.virt", 8, 8),
        ("dest.foreign.ref", 8, 4),
        ("dest.foreign.offset", 12, 2),
        ("dest.foreign.domid", 14, 2),
        ("len", 16, 2),
        ("flags", 18, 2),
        ("status", 20, 2),
    )


class GrantCopy(KernelStruct, NamedTuple("GrantCopy", [("count", int), ("segments", int)])):
    """Carry out `count` GrantCopySegments, which lie in the program's memory at the address `segments`."""

    __slots__ = ()
    C_NAME = "ioctl_gntdev_grant_copy"
    LAYOUT = Struct("=I4xQ")
    SIZE = 16
    FIELDS = (("count", 0, 4), ("segments", 8, 8))


class DmabufExpFromRefs(
    KernelStruct,
    NamedTuple("DmabufExpFromRefs", [("flags", int), ("count", int), ("fd", int), ("domid", int)]),
):
    """Make a dma-buf, answered in `fd`, of `count` pages of `domid`: u32 references from REFS_OFFSET on."""

    __slots__ = ()
    C_NAME = "ioctl_gntdev_dmabuf_exp_from_refs"
    LAYOUT = Struct("=IIII")
    REFS_OFFSET = 16
    SIZE = 20
    FIELDS = (("flags", 0, 4), ("count", 4, 4), ("fd", 8, 4), ("domid", 12, 4), ("refs", 16, 4))


class DmabufExpWaitReleased(KernelStruct, NamedTuple("DmabufExpWaitReleased", [("fd", int), ("wait_to_ms", int)])):
    """Wait, at most `wait_to_ms` milliseconds, until nobody uses an exported dma-buf any more."""

    __slots__ = ()
    C_NAME = "ioctl_gntdev_dmabuf_exp_wait_released"
    LAYOUT = Struct("=II")
    SIZE = 8
    FIELDS = (("fd", 0, 4), ("wait_to_ms", 4, 4))


class DmabufImpToRefs(
    KernelStruct,
    NamedTuple("DmabufImpToRefs", [("fd", int), ("count", int), ("domid", int), ("reserved", int)]),
):
    """Grant the `count` pages of a dma-buf to `domid`; the references are answered from REFS_OFFSET on."""

    __slots__ = ()
    C_NAME = "ioctl_gntdev_dmabuf_imp_to_refs"
    LAYOUT = Struct("=IIII")
    REFS_OFFSET = 16
    SIZE = 20
    FIELDS = (("fd", 0, 4), ("count", 4, 4), ("domid", 8, 4), ("reserved", 12, 4), ("refs", 16, 4))


class DmabufImpRelease(KernelStruct, NamedTuple("DmabufImpRelease", [("fd", int), ("reserved", int)])):
    """Take back the grants of an imported dma-buf."""

    __slots__ = ()
    C_NAME = "ioctl_gntdev_dmabuf_imp_release"
    LAYOUT = Struct("=II")
    SIZE = 8
    FIELDS = (("fd", 0, 4), ("reserved", 4, 4))


MAP_GRANT_REF = ioc(NONE, "G", 0, MapGrantRef.SIZE)
UNMAP_GRANT_REF = ioc(NONE, "G", 1, UnmapGrantRef.SIZE)
GET_OFFSET_FOR_VADDR = ioc(NONE, "G", 2, GetOffsetForVaddr.SIZE)
SET_MAX_GRANTS = ioc(NONE, "G", 3, SetMaxGrants.SIZE)
SET_UNMAP_NOTIFY = ioc(NONE, "G", 7, UnmapNotify.SIZE)
GRANT_COPY = ioc(NONE, "G", 8, GrantCopy.SIZE)
DMABUF_EXP_FROM_REFS = ioc(NONE, "G", 9, DmabufExpFromRefs.SIZE)
DMABUF_EXP_WAIT_RELEASED = ioc(NONE, "G", 10, DmabufExpWaitReleased.SIZE)
DMABUF_IMP_TO_REFS = ioc(NONE, "G", 11, DmabufImpToRefs.SIZE)
DMABUF_IMP_RELEASE = ioc(NONE, "G", 12, DmabufImpRelease.SIZE)

IOCTLS = {
    MAP_GRANT_REF: "IOCTL_GNTDEV_MAP_GRANT_REF",
    UNMAP_GRANT_REF: "IOCTL_GNTDEV_UNMAP_GRANT_REF",
    GET_OFFSET_FOR_VADDR: "IOCTL_GNTDEV_GET_OFFSET_FOR_VADDR",
    SET_MAX_GRANTS: "IOCTL_GNTDEV_SET_MAX_GRANTS",
    SET_UNMAP_NOTIFY: "IOCTL_GNTDEV_SET_UNMAP_NOTIFY",
    GRANT_COPY: "IOCTL_GNTDEV_GRANT_COPY",
    DMABUF_EXP_FROM_REFS: "IOCTL_GNTDEV_DMABUF_EXP_FROM_REFS",
    DMABUF_EXP_WAIT_RELEASED: "IOCTL_GNTDEV_DMABUF_EXP_WAIT_RELEASED",
    DMABUF_IMP_TO_REFS: "IOCTL_GNTDEV_DMABUF_IMP_TO_REFS",
    DMABUF_IMP_RELEASE: "IOCTL_GNTDEV_DMABUF_IMP_RELEASE",
}
"""Request number -> the kernel's name for it, for messages to people."""

CONSTANTS = {
    "UNMAP_NOTIFY_CLEAR_BYTE": UNMAP_NOTIFY_CLEAR_BYTE,
    "UNMAP_NOTIFY_SEND_EVENT": UNMAP_NOTIFY_SEND_EVENT,
    "GNTDEV_DMA_FLAG_WC": DMA_FLAG_WC,
    "GNTDEV_DMA_FLAG_COHERENT": DMA_FLAG_COHERENT,
}
"""The kernel's name -> value."""

STRUCTS = (
    GrantRef,
    MapGrantRef,
    UnmapGrantRef,
    GetOffsetForVaddr,
    SetMaxGrants,
    UnmapNotify,
    GrantCopySegment,
    GrantCopy,
    DmabufExpFromRefs,
    DmabufExpWaitReleased,
    DmabufImpToRefs,
    DmabufImpRelease,
)
