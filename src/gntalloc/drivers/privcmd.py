"""Serve /dev/xen/privcmd: the two hypercalls that channel libraries make, to learn whether their peer is still there.

Any other hypercall of a toolstack is answered with ENOSYS, as on a hypervisor that has no such call. Any other request
is answered with ENOTTY. Unlike on Xen, a domain without privileges may ask, so a program that was made for domain 0 can
run in any domain.

Sources: Xen's public domctl.h (the first domain of this number or above, ESRCH if there is none) and event_channel.h;
Linux's privcmd.c as of 6.1 (what the hypercall returns is what the ioctl does).
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from gntalloc.abi.grants import DOMID_SELF
from gntalloc.abi.privcmd import (
    DEVICE,
    DOMCTL,
    DOMCTL_GETDOMAININFO,
    DOMCTL_SIZE,
    DOMINF_RUNNING,
    EVENT_CHANNEL_OP,
    EVTCHNOP_STATUS,
    HYPERCALL,
    DomctlHead,
    EvtchnStatus,
    Hypercall,
)
from gntalloc.errors import DeviceError
from gntalloc.hypervisor.ports import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from gntalloc.drivers.chardev import Caller, File, Plan, Record
    from gntalloc.hypervisor.ports import EventChannels

__all__ = ["PrivcmdDriver"]

_STATUS = {State.UNBOUND: 1, State.INTERDOMAIN: 2, State.VIRQ: 4}
_CLOSED = 0
_INFORMATION = struct.Struct("=HHI56xI")  # struct xen_domctl_getdomaininfo: domain, pad, flags, ..., processors online
_PRIVILEGED = 0


class PrivcmdDriver:
    """Serve the device for domain `domid`.

    Args:
        domids: the domids of all domains, in order.
        channels: their ports.
    """

    name = DEVICE
    unknown_request = errno.ENOTTY

    def __init__(self, domid: int, domids: Iterable[int], channels: EventChannels) -> None:
        self._domid = domid
        self._domids = domids
        self._channels = channels
        self._requests = {HYPERCALL: self._hypercall}

    @property
    def requests(self) -> Mapping[int, Callable[[File, int, Caller], int]]:
        """Request number -> the function that serves it."""
        return self._requests

    def open(self) -> None:
        """Give a new file no state: it needs none."""

    def _hypercall(self, file: File, address: int, caller: Caller) -> int:
        call = Hypercall.unpack_from(caller.read(address, Hypercall.SIZE))
        if call.op == DOMCTL:
            return self._domctl(call.arg0, caller)
        if call.op == EVENT_CHANNEL_OP and call.arg0 == EVTCHNOP_STATUS:
            return self._status(call.arg1, caller)
        raise DeviceError(
            errno.ENOSYS,
            f"hypercall {call.op} ({call.arg0:#x}, ...) is not served; of those only domain information is",
        )

    def _domctl(self, address: int, caller: Caller) -> int:
        asked = DomctlHead.unpack_from(caller.read(address, DomctlHead.SIZE))
        if asked.cmd != DOMCTL_GETDOMAININFO:
            raise DeviceError(errno.ENOSYS, f"domctl {asked.cmd} is not served; getdomaininfo is")
        found = next((domid for domid in self._domids if domid >= asked.domain), None)
        if found is None:
            raise DeviceError(errno.ESRCH, f"there is no domain {asked.domain}, and none above")
        information = _INFORMATION.pack(found, 0, DOMINF_RUNNING, 1)
        answer = asked._replace(domain=found).pack() + information
        caller.write(address, answer.ljust(DOMCTL_SIZE, b"\0"))
        return 0

    def _status(self, address: int, caller: Caller) -> int:
        asked = EvtchnStatus.unpack_from(caller.read(address, EvtchnStatus.SIZE))
        domid = self._domid if asked.dom == DOMID_SELF else asked.dom
        if self._domid not in {domid, _PRIVILEGED}:
            raise DeviceError(errno.EPERM, f"domain {self._domid} may ask about its own ports, not domain {domid}'s")
        ports = self._channels.of(domid)
        if ports is None:
            raise DeviceError(errno.ESRCH, f"there is no domain {domid}")
        port = ports.get(asked.port)
        if port is None:
            answer = asked._replace(status=_CLOSED)
        else:
            peer = port.virq if port.state is State.VIRQ else port.peer
            answer = asked._replace(status=_STATUS[port.state], vcpu=0, peer=peer, peer_port=port.remote)
        caller.write(address, answer.pack())
        return 0

    def release(self, file: File) -> None:
        """Do nothing: a file has nothing to give up."""

    # There is nothing to map.

    def mmap(self, file: File, offset: int, length: int, *, writable: bool, shared: bool) -> Plan:
        """Refuse to map.

        Raises:
            DeviceError: ENODEV.
        """
        raise DeviceError(errno.ENODEV, "privcmd has no pages to map here; it is for hypercalls")

    def unmapped(self, record: Record) -> None:
        """Do nothing: no map is ever made."""
