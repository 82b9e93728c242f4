"""xenstore on a real Xen: our client in every domain, and our server beside the real one. With GNTALLOC_LAB=1."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xs_generate import generate
from xs_judge import ask, compare

if TYPE_CHECKING:
    from gntalloc.lab import Session

XENSTORE = Path(__file__).parent.parent / "xenstore"

pytestmark = [
    pytest.mark.skipif(os.environ.get("GNTALLOC_LAB") != "1", reason="boots a real Xen; GNTALLOC_LAB=1 runs it"),
    pytest.mark.timeout(600),
]

EPISODES, LENGTH, SEED = 6, 100, 500

# What a program does with domain.store, the same as on the machine.
PROGRAM = """
import sys, gntalloc
domain = gntalloc.current_domain()
store = domain.store
assert store is domain.store and store.domid == domain.domid, (store.domid, domain.domid)
with store.watch("data/lab-test") as watch:
    assert watch.wait(timeout=20) == "data/lab-test"
    store.write("data/lab-test", "0")
    assert watch.wait(timeout=20) == "data/lab-test"
with store.transaction() as transaction:
    transaction.write("data/lab-test", transaction.read("data/lab-test") + b"1")
    transaction.write("data/lab-test/below", "")
assert (store.read("data/lab-test"), store.list("data/lab-test")) == (b"01", ("below",))
conflicting = store.transaction()
conflicting.write("data/lab-test", conflicting.read("data/lab-test") + b"1")
store.write("data/lab-test", "2")
try:
    conflicting.commit()
except OSError as error:
    assert error.errno == 11, error
else:
    raise AssertionError("no conflict")
store.remove("data/lab-test")
domain.close()
print(domain.domid)
"""


@pytest.mark.parametrize("domain", ["dom0", "pv", "pvh"])
def test_the_client_and_the_real_xenstored(xen: Session, domain: str) -> None:
    """Over the daemon's socket in dom0, over /dev/xen/xenbus in a guest; watches and transactions included."""
    if domain == "dom0":
        xen.run(["xenstore-write", "/local/domain/0/data", ""])
    xen.put([XENSTORE / "probe.py"], domain)
    outcome = xen.run(["python3", "probe.py"], domain)
    assert outcome.exit_status == 0, outcome.output + outcome.errors
    assert json.loads(outcome.output)


@pytest.mark.parametrize("domain", ["dom0", "pv", "pvh"])
def test_domain_store_is_the_same_on_xen(xen: Session, domain: str) -> None:
    outcome = xen.run(["python3", "-c", PROGRAM], domain)
    assert (outcome.exit_status, outcome.output) == (0, f"{xen.domid(domain)}\n"), outcome.errors


def test_our_server_replies_as_the_real_one(xen: Session) -> None:
    episodes = {number: generate(number, LENGTH) for number in range(SEED, SEED + EPISODES)}
    differing = compare(episodes, ask(xen, episodes))
    assert not differing, "\n".join(map(str, differing[:5]))
    assert xen.run(["xenstore-write", "data/afterwards", ""], "pv").exit_status == 0, "it left something behind"


def test_a_permission_for_a_number_that_no_domain_has_is_void_there(xen: Session) -> None:
    """The rule that ours has with behaviour="linux", and not by default (tests/machine/test_numbers.py)."""
    xen.put([XENSTORE / "idle.py", XENSTORE / "xs_numbers.py"], "dom0")
    outcome = xen.run(["python3", "xs_numbers.py"], "dom0")
    assert outcome.exit_status == 0, outcome.output + outcome.errors
    assert json.loads(outcome.output) == {
        "named before": "OK",
        "owner before": "ENOENT",
        "read": "EACCES",
        "read after it was said again": "1",
    }
