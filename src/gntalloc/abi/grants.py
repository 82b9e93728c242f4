"""Define the grant table: its entries, their number, and the hypervisor's answers.

Source: Xen's public headers grant_table.h (entries, GNTST codes) and xen.h (reserved domids), and Xen's
default of 64 table frames. A program sees none of this directly: the two device drivers do.
"""

from __future__ import annotations

__all__ = [
    "ACCEPT_TRANSFER",
    "BAD_DOMAIN",
    "BAD_GNTREF",
    "BAD_PAGE",
    "DOMID_FIRST_RESERVED",
    "DOMID_INVALID",
    "DOMID_SELF",
    "EAGAIN",
    "GENERAL_ERROR",
    "INVALID",
    "MAX_FRAMES",
    "NO_SPACE",
    "OKAY",
    "PAGE_SIZE",
    "PERMISSION_DENIED",
    "PERMIT_ACCESS",
    "PERMIT_READONLY",
    "READING",
    "RESERVED_REFS",
    "STATUS_NAMES",
    "SUB_PAGE",
    "TRANSITIVE",
    "TYPE_MASK",
    "V1_ENTRIES_PER_FRAME",
    "V1_ENTRY_SIZE",
    "V2_ENTRIES_PER_FRAME",
    "V2_ENTRY_SIZE",
    "WRITING",
]

PAGE_SIZE = 4096
"""Bytes of a granted page: Xen's page, whatever the guest's own page size is."""

# Domain numbers. Everything from 0x7FF0 on has a special meaning or none.
DOMID_FIRST_RESERVED = 0x7FF0
DOMID_SELF = 0x7FF0
DOMID_INVALID = 0x7FF4

# The table.
RESERVED_REFS = 8
"""References 0 to 7 belong to the tool stack (0: the console, 1: xenstore) and are never given out."""

V1_ENTRY_SIZE = 8
V1_ENTRIES_PER_FRAME = PAGE_SIZE // V1_ENTRY_SIZE
V2_ENTRY_SIZE = 16
V2_ENTRIES_PER_FRAME = PAGE_SIZE // V2_ENTRY_SIZE

MAX_FRAMES = 64
"""Frames a table may grow to unless the tool stack says otherwise: 32768 references in version 1."""

# The flags of an entry: two bits of type, then what goes with the type.
TYPE_MASK = 3
INVALID = 0
PERMIT_ACCESS = 1
ACCEPT_TRANSFER = 2
TRANSITIVE = 3

PERMIT_READONLY = 1 << 2
READING = 1 << 3
"""Set by the hypervisor while a domain maps the page; in version 2 it is in the status array instead."""
WRITING = 1 << 4
"""Set by the hypervisor while a domain maps the page for writing."""
SUB_PAGE = 1 << 8

# The answers of a grant-table operation.
OKAY = 0
GENERAL_ERROR = -1
BAD_DOMAIN = -2
BAD_GNTREF = -3
BAD_PAGE = -9
PERMISSION_DENIED = -8
EAGAIN = -12
NO_SPACE = -13

STATUS_NAMES = {
    0: "GNTST_okay",
    -1: "GNTST_general_error",
    -2: "GNTST_bad_domain",
    -3: "GNTST_bad_gntref",
    -4: "GNTST_bad_handle",
    -5: "GNTST_bad_virt_addr",
    -6: "GNTST_bad_dev_addr",
    -7: "GNTST_no_device_space",
    -8: "GNTST_permission_denied",
    -9: "GNTST_bad_page",
    -10: "GNTST_bad_copy_arg",
    -11: "GNTST_address_too_big",
    -12: "GNTST_eagain",
    -13: "GNTST_no_space",
}
"""Status code -> Xen's name for it."""
