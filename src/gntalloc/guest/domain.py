"""A domain, for a program inside it: share pages, map pages. The same on the machine and on real Xen."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING, Any

from gntalloc.abi.gntalloc import ALLOC_GREF, DEALLOC_GREF, FLAG_WRITABLE, AllocGref, DeallocGref
from gntalloc.abi.gntdev import MAP_GRANT_REF, UNMAP_GRANT_REF, GrantRef, MapGrantRef, UnmapGrantRef
from gntalloc.clock import Deadline
from gntalloc.digits import whole_number
from gntalloc.errors import DeviceError, MachineGone, NoMachine, TimedOut
from gntalloc.guest.devices.kernel import FOLDER, KernelDevices
from gntalloc.guest.devices.machine import MachineDevices
from gntalloc.guest.events import Events
from gntalloc.guest.grant import Grant
from gntalloc.guest.pages import MappedPages, SharedPages
from gntalloc.maps import PAGE_SIZE, PROT_READ, PROT_WRITE
from gntalloc.places import domain_path, machine_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gntalloc.guest.devices import DeviceFile
    from gntalloc.maps import Mapping
    from gntalloc.vchan.channel import Channel
    from gntalloc.vchan.server import Listener
    from gntalloc.vchan.ticket import Ticket
    from gntalloc.xenstore.client import Store

__all__ = ["Domain", "adopt", "current_domain"]

_LONGEST_NAP = 0.01  # seconds between two tries of a map whose granter is not ready


class Domain:
    """One domain, seen from inside. Any thread may use it; a pickle of it is its address.

    Get one from `Machine.domain` or `current_domain`.
    """

    def __init__(self, devices: MachineDevices | KernelDevices) -> None:
        self.devices = devices
        self.events = Events(devices)
        self._files: dict[tuple[int, str], DeviceFile] = {}
        self._stores: dict[int, Store] = {}

    @property
    def domid(self) -> int:
        """The number peers know this domain by."""
        return self.devices.domid

    @property
    def address(self) -> str:
        """What finds this domain from another process: give it to `current_domain`."""
        return self.devices.address

    @property
    def on_machine(self) -> bool:
        """Whether a machine plays this domain, and so its peers are programs of this computer too."""
        return isinstance(self.devices, MachineDevices)

    @property
    def limit(self) -> int:
        """Pages that may be granted at once in this domain. Set it to change it; only its owner may."""
        return self.devices.limit

    @limit.setter
    def limit(self, pages: int) -> None:
        self.devices.limit = pages

    @property
    def store(self) -> Store:
        """The xenstore, as this domain sees it: one connection a process, made when it is first asked for.

        Raises:
            NoMachine: there is nothing to connect to.
        """
        store = self._stores.get(os.getpid())
        if store is None or store.closed:
            if store is not None:
                store.close()
            store = self._stores[os.getpid()] = self.devices.open_store()
            store.belongs_to_a_domain()
        return store

    def share(
        self,
        peer: int | Domain,
        pages: int | None = None,
        *,
        size: int | None = None,
        writable: bool = False,
        mirrored: bool = False,
        file: DeviceFile | None = None,
    ) -> SharedPages:
        """Allocate zeroed pages and grant them to `peer`.

        Args:
            peer: a domid or a Domain. That one only, and from now on.
            pages: how many pages of 4096 bytes; one if neither this nor `size` is given.
            size: bytes instead, rounded up to whole pages.
            writable: whether the peer may write. This side always may.
            mirrored: have them in `memory` twice in a row, so that what lies in a ring never wraps.
            file: of gntalloc, to do it with; they end with it. If not given: one that this process has for all.

        Raises:
            DeviceError: ENOSPC the limit or the grant table is exhausted (the text says which), ENOMEM no memory.
        """
        count = _pages(pages, size)
        domid = peer.domid if isinstance(peer, Domain) else peer
        if not 0 <= domid <= 0xFFFF:
            raise ValueError(f"{domid} is no domain's number; they go from 0 to 65535")
        flags = FLAG_WRITABLE if writable else 0
        head = AllocGref(domid, flags, count, 0).pack()
        argument = bytearray(max(AllocGref.SIZE, AllocGref.REFS_OFFSET + 4 * count))
        argument[: len(head)] = head
        prot, times = PROT_READ | PROT_WRITE, 2 if mirrored else 1
        file, mapping = self._make_and_map(
            file or "gntalloc", ALLOC_GREF, argument, count * PAGE_SIZE, prot=prot, times=times
        )
        index = AllocGref.unpack_from(argument).index
        if isinstance(mapping, DeviceError):
            file.ioctl_unanswered(DEALLOC_GREF, DeallocGref(index, count).pack())
            raise mapping
        array = memoryview(argument)[AllocGref.REFS_OFFSET : AllocGref.REFS_OFFSET + 4 * count].cast("I")
        grant = Grant(self.domid, tuple(array), writable)
        mapping.name = "grant", grant
        return SharedPages(file, index, grant, mapping)

    def map(
        self,
        granter: Grant | int | Domain,
        refs: Sequence[int] | int | None = None,
        *,
        writable: bool | None = None,
        timeout: float = 1.0,
        mirrored: bool = False,
        file: DeviceFile | None = None,
    ) -> MappedPages:
        """Map pages that `granter` granted to this domain, as one range.

        Args:
            granter: a Grant, or whose pages: a domid or a Domain, and then `refs`.
            refs: one reference or several, in the order wanted.
            writable: whether to map for writing; if not said, as the Grant says, and read-only without one.
            timeout: seconds to go on trying while the granter of read-only pages has not mapped them itself.
            mirrored: have them in `memory` twice in a row, so that what lies in a ring never wraps.
            file: of gntdev, to do it with. If not given: one that this process has for all.

        Raises:
            DeviceError: EINVAL there is no such grant, or not for this domain, or not for writing; the text says what.
            TimedOut: the granter did not get ready.
        """
        grant = _grant(granter, refs, writable)
        wanted = grant.refs * 2 if mirrored else grant.refs
        count = len(wanted)
        head = MapGrantRef(count, 0).pack()
        argument = bytearray(head + b"".join(GrantRef(grant.granter, ref).pack() for ref in wanted))
        prot = PROT_READ | PROT_WRITE if grant.writable else PROT_READ
        file, mapping = self._make_and_map(file or "gntdev", MAP_GRANT_REF, argument, count * PAGE_SIZE, prot=prot)
        index = MapGrantRef.unpack_from(argument).index
        if isinstance(mapping, DeviceError):
            try:
                mapping = self._mmap_when_ready(file, index, count, grant, prot, mapping, timeout)
            except BaseException:
                file.ioctl_unanswered(UNMAP_GRANT_REF, UnmapGrantRef(index, count).pack())
                raise
        mapping.name = "the map of grant", grant
        return MappedPages(file, index, grant, mapping, count)

    def listen(
        self,
        peer: int | Domain,
        path: str,
        *,
        size: int | tuple[int, int] = 65536,
        extensions: bool | None = None,
        spin: float | None = None,
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

        Raises:
            DeviceError: ENOSPC there are not enough pages, or no port; ENOSYS this processor needs libatomic.
            StoreError: xenstore refused.
            ValueError: the path is too long, or the size.
        """
        from gntalloc.vchan.end import SPIN
        from gntalloc.vchan.server import Listener

        domid = peer.domid if isinstance(peer, Domain) else peer
        return Listener(self, domid, path, size=size, extensions=extensions, spin=SPIN if spin is None else spin)

    def connect(
        self,
        peer: int | Domain,
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
        from gntalloc.vchan.end import SPIN

        domid = peer.domid if isinstance(peer, Domain) else peer
        look = SPIN if spin is None else spin
        return connect(self, domid, path, timeout=timeout, extensions=extensions, spin=look)

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

    def destroy(self) -> None:
        """End the domain: nobody enters it any more, its device files close. Only the machine's owner may.

        Pages that others map stay theirs until they unmap them.
        """
        self.close()
        self.devices.destroy()

    def close(self) -> None:
        """Close this object's device files and store: what was shared through it and is not mapped any more goes."""
        stores, self._stores = self._stores, {}
        for store in stores.values():
            store.close()
        files, self._files = self._files, {}
        for (pid, _name), file in files.items():
            if pid == os.getpid():
                file.close()

    def __repr__(self) -> str:
        return f"<Domain {self.domid} at {self.address}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return current_domain, (self.address,)

    def _mmap_when_ready(
        self, file: DeviceFile, index: int, count: int, grant: Grant, prot: int, refusal: DeviceError, timeout: float
    ) -> Mapping:
        """Try again until the granter is ready: the first try ended in `refusal`."""
        deadline = Deadline(timeout)
        nap = 0.0005
        while True:
            if refusal.errno != errno.EAGAIN:
                raise refusal
            if deadline.expired:
                raise TimedOut(f"grant {grant} could not be mapped within {timeout} s: {refusal}") from refusal
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)
            try:
                return file.mmap(index, count * PAGE_SIZE, prot=prot)
            except DeviceError as again:
                refusal = again

    def _make_and_map(
        self, which: DeviceFile | str, request: int, argument: bytearray, length: int, *, prot: int, times: int = 1
    ) -> tuple[DeviceFile, Mapping | DeviceError]:
        """See `DeviceFile.ioctl_mmap`; of a device by name on a new file, if the old one's domain ended and is back."""
        if not isinstance(which, str):
            return which, which.ioctl_mmap(request, argument, length, prot=prot, times=times)
        file = self._file(which)
        try:
            return file, file.ioctl_mmap(request, argument, length, prot=prot, times=times)
        except MachineGone:
            if not (file.lost and self.devices.is_back()):
                raise
        del self._files[os.getpid(), which]  # and not closed: what was made with it says that it is gone
        file = self._file(which)
        return file, file.ioctl_mmap(request, argument, length, prot=prot, times=times)

    def _file(self, name: str) -> DeviceFile:
        # A file a process: pages granted after a fork must end with the process that granted them.
        key = os.getpid(), name
        file = self._files.get(key)
        if file is None:
            file = self._files.setdefault(key, self.devices.open(name))
        return file


def current_domain(address: str | None = None) -> Domain:
    """The domain this program is in.

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


def _pages(pages: int | None, size: int | None) -> int:
    if pages is not None and size is not None:
        raise ValueError("give `pages` or `size`, not both")
    count = -(-size // PAGE_SIZE) if size is not None else 1 if pages is None else pages
    if not 0 < count < 1 << 32:
        raise ValueError(f"{count} pages cannot be shared; ask for one at least, and fewer than {1 << 32}")
    return count


def _grant(granter: Grant | int | Domain, refs: Sequence[int] | int | None, writable: bool | None) -> Grant:
    if isinstance(granter, Grant):
        if refs is not None:
            raise ValueError("a Grant names its references itself; give a domid to choose others")
        grant = granter if writable is None else granter._replace(writable=writable)
    else:
        chosen = (refs,) if isinstance(refs, int) else tuple(refs or ())
        grant = Grant(granter.domid if isinstance(granter, Domain) else granter, chosen, bool(writable))
    if not grant.refs:
        raise ValueError("no reference was given; give the granter's domid and its references, or a Grant")
    grant.check()
    return grant
