"""Serve the system calls of a `run` in the machine itself: they come straight to its loop.

That is for programs of the machine's own user only. A look into a program may wait for another process that fills the
program's memory. A user who can hold the machine up so must be one who could stop it anyway: kill(2) asks for no more
than the same user, in a user namespace too. Programs of other users are served by their run's supervisor, which asks
the machine for each call.

A step that waits by design is left to the supervisor here too: it places maps, by ptrace. The supervisor also takes
over for good if the kernel does not let us look into a program (Yama: only its parent may), or another program traces
it (strace, gdb).

If we die, the supervisor fails the calls that we had taken and not answered. The kernel has noted these calls in a page
that the supervisor can read, and that no other process but ours could write to.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

from gntalloc import clock
from gntalloc.abi import privcmd
from gntalloc.abi.evtchn import NOTIFY, Notify
from gntalloc.abi.gntdev import MAP_GRANT_REF
from gntalloc.drivers.chardev import Plan
from gntalloc.errors import DeviceError
from gntalloc.machine.loop import READABLE
from gntalloc.machine.speaker import MESSAGES_A_TURN, RUNNABLE, Dropped
from gntalloc.maps import PAGE_SIZE
from gntalloc.steps import finish_steps
from gntalloc.syscalls.arguments import regions_of
from gntalloc.syscalls.listener import NOTES_SIZE, CallerGone, Listener
from gntalloc.syscalls.memory import Denied, Memory
from gntalloc.syscalls.serving import IOCTL, Serving, is_shared
from gntalloc.wire.memory import MessageCaller

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from gntalloc.drivers.chardev import Caller, File
    from gntalloc.machine.homes import Homes
    from gntalloc.machine.machine import Guest
    from gntalloc.machine.speaker import Speaker
    from gntalloc.steps import Steps
    from gntalloc.syscalls.listener import Call
    from gntalloc.wire.memory import Region

__all__ = ["Handover", "OpenStore", "Syscalls", "is_listener", "may_be_served", "process_namespace"]

log = logging.getLogger("gntalloc.machine")

# Requests that name memory beside their argument, any amount of it. The memory that goes along with them has a limit.
_FAR = frozenset({privcmd.HYPERCALL})
_LISTENER = "anon_inode:seccomp notify"
_CALLS_WAIT = READABLE | RUNNABLE
_MOST_BELLS = 256
_AT_ONCE = 16 * PAGE_SIZE  # bytes of a map that takes no steps
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | 0x10  # and F_SEAL_FUTURE_WRITE


def process_namespace() -> int:
    """Give a number that tells our numbers of processes from those of another container."""
    return os.stat("/proc/self/ns/pid").st_ino


def may_be_served(uid: int, namespace: int) -> bool:
    """Say whether we serve calls for a supervisor of that user, whose numbers of processes are of that namespace."""
    return uid == os.getuid() and namespace == process_namespace()


def is_listener(descriptor: int) -> bool:
    """Say whether this is a listener. No fstat(2) is made: of a file on FUSE it may wait for another program."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}") == _LISTENER
    except OSError:
        return False


class Handover(Protocol):
    """Hand calls that the machine does not answer itself to the supervisor."""

    def place(self, call: Call, plan: Plan, process: int) -> Steps[None]:
        """Have the supervisor answer this mmap with these pages."""

    def take_over(self, call: Call) -> None:
        """Have the supervisor answer this call and all that follow."""


class OpenStore(Protocol):
    """Open a connection to xenstore as process `opener` of a domain, and return the program's end."""

    def __call__(self, guest: Guest, *, opener: int) -> socket.socket:
        """Open a connection.

        Raises:
            DeviceError: EMFILE: it cannot be opened.
        """


class Syscalls:
    """Serve the calls of one run: be their `Speaker`, and their `Files`.

    Args:
        guest: the run's domain.
        descriptor: the listener; ours from now on.
        homes: the homes of open files.
        open_store: opens /dev/xen/xenbus.
        supervisor: answers the calls that are not answered here.
    """

    companion: Speaker | None = None
    weight = 0
    standing = READABLE

    def __init__(
        self, guest: Guest, descriptor: int, homes: Homes, open_store: OpenStore, supervisor: Handover
    ) -> None:
        self._guest = guest
        self._homes = homes
        self._open_store = open_store
        self._supervisor = supervisor
        with os.fdopen(os.memfd_create("gntalloc calls", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "rb") as notes:
            os.ftruncate(notes.fileno(), NOTES_SIZE)
            self._page = mmap.mmap(notes.fileno(), NOTES_SIZE)
            fcntl.fcntl(notes, fcntl.F_ADD_SEALS, _SEALS)
            self.notes = os.dup(notes.fileno())
        self._listener = Listener(descriptor, memoryview(self._page))
        self._serving = Serving(self._listener, self, say=log.error, one_user=True)
        self._memory = Memory()
        self._taken: deque[Call] = deque()
        self._admitted = 0
        self._rest: tuple[Call, Steps[None]] | None = None  # the call that is served in part
        self._bells: dict[tuple[int, int], File] = {}  # (thread, descriptor) -> a file of evtchn: see _notify

    # As a Speaker.

    def fileno(self) -> int:
        """Give the listener. See `Speaker`."""
        return self._listener.fileno()

    def receive(self, events: int) -> None:
        """Take one call.

        Raises:
            Dropped: no process is left that could make one.
        """
        if not events & READABLE:
            raise Dropped("nobody is left in that run")
        call = self._listener.receive()
        if call is not None:
            self._taken.append(call)
            self.standing = _CALLS_WAIT

    def flush(self) -> None:
        """See `Speaker`. Answers never wait."""

    def stalled(self, now: float) -> bool:
        """See `Speaker`. A run's supervisor may stall; its calls do not."""
        return False

    def admit(self) -> None:
        """See `Speaker`."""
        self._admitted = len(self._taken)

    def take_turn(self, until: float) -> None:
        """Answer calls, or have the supervisor answer them."""
        taken = self._taken
        left = min(self._admitted, MESSAGES_A_TURN)
        if self._rest is not None:
            self._go_on(*self._rest, until)
        while left and taken and self._rest is None:  # none is left once the supervisor has taken over
            left -= 1
            call = taken.popleft()
            try:
                if not (call.arguments[1] == NOTIFY and self._notify(call)):
                    steps = self._serving.serve(call)
                    if steps is not None:
                        self._go_on(call, steps, until)
            except Denied:
                self._supervisor.take_over(call)
            if clock.now() >= until:
                break
        if not taken and self._rest is None:
            self.standing = READABLE

    def _go_on(self, call: Call, steps: Steps[None], until: float) -> None:
        """Take steps of a call: one, and more until then. What is left is taken at the next turn."""
        self._rest = None
        try:
            next(steps)
            while clock.now() < until:
                next(steps)
        except StopIteration:
            return
        except Denied:
            self._supervisor.take_over(call)
            return
        self._rest = call, steps

    def take_back(self) -> Call | None:
        """Give back the next of the calls that were taken and are not served. None: there is none."""
        return self._taken.popleft() if self._taken else None

    def fail(self, call: Call) -> None:
        """Let a call fail that no process can serve."""
        with suppress(CallerGone):
            self._listener.answer(call, -errno.EIO)

    def close(self) -> None:
        """Stop serving. Calls that were not taken back fail, or their callers would wait for ever."""
        if self._rest is not None:
            unfinished, steps = self._rest
            steps.close()
            self.fail(unfinished)
        while (call := self.take_back()) is not None:
            self.fail(call)
        self._listener.close()
        self._page.close()  # it has a descriptor
        self._serving.close()

    def _notify(self, call: Call) -> bool:
        """Serve NOTIFY the short way: it comes more often than all other calls together. False: take the long way.

        The long way finds out which file the descriptor is. The short way assumes the file that it was when this thread
        last went the long way. If it is another by now, its port is not that file's, unless the program is wrong.
        """
        file = self._bells.get((call.thread, call.arguments[0]))
        if file is None or file.closed or call.number != IOCTL:
            return False
        argument = self._memory.read(call.thread, call.arguments[2], Notify.SIZE)
        if len(argument) < Notify.SIZE or not self._guest.evtchn.ring(file, argument):
            return False
        try:
            self._listener.answer(call, 0)
        except CallerGone:
            pass
        return True

    # As `Files`.

    def open(self, process: int, name: str, flags: int) -> socket.socket:
        """See `Files`."""
        with self._told(process):
            return self._homes.open(self._guest, name, flags, opener=process)[1]

    def open_store(self, process: int) -> socket.socket:
        """See `Files`."""
        with self._told(process):
            return self._open_store(self._guest, opener=process)

    def find(self, thread: int, descriptor: int, identity: tuple[int, int]) -> File | None:
        """See `Files`."""
        return self._homes.file_of(self._guest, identity)

    def name(self, file: File) -> str:
        """See `Files`."""
        return file.driver.name

    def ioctl(self, call: Call, process: int, file: File) -> int | Steps[int]:
        """See `Files`."""
        _, request, address, *_ = call.arguments
        request &= 0xFFFFFFFF
        if request == MAP_GRANT_REF and self._serving.is_traced(call.thread):
            raise Denied
        caller: Caller
        if request in _FAR:
            there = regions_of(file.driver.name, request, address, self._memory, call.thread)
            caller = MessageCaller(there, process=process)
        else:
            caller, there = _Program(self, call, process), []
        if request == NOTIFY and file.driver is self._guest.evtchn:
            if len(self._bells) >= _MOST_BELLS:
                self._bells.clear()
            self._bells[call.thread, call.arguments[0]] = file
        try:
            result = file.begin_ioctl(request, address, caller)
        except DeviceError as refusal:
            result = self._refused(process, refusal)
        if isinstance(result, int):
            return self._put_back(call, there, result) if there else result
        return self._ioctl_in_steps(call, process, result, there)

    def _ioctl_in_steps(self, call: Call, process: int, steps: Steps[int], there: list[Region]) -> Steps[int]:
        try:
            result = yield from steps
        except DeviceError as refusal:
            result = self._refused(process, refusal)
        return self._put_back(call, there, result)

    def _refused(self, process: int, refusal: DeviceError) -> int:
        log.debug("domain %d, pid %d: %s", self._guest.domid, process, refusal)
        return -(refusal.errno or errno.EIO)

    def _put_back(self, call: Call, there: list[Region], result: int) -> int:
        """Write what a driver has written to memory beside the argument, and give the result."""
        for region in there:
            if region.written and not self.put(call, region.address, region.data):
                result = -errno.EFAULT  # it was writable a moment ago: another thread of the program has changed that
        return result

    def get(self, call: Call, address: int, size: int) -> bytes:
        """Read so much of the caller's memory, or less."""
        return self._memory.read(call.thread, address, size)

    def put(self, call: Call, address: int, data: bytes | bytearray) -> bool:
        """Write to the caller's memory, if the caller is still there. Return whether all could be written."""
        return self._listener.waits(call) and self._memory.write(call.thread, address, bytes(data)) == len(data)

    def map(self, call: Call, process: int, file: File) -> Steps[None] | None:
        """See `Files`."""
        if self._serving.is_traced(call.thread):
            raise Denied
        length = call.arguments[1]
        steps = self._map_in_steps(call, process, file)
        if length > _AT_ONCE:
            return steps
        finish_steps(steps)
        return None

    def _map_in_steps(self, call: Call, process: int, file: File) -> Steps[None]:
        _address, length, prot, flags, _descriptor, offset = call.arguments
        with self._told(process):
            work = file.begin_mmap(offset, length, prot=prot & 0xFFFFFFFF, shared=is_shared(flags))
            plan = work if isinstance(work, Plan) else (yield from work)
            yield from self._supervisor.place(call, plan, process)

    @contextmanager
    def _told(self, process: int) -> Iterator[None]:
        """Log the reasons of refusals that the program gets as an errno alone, but for devices that are not ours."""
        try:
            yield
        except DeviceError as refusal:
            if refusal.errno != errno.ENOENT:
                log.debug("domain %d, pid %d: %s", self._guest.domid, process, refusal)
            raise


class _Program:
    """Give drivers the memory of a program."""

    __slots__ = ("_call", "_calls", "process")

    by_offset = False  # a program whose maps are so is served by its supervisor

    def __init__(self, calls: Syscalls, call: Call, process: int) -> None:
        self.process = process
        self._calls = calls
        self._call = call

    def read(self, address: int, size: int) -> bytes:
        """See `Caller`."""
        data = self._calls.get(self._call, address, size)
        if len(data) < size:
            raise DeviceError(errno.EFAULT, f"the {size} bytes at {address:#x} are not all in the caller's memory")
        return data

    def write(self, address: int, data: bytes) -> None:
        """See `Caller`."""
        if not self._calls.put(self._call, address, data):
            raise DeviceError(errno.EFAULT, f"the {len(data)} bytes at {address:#x} cannot all be written")
