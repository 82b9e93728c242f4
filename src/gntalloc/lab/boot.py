"""Boot images into a session, or boot for a single command in one call."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gntalloc.clock import Deadline
from gntalloc.lab import machine_tools
from gntalloc.lab.errors import LabError, explain
from gntalloc.lab.images import Images
from gntalloc.lab.payload import payload
from gntalloc.lab.qemu import Qemu
from gntalloc.lab.session import GUESTS, OnOutput, Outcome, Session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["DOM0_MEMORY", "GUEST_MEMORY", "TIMEOUT", "Lab"]

TIMEOUT = 300.0
DOM0_MEMORY = 1024
GUEST_MEMORY = 384


@dataclass(frozen=True)
class Lab:
    """Be a lab that could be booted: the images and the emulator are there."""

    images: Images
    emulator: str

    @classmethod
    def find(cls) -> Lab:
        """Find the images and the emulator on this machine.

        Raises:
            NothingToRunOn: QEMU is missing, or there are no images yet.
        """
        programs = machine_tools.need("boot the lab", machine_tools.EMULATOR)
        return cls(Images.current(), programs[machine_tools.EMULATOR])

    def boot(
        self,
        guests: Sequence[str] = (),
        *,
        files: Sequence[str | Path] = (),
        timeout: float = TIMEOUT,
        memory: int = GUEST_MEMORY,
        dom0_memory: int = DOM0_MEMORY,
    ) -> Session:
        """Boot Xen and dom0, and guests beside it.

        Args:
            guests: Any of "pv" and "pvh".
            files: Files and folders to bring into the working directory of every domain.
            timeout: Seconds until all of them have to be up.
            memory: MiB for each guest.
            dom0_memory: MiB for dom0.

        Returns:
            The session, which is a context manager.
        """
        for guest in guests:
            if guest not in GUESTS:
                raise LabError(explain(f"boot a guest {guest!r}", "there is no such kind", "Take pv or pvh"))
        deadline = Deadline(timeout)
        folder = tempfile.TemporaryDirectory(prefix="gntalloc-lab-")
        qemu = Qemu(
            self.emulator,
            self.images,
            payload(files),
            Path(folder.name),
            dom0_memory=dom0_memory,
            guests_memory=memory * len(guests),
        )
        session = Session(qemu, self.images.manifest.versions, folder.cleanup)
        try:
            session.wait_up("dom0", deadline)
            for guest in guests:
                session.start_guest(guest, memory)
            for guest in guests:
                session.wait_up(guest, deadline)
        except BaseException:
            session.close()
            raise
        return session

    def run(
        self,
        command: Sequence[str],
        *,
        guest: str | None = None,
        files: Sequence[str | Path] = (),
        fetch: Sequence[str] = (),
        timeout: float = TIMEOUT,
        memory: int = GUEST_MEMORY,
        on_output: OnOutput | None = None,
    ) -> Outcome:
        """Boot, run one command in dom0 or in a guest, and switch off.

        Args:
            command: Program and arguments.
            guest: "pv", "pvh", or None for dom0.
            files: Files and folders to bring into the command's working directory.
            fetch: Files to bring out afterwards, into `Outcome.files`.
            timeout: Seconds for all of it.
            memory: MiB for the guest.
            on_output: Gets the output as it comes.
        """
        domain = guest or "dom0"
        outcomes = self.run_together(
            {domain: command}, files=files, fetch=fetch, timeout=timeout, memory=memory, on_output=on_output
        )
        return outcomes[domain]

    def run_pair(
        self,
        *,
        in_guest: Sequence[str],
        in_dom0: Sequence[str],
        guest: str = "pvh",
        files: Sequence[str | Path] = (),
        fetch: Sequence[str] = (),
        timeout: float = TIMEOUT,
        memory: int = GUEST_MEMORY,
        on_output: OnOutput | None = None,
    ) -> dict[str, Outcome]:
        """Boot and run two commands at the same time, one in a guest and one in dom0.

        Both find the other's number in their environment, as PEER_DOMID. `files` go to both, `fetch` is
        looked for in both. The outcomes come in the order in which the commands ended.
        """
        commands = {guest: in_guest, "dom0": in_dom0}
        return self.run_together(
            commands, files=files, fetch=fetch, timeout=timeout, memory=memory, on_output=on_output
        )

    def run_together(
        self,
        commands: Mapping[str, Sequence[str]],
        *,
        files: Sequence[str | Path] = (),
        fetch: Sequence[str] = (),
        timeout: float = TIMEOUT,
        memory: int = GUEST_MEMORY,
        on_output: OnOutput | None = None,
    ) -> dict[str, Outcome]:
        """Boot the domains that are named and run a command in each at the same time.

        The other arguments are those of `run`; the order of the outcomes is that of `run_pair`.
        """
        deadline = Deadline(timeout)
        guests = [domain for domain in commands if domain != "dom0"]
        with self.boot(guests, files=files, timeout=timeout, memory=memory) as session:
            return session.run_together(
                commands,
                fetch=dict.fromkeys(commands, fetch),
                timeout=deadline.within(timeout),
                on_output=on_output,
            )
