"""Define /dev/xen/privcmd: hypercalls made by a program. Only the two that channel libraries make are here.

Sources: the public headers xen/sys/privcmd.h, xen/domctl.h (getdomaininfo), xen/event_channel.h (status).
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from gntalloc.abi.ioc import NONE, ioc
from gntalloc.abi.layout import KernelStruct

__all__ = [
    "DEVICE",
    "DOMCTL",
    "DOMCTL_GETDOMAININFO",
    "DOMCTL_SIZE",
    "DOMINF_RUNNING",
    "EVENT_CHANNEL_OP",
    "EVTCHNOP_STATUS",
    "HYPERCALL",
    "DomctlHead",
    "EvtchnStatus",
    "Hypercall",
]

DEVICE = "privcmd"
"""The name of its file in /dev/xen."""

EVENT_CHANNEL_OP = 32
"""Hypercall: a sub-operation, and the address of its struct."""

EVTCHNOP_STATUS = 5
"""Sub-operation: an EvtchnStatus."""

DOMCTL = 36
"""Hypercall: the address of a struct xen_domctl."""

DOMCTL_GETDOMAININFO = 5
"""Command of a struct xen_domctl: find the first domain of this number or above."""

DOMCTL_SIZE = 144
"""Bytes of a struct xen_domctl. The answer begins at DomctlHead.SIZE."""

DOMINF_RUNNING = 1 << 5
"""Flag of a domain's information."""


class Hypercall(
    KernelStruct,
    NamedTuple("Hypercall", [("op", int), ("arg0", int), ("arg1", int), ("arg2", int), ("arg3", int), ("arg4", int)]),
):
    """Make one hypercall: its number and five words."""

    __slots__ = ()
    C_NAME = "privcmd_hypercall"
    LAYOUT = Struct("=6Q")
    SIZE = 48
    FIELDS = (("op", 0, 8), ("arg", 8, 40))


class DomctlHead(KernelStruct, NamedTuple("DomctlHead", [("cmd", int), ("interface_version", int), ("domain", int)])):
    """Begin a struct xen_domctl."""

    __slots__ = ()
    C_NAME = "xen_domctl"
    LAYOUT = Struct("=IIH6x")
    SIZE = 16
    FIELDS = (("cmd", 0, 4), ("interface_version", 4, 4), ("domain", 8, 2))


class EvtchnStatus(
    KernelStruct,
    NamedTuple(
        "EvtchnStatus",
        [("dom", int), ("port", int), ("status", int), ("vcpu", int), ("peer", int), ("peer_port", int)],
    ),
):
    """Ask for the `status` and the other end of port `port` of domain `dom`.

    Of a virtual interrupt, `peer` is the number.
    """

    __slots__ = ()
    C_NAME = "evtchn_status"
    LAYOUT = Struct("=H2xIIIH2xI")
    SIZE = 24
    FIELDS = (("dom", 0, 2), ("port", 4, 4), ("status", 8, 4), ("vcpu", 12, 4), ("u", 16, 8))


HYPERCALL = ioc(NONE, "P", 0, Hypercall.SIZE)
