"""Define the numbers and structs that cross the kernel boundary, one module per device file. No behaviour is here.

    ioc       make an ioctl number as Linux does
    layout    describe a kernel struct: a named tuple that knows its C layout
    gntalloc  /dev/xen/gntalloc: allocate pages and grant them
    gntdev    /dev/xen/gntdev: map what a peer granted
    evtchn    /dev/xen/evtchn: event channels
    privcmd   /dev/xen/privcmd: the two hypercalls that channel libraries make
    grants    the grant table itself: entries, status codes, reserved domids

The tests compare all of it with the C headers of the kernel, where there is a compiler.
"""

from __future__ import annotations

from gntalloc.abi import evtchn, gntalloc, gntdev, grants, ioc, layout, privcmd

__all__ = ["evtchn", "gntalloc", "gntdev", "grants", "ioc", "layout", "privcmd"]
