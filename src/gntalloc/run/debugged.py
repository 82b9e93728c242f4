"""Serve an mmap under a debugger: the caller makes its own call, while its descriptor is the pages' memory.

A thread has one tracer, so a thread that strace or gdb traces cannot be made to call mmap by run/injector.py. But the
descriptor of a caller that waits can be replaced. So the memory file takes the device's number, the call goes on, and
the device is put back at the next call that comes from there. The call is the caller's own, at the offset that it asks
for. So this works where the pages are in one memory file, in order, and at just that offset. The machine chooses
indexes so that this is so, as far as it can (`Caller.by_offset`, `Extent.first`).

The kernel looks the descriptor up some time after the call went on, and does not say when. So no descriptor of a
process is replaced as long as an mmap of it may still be looking. Another mmap that comes then is refused: better no
pages than wrong ones.

Meanwhile the descriptor has another inode, which many descriptors may share. It is recognised by the position in the
file, which no map moves: that has the number of the device file.

Sources: seccomp_unotify(2); proc_pid_fdinfo(5), proc_pid_maps(5), proc_pid_syscall(5).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.clock import Deadline
from gntalloc.descriptions import lock_place
from gntalloc.syscalls.serving import MMAP
from gntalloc.syscalls.threads import leader_of

if TYPE_CHECKING:
    from gntalloc.syscalls.listener import Call, Listener

__all__ = ["Place", "Swaps", "tell_place"]

_MARK = 1 << 62  # marks a position as ours; the lower bits are the number of a device file
_MOST_KNOWN = 4096
_PATIENCE = 0.2  # seconds to wait for the map; later it is looked for at the process's next call
_MAP_FIXED = 0x10
_LOW_INT = 0xFFFFFFFF


class Place(NamedTuple):
    """Name the memory from which an mmap takes its pages."""

    memory: int  # a descriptor of ours, with a description of its own
    offset: int
    handle: int  # of the device file
    mark: int  # see `descriptions.lock_place`; 0: the place is not locked
    length: int


class _Unfinished(NamedTuple):
    """Keep an mmap that has gone on, and was not seen to be done."""

    call: Call
    inode: int
    place: Place  # its memory is a descriptor of the same description, to be closed at the end
    before: frozenset[int]  # the addresses where the same pages were mapped already


class Swaps:
    """Keep the replaced descriptors of one run.

    Args:
        listener: brings the run's calls.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._away: set[tuple[int, int]] = set()  # inode of the memory, number of the device file
        self._unfinished: dict[int, _Unfinished] = {}  # by process

    def free(self, process: int) -> bool:
        """Say whether descriptors of this process may be replaced."""
        return process not in self._unfinished

    def place(self, call: Call, process: int, place: Place) -> None:
        """Let the mmap `call` go on with its descriptor replaced. The place is locked when it is seen, now or later.

        Raises:
            OSError: the descriptor could not be replaced. The call is not answered.
            CallerGone: the caller is gone.
        """
        descriptor, offset = call.arguments[4] & _LOW_INT, call.arguments[5]
        assert place.offset == offset
        assert self.free(process)
        place = place._replace(memory=os.dup(place.memory))
        try:
            inode = os.fstat(place.memory).st_ino
            os.lseek(place.memory, _MARK + place.handle, os.SEEK_SET)
            before = frozenset(_maps_of(call.thread, inode, offset))
            self._listener.replace(call, place.memory, descriptor, flags=_close_on_exec(call.thread, descriptor))
            if len(self._away) >= _MOST_KNOWN:
                self._away.clear()
            self._away.add((inode, place.handle))
            self._listener.go_on(call)
        except BaseException:
            os.close(place.memory)
            raise
        self._unfinished[process] = _Unfinished(call, inode, place, before)
        deadline = Deadline(_PATIENCE)
        while not self._see(process, call.thread, left=False) and not deadline.expired:
            time.sleep(0.0002)  # no event tells

    def find(self, thread: int, descriptor: int, inode: int) -> int | None:
        """Find the number of the device file that this descriptor was, if it was replaced here."""
        if not self._away:
            return None
        handle = int(_details(thread, descriptor).get("pos", "0")) - _MARK
        return handle if (inode, handle) in self._away else None

    def bring_back(self, call: Call, descriptor: int, home: int) -> None:
        """Put the device back in place of the memory."""
        self._listener.replace(call, home, descriptor, flags=_close_on_exec(call.thread, descriptor))

    def look(self, call: Call) -> None:
        """See whether the mmap of a process is done, as another call of it has come."""
        if not self._unfinished:
            return
        process = leader_of(call.thread)
        for other, unfinished in list(self._unfinished.items()):
            if other == process:
                self._see(process, call.thread, left=unfinished.call.thread == call.thread)
            elif not os.path.exists(f"/proc/{other}"):
                self._see(other, other, left=True)

    def _see(self, process: int, thread: int, *, left: bool) -> bool:
        """Say whether the mmap of a process is done, and tell of it then.

        `thread` is a thread of it that lives. With `left` the mmap is surely done.
        """
        call, inode, place, before = self._unfinished[process]
        left = left or _has_left(call.thread)
        there = _maps_of(thread, inode, place.offset) - before
        if call.arguments[3] & _MAP_FIXED and left:
            there = _maps_of(thread, inode, place.offset) & {call.arguments[0]}
        if not there and not left:
            return False
        del self._unfinished[process]
        if there:
            tell_place(place.memory, place.mark, there.pop(), place.length)
        os.close(place.memory)
        return True


def tell_place(descriptor: int, mark: int, address: int, length: int) -> None:
    """Let the kernel tell the machine that the program has these pages at `address`. With mark 0 it does not ask."""
    if mark:
        with suppress(OSError):  # then the machine does not know it, and says so to those that ask
            lock_place(descriptor, mark, address, length)


def _details(thread: int, descriptor: int) -> dict[str, str]:
    try:
        with open(f"/proc/{thread}/fdinfo/{descriptor}") as file:
            return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}
    except OSError:
        return {}


def _close_on_exec(thread: int, descriptor: int) -> int:
    return int(_details(thread, descriptor).get("flags", "0"), 8) & os.O_CLOEXEC


def _maps_of(thread: int, inode: int, offset: int) -> set[int]:
    """List the addresses where this memory file is mapped from this offset on."""
    found: set[int] = set()
    try:
        with open(f"/proc/{thread}/maps") as file:
            for line in file:
                addresses, _, at, _, number, *name = line.split(maxsplit=5)
                if int(number) == inode and int(at, 16) == offset and "memfd:" in name[0]:
                    found.add(int(addresses.partition("-")[0], 16))
    except OSError:
        pass  # it is dead
    return found


def _has_left(thread: int) -> bool:
    """Say whether a thread has surely come out of its mmap: it sleeps in another call, is stopped, or dead."""
    try:
        with open(f"/proc/{thread}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
        if state in "tTZX":  # no thread can be stopped inside an mmap
            return True
        with open(f"/proc/{thread}/syscall") as file:
            number = file.read().split()[0]
    except OSError:
        return True
    return number not in {"running", str(MMAP)}
