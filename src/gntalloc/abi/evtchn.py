"""Define /dev/xen/evtchn: bind event channels, notify their other end, take events and re-arm them.

Source: the kernel's UAPI header xen/evtchn.h. The bind calls answer with the local port as the result of the ioctl.
read() gives events and write() takes ports to re-arm. Both are port numbers, each a PORT.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from gntalloc.abi.ioc import NONE, ioc
from gntalloc.abi.layout import KernelStruct

__all__ = [
    "BIND_INTERDOMAIN",
    "BIND_STATIC",
    "BIND_UNBOUND_PORT",
    "BIND_VIRQ",
    "CONSTANTS",
    "DEVICE",
    "IOCTLS",
    "LEAST_RING",
    "NOTIFY",
    "PORT",
    "RESET",
    "RESTRICT_DOMID",
    "STRUCTS",
    "UNBIND",
    "BindInterdomain",
    "BindStatic",
    "BindUnboundPort",
    "BindVirq",
    "Notify",
    "RestrictDomid",
    "Unbind",
]

DEVICE = "evtchn"
"""The name of its file in /dev/xen."""

PORT = Struct("=I")
"""One port number, as read() and write() move them."""

LEAST_RING = 64
"""Events that a file keeps for its reader, from its first port on. With more than 64 ports it keeps more."""


class BindVirq(KernelStruct, NamedTuple("BindVirq", [("virq", int)])):
    """Bind a virtual interrupt of the hypervisor."""

    __slots__ = ()
    C_NAME = "ioctl_evtchn_bind_virq"
    LAYOUT = Struct("=I")
    SIZE = 4
    FIELDS = (("virq", 0, 4),)


class BindInterdomain(KernelStruct, NamedTuple("BindInterdomain", [("remote_domain", int), ("remote_port", int)])):
    """Connect to a port that a peer bound for this domain."""

    __slots__ = ()
    C_NAME = "ioctl_evtchn_bind_interdomain"
    LAYOUT = Struct("=II")
    SIZE = 8
    FIELDS = (("remote_domain", 0, 4), ("remote_port", 4, 4))


class BindUnboundPort(KernelStruct, NamedTuple("BindUnboundPort", [("remote_domain", int)])):
    """Make a port that one peer may connect to."""

    __slots__ = ()
    C_NAME = "ioctl_evtchn_bind_unbound_port"
    LAYOUT = Struct("=I")
    SIZE = 4
    FIELDS = (("remote_domain", 0, 4),)


class Unbind(KernelStruct, NamedTuple("Unbind", [("port", int)])):
    """Close a port that this file bound."""

    __slots__ = ()
    C_NAME = "ioctl_evtchn_unbind"
    LAYOUT = Struct("=I")
    SIZE = 4
    FIELDS = (("port", 0, 4),)


class Notify(KernelStruct, NamedTuple("Notify", [("port", int)])):
    """Send an event to the other end of a local port."""

    __slots__ = ()
    C_NAME = "ioctl_evtchn_notify"
    LAYOUT = Struct("=I")
    SIZE = 4
    FIELDS = (("port", 0, 4),)


class RestrictDomid(KernelStruct, NamedTuple("RestrictDomid", [("domid", int)])):
    """Let this file bind to one peer only, for good. The one domid here that is 16 bits wide."""

    __slots__ = ()
    C_NAME = "ioctl_evtchn_restrict_domid"
    LAYOUT = Struct("=H")
    SIZE = 2
    FIELDS = (("domid", 0, 2),)


class BindStatic(KernelStruct, NamedTuple("BindStatic", [("port", int)])):
    """Take over a port that existed before this guest started. Older headers lack it."""

    __slots__ = ()
    C_NAME = "ioctl_evtchn_bind"
    LAYOUT = Struct("=I")
    SIZE = 4
    FIELDS = (("port", 0, 4),)


BIND_VIRQ = ioc(NONE, "E", 0, BindVirq.SIZE)
BIND_INTERDOMAIN = ioc(NONE, "E", 1, BindInterdomain.SIZE)
BIND_UNBOUND_PORT = ioc(NONE, "E", 2, BindUnboundPort.SIZE)
UNBIND = ioc(NONE, "E", 3, Unbind.SIZE)
NOTIFY = ioc(NONE, "E", 4, Notify.SIZE)
RESET = ioc(NONE, "E", 5, 0)
RESTRICT_DOMID = ioc(NONE, "E", 6, RestrictDomid.SIZE)
BIND_STATIC = ioc(NONE, "E", 7, BindStatic.SIZE)

IOCTLS = {
    BIND_VIRQ: "IOCTL_EVTCHN_BIND_VIRQ",
    BIND_INTERDOMAIN: "IOCTL_EVTCHN_BIND_INTERDOMAIN",
    BIND_UNBOUND_PORT: "IOCTL_EVTCHN_BIND_UNBOUND_PORT",
    UNBIND: "IOCTL_EVTCHN_UNBIND",
    NOTIFY: "IOCTL_EVTCHN_NOTIFY",
    RESET: "IOCTL_EVTCHN_RESET",
    RESTRICT_DOMID: "IOCTL_EVTCHN_RESTRICT_DOMID",
    BIND_STATIC: "IOCTL_EVTCHN_BIND_STATIC",
}
"""Request number -> the kernel's name for it, for messages to people."""

CONSTANTS: dict[str, int] = {}
"""This header defines ioctls and nothing else."""

STRUCTS = (BindVirq, BindInterdomain, BindUnboundPort, Unbind, Notify, RestrictDomid, BindStatic)
