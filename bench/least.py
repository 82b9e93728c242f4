"""The least that Python has to do for a program's calls: what `gntalloc run` can be measured against.

    python bench/least.py PROGRAM ARGUMENTS…

Serves evtchn, gntalloc and gntdev to one program and its children, from one process that knows nobody else: no machine
and no domains, nothing is checked, nobody is asked who still maps a page, nothing is given back in order. What the
kernel has to do is all there, and done with the parts that `run` has: a call is taken and answered, its argument read
and written, each open file has a home, each ALLOC a memory file, each map is placed by ptrace. An event goes to
whoever else has opened evtchn.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from struct import Struct

from gntalloc.abi.evtchn import NOTIFY
from gntalloc.abi.gntalloc import ALLOC_GREF, DEALLOC_GREF
from gntalloc.abi.gntdev import GET_OFFSET_FOR_VADDR, MAP_GRANT_REF, UNMAP_GRANT_REF
from gntalloc.maps import PAGE_SIZE
from gntalloc.run.files import Piece
from gntalloc.run.filter import filter_program, install
from gntalloc.run.injector import Injector
from gntalloc.syscalls.listener import Call, CallerGone, Listener
from gntalloc.syscalls.memory import Memory
from gntalloc.syscalls.serving import IOCTL, MMAP

MARK = 0x1EA57
INDEX, REFERENCE, OFFSET = Struct("=Q"), Struct("=I"), Struct("=QI")


class Least:
    """Serves what comes to `listener`."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.memory = Memory()
        self.injector = Injector(listener, MARK, lambda *_: None)
        self.epoll = select.epoll()
        self.epoll.register(listener.fileno(), select.EPOLLIN)
        self.homes: dict[int, socket.socket] = {}
        self.bells: dict[int, socket.socket] = {}  # of a thread
        self.page = os.memfd_create("granted")
        os.posix_fallocate(self.page, 0, PAGE_SIZE)
        self.pages = [self.page]  # what an mmap takes: the last one
        self.ioctls = {
            NOTIFY: self.notify,
            ALLOC_GREF: self.alloc,
            DEALLOC_GREF: self.dealloc,
            MAP_GRANT_REF: self.note,
            GET_OFFSET_FOR_VADDR: self.locate,
            UNMAP_GRANT_REF: self.forget,
        }

    def run(self) -> None:
        """Until nobody is left."""
        listener = self.listener.fileno()
        while True:
            for descriptor, events in self.epoll.poll():
                if descriptor != listener:
                    self.homes.pop(descriptor).close()
                elif not events & select.EPOLLIN:
                    return
                elif (call := self.listener.receive()) is not None:
                    try:
                        self.serve(call)
                    except CallerGone:
                        pass

    def serve(self, call: Call) -> None:
        """Answer one."""
        if call.number == IOCTL:
            serve = self.ioctls.get(call.arguments[1])
            self.listener.answer(call, serve(call, call.arguments[2]) if serve else 1)
        elif call.number == MMAP:
            page = os.open(f"/proc/self/fd/{self.pages[-1]}", os.O_RDWR)
            self.injector.place(call, [Piece(0, 0, PAGE_SIZE)], [page])
            os.close(page)
        else:
            self.open(call, call.arguments[1])

    def open(self, call: Call, address: int) -> None:
        """Of openat."""
        path = self.memory.path(call.thread, address)
        if not path.startswith(b"/dev/xen/"):
            self.listener.go_on(call)
            return
        ours, theirs = socket.socketpair()
        self.homes[ours.fileno()] = ours
        self.epoll.register(ours.fileno(), 0)
        if path.endswith(b"evtchn"):
            self.bells[call.thread] = ours
        self.listener.answer_with(call, theirs.fileno(), flags=os.O_CLOEXEC)
        theirs.close()

    def notify(self, call: Call, address: int) -> int:
        """An event for the others."""
        port = self.memory.read(call.thread, address, 4)
        for thread, bell in self.bells.items():
            if thread != call.thread:
                bell.send(port)
        return 0

    def alloc(self, call: Call, address: int) -> int:
        """One page."""
        self.memory.read(call.thread, address, 24)
        page = os.memfd_create("page")
        os.posix_fallocate(page, 0, PAGE_SIZE)
        self.pages.append(page)
        self.memory.write(call.thread, address + 8, INDEX.pack(0) + REFERENCE.pack(8))
        return 0

    def dealloc(self, call: Call, address: int) -> int:
        """What ALLOC made last."""
        self.memory.read(call.thread, address, 16)
        os.close(self.pages.pop())
        return 0

    def note(self, call: Call, address: int) -> int:
        """MAP_GRANT_REF."""
        self.memory.read(call.thread, address, 24)
        self.memory.write(call.thread, address + 8, INDEX.pack(0))
        return 0

    def locate(self, call: Call, address: int) -> int:
        """GET_OFFSET_FOR_VADDR."""
        self.memory.read(call.thread, address, 8)
        self.memory.write(call.thread, address + 8, OFFSET.pack(0, 1))
        return 0

    def forget(self, call: Call, address: int) -> int:
        """UNMAP_GRANT_REF."""
        self.memory.read(call.thread, address, 16)
        return 0


def main() -> int:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        try:
            socket.send_fds(theirs, [b"!"], [install(filter_program(MARK))])
            os.execvp(sys.argv[1], sys.argv[1:])
        finally:
            os._exit(127)
    _, (listener,), _, _ = socket.recv_fds(ours, 1, 1)
    os.set_inheritable(listener, False)
    Least(Listener(listener)).run()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
