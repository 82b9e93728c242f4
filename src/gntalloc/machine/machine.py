"""Domains, their drivers and open files, and what the kernel says of mappings. No sockets here."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from gntalloc.abi.grants import MAX_FRAMES
from gntalloc.drivers.behaviour import LINUX, OURS, Behaviour
from gntalloc.drivers.chardev import Driver, File, Frame, Loan, Plan, Record
from gntalloc.drivers.evtchn import EvtchnDriver
from gntalloc.drivers.gntalloc import DEFAULT_LIMIT, GntallocDriver
from gntalloc.drivers.gntdev import GntdevDriver
from gntalloc.drivers.privcmd import PrivcmdDriver
from gntalloc.errors import DeviceError, GntallocError
from gntalloc.frames import Frames
from gntalloc.hypervisor.domains import DomainExists, Hypervisor
from gntalloc.hypervisor.grants import GrantTable
from gntalloc.hypervisor.ports import EventChannels, Ports
from gntalloc.machine.toolstack import furnish, strip
from gntalloc.xenstore.daemon.server import Server as Store

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BEHAVIOURS", "Guest", "Machine"]

BEHAVIOURS = {"ours": OURS, "linux": LINUX}

MAX_FILES = 4096  # open at once in one domain, so that it cannot use up the machine's descriptors


class Guest:
    """A domain: who may enter it, and its kernel's drivers.

    Args:
        domid: its number.
        uid: the user whose programs may connect.
    """

    def __init__(self, domid: int, uid: int, table: GrantTable[Frame], drivers: list[Driver]) -> None:
        self.domid = domid
        self.uid = uid
        self.table = table
        self.drivers = {driver.name: driver for driver in drivers}
        self.files: set[File] = set()

    @property
    def gntalloc(self) -> GntallocDriver:
        """The driver that holds the domain's limit and grants."""
        driver = self.drivers["gntalloc"]
        assert isinstance(driver, GntallocDriver)
        return driver

    @property
    def evtchn(self) -> EvtchnDriver:
        """The driver that holds the domain's event channel ports."""
        driver = self.drivers["evtchn"]
        assert isinstance(driver, EvtchnDriver)
        return driver


class Machine:
    """Everything there is.

    Args:
        limit: pages a domain may have in use at once, unless it is given another limit.
        behaviour: ours, or as Linux does.
        table_frames: how far a grant table may grow, in frames of 512 references.
    """

    def __init__(
        self, *, limit: int = DEFAULT_LIMIT, behaviour: Behaviour = OURS, table_frames: int = MAX_FRAMES
    ) -> None:
        self.frames: Frames[Record] = Frames()
        self.guests: dict[int, Guest] = {}
        self.store = Store(by_number=behaviour.permissions_by_number)
        self._hypervisor: Hypervisor[Frame] = Hypervisor()
        self._event_channels = EventChannels()
        self._limit = limit
        self._behaviour = behaviour
        self._table_frames = table_frames

    # Domains.

    def create(self, domid: int, *, uid: int, limit: int | None = None) -> Guest:
        """Make a domain.

        Raises:
            GntallocError: EEXIST there is one of that number, or the number is none a domain may have.
        """
        table: GrantTable[Frame] = GrantTable(
            domid,
            max_frames=self._table_frames,
            oldest_first=self._behaviour.oldest_reference_first,
            refuse_while_ending=self._behaviour.refuse_while_ending,
        )
        try:
            self._hypervisor.create(domid, table)
        except DomainExists as error:
            raise GntallocError(errno.EEXIST, str(error)) from None
        evtchn = EvtchnDriver(self._event_channels.create(domid))
        drivers: list[Driver] = [
            GntallocDriver(
                table,
                self.frames,
                evtchn,
                limit=self._limit if limit is None else limit,
                behaviour=self._behaviour,
            ),
            GntdevDriver(domid, self._hypervisor, self.frames, evtchn, behaviour=self._behaviour),
            evtchn,
            PrivcmdDriver(domid, self._hypervisor, self._event_channels),
        ]
        guest = self.guests[domid] = Guest(domid, uid, table, drivers)
        furnish(self.store, domid)
        return guest

    def guest(self, domid: int) -> Guest:
        """The domain of that number.

        Raises:
            GntallocError: ESRCH there is none.
        """
        guest = self.guests.get(domid)
        if guest is None:
            there = ", ".join(map(str, sorted(self.guests))) or "none"
            raise GntallocError(errno.ESRCH, f"there is no domain {domid} in this machine; it has {there}")
        return guest

    def destroy(self, domid: int) -> None:
        """End a domain: its files close. Pages that others map, or its own programs, stay until they unmap them."""
        guest = self.guest(domid)
        for file in list(guest.files):
            self.close(guest, file)
        self._event_channels.destroy(domid)
        self._hypervisor.destroy(domid)
        strip(self.store, domid)
        del self.guests[domid]

    # Files.

    def open(self, guest: Guest, name: str, flags: int, *, opener: int) -> File:
        """Open a device file of a domain.

        Raises:
            DeviceError: ENOENT there is no such device; ENOTDIR a folder was wanted; ENFILE too many are open.
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
        """The last descriptor of `file` is gone."""
        guest.files.discard(file)
        file.close()

    def carry_out(self, plan: Plan) -> list[Loan]:
        """Descriptions for a plan, one for each extent in the order they first appear. Send them, then close them.

        Raises:
            DeviceError: ENOMEM; nothing is left of the plan.
        """
        loans: dict[object, Loan] = {}
        try:
            for piece in plan.pieces:
                if piece.extent not in loans:
                    loan = self.frames.lend(piece.extent, plan.record, writable=plan.writable, granters=plan.granters)
                    plan.record.loans.add(loan)
                    loans[piece.extent] = loan
        except DeviceError:
            for loan in loans.values():
                loan.close()
            if loans:
                self.settle()  # the kernel reports them gone, as it would a program's
            else:
                plan.record.file.unmapped(plan.record)
            raise
        return list(loans.values())

    # What the kernel says.

    def settle(self, *, heard: bool = True) -> None:
        """Take in what has been unmapped. After this the books agree with the kernel. `heard`: see `Frames.news`."""
        news = self.frames.news(heard=heard)
        for loan in news.ended:
            record = loan.holder
            record.loans.remove(loan)
            if not record.loans:
                record.file.unmapped(record)
        for extent in news.touched:
            extent.changed(extent)

    # For people.

    def grants(self) -> list[dict[str, Any]]:
        """Every granted page of every domain."""
        return list(self._grants())

    def _grants(self) -> Iterator[dict[str, Any]]:
        for guest in self.guests.values():
            for grant in guest.gntalloc.grants():
                yield {"granter": guest.domid, **grant._asdict()}

    def files(self) -> list[dict[str, Any]]:
        """Every open device file of every domain: who opened it, the ports bound on it, the bytes mapped of it."""
        return [
            {
                "domid": guest.domid,
                "device": file.driver.name,
                "opener": file.opener,
                "ports": guest.evtchn.ports_of(file) if file.driver is guest.evtchn else [],
                "mapped": sum(record.length for record in file.records),
            }
            for guest in self.guests.values()
            for file in guest.files
        ]

    def event_ports(self, domid: int) -> Ports:
        """The event channel ports of a domain.

        Raises:
            GntallocError: ESRCH there is no such domain.
        """
        self.guest(domid)
        ports = self._event_channels.of(domid)
        assert ports is not None
        return ports

    def statistics(self) -> dict[str, Any]:
        """Counters of the machine and of each domain."""
        return {
            "pid": os.getpid(),
            "pages": self.frames.pages,
            "extents": self.frames.extents,
            "descriptors": len(os.listdir("/proc/self/fd")) - 1,
            "domains": [
                {
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
                for guest in self.guests.values()
            ],
        }
