"""Serves one `run`: a process beside the program, one thread around one poll.

Where the machine is of the same user it serves the program's calls itself (machine/served.py), and what is left to us
are the maps, which are placed by ptrace. Else we serve all of them, as a program in the domain like any other: a
program's memory may be another program's to fill in (userfaultfd, FUSE), and a thread under ptrace may not stop for
long; that holds up this process, which serves nobody else, and never the machine.
"""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING

from gntalloc.calls.listener import NOTES_SIZE, CallerGone
from gntalloc.calls.memory import Denied, Memory
from gntalloc.calls.serving import Serving
from gntalloc.errors import MachineGone
from gntalloc.run.injector import Injector, Traced
from gntalloc.run.machine import Files

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.calls.listener import Call, Listener
    from gntalloc.run.machine import OpenFile, Plan

__all__ = ["Supervisor"]


class Supervisor:
    """Serves the calls of `listener`, or has them served.

    Args:
        path: of the domain's socket.
        say: tells the user something.

    Raises:
        NoMachine: nobody answers there.
    """

    def __init__(self, path: str, *, say: Callable[[str], None]) -> None:
        self.files = Files(path, self._place, self._waits)
        self.serves = True
        """Whether it is us who take the calls; else the machine does, and says what is left to us."""
        self._say = say
        self._said: set[str] = set()
        self._notes: mmap.mmap | None = None

    def begin(self, listener: Listener, *, mark: int, died: Callable[[int, int], None]) -> None:
        """Have the calls served.

        Args:
            listener: where they come from.
            mark: the filter's.
            died: told of threads whose end we saw in passing: see Injector.
        """
        self._listener = listener
        self._serving: Serving[OpenFile] = Serving(listener, self.files, say=self._say_once)
        self._injector = Injector(listener, mark, died, Memory().read)
        notes = self.files.have_served(listener.fileno())
        if notes is not None:
            self._notes = mmap.mmap(notes.fileno(), NOTES_SIZE, prot=mmap.PROT_READ)
            notes.close()
            self.serves = False

    def serve(self) -> None:
        """Answer one call."""
        call = self._listener.receive()
        if call is not None:
            self._serve(call)

    def hear(self) -> None:
        """The machine has handed something over, or has ended."""
        while True:
            try:
                call, plan = self.files.brought()
            except MachineGone:
                self.serves = True
                assert self._notes is not None
                self._listener.fail_all(memoryview(self._notes), errno.EIO)
                return
            if plan is None:
                self.serves = True
                self._serve(call)
            else:
                try:
                    self._place(call, plan)
                except CallerGone:
                    pass
            if not self.files.channel.has_heard:
                return

    def _waits(self, call: Call) -> bool:
        return self._listener.waits(call)

    def _serve(self, call: Call) -> None:
        try:
            self._serving.serve(call)
        except Denied:
            self._listener.go_on(call)  # it can be nobody's whom we serve

    def _place(self, call: Call, plan: Plan) -> None:
        try:
            numbers = [descriptor.fileno() for descriptor in plan.descriptors]
            self._injector.place(call, plan.pieces, numbers, lambda address: self.files.placed(plan, address))
        except Traced:
            self._say_once(
                f"process {call.thread} maps pages while another program traces it (gdb, strace): they cannot be "
                "placed; detach while it maps"
            )
            self._listener.answer(call, -errno.EBUSY)
        finally:
            for each in plan.descriptors:
                each.close()

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)
