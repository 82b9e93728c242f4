"""Machine(): a machine of one's own, as a child process. No root, no Xen, no daemon to set up."""

from __future__ import annotations

import errno
import os
import sys
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any, Self

from gntalloc import waits
from gntalloc.claims import claim, sweep, take_away, take_away_lock
from gntalloc.domain import Domain
from gntalloc.errors import GntallocError, MachineBroke, MachineGone
from gntalloc.guest.books import GrantedPage, OpenFile, Statistics
from gntalloc.guest.control import ControlClient
from gntalloc.guest.devices.machine import MachineDevices
from gntalloc.guest.peers import count_of, domid_of
from gntalloc.places import domain_path, lock_path, machine_folder, make_top_folder, store_path
from gntalloc.unclosed import warn_unclosed

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

__all__ = ["Machine"]

_numbers = count(1)

# -I -S: nothing of the user's environment or site-packages gets into the machine, and it starts in half the time.
_CHILD = (
    "import sys; sys.path.append(sys.argv[1]); from gntalloc.machine.process import child_main; "
    "child_main(int(sys.argv[2]), sys.argv[3], sys.argv[4])"
)


class Machine:
    """A machine that lives as long as this object, and no longer than this process.

    Args:
        limit: pages each domain may have granted at once, unless it is given another limit.
        behaviour: "ours", or "linux" for what the real driver does in every row of docs/differences.md.
        strict: refuse what Linux lets pass and nobody can have meant: an ALLOC of no pages, with flags that nobody
            knows, for a number that is no domain's, or for one's own.
        table_frames: how far a grant table may grow, in frames of 512 references.
        verbose: say on standard error why each request that fails does.

    Raises:
        GntallocError: it could not be started; the text says why.
    """

    def __init__(
        self,
        limit: int = 1024,
        behaviour: str = "ours",
        *,
        strict: bool = False,
        table_frames: int = 64,
        verbose: bool = False,
    ) -> None:
        if behaviour not in {"ours", "linux"}:
            raise ValueError(f"behaviour is 'ours' or 'linux', not {behaviour!r}")
        if limit < 0 or not 0 < table_frames <= 1 << 16:
            raise ValueError(f"limit={limit}, table_frames={table_frames}: a limit is 0 or more, a table has a frame")
        make_top_folder()
        sweep()
        self.folder, claimed = _own_folder()
        settings = {
            "limit": limit,
            "behaviour": behaviour,
            "strict": strict,
            "table_frames": table_frames,
            "verbose": verbose,
        }
        try:
            self._process, sock = start_machine(self.folder, claimed, settings)
        except BaseException:
            _remove(self.folder)
            raise
        self._control = ControlClient(self.folder, sock=sock)
        self._owner = os.getpid()
        self._closed = False
        _machines.add(self)
        try:
            self.statistics()
        except MachineGone:
            self.close()
            code = self._process.returncode
            raise GntallocError(
                f"the machine did not start (exit status {code}); `gntalloc doctor` may know why"
            ) from None

    @property
    def pid(self) -> int:
        """Of the machine's process."""
        return self._process.pid

    def domain(self, domid: int, *, limit: int | None = None, uid: int | None = None) -> Domain:
        """Make a domain, or return the one of that number.

        Args:
            domid: 0 to 32751.
            limit: pages it may have granted at once, if not the machine's. `Domain.limit` changes it later.
            uid: whose programs may enter it; this user's if not given. (The folder must let them in.)

        Raises:
            ValueError: the domain is there already, with another limit or uid.
        """
        for value, what in (limit, "a limit"), (uid, "a uid"):
            if value is not None:
                count_of(value, what)
        if type(domid) is not int:  # the machine says of a whole number what it has against it
            domid = domid_of(domid)
        if not self._create(domid, os.getuid() if uid is None else uid, limit):
            self._check_same(domid, limit, uid)
        return Domain(MachineDevices(domain_path(self.folder, domid)))

    def _check_same(self, domid: int, limit: int | None, uid: int | None) -> None:
        """See that a domain that is there already is as it was asked for."""
        if limit is uid is None:
            return
        for domain in self.statistics().domains:
            if domain.domid == domid and (limit not in {None, domain.limit} or uid not in {None, domain.uid}):
                asked = ", ".join(
                    f"{name}={value}" for name, value in (("limit", limit), ("uid", uid)) if value is not None
                )
                raise ValueError(
                    f"domain {domid} cannot be made with {asked}: it is there already, with limit={domain.limit}, "
                    f"uid={domain.uid}. Its limit is changed by setting `limit` of the Domain, its uid never"
                )

    def _create(self, domid: int, uid: int, limit: int | None) -> bool:
        """Make a domain. False: it is there already."""
        path = domain_path(self.folder, domid)
        if os.path.exists(path):
            return False
        try:
            self._control.order("create", domid=domid, uid=uid, limit=limit)
        except GntallocError as error:
            if error.errno != errno.EEXIST or not os.path.exists(path):
                raise
            return False  # another thread was faster
        return True

    def environ(self, domid: int) -> dict[str, str]:
        """Give the environment that puts a program into domain `domid`, which is made if it is not there."""
        if not os.path.exists(domain_path(self.folder, domid)):
            self.domain(domid)
        where = {"GNTALLOC_DOMAIN": domain_path(self.folder, domid), "XENSTORED_PATH": store_path(self.folder, domid)}
        return {**os.environ, **where}

    def statistics(self) -> Statistics:
        """Get the counters of the machine and of each domain."""
        return Statistics.of(self._control.order("statistics"))

    def grants(self) -> list[GrantedPage]:
        """Get every granted page: whose it is, for whom, who maps it."""
        return [GrantedPage.of(each) for each in self._control.order("grants")]

    def files(self) -> list[OpenFile]:
        """Get every open device file: of which domain, who opened it, what is bound and mapped of it."""
        return [OpenFile.of(each) for each in self._control.order("files")]

    def store_connections(self) -> list[dict[str, Any]]:
        """Every connection to xenstore that keeps something: domid, pid, its watches and its open transactions.

        A watch is a path and a token; a transaction is a number and the first path that it has seen, or "". A path of
        more than 200 characters is cut, and after 1,000 watches and transactions there are no more.
        """
        connections = self._control.order("store_connections")
        if type(connections) is not list or not all(type(each) is dict for each in connections):
            raise MachineBroke("the machine's list of connections to xenstore is none; use one gntalloc for both")
        return connections

    def close(self) -> None:
        """End the machine. Pages that are mapped stay valid until they are unmapped."""
        if self._closed:
            return
        self._closed = True
        self._control.close()
        if os.getpid() != self._owner:
            return  # a child made by fork: the machine is its parent's
        try:
            self._process.wait(10)
        except Exception:  # stopped by somebody: it holds nothing that would be lost
            self._process.kill()
            self._process.wait()
        _remove(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, _warn: Callable[[object, int], bool] = warn_unclosed) -> None:
        if not getattr(self, "_closed", True):
            if _warn(self, self._owner):
                self.close()
            else:  # it ends by itself when our socket is closed
                self._process.returncode = 0  # so that Popen has no warning of its own

    def __repr__(self) -> str:
        return f"<Machine {'closed' if self._closed else f'pid {self.pid}'} in {self.folder}>"

    def after_fork_in_child(self) -> None:
        """Leave the machine to the parent: a child must not keep it alive, nor give it orders over this channel."""
        self._closed = True
        self._process.returncode = 0  # it is no child of ours to wait for


def _own_folder() -> tuple[str, int]:
    """Make a folder that no other machine has, and give the descriptor of its lock too."""
    while True:
        folder = machine_folder(f"of-{os.getpid()}-{next(_numbers)}")
        try:
            return folder, claim(folder)
        except FileExistsError:
            pass  # of a process that has our number in another namespace


def start_machine(
    folder: str, claimed: int, settings: dict[str, Any], *, quiet: bool = False
) -> tuple[subprocess.Popen[bytes], waits.Socket]:
    """Start a machine's process in `folder`, which is there and empty. Gives it, and its control channel.

    Args:
        folder: for its sockets.
        claimed: the descriptor of its lock, which is the process's from then on. It is closed here.
        settings: see `child_main` of the machine's process.
        quiet: what it has to say about itself goes nowhere, since it may outlive whoever reads our standard error.
    """
    import json  # only who starts a machine pays for these
    import subprocess

    ours, theirs = waits.socketpair()
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    arguments = [package, str(theirs.fileno()), folder, json.dumps(settings)]
    try:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CHILD, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if quiet else None,
                pass_fds=[theirs.fileno(), claimed],
                start_new_session=True,
            )
    except BaseException:
        ours.close()
        raise
    finally:
        os.close(claimed)
    return process, ours


def _remove(folder: str) -> None:
    try:
        take_away(folder)
    except GntallocError:
        pass
    take_away_lock(lock_path(folder))  # of a `gntalloc run` that joined


_machines: weakref.WeakSet[Machine] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for machine in list(_machines):
        machine.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
