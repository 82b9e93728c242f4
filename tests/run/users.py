"""Runs as several users of this computer, in domains of one machine that root has made for them."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from runs import Runs, said

from gntalloc.places import domain_path

if TYPE_CHECKING:
    from collections.abc import Iterator

ALICE, BOB = 65533, 65532  # nobody's numbers
DOMAINS = {1: ALICE, 2: ALICE, 3: BOB, 4: 0}  # who owns which

# All is imported before, since the interpreter may be in a folder that the user cannot enter. What changes its user is
# no longer dumpable, as a program that was started by that user would be.
BECOME = """
import ctypes, importlib, os, pkgutil, sys
import gntalloc.cli.run, gntalloc.run
for found in pkgutil.iter_modules(gntalloc.run.__path__): importlib.import_module('gntalloc.run.' + found.name)
user = int(sys.argv[1])
os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
gntalloc.cli.main(['run', *sys.argv[2:]])
"""


def interpreter() -> str | None:
    """A Python that any user can start."""
    for path in (sys.executable, "/usr/bin/python3"):
        command = ["setpriv", "--reuid", str(BOB), "--regid", str(BOB), "--clear-groups", "sh", "-c", '"$0" -c 0', path]
        with contextlib.suppress(OSError):
            if subprocess.run(command, capture_output=True, check=False, cwd="/", timeout=50).returncode == 0:
                return path
    return None


class UserRuns(Runs):
    """Runs in DOMAINS, each as the user it belongs to."""

    def command(self, domid: int, *program: str, options: tuple[str, ...] = ()) -> list[str]:
        """The command line of a run."""
        return self.command_of(DOMAINS[domid], domid, *program, options=options)

    def command_of(self, user: int, domid: int, *program: str, options: tuple[str, ...] = ()) -> list[str]:
        """The same, as another user."""
        ours = [sys.executable, "-c", BECOME, str(user), "--domid", str(domid), "--machine", self.folder]
        return [*ours, *options, "--", *program]

    def over(self) -> bool:
        """The machine is not theirs to end."""
        return True


@contextlib.contextmanager
def machine_of_users() -> Iterator[UserRuns]:
    """The machine and its domains."""
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    runs = UserRuns()
    runs.folder = str(top / "machine")
    domains = [word for domid, user in DOMAINS.items() for word in ("--domain", f"{domid}:uid={user}")]
    command = [sys.executable, "-m", "gntalloc", "machine", "--name", runs.folder, *domains]
    machine = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for domid in DOMAINS:
            assert domain_path(runs.folder, domid) in said(machine)
        assert "runs as pid" in said(machine)
        yield runs
        runs.finish()
        assert machine.poll() is None, "an attack ended the machine"
    finally:
        machine.send_signal(signal.SIGTERM)
        machine.communicate(timeout=20)
        shutil.rmtree(top)
