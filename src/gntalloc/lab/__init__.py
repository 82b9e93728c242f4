"""A real Xen in a box: the hypervisor, dom0 and guests under QEMU, made from Debian's packages.

from gntalloc.lab import Lab

outcome = Lab.find().run(["python3", "test.py"], guest="pvh", files=["test.py"], fetch=["result.json"])
assert outcome.exit_status == 0, outcome.output

with Lab.find().boot(guests=["pv", "pvh"]) as session:      # several commands in one boot
    session.put(["peer.py"], "pvh")
    session.run_together({"pvh": ["python3", "peer.py"], "dom0": ["xl", "list"]})
"""

from __future__ import annotations

from gntalloc.lab.boot import Lab
from gntalloc.lab.errors import BuildFailed, Crashed, LabError, LabTimedOut, NothingToRunOn
from gntalloc.lab.session import Outcome, Session

__all__ = ["BuildFailed", "Crashed", "Lab", "LabError", "LabTimedOut", "NothingToRunOn", "Outcome", "Session"]
