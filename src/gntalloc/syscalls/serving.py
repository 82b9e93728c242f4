"""Serve system calls: opens, ioctls and maps of /dev/xen, and of nothing else.

Two processes serve so: a run's supervisor, which asks the machine for each call (run/files.py), and the machine itself,
which has the files (machine/syscalls.py).
"""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from gntalloc.abi.evtchn import DEVICE as EVTCHN
from gntalloc.abi.evtchn import RESET
from gntalloc.descriptors import inode_of_socket
from gntalloc.errors import GntallocError
from gntalloc.syscalls.listener import CallerGone
from gntalloc.syscalls.memory import Denied, Memory
from gntalloc.syscalls.threads import Threads, fetch
from gntalloc.unasked import Disposal

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.steps import Steps
    from gntalloc.syscalls.listener import Call, Listener

__all__ = [
    "CHANGES_OF_USER",
    "IOCTL",
    "MMAP",
    "OPEN",
    "OPENAT",
    "Files",
    "Home",
    "Serving",
    "Witness",
    "is_shared",
]

OPEN, MMAP, IOCTL, OPENAT = 2, 9, 16, 257  # x86-64's numbers
CHANGES_OF_USER = 105, 113, 117, 122  # setuid, setreuid, setresuid, setfsuid

_FOLDER = b"/dev/xen/"
_STORE = "xenbus"
_LOW_INT = 0xFFFFFFFF

_MAP_SHARED_BITS = 0x03  # MAP_SHARED, MAP_PRIVATE; both are MAP_SHARED_VALIDATE
_MAP_PRIVATE = 0x02

F = TypeVar("F")


class Home(Protocol):
    """Hold a program's end of an open file, until the program has it."""

    def fileno(self) -> int:
        """Give the number of the descriptor."""

    def close(self) -> None:
        """Close our copy, as the program has its own."""


class Files(Protocol[F]):
    """Give the open device files of a domain. F is one of them. Each method may raise GntallocError with the errno."""

    def open(self, process: int, name: str, flags: int) -> Home:
        """Open a device. ENOENT: no device has that name."""

    def open_store(self, process: int) -> socket.socket | None:
        """Connect to the domain's xenstore for this process, if the domain has one."""

    def find(self, thread: int, descriptor: int, identity: tuple[int, int]) -> F | None:
        """Find the file whose home is that descriptor."""

    def name(self, file: F) -> str:
        """Give the name of the device."""

    def ioctl(self, call: Call, process: int, file: F) -> int | Steps[int]:
        """Carry out this ioctl. Return its result or a negative errno, or the steps to that."""

    def map(self, call: Call, process: int, file: F) -> Steps[None] | None:
        """Carry out this mmap, and answer it, or give the steps to that."""


class Witness(Protocol):
    """Hear of calls that fail, and of calls on a device that are left to the kernel."""

    def refused(self, call: Call, what: str, refusal: OSError) -> None:
        """Hear that an open or an mmap has failed."""

    def not_served(self, call: Call, what: str, why: str) -> None:
        """Hear that a call is left to the kernel."""


def is_shared(flags: int) -> bool:
    """Say whether an mmap with these flags is shared."""
    return flags & _MAP_SHARED_BITS != _MAP_PRIVATE


class Serving(Generic[F]):
    """Serve the calls of `listener` with `files`.

    Args:
        listener: brings the calls.
        files: the device files of the domain.
        say: is told of our own faults.
        one_user: stop when the program becomes another user's.
        witness: is told of calls that fail. The filter brings all opens and maps here then.
        all_opens: serve also opens for reading only, and private maps, if the filter brings them here.
    """

    def __init__(
        self,
        listener: Listener,
        files: Files[F],
        *,
        say: Callable[[str], None],
        one_user: bool = False,
        witness: Witness | None = None,
        all_opens: bool = True,
    ) -> None:
        self._one_user = one_user
        self._witness = witness
        self._all_opens = all_opens
        self._memory = Memory()
        self._listener = listener
        self._files = files
        self._say = say
        self._threads = Threads()
        self._disposal = Disposal()
        self._serve: dict[int, Callable[[Call], Steps[None] | None]] = {
            IOCTL: self._ioctl,
            MMAP: self._mmap,
            OPEN: lambda call: self._open(call, call.arguments[0], call.arguments[1]),
            OPENAT: lambda call: self._open(call, call.arguments[1], call.arguments[2]),
            **dict.fromkeys(CHANGES_OF_USER, self._change_user),
        }

    def serve(self, call: Call) -> Steps[None] | None:
        """Answer a call, or give the steps to that.

        Raises:
            Denied: the kernel does not let us look into this program. The call is not answered.
        """
        try:
            steps = self._serve[call.number](call)
        except Denied:
            raise
        except Exception as error:
            self._fail(call, error)
            return None
        return None if steps is None else self._go_through(call, steps)

    def _go_through(self, call: Call, steps: Steps[None]) -> Steps[None]:
        try:
            yield from steps
        except Denied:
            raise
        except Exception as error:
            self._fail(call, error)

    def _fail(self, call: Call, error: Exception) -> None:
        """Answer a call that cannot be served. No caller waits for the answer if it is gone."""
        try:
            if isinstance(error, GntallocError):
                self._refuse(call, error)
            elif not isinstance(error, CallerGone):
                # A fault of ours. The caller must not wait for ever.
                self._say(f"a call of thread {call.thread} could not be served: {error!r}")
                self._listener.answer(call, -errno.EIO)
        except CallerGone:
            pass

    def _refuse(self, call: Call, refusal: GntallocError, what: str = "a device") -> None:
        if self._witness is not None:
            self._witness.refused(call, what, refusal)
        self._listener.answer(call, -(refusal.errno or errno.EIO))

    def is_traced(self, thread: int) -> bool:
        """Say whether a debugger traces the caller that is being served."""
        return self._threads.is_traced(thread)

    def close(self) -> None:
        """Forget all threads of the program."""
        self._threads.close()

    def _open(self, call: Call, path: int, flags: int) -> None:
        name = self._memory.path(call.thread, path)
        if not name.startswith(_FOLDER) or flags & os.O_PATH:
            self._listener.go_on(call)
            return
        device = name[len(_FOLDER) :].decode(errors="replace")
        if not self._all_opens and flags & (os.O_ACCMODE | os.O_CREAT) != os.O_RDWR:
            self._leave(call, f"an open of {device}", "only opens with O_RDWR and without O_CREAT are, or --all-opens")
            return
        try:
            home = self._open_store(call, flags) if device == _STORE else self._open_device(call, device, flags)
        except GntallocError as error:
            if error.errno != errno.ENOENT:
                self._refuse(call, error, device)
            else:
                self._leave(call, f"an open of {device}", str(error))  # the kernel itself answers so
            return
        try:
            self._listener.answer_with(call, home.fileno(), flags=flags & os.O_CLOEXEC)
        except OSError as error:
            self._listener.answer(call, -(error.errno or errno.EMFILE))
        finally:
            home.close()

    def _leave(self, call: Call, what: str, why: str) -> None:
        if self._witness is not None:
            self._witness.not_served(call, what, why)
        self._listener.go_on(call)

    def _open_device(self, call: Call, device: str, flags: int) -> Home:
        return self._files.open(self._threads.process_now(call.thread), device, flags & _LOW_INT)

    def _open_store(self, call: Call, flags: int) -> Home:
        """Open the xenstore device. It gives what the daemon's socket gives, so the file is a connection to that."""
        sock = self._files.open_store(self._threads.process_now(call.thread))
        if sock is None:
            raise GntallocError(errno.ENOENT, "this domain has no xenstore")
        if flags & os.O_DIRECTORY:
            sock.close()
            raise GntallocError(errno.ENOTDIR, f"{_STORE} is a device, and was opened with O_DIRECTORY or O_TMPFILE")
        os.set_blocking(sock.fileno(), not flags & os.O_NONBLOCK)
        return sock

    def _ioctl(self, call: Call) -> Steps[None] | None:
        _, thread, _, arguments = call
        descriptor = arguments[0] & _LOW_INT
        identity = self._threads.identity(thread, descriptor)
        file = None if identity is None else self._files.find(thread, descriptor, identity)
        if file is None:
            self._listener.go_on(call)
            return None
        process = self._threads.process(thread)
        if arguments[1] & _LOW_INT == RESET and self._files.name(file) == EVTCHN:
            self._empty(fetch(thread, descriptor), identity)
        result = self._files.ioctl(call, process, file)
        if not isinstance(result, int):
            return self._answer_in_steps(call, result)
        self._listener.answer(call, result)
        return None

    def _answer_in_steps(self, call: Call, steps: Steps[int]) -> Steps[None]:
        self._listener.answer(call, (yield from steps))

    def _empty(self, home: int, identity: tuple[int, int] | None) -> None:
        """Throw away the events on a home, if `home` still is that: the machine cannot take them back."""
        if home < 0:
            return
        if identity is None or inode_of_socket(home) != identity[1]:
            self._disposal.close([home])  # the program has another file there now, which may be slow to close
            return
        with socket.socket(fileno=home) as sock:
            try:
                while sock.recv(4096, socket.MSG_DONTWAIT):
                    pass
            except OSError:
                pass  # nothing is left

    def _change_user(self, call: Call) -> None:
        """Let a program change its user, and stop serving it here: the server must not wait for another user's."""
        if self._one_user:
            raise Denied
        self._listener.go_on(call)

    def _mmap(self, call: Call) -> Steps[None] | None:
        descriptor = call.arguments[4] & _LOW_INT
        identity = self._threads.identity(call.thread, descriptor)
        file = None if identity is None else self._files.find(call.thread, descriptor, identity)
        if file is None:
            self._listener.go_on(call)
            return None
        device = self._files.name(file)
        if not self._all_opens and not is_shared(call.arguments[3]):
            self._leave(call, f"a private map of {device}", "only shared maps are, or --all-opens")
            return None
        try:
            steps = self._files.map(call, self._threads.process(call.thread), file)
        except GntallocError as error:
            self._refuse(call, error, device)
            return None
        return None if steps is None else self._map_in_steps(call, device, steps)

    def _map_in_steps(self, call: Call, device: str, steps: Steps[None]) -> Steps[None]:
        try:
            yield from steps
        except GntallocError as error:
            self._refuse(call, error, device)
