"""Serve one `run`: a process beside the program, one thread around one poll.

A machine of the same user serves the program's calls itself (machine/syscalls.py), and leaves only the maps to the
supervisor, which places them by ptrace. Otherwise the supervisor serves all calls, as a program in the domain like any
other. Some calls may wait for long: another program may have to fill a program's memory in (userfaultfd, FUSE), and a
thread under ptrace may not stop soon. That holds up this process, which serves no other run, and never the machine.
"""

from __future__ import annotations

import errno
import mmap
from contextlib import suppress
from typing import TYPE_CHECKING

from gntalloc.errors import GntallocError
from gntalloc.run.debugged import Place, Swaps, tell_place
from gntalloc.run.explain import Explainer
from gntalloc.run.files import Files
from gntalloc.run.injector import Injector, Traced
from gntalloc.syscalls.listener import NOTES_SIZE, CallerGone
from gntalloc.syscalls.memory import Denied
from gntalloc.syscalls.serving import Serving
from gntalloc.syscalls.threads import leader_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.run.files import OpenFile, Plan
    from gntalloc.syscalls.listener import Call, Listener

__all__ = ["Supervisor"]


class Supervisor:
    """Serve the calls of `listener`, or have them served.

    Args:
        path: the path of the domain's socket.
        say: tells the user a line.
        explain: say why each failing call fails.
        all_opens: see `run`.

    Raises:
        NoMachine: nobody answers there.
    """

    def __init__(
        self, path: str, *, say: Callable[[str], None], explain: bool = False, all_opens: bool = False
    ) -> None:
        self.files = Files(path, self._place, self._waits)
        self.serves = True
        """Whether this process takes the calls. Otherwise the machine does, and hands over those that are left."""
        self._say = say
        self._all_opens = all_opens
        self._explainer = self.files.explainer = Explainer(say) if explain else None
        self._said: set[str] = set()
        self._notes: mmap.mmap | None = None  # of calls that the machine takes, as long as it may hand any over

    def begin(self, listener: Listener, *, mark: int, died: Callable[[int, int], None]) -> None:
        """Have the calls served.

        Args:
            listener: brings the calls.
            mark: the filter's mark.
            died: is told of threads whose end was seen in passing: see Injector.
        """
        self._listener = listener
        self._serving: Serving[OpenFile] = Serving(
            listener,
            self.files,
            say=self._say_once,
            witness=self._explainer,
            all_opens=self._all_opens or self._explainer is None,
        )
        self._injector = Injector(listener, mark, died)
        self._swaps = self.files.swaps = Swaps(listener)
        if self._explainer is not None:
            return  # a machine that serves the calls gives no reasons
        notes = self.files.have_served(listener.fileno())
        if notes is not None:
            self._notes = mmap.mmap(notes.fileno(), NOTES_SIZE, prot=mmap.PROT_READ)
            notes.close()
            self.serves = False

    @property
    def machine(self) -> int:
        """The descriptor that is readable when the machine hands something over. -1: it never will (any more)."""
        return -1 if self._notes is None else self.files.channel.fileno()

    def serve(self) -> None:
        """Answer one call."""
        call = self._listener.receive()
        if call is not None:
            self._serve(call)
        if self._notes is not None and self.files.has_brought():  # it came together with an answer
            self.hear()

    def hear(self) -> None:
        """Serve all calls that the machine has handed over by now, or has left unanswered if it has ended.

        After the first call to take over, the machine goes on handing over those that it had taken already.
        """
        while self._notes is not None:
            try:
                brought = self.files.brought()
            except GntallocError:
                self.serves = True
                self._listener.fail_all(memoryview(self._notes), errno.EIO)
                self._notes = None
                return
            if brought is None:
                return
            call, plan = brought
            if plan is None:
                self.serves = True
                self._serve(call)
            else:
                with suppress(CallerGone):
                    self._place(call, plan)

    def _waits(self, call: Call) -> bool:
        return self._listener.waits(call)

    def _serve(self, call: Call) -> None:
        self._swaps.look(call)
        try:
            self._serving.serve(call)
        except Denied:
            if self._explainer is not None:
                self._explainer.not_seen(call)
            self._listener.go_on(call)  # its caller is in none of the processes served here

    def _place(self, call: Call, plan: Plan) -> None:
        try:
            numbers = [descriptor.fileno() for descriptor in plan.descriptors]
            self._injector.place(call, plan.pieces, numbers, lambda result: self._done(plan, result))
        except Traced:
            if not self._swap(call, plan):
                self._say_once(
                    f"process {call.thread} maps pages while another program traces it (gdb, strace): these cannot be "
                    "placed then; detach while it maps"
                )
                self._listener.answer(call, -errno.EBUSY)
        finally:
            _close(plan)

    def _done(self, plan: Plan, result: int) -> None:
        """Tell where the pages are, and close the descriptors: the caller may ask next whether they are held."""
        if result >= 0:
            for descriptor in plan.descriptors:
                tell_place(descriptor.fileno(), plan.mark, result, plan.length)
        _close(plan)

    def _swap(self, call: Call, plan: Plan) -> bool:
        """Try to let the program's own call make this map: see run/debugged.py. Return whether it could."""
        process = leader_of(call.thread)
        if plan.file is None or len(plan.pieces) != 1 or plan.pieces[0].offset != call.arguments[5]:
            return False
        if not self._swaps.free(process):
            return False
        try:
            self.files.keep(plan.file)
            piece = plan.pieces[0]
            place = Place(plan.descriptors[0].fileno(), piece.offset, plan.file.handle, plan.mark, plan.length)
            self._swaps.place(call, process, place)
        except OSError:
            return False
        return True

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)


def _close(plan: Plan) -> None:
    for each in plan.descriptors:
        each.close()
