"""Quotas of xenstore: which one was reached is said, to the program and in the machine's log; and `transact` waits."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from gntalloc.errors import TimedOut
from gntalloc.testing import faults
from gntalloc.xenstore.client import Store
from gntalloc.xenstore.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gntalloc import Domain, Machine
    from gntalloc.xenstore.client import Transaction

PATIENCE = 40.0
GNTALLOC = [sys.executable, "-m", "gntalloc"]
HELD = 11  # transactions of a domain at once


def many_nodes(store: Store) -> None:
    with store.transaction() as transaction:
        for number in range(1100):
            transaction.exists(f"data/nothing-{number}")


def many_permissions(store: Store) -> None:
    store.write("data/open", "")
    store.set_permissions("data/open", ["n1", "r2", "r3", "r4", "r5", "r6"])


def much_memory(store: Store) -> None:
    """Changes in transactions count; nodes and their sizes have quotas of their own, which come first."""
    for _ in range(4):
        transaction = store.transaction()
        for number in range(400):
            transaction.write(f"data/much/{number}", bytes(1900))


def many_children(store: Store) -> None:
    for number in range(300):
        store.mkdir(f"data/many/{number:030}")


def watch_often(store: Store) -> None:
    with store.watch("data/a"), store.watch("data/b"), store.watch("data/c"):
        pass


def begin_often(store: Store) -> None:
    for _ in range(HELD + 1):
        store.transaction()


REACHED: dict[str, tuple[Callable[[Store], None], int, str]] = {
    "node-size": (lambda store: store.write("data/big", bytes(3000)), errno.ENOSPC, "node-size 2048: .* 3000 bytes"),
    "children": (many_children, errno.ENOSPC, "node-size 2048: the names of the children of /local/domain/1/data/many"),
    "transactions": (begin_often, errno.ENOSPC, "transactions 10: domain 1 has 11 open"),
    "transaction-nodes": (many_nodes, errno.ENOSPC, "transaction-nodes 1024: it has seen 1024"),
    "permissions": (many_permissions, errno.ENOSPC, "permissions 5: 6 were given"),
    "memory": (much_memory, errno.EIO, "memory 2621440: domain 1 uses 26[0-9]{5} bytes, and 19[0-9]{2} more"),
}


@pytest.fixture
def store(machine: Machine, alice: Domain) -> Iterator[Store]:
    """A connection of its own, so that what a test leaves open ends with it."""
    with Store(machine.environ(1)["XENSTORED_PATH"]) as store:
        yield store
    for name in alice.store.list("data"):
        alice.store.remove(f"data/{name}")


@pytest.mark.parametrize("name", REACHED)
def test_the_quota_that_was_reached_is_said(store: Store, name: str) -> None:
    work, code, text = REACHED[name]
    with pytest.raises(StoreError, match=text) as caught:
        work(store)
    assert caught.value.errno == code


def test_quotas_of_nodes_and_watches_are_said(alice: Domain, store: Store) -> None:
    with faults.store(alice, nodes=0), pytest.raises(StoreError, match=r"nodes \d+: domain 1 has \d+") as nodes:
        store.write("data/one-more", "")
    assert nodes.value.errno == errno.ENOSPC
    with faults.store(alice, watches=1), pytest.raises(StoreError, match=r"watches \d+: domain 1 has \d+") as watches:
        watch_often(store)
    assert watches.value.errno == errno.E2BIG


def test_a_commit_says_what_the_transaction_has_met(store: Store) -> None:
    transaction = store.transaction()
    with pytest.raises(StoreError):
        transaction.write("data/big", bytes(3000))
    with pytest.raises(StoreError, match=r"has failed before: node-size 2048: the value has 3000 bytes") as caught:
        transaction.commit()
    assert caught.value.errno == errno.ENOMEM


def test_a_refusal_of_another_is_not_taken_for_ones_own(store: Store) -> None:
    """Threads share a connection, and each is told of its own."""
    wrong: list[str] = []

    def refuse(size: int) -> None:
        for _ in range(50):
            try:
                store.write("data/big", bytes(size))
            except StoreError as error:
                if f"the value has {size} bytes" not in str(error):
                    wrong.append(str(error))
            else:
                wrong.append("it was written")

    threads = [threading.Thread(target=refuse, args=(size,)) for size in (2500, 2600, 2700, 2800)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert wrong == []


def test_transact_waits_for_a_transaction_to_end(store: Store) -> None:
    open_ones = [store.transaction() for _ in range(HELD)]
    with pytest.raises(TimedOut, match="transactions 10: domain 1 has 11 open"):
        store.transact(lambda transaction: transaction.mkdir("data/x"), timeout=0.2)
    ending = threading.Timer(0.3, open_ones[0].abort)
    ending.start()
    store.transact(lambda transaction: transaction.write("data/x", "there"), timeout=PATIENCE)
    ending.join(PATIENCE)
    assert store.read("data/x") == b"there"


def test_transact_does_not_wait_where_it_is_of_no_use(store: Store) -> None:
    """A node that is too large will be no smaller later."""
    calls = []

    def write(transaction: Transaction) -> None:
        calls.append(1)
        transaction.write("data/big", bytes(3000))

    with pytest.raises(StoreError, match="node-size"):
        store.transact(write, timeout=PATIENCE)
    assert calls == [1]


def test_sixteen_processes_lose_no_addition(machine: Machine, alice: Domain) -> None:
    program = (
        "import gntalloc, time\n"
        "domain = gntalloc.current_domain()\n"
        "def add(t):\n"
        "    number = int(t.read('data/count'))\n"
        "    time.sleep(0.002)\n"  # as one that has more to do: all of them are in a transaction at once
        "    t.write('data/count', str(number + 1))\n"
        "domain.store.read('data/count')\n"
        "print('ready', flush=True)\n"
        "input()\n"
        f"for _ in range(20): domain.store.transact(add, timeout={PATIENCE})\n"
        "domain.close()\n"
    )
    alice.store.write("data/count", "0")
    adding = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=machine.environ(1),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(16)
    ]
    try:
        for process in adding:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        for process in adding:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
        said = [process.communicate(timeout=PATIENCE)[1] for process in adding]
    finally:
        for process in adding:
            process.kill()
            process.wait(PATIENCE)
    assert said == [b""] * 16
    assert alice.store.read("data/count") == b"320"
    alice.store.remove("data/count")


# The log.


@pytest.fixture
def verbose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """`gntalloc machine -v`, with domains 1 and 2. Call it for its log, which ends it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("GNTALLOC_DOMAIN", "told/1")
    process = subprocess.Popen(
        [*GNTALLOC, "machine", "--name", "told", "-v"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("machine"):
        assert process.poll() is None

    def end() -> str:
        process.send_signal(signal.SIGINT)
        return process.communicate(timeout=PATIENCE)[1]

    yield end
    process.kill()
    process.communicate(timeout=PATIENCE)


def test_the_log_says_why_xenstore_refuses(verbose: Callable[[], str], tmp_path: Path) -> None:
    with Store(str(tmp_path / "gntalloc" / "told" / "1.store")) as store:
        for path, value in (("data/big", bytes(3000)), ("/local/domain/2/data", b""), ("data//x", b"")):
            with pytest.raises(StoreError):
                store.write(path, value)
        with pytest.raises(StoreError):
            begin_often(store)
    log = verbose()
    for line in (
        "xenstore, domain 1: xenstore WRITE data/big: node-size 2048: the value has 3000 bytes",
        "xenstore, domain 1: xenstore WRITE /local/domain/2/data: the node's permissions do not let this domain",
        "xenstore, domain 1: xenstore WRITE data//x: ",
        "xenstore, domain 1: xenstore TRANSACTION_START: transactions 10: domain 1 has 11 open (ENOSPC)",
    ):
        assert log.count(line) == 1, log


MAPPING = """
import ctypes, fcntl, mmap, os, struct
gntdev = os.open("/dev/xen/gntdev", os.O_RDWR)
try: mmap.mmap(gntdev, 4096, offset=4096 * 77)
except OSError: pass
else: raise SystemExit("it was mapped")
asked = bytearray(struct.pack("=IIQII", 1, 0, 0, 2, 9999))
fcntl.ioctl(gntdev, 0x00184700, asked)
try: mmap.mmap(gntdev, 4096, offset=struct.unpack_from("=Q", asked, 8)[0])
except OSError: pass
else: raise SystemExit("it was mapped")
try: fcntl.ioctl(gntdev, 0x00104701, bytearray(struct.pack("=QII", 4096 * 55, 1, 0)))
except OSError: pass
else: raise SystemExit("it was unmapped")
"""


@pytest.mark.parametrize("how", ["run", "api"])
def test_the_log_says_why_a_map_is_refused(verbose: Callable[[], str], how: str) -> None:
    if how == "run":
        command = [*GNTALLOC, "run", "--machine", "told", "--domid", "1", "--", sys.executable, "-c", MAPPING]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert ended.returncode == 0, ended.stderr
        wanted = [
            "a map of 1 pages at index 0x4d000 needs a MAP_GRANT_REF of just that",
            "reference 9999 is beyond domain 2's grant table",
            "1 pages at index 0x37000 were to be unmapped",
        ]
    else:
        program = "import gntalloc\ntry: gntalloc.current_domain().map(2, 9999, timeout=0)\nexcept OSError: pass\n"
        subprocess.run([sys.executable, "-c", program], timeout=PATIENCE, check=True, env=os.environ)
        wanted = ["reference 9999 is beyond domain 2's grant table"]
    log = verbose()
    for line in wanted:
        assert log.count(line) == 1, log
