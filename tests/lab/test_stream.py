"""On a real Xen: the demo's stream between a guest and dom0, both ways, with no machine. Same code, equal digests."""

from __future__ import annotations

import hashlib
import os
import random
from typing import TYPE_CHECKING

import pytest

from gntalloc.lab import Lab, NothingToRunOn

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(os.environ.get("GNTALLOC_LAB") != "1", reason="boots a real Xen: set GNTALLOC_LAB=1"),
    pytest.mark.timeout(600),
]

BETWEEN = ["python3", "-m", "gntalloc.demo.between"]


def test_a_file_goes_between_a_guest_and_dom0_both_ways(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3_000_017)  # no multiple of anything
    (tmp_path / "file").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    try:
        lab = Lab.find()
    except NothingToRunOn as why:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(why))
    with lab.boot(("pv", "pvh"), files=[tmp_path / "file"], timeout=400) as session:
        for guest in ("pv", "pvh"):
            domid = str(session.domid(guest))
            for sender, receiver, to, of in ((guest, "dom0", "0", domid), ("dom0", guest, domid, "0")):
                commands = {sender: [*BETWEEN, "send", to, "file"], receiver: [*BETWEEN, "receive", of]}
                outcomes = session.run_together(commands)
                said = {domain: outcome.output + outcome.errors for domain, outcome in outcomes.items()}
                assert {outcome.exit_status for outcome in outcomes.values()} == {0}, said
                assert said[sender] == f"sent {len(data)} bytes, SHA-256 {digest}\n"
                assert said[receiver] == f"received {len(data)} bytes, SHA-256 {digest}\n"
