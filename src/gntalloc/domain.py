"""Domain: a domain as a program inside it sees it, with all that can be done there; and how a program finds its own.

What shares and maps pages is below, in `gntalloc.guest.domain`; what connects channels, in `gntalloc.vchan`.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from gntalloc.digits import whole_number
from gntalloc.errors import NoMachine
from gntalloc.guest.devices.kernel import FOLDER, KernelDevices
from gntalloc.guest.devices.machine import MachineDevices
from gntalloc.guest.domain import BareDomain
from gntalloc.guest.peers import domid_of
from gntalloc.places import domain_path, machine_folder

if TYPE_CHECKING:
    from gntalloc.vchan.channel import Channel
    from gntalloc.vchan.server import Listener
    from gntalloc.vchan.ticket import Ticket

__all__ = ["Domain", "adopt", "current_domain"]


class Domain(BareDomain):
    """One domain, seen from inside. Any thread may use it; a pickle of it is its address.

    Get one from `Machine.domain` or `current_domain`.
    """

    def listen(
        self,
        peer: int | BareDomain,
        path: str,
        *,
        size: int | tuple[int, int] = 65536,
        extensions: bool | None = None,
        spin: float | None = None,
        most_per_peer: int | None = None,
    ) -> Listener:
        """Wait for clients in `peer`: `with domain.listen(2, "echo") as listener: channel = listener.accept()`.

        Each channel is a vchan, as libxenvchan's: its clients can be C programs.

        Args:
            peer: a domid or a Domain.
            path: where in xenstore. "echo" is short for /local/domain/<this>/data/vchan/<peer>/echo.
            size: bytes of each ring; or a pair: of what is read here, and of what is written. Above 1 MiB only a client
                of this package has it all; the largest is 16 MiB.
            extensions: between two ends of this package there is more (see docs/vchan.md). False does without; True
                takes no client that cannot.
            spin: seconds to look before sleeping; 0 sleeps at once.
            most_per_peer: pages that `peer` may have of this Domain object, in all channels and shares; a channel that
                was closed here counts until `peer` has let go. 512 if not given, and always enough for two channels.

        Raises:
            PeerQuotaReached: EDQUOT `peer` has so many already; `accept` raises it too. Others are served as before.
            DeviceError: ENOSPC there are not enough pages, or no port; ENOSYS this processor needs libatomic.
            StoreError: xenstore refused.
            ValueError: the path is too long, or the size.
        """
        from gntalloc.vchan.server import Listener

        how: dict[str, Any] = {"size": size, "extensions": extensions, "spin": spin, "most_per_peer": most_per_peer}
        return Listener(self, domid_of(peer), path, **how)

    def connect(
        self,
        peer: int | BareDomain,
        path: str,
        *,
        timeout: float | None = None,
        extensions: bool | None = None,
        spin: float | None = None,
    ) -> Channel:
        """Connect to a server in `peer` that listens for this domain; wait until there is one.

        Args:
            peer: a domid or a Domain.
            path: where in xenstore. "echo" is short for /local/domain/<peer>/data/vchan/<this>/echo.
            timeout: seconds; None waits for ever, 0 takes what is there.
            extensions: as for `listen`.
            spin: as for `listen`.

        Raises:
            TimedOut: there was no server, or it was not free; the text says which.
            PeerBroke: what the server shows is no vchan.
            DeviceError: ENOSYS this processor needs libatomic.
            ValueError: the path is too long.
        """
        from gntalloc.vchan.client import connect

        return connect(self, domid_of(peer), path, timeout=timeout, extensions=extensions, spin=spin)

    def adopt(self, ticket: Ticket) -> Channel:
        """Have a channel of this domain that another process has detached: it goes on where it was.

        The ticket is closed. `gntalloc.adopt(ticket)` finds the domain by itself.

        Raises:
            Busy: somebody has adopted it already.
            Closed: the ticket is closed in this process.
            MachineGone: the domain is not there any more.
            PeerBroke: the peer lies about what is in the rings.
        """
        from gntalloc.vchan.adopting import adopt

        return adopt(self, ticket)

    def __reduce__(self) -> tuple[Any, ...]:
        return current_domain, (self.address,)


def current_domain(address: str | None = None) -> Domain:
    """Return the domain that this program is in.

    Args:
        address: a domain's address: the path of its socket, `MACHINE/DOMID` for a machine by name, or /dev/xen.
            If not given: $GNTALLOC_DOMAIN; if that is not set, /dev/xen where it can be opened.

    Raises:
        NoMachine: there is none of these; the text says what to do.
    """
    if address is None:
        address = os.environ.get("GNTALLOC_DOMAIN") or None  # an empty one is as good as none
    if address == FOLDER or (address is None and _on_xen()):
        return Domain(KernelDevices())
    if address is None:
        raise NoMachine(
            "this program is in no domain: $GNTALLOC_DOMAIN is not set and /dev/xen/gntdev cannot be opened. "
            "Start it with env=machine.environ(DOMID), or set GNTALLOC_DOMAIN=NAME/DOMID for a machine that was "
            "started with `gntalloc machine --name NAME --domain DOMID`"
        )
    name, _, number = address.rpartition("/")
    if not name or "\0" in address:
        raise NoMachine(
            errno.EINVAL,
            f"{address[:200]!r} is no domain's address; write MACHINE/DOMID as in default/1, the path of its socket, "
            f"or {FOLDER}",
        )
    if "/" not in name:
        domid = whole_number(number, 0xFFFF)
        if domid is None:
            raise NoMachine(
                errno.EINVAL,
                f"{address[:200]!r}: {number[:40]!r} is no domid; write MACHINE/DOMID, as in {name[:40]}/1",
            )
        address = domain_path(machine_folder(name), domid)
    return Domain(MachineDevices(address))


def adopt(ticket: Ticket) -> Channel:
    """Have a channel that another process has detached. See `Domain.adopt` and docs/vchan.md.

    Raises:
        NoMachine: the domain is not there any more.
        Busy, Closed, MachineGone, PeerBroke: as `Domain.adopt`.
    """
    return current_domain(ticket.tells.address).adopt(ticket)


def _on_xen() -> bool:
    try:
        os.close(os.open(os.path.join(FOLDER, "gntdev"), os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True
