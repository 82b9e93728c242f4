"""Define /dev/xen/gntalloc: allocate pages, grant them to one domain, take them back.

Source: the kernel's UAPI header xen/gntalloc.h. The trailing `gref_ids[1]` makes ALLOC_GREF's struct 24 bytes
long on 64-bit machines, and the driver copies all 24 even if no reference follows.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from gntalloc.abi.ioc import NONE, ioc
from gntalloc.abi.layout import KernelStruct

__all__ = [
    "ALLOC_GREF",
    "CONSTANTS",
    "DEALLOC_GREF",
    "DEVICE",
    "FLAG_WRITABLE",
    "IOCTLS",
    "SET_UNMAP_NOTIFY",
    "STRUCTS",
    "UNMAP_NOTIFY_CLEAR_BYTE",
    "UNMAP_NOTIFY_SEND_EVENT",
    "AllocGref",
    "DeallocGref",
    "UnmapNotify",
]

DEVICE = "gntalloc"
"""The name of its file in /dev/xen."""

FLAG_WRITABLE = 1
"""ALLOC_GREF flag: the peer may write. The granter always may."""

UNMAP_NOTIFY_CLEAR_BYTE = 1
"""SET_UNMAP_NOTIFY action: set the byte at the index to zero."""

UNMAP_NOTIFY_SEND_EVENT = 2
"""SET_UNMAP_NOTIFY action: send an event on the port."""


class AllocGref(
    KernelStruct, NamedTuple("AllocGref", [("domid", int), ("flags", int), ("count", int), ("index", int)])
):
    """Allocate `count` pages for `domid`. Answered: `index`, and the references from REFS_OFFSET on."""

    __slots__ = ()
    C_NAME = "ioctl_gntalloc_alloc_gref"
    LAYOUT = Struct("=HHIQ")
    REFS_OFFSET = 16  # where the u32 references begin, `count` of them
    SIZE = 24
    FIELDS = (("domid", 0, 2), ("flags", 2, 2), ("count", 4, 4), ("index", 8, 8), ("gref_ids", 16, 4))


class DeallocGref(KernelStruct, NamedTuple("DeallocGref", [("index", int), ("count", int)])):
    """Take `count` pages back, from `index` on. A page that is still mapped lives until its last unmap."""

    __slots__ = ()
    C_NAME = "ioctl_gntalloc_dealloc_gref"
    LAYOUT = Struct("=QI4x")
    SIZE = 16
    FIELDS = (("index", 0, 8), ("count", 8, 4))


class UnmapNotify(
    KernelStruct, NamedTuple("UnmapNotify", [("index", int), ("action", int), ("event_channel_port", int)])
):
    """Set what is done when a page goes: `index` names the byte, `action` the deeds. Zero forgets them."""

    __slots__ = ()
    C_NAME = "ioctl_gntalloc_unmap_notify"
    LAYOUT = Struct("=QII")
    SIZE = 16
    FIELDS = (("index", 0, 8), ("action", 8, 4), ("event_channel_port", 12, 4))


ALLOC_GREF = ioc(NONE, "G", 5, AllocGref.SIZE)
DEALLOC_GREF = ioc(NONE, "G", 6, DeallocGref.SIZE)
SET_UNMAP_NOTIFY = ioc(NONE, "G", 7, UnmapNotify.SIZE)

IOCTLS = {
    ALLOC_GREF: "IOCTL_GNTALLOC_ALLOC_GREF",
    DEALLOC_GREF: "IOCTL_GNTALLOC_DEALLOC_GREF",
    SET_UNMAP_NOTIFY: "IOCTL_GNTALLOC_SET_UNMAP_NOTIFY",
}
"""Request number -> the kernel's name for it, for messages to people."""

CONSTANTS = {
    "GNTALLOC_FLAG_WRITABLE": FLAG_WRITABLE,
    "UNMAP_NOTIFY_CLEAR_BYTE": UNMAP_NOTIFY_CLEAR_BYTE,
    "UNMAP_NOTIFY_SEND_EVENT": UNMAP_NOTIFY_SEND_EVENT,
}
"""The kernel's name -> value."""

STRUCTS = (AllocGref, DeallocGref, UnmapNotify)
