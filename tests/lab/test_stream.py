"""On a real Xen: the demo's stream between a guest and dom0, both ways, with no machine. Same code, equal digests."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gntalloc.lab import Session

pytestmark = [
    pytest.mark.skipif(os.environ.get("GNTALLOC_LAB") != "1", reason="boots a real Xen: set GNTALLOC_LAB=1"),
    pytest.mark.timeout(600),
]

BETWEEN = ["python3", "-m", "gntalloc.demo.between"]


def test_a_file_goes_between_a_guest_and_dom0_both_ways(xen: Session, some_bytes: bytes) -> None:
    digest = hashlib.sha256(some_bytes).hexdigest()
    for guest in ("pv", "pvh"):
        domid = str(xen.domid(guest))
        for sender, receiver, to, of in ((guest, "dom0", "0", domid), ("dom0", guest, domid, "0")):
            commands = {sender: [*BETWEEN, "send", to, "some-bytes"], receiver: [*BETWEEN, "receive", of]}
            outcomes = xen.run_together(commands)
            said = {domain: outcome.output + outcome.errors for domain, outcome in outcomes.items()}
            assert {outcome.exit_status for outcome in outcomes.values()} == {0}, said
            assert said[sender] == f"sent {len(some_bytes)} bytes, SHA-256 {digest}\n"
            assert said[receiver] == f"received {len(some_bytes)} bytes, SHA-256 {digest}\n"
