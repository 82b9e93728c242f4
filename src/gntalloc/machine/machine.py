"""Keep domains, their drivers and open files, and take in what the kernel says of mappings. No sockets are here."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from gntalloc.abi.grants import MAX_FRAMES
from gntalloc.drivers.behaviour import LINUX, OURS, Behaviour
from gntalloc.drivers.chardev import Driver, File, Loan, Plan, Record
from gntalloc.drivers.evtchn import EvtchnDriver
from gntalloc.drivers.gntalloc import DEFAULT_LIMIT, GntallocDriver
from gntalloc.drivers.gntdev import GntdevDriver
from gntalloc.drivers.privcmd import PrivcmdDriver
from gntalloc.errors import DeviceError, GntallocError
from gntalloc.frames import Frames
from gntalloc.hypervisor.domains import DomainExists, Hypervisor
from gntalloc.hypervisor.grants import GrantTable
from gntalloc.hypervisor.ports import EventChannels
from gntalloc.machine.disturbed import DisturbedPorts
from gntalloc.machine.quotas import Share, descriptors_of_this_process
from gntalloc.machine.toolstack import furnish, strip
from gntalloc.steps import batches, finish_steps
from gntalloc.unasked import Disposal
from gntalloc.xenstore.daemon.server import Daemon as Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc.drivers.grefs import Pages
    from gntalloc.steps import Steps

__all__ = ["BEHAVIOURS", "Guest", "Machine"]

BEHAVIOURS = {"ours": OURS, "linux": LINUX}

_LENT_AT_ONCE = 16  # extents
_CLOSED_AT_ONCE = 16  # files
MAX_FILES = 4096  # open at once in one domain, so that it cannot use up the machine's descriptors


class Guest:
    """Keep a domain: its user, its grants and event channels, and its kernel's drivers.

    Args:
        domid: its number.
        uid: the user whose programs may connect.
        table: its grants.
        ports: its event channel ports.
        gntalloc: the driver that has its limit.
        gntdev: the driver that has its maps of other domains' pages.
        evtchn: the driver that gives its ports to programs.
        privcmd: the driver of the hypercalls that it may make.
        descriptors: its share of the machine's descriptors.
    """

    def __init__(
        self,
        domid: int,
        uid: int,
        table: GrantTable[Pages],
        ports: DisturbedPorts,
        *,
        gntalloc: GntallocDriver,
        gntdev: GntdevDriver,
        evtchn: EvtchnDriver,
        privcmd: PrivcmdDriver,
        descriptors: Share,
    ) -> None:
        self.domid = domid
        self.uid = uid
        self.table = table
        self.ports = ports
        self.gntalloc = gntalloc
        self.gntdev = gntdev
        self.evtchn = evtchn
        self.descriptors = descriptors
        self.ending = False  # whether it is being destroyed
        self.waits = 0  # for releases of its pages
        self.connections = 0  # of programs to the domain, beside those to xenstore
        drivers: tuple[Driver, ...] = (gntalloc, gntdev, evtchn, privcmd)
        self.drivers = {driver.name: driver for driver in drivers}
        self.files: set[File] = set()
        self.disposal = Disposal(min(1024, max(1, descriptors.left // 4)))
        """Closes descriptors that its programs send, where they cannot be refused."""


class Machine:
    """Keep all domains and their open files.

    Args:
        limit: the most pages that a domain may have in use at once, unless it is given another limit.
        behaviour: ours, or as Linux does.
        table_frames: the most frames, of 512 references each, that a grant table may have.
    """

    def __init__(
        self, *, limit: int = DEFAULT_LIMIT, behaviour: Behaviour = OURS, table_frames: int = MAX_FRAMES
    ) -> None:
        self.frames: Frames[Record] = Frames()
        self.descriptors = descriptors_of_this_process()
        self.guests: dict[int, Guest] = {}
        self.store = Store(by_number=behaviour.permissions_by_number)
        self._hypervisor: Hypervisor[Pages] = Hypervisor()
        self._event_channels = EventChannels()
        self.later: Callable[[int, Steps[None]], None] = lambda _domid, work: finish_steps(work)
        """Begins work of a domain's that may take long: see `gntalloc.steps.Later`."""
        self._limit = limit
        self._behaviour = behaviour
        self._table_frames = table_frames

    # Domains.

    def create(self, domid: int, *, uid: int, limit: int | None = None) -> Guest:
        """Make a domain.

        Raises:
            GntallocError: EEXIST: there is one of that number, or no domain may have that number.
        """
        table: GrantTable[Pages] = GrantTable(
            domid,
            max_frames=self._table_frames,
            oldest_first=self._behaviour.oldest_reference_first,
            refuse_while_ending=self._behaviour.refuse_while_ending,
        )
        try:
            self._hypervisor.create(domid, table)
        except DomainExists as error:
            raise GntallocError(errno.EEXIST, str(error)) from None
        ports = self._event_channels.create(domid, DisturbedPorts)
        evtchn = EvtchnDriver(ports)
        limit = self._limit if limit is None else limit
        share = Share(self.descriptors, uid, domid)

        def later(work: Steps[None]) -> None:
            self.later(domid, work)

        guest = self.guests[domid] = Guest(
            domid,
            uid,
            table,
            ports,
            gntalloc=GntallocDriver(
                table, self.frames, evtchn, limit=limit, behaviour=self._behaviour, later=later, descriptors=share
            ),
            gntdev=GntdevDriver(domid, self._hypervisor, self.frames, evtchn, behaviour=self._behaviour, later=later),
            evtchn=evtchn,
            privcmd=PrivcmdDriver(domid, self._hypervisor, self._event_channels),
            descriptors=share,
        )
        furnish(self.store, domid)
        return guest

    def guest(self, domid: int) -> Guest:
        """Find the domain of that number.

        Raises:
            GntallocError: ESRCH: there is none.
        """
        guest = self.guests.get(domid)
        if guest is None:
            there = ", ".join(map(str, sorted(self.guests))) or "none"
            raise GntallocError(errno.ESRCH, f"there is no domain {domid} in this machine; it has {there}")
        return guest

    def destroy(self, domid: int) -> None:
        """End a domain: its files close. Pages that others, or its own programs, map stay until they unmap them."""
        finish_steps(self.begin_to_destroy(domid))

    def begin_to_destroy(self, domid: int) -> Steps[None]:
        """Give the steps to what `destroy` does: a domain may have thousands of files."""
        guest = self.guest(domid)
        for files in batches(list(guest.files), _CLOSED_AT_ONCE):
            for file in files:
                self.close(guest, file)
            yield
        self._event_channels.destroy(domid)
        self._hypervisor.destroy(domid)
        strip(self.store, domid)
        del self.guests[domid]

    # Files.

    def open(self, guest: Guest, name: str, flags: int, *, opener: int) -> File:
        """Open a device file of a domain.

        Raises:
            DeviceError: ENOENT: there is no such device. ENOTDIR: a folder was wanted. ENFILE: too many are open.
        """
        driver = guest.drivers.get(name)
        if driver is None:
            there = ", ".join(guest.drivers)
            raise DeviceError(
                errno.ENOENT, f"there is no device {name[:40]!r} in domain {guest.domid}; there are {there}"
            )
        if flags & os.O_DIRECTORY:
            raise DeviceError(errno.ENOTDIR, f"{name} is a device, and was opened with O_DIRECTORY or O_TMPFILE")
        if len(guest.files) >= MAX_FILES:
            raise DeviceError(errno.ENFILE, f"domain {guest.domid} has {MAX_FILES} device files open; close some")
        file = File(driver, flags, opener=opener)
        guest.files.add(file)
        return file

    def close(self, guest: Guest, file: File) -> None:
        """Close `file`, as its last descriptor is gone."""
        guest.files.discard(file)
        file.close()

    def carry_out(self, plan: Plan) -> Steps[list[Loan]]:
        """Make descriptions for a plan, in steps: one for each extent in the order they first appear.

        Send them, then close them.

        Raises:
            DeviceError: ENOMEM. Nothing is left of the plan.
        """
        loans: dict[object, Loan] = {}
        try:
            for piece in plan.pieces:
                if piece.extent not in loans:
                    if len(loans) % _LENT_AT_ONCE == _LENT_AT_ONCE - 1:
                        yield
                    loan = self.frames.lend(piece.extent, plan.record, writable=plan.writable, granters=plan.granters)
                    plan.record.loans.add(loan)
                    loans[piece.extent] = loan
        except BaseException:  # the program's end, too
            for loan in loans.values():
                loan.close()
            if loans:
                self.settle()  # the kernel reports them gone, as it would a program's
            else:
                plan.record.file.unmapped(plan.record)
            raise
        plan.record.made = True
        return list(loans.values())

    # News of the kernel's.

    def settle(self, *, heard: bool = True, until: float | None = None) -> None:
        """Take in which maps have ended. After this the books agree with the kernel, but for what is left over.

        `heard` and `until`: see `Loans.news`.
        """
        news = self.frames.news(heard=heard, until=until)
        for loan in news.ended:
            record = loan.holder
            record.loans.remove(loan)
            if not record.loans:
                record.file.unmapped(record)
        for extent in news.touched:
            extent.changed(extent)

    # For people: row after row, as a long list is made in pieces.

    def grants(self) -> list[dict[str, Any]]:
        """List every granted page of every domain."""
        return list(self.each_grant())

    def each_grant(self) -> Iterator[dict[str, Any]]:
        """List every granted page of every domain, one after the other."""
        for guest in list(self.guests.values()):
            for grant in guest.gntalloc.each_grant():
                yield {"granter": guest.domid, **grant._asdict()}

    def each_file(self) -> Iterator[dict[str, Any]]:
        """List every open device file of every domain: its opener, the ports bound on it, the bytes mapped of it."""
        for guest in list(self.guests.values()):
            for file in list(guest.files):
                if file in guest.files:
                    yield {
                        "domid": guest.domid,
                        "device": file.driver.name,
                        "opener": file.opener,
                        "ports": guest.evtchn.ports_of(file) if file.driver is guest.evtchn else [],
                        "mapped": sum(record.length for record in file.records),
                    }

    def statistics(self) -> dict[str, Any]:
        """Give the counters of the machine and of each domain.

        Raises:
            OSError: EMFILE: there is no descriptor left to count the descriptors with.
        """
        return {**self.totals(), "domains": list(self.each_domain())}

    def totals(self) -> dict[str, Any]:
        """Give the counters of the machine.

        Raises:
            OSError: as of `statistics`.
        """
        return {
            "pid": os.getpid(),
            "pages": self.frames.pages,
            "extents": self.frames.extents,
            "descriptors": len(os.listdir("/proc/self/fd")) - 1,
        }

    def each_domain(self) -> Iterator[dict[str, Any]]:
        """Give the counters of every domain, one after the other."""
        for guest in list(self.guests.values()):
            yield {
                "domid": guest.domid,
                "uid": guest.uid,
                "limit": guest.gntalloc.limit,
                "pages_in_use": guest.gntalloc.in_use,
                "references": guest.table.usage().live,
                "ports": guest.evtchn.in_use,
                "files": len(guest.files),
                "files_mapped": sum(bool(file.records) for file in guest.files),
                **self.store.usage(guest.domid),
            }
