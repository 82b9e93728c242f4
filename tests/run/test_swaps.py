"""A map that goes on with its descriptor replaced, under a debugger, and one that comes before it is made.

The kernel does not say when it has looked a descriptor up. Here it takes its time: the call waits a while longer.
"""

from __future__ import annotations

import errno
import os
import select
from typing import TYPE_CHECKING, NoReturn

from held import MARK, PATIENCE, Held, readable, refuse
from runs import python

from gntalloc.embed import Machine
from gntalloc.places import domain_path
from gntalloc.run import debugged
from gntalloc.run import injector as injector_module
from gntalloc.run.files import Files
from gntalloc.run.supervisor import Supervisor
from gntalloc.syscalls.listener import Call, Listener
from gntalloc.syscalls.serving import MMAP

if TYPE_CHECKING:
    import pytest


class Late(Listener):
    """As if the kernel took its time with a map that goes on."""

    late: list[Call] | None = None

    def go_on(self, call: Call) -> None:
        """Not yet."""
        if self.late is None or call.number != MMAP:
            super().go_on(call)
        else:
            self.late.append(call)


TWO_MAPS = """
import threading
f = device('gntalloc'); g = device('gntalloc'); i, _ = alloc(f, 2); j, _ = alloc(g, 2)
libc = ctypes.CDLL(None, use_errno=True); libc.mmap.restype = ctypes.c_void_p
def work(file, index, name):
    at = libc.mmap(None, 4096, 3, 1, file, ctypes.c_long(index))
    if at == 2**64 - 1: say(errno.errorcode[ctypes.get_errno()])
    else: ctypes.memset(at, 1, 4096); say(name, at)
say('ready'); input(); threading.Thread(target=work, args=(f, i, 'first')).start()
for _ in range(2): input(); work(g, j, 'second')
input()
"""


class Supervised:
    """A program under a debugger, whose calls a supervisor of ours serves."""

    def __init__(self, machine: Machine, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
        monkeypatch.setattr(Files, "have_served", lambda *_: None)  # so the supervisor serves
        monkeypatch.setattr(injector_module, "_ptrace", refuse)
        monkeypatch.setattr(debugged, "tell_place", lambda _memory, _mark, at, _length: self.placed.append(str(at)))
        self.told: list[str] = []
        self.placed: list[str] = []
        machine.domain(1)
        self.supervisor = Supervisor(domain_path(machine.folder, 1), say=self.told.append)
        self.held = Held(*python(code), kind=Late)
        assert isinstance(self.held.listener, Late)
        self.listener = self.held.listener
        self.supervisor.begin(self.listener, mark=MARK, died=lambda *_: None)
        self._poll = select.poll()
        self._poll.register(self.listener, select.POLLIN)
        self._poll.register(self.held.output, select.POLLIN)

    def next_line(self) -> str:
        """Serve until the program says something."""
        while self.held.output.fileno() not in dict(self._poll.poll(PATIENCE * 1000)):
            self.supervisor.serve()
        return self.held.said()

    def end(self) -> None:
        """See it leave."""
        self.held.tell("")
        assert self.held.status() == 0
        self.held.end()
        self.supervisor.files.channel.close()


def test_another_map_while_one_may_still_look_for_its_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    with Machine() as machine:
        run = Supervised(machine, monkeypatch, TWO_MAPS)
        late = run.listener
        assert run.next_line() == "ready"
        late.late = []
        run.held.tell("")
        assert readable(late)
        run.supervisor.serve()  # does not wait for it for ever
        assert len(late.late) == 1
        run.held.tell("")
        assert run.next_line() == "EBUSY"
        (text,) = run.told
        assert "while another program traces it" in text
        (call,), late.late = late.late, None
        late.go_on(call)
        name, first = run.next_line().split()
        assert (name, run.placed) == ("first", [])
        run.held.tell("")
        name, second = run.next_line().split()
        assert (name, run.placed) == ("second", [first, second])
        run.end()


def test_a_map_for_which_no_descriptor_is_left_is_refused_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is refused before the program's call goes on, which could not be answered then."""
    with Machine() as machine:
        run = Supervised(machine, monkeypatch, TWO_MAPS)
        assert run.next_line() == "ready"

        def no_room(_: int) -> NoReturn:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(os, "dup", no_room)
            run.held.tell("")
            assert run.next_line() == "EBUSY"
        for _ in range(2):
            run.held.tell("")
            name, at = run.next_line().split()
            assert (name, run.placed.pop()) == ("second", at)
        run.end()
