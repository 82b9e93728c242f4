"""Share pages and map pages, for a program inside a domain. The same on the machine and on real Xen."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from gntalloc.clock import Deadline
from gntalloc.errors import DeviceError, MachineGone, TimedOut
from gntalloc.guest.devices.machine import MachineDevices
from gntalloc.guest.events import Events
from gntalloc.guest.grant import Grant
from gntalloc.guest.pages import MappedPages, SharedPages
from gntalloc.guest.peers import count_of, domid_of
from gntalloc.guest.quotas import Quotas
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gntalloc.guest.devices import Attached, DeviceFile
    from gntalloc.guest.devices.kernel import KernelDevices
    from gntalloc.xenstore.client import Store

__all__ = ["BareDomain"]

Made = TypeVar("Made")

_MOST_PAGES = 0xFFFF_FFFF  # that one call can ask for
_LONGEST_NAP = 0.01  # seconds between two tries of a map whose granter is not ready


class BareDomain:
    """One domain, seen from inside, without channels. `gntalloc.Domain` is this with them."""

    def __init__(self, devices: MachineDevices | KernelDevices) -> None:
        self.devices = devices
        self.events = Events(devices)
        self._files: dict[tuple[int, str], DeviceFile] = {}
        self._stores: dict[int, Store] = {}
        self._quotas_of: dict[int, Quotas] = {}

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
        peer: int | BareDomain,
        pages: int | None = None,
        *,
        size: int | None = None,
        writable: bool = False,
        mirrored: bool = False,
        file: DeviceFile | None = None,
        most_per_peer: int | None = None,
    ) -> SharedPages:
        """Allocate zeroed pages and grant them to `peer`.

        Args:
            peer: a domid or a Domain. That one only, and from now on.
            pages: how many pages of 4096 bytes; one if neither this nor `size` is given.
            size: bytes instead, rounded up to whole pages.
            writable: whether the peer may write. This side always may.
            mirrored: have them in `memory` twice in a row, so that what lies in a ring never wraps.
            file: of gntalloc, to do it with; they end with it. If not given: one that this process has for all.
            most_per_peer: pages that `peer` may have of this Domain object then, channels included. Those that were
                shared with such a bound count until `peer` has let go of them; others until they are closed here.

        Raises:
            PeerQuotaReached: EDQUOT `peer` would have more than `most_per_peer`. Other peers are not concerned.
            DeviceError: ENOSPC the limit or the grant table is exhausted (the text says which), ENOMEM no memory.
        """
        count = _pages(pages, size)
        domid = domid_of(peer)
        if most_per_peer is not None:
            count_of(most_per_peer, "most_per_peer, a number of pages")
        charge = self._quotas.charge(domid, count, most_per_peer)
        times, kept = 2 if mirrored else 1, file is not None
        try:
            device, made = self._make(
                "gntalloc", file, lambda it: it.share(domid, count, writable=writable, times=times, keep=kept)
            )
            grant = Grant(self.domid, made.refs, writable)
            made.mapping.name = "grant", grant
            return SharedPages(device, made.first, grant, made.mapping, charge, kept=kept)
        except BaseException:
            charge.end()
            raise

    def see_to_quota(self, peer: int, pages: int, most_per_peer: int) -> None:
        """See that `peer` may have so many pages more, which are shared in several pieces then.

        Raises:
            PeerQuotaReached: as `share`.
        """
        count_of(most_per_peer, "most_per_peer, a number of pages")
        self._quotas.charge(peer, pages, most_per_peer).end()

    def map(
        self,
        granter: Grant | int | BareDomain,
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
        kept = file is not None
        device, made = self._make("gntdev", file, lambda it: _attach_when_ready(it, grant, wanted, timeout, keep=kept))
        made.mapping.name = "the map of grant", grant
        return MappedPages(device, made.first, grant, made.mapping, len(wanted), kept=kept)

    def destroy(self) -> None:
        """End the domain: nobody enters it any more, its device files close. Only the machine's owner may.

        Pages that others map stay theirs until they unmap them.
        """
        self.close()
        self.devices.destroy()

    def close(self) -> None:
        """Close this object's device files and store: what was shared through it and is not mapped any more goes."""
        self._quotas.close()
        stores, self._stores = self._stores, {}
        for store in stores.values():
            store.close()
        files, self._files = self._files, {}
        for (pid, _name), file in files.items():
            if pid == os.getpid():
                file.close()

    def __repr__(self) -> str:
        return f"<Domain {self.domid} at {self.address}>"

    def _make(self, name: str, given: DeviceFile | None, make: Callable[[DeviceFile], Made]) -> tuple[DeviceFile, Made]:
        """Make something with a file, and return both: the given one, or that which this process has for all.

        If the domain of the latter has ended and is there again, it is done once more with a new one. The old one is
        not closed: what was made with it says that it is gone.
        """
        if given is not None:
            return given, make(given)
        file = self._file(name)
        try:
            return file, make(file)
        except MachineGone:
            if not (file.lost and self.devices.is_back()):
                raise
        key = os.getpid(), name
        if self._files.get(key) is file:  # else another thread has been here
            self._files.pop(key, None)
        file = self._file(name)
        return file, make(file)

    @property
    def _quotas(self) -> Quotas:
        # One a process, as of the files: a child made by fork has shared nothing.
        quotas = self._quotas_of.get(os.getpid())
        if quotas is None:
            quotas = self._quotas_of.setdefault(os.getpid(), Quotas())
        return quotas

    def _file(self, name: str) -> DeviceFile:
        # A file a process: pages granted after a fork must end with the process that granted them.
        key = os.getpid(), name
        file = self._files.get(key)
        if file is None:
            file = self._files.setdefault(key, self.devices.open(name))
        return file


def _attach_when_ready(
    device: DeviceFile, grant: Grant, refs: tuple[int, ...], timeout: float, *, keep: bool
) -> Attached:
    """Map references of a grant, and try again while its granter has not mapped them itself."""
    deadline: Deadline | None = None
    nap = 0.0005
    while True:
        try:
            return device.attach(grant.granter, refs, writable=grant.writable, keep=keep)
        except DeviceError as refusal:
            if refusal.errno != errno.EAGAIN:
                raise
            deadline = deadline or Deadline(timeout)
            if deadline.expired:
                raise TimedOut(f"grant {grant} could not be mapped within {timeout} s: {refusal}") from refusal
        time.sleep(nap)
        nap = min(2 * nap, _LONGEST_NAP)


def _pages(pages: int | None, size: int | None) -> int:
    if pages is not None and size is not None:
        raise ValueError("give `pages` or `size`, not both")
    if size is not None:
        return -(-count_of(size, "a number of bytes to share", least=1, most=_MOST_PAGES * PAGE_SIZE) // PAGE_SIZE)
    return 1 if pages is None else count_of(pages, "a number of pages to share", least=1, most=_MOST_PAGES)


def _grant(granter: Grant | int | BareDomain, refs: Sequence[int] | int | None, writable: bool | None) -> Grant:
    if isinstance(granter, Grant):
        if refs is not None:
            raise ValueError("a Grant names its references itself; give a domid to choose others")
        grant = granter if writable is None else granter._replace(writable=writable)
    else:
        chosen = () if refs is None else tuple(refs) if isinstance(refs, Iterable) else (refs,)
        grant = Grant(domid_of(granter), tuple(count_of(ref, "a grant reference") for ref in chosen), bool(writable))
    if not grant.refs:
        raise ValueError("no reference was given; give the granter's domid and its references, or a Grant")
    grant.check()
    return grant
