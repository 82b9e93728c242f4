"""A real Xen in a box: the hypervisor, dom0 and guests under QEMU, made from Debian's packages.

from gntalloc.lab import Lab

outcome = Lab.find().run(["python3", "test.py"], guest="pvh", files=["test.py"], fetch=["result.json"])
assert outcome.exit_status == 0, outcome.output

with Lab.find().boot(guests=["pv", "pvh"]) as session:      # several commands in one boot
    session.put(["peer.py"], "pvh")
    session.run_together({"pvh": ["python3", "peer.py"], "dom0": ["xl", "list"]})

boot           Lab: find the images, boot them
session        Session: commands in domains of a booted lab
qemu           the emulator
images         the images, and what is in them
build          makes them
apt            Debian's packages, their signatures checked
kernel         what is wanted of the kernel's packages
modules        which kernel modules are needed, and in what order
cpio           archives as the kernel unpacks them
payload        what is copied into a domain
machine_tools  programs of this computer that are needed
errors         what can go wrong
inside/        what runs inside a domain
"""

from __future__ import annotations

from gntalloc.lab.boot import Lab
from gntalloc.lab.errors import BuildFailed, Crashed, LabError, LabTimedOut, NothingToRunOn
from gntalloc.lab.session import Outcome, Session

__all__ = ["BuildFailed", "Crashed", "Lab", "LabError", "LabTimedOut", "NothingToRunOn", "Outcome", "Session"]
