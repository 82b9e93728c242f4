"""Boot a real Xen in a box: the hypervisor, dom0 and guests under QEMU, made from Debian's packages.

from gntalloc.lab import Lab

outcome = Lab.find().run(["python3", "test.py"], guest="pvh", files=["test.py"], fetch=["result.json"])
assert outcome.exit_status == 0, outcome.output

with Lab.find().boot(guests=["pv", "pvh"]) as session:      # several commands in one boot
    session.put(["peer.py"], "pvh")
    session.run_together({"pvh": ["python3", "peer.py"], "dom0": ["xl", "list"]})

boot           Lab: find the images, boot them
session        Session: run commands in domains of a booted lab
qemu           run the emulator
images         keep the images, and their manifests
build          make the images
apt            fetch Debian's packages, and check their signatures
kernel         take the kernel out of its wrapping
modules        choose the kernel modules that are needed, and their order
cpio           write archives as the kernel unpacks them
payload        make the archive that is copied into every domain
machine_tools  find programs of this computer that are needed
errors         name the lab's errors
inside/        run inside a domain
"""

from __future__ import annotations

from gntalloc.lab.boot import Lab
from gntalloc.lab.errors import BuildFailed, Crashed, LabError, LabTimedOut, NothingToRunOn
from gntalloc.lab.session import Outcome, Session

__all__ = ["BuildFailed", "Crashed", "Lab", "LabError", "LabTimedOut", "NothingToRunOn", "Outcome", "Session"]
