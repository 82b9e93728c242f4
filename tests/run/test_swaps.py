"""A map that goes on with its descriptor replaced, under a debugger, and one that comes before it is made.

The kernel does not say when it has looked a descriptor up. Here it takes its time: the call waits a while longer.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

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


def test_another_map_while_one_may_still_look_for_its_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Files, "have_served", lambda *_: None)  # so the supervisor serves
    monkeypatch.setattr(injector_module, "_ptrace", refuse)
    told: list[str] = []
    placed: list[str] = []
    monkeypatch.setattr(debugged, "tell_place", lambda _memory, _mark, address, _length: placed.append(str(address)))
    with Machine() as machine:
        machine.domain(1)
        supervisor = Supervisor(domain_path(machine.folder, 1), say=told.append)
        held = Held(*python(TWO_MAPS), kind=Late)
        late = held.listener
        assert isinstance(late, Late)
        supervisor.begin(late, mark=MARK, died=lambda *_: None)
        poll = select.poll()
        poll.register(late, select.POLLIN)
        poll.register(held.output, select.POLLIN)

        def next_line() -> str:
            while held.output.fileno() not in dict(poll.poll(PATIENCE * 1000)):
                supervisor.serve()
            return held.said()

        assert next_line() == "ready"
        late.late = []
        held.tell("")
        assert readable(late)
        supervisor.serve()  # does not wait for it for ever
        assert len(late.late) == 1
        held.tell("")
        assert next_line() == "EBUSY"
        (text,) = told
        assert "while another program traces it" in text
        (call,), late.late = late.late, None
        late.go_on(call)
        name, first = next_line().split()
        assert (name, placed) == ("first", [])
        held.tell("")
        name, second = next_line().split()
        assert (name, placed) == ("second", [first, second])
        held.tell("")
        assert held.status() == 0
        held.end()
        supervisor.files.channel.close()
