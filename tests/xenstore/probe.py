"""The xenstore client against a real xenstored: run it inside a domain, dom0 or a guest.

    python3 tests/xenstore/probe.py [SOCKET-OR-DEVICE]

Needs the standard library and gntalloc. Prints a JSON report, one entry per point; exits with 1 if any failed.
It works below the relative node data/gntalloc-probe, which it removes at the end.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import os
import select
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from gntalloc.errors import Closed, TimedOut
from gntalloc.xenstore.client import Store, Transaction
from gntalloc.xenstore.errors import Conflict, Denied, NoNode, StoreError
from gntalloc.xenstore.path import Permission

if TYPE_CHECKING:
    from collections.abc import Callable

BASE = "data/gntalloc-probe"
HANGS_AFTER = 60  # seconds for one point; then every thread's traceback goes to stderr, and that is the end
POINTS: list[Callable[[Store], Any]] = []


def point(check: Callable[[Store], Any]) -> Callable[[Store], Any]:
    """Something to look at. It fails by raising; what it returns goes into the report."""
    POINTS.append(check)
    return check


def expect(found: object, expected: object) -> None:
    if found != expected:
        raise AssertionError(f"expected {expected!r}, found {found!r}")


@contextlib.contextmanager
def refused(kind: type[OSError], *codes: int) -> Any:
    try:
        yield
    except kind as error:
        if codes and error.errno not in codes:
            raise
    else:
        raise AssertionError(f"no {kind.__name__}")


def drain(watch: Any, seconds: float = 0.2) -> list[str]:
    """What a watch has to say until it is quiet."""
    found = []
    with contextlib.suppress(TimedOut):
        while True:
            found.append(watch.wait(timeout=seconds))
    return found


@point
def who_am_i(store: Store) -> Any:
    domid = store.domid
    home = store.get_domain_path(domid)
    expect(home, f"/local/domain/{domid}")
    expect(store.get_domain_path(12345), "/local/domain/12345")
    expect(store.read(f"{home}/domid"), str(domid).encode())
    return {"domid": domid, "connection": repr(store)}


@point
def values(store: Store) -> Any:
    for value in (b"", b"text", bytes(range(256)), b"\0", b"x" * 2000):
        store.write(f"{BASE}/value", value)
        expect(store.read(f"{BASE}/value"), value)
    store.write(f"{BASE}/value", "gr\u00fc\u00df")
    expect(store.read_text(f"{BASE}/value"), "gr\u00fc\u00df")


@point
def relative_is_below_home(store: Store) -> Any:
    store.write(f"{BASE}/here", "1")
    expect(store.read(f"{store.get_domain_path(store.domid)}/{BASE}/here"), b"1")


@point
def mkdir_keeps_values(store: Store) -> Any:
    store.write(f"{BASE}/kept", "1")
    store.mkdir(f"{BASE}/kept")
    store.mkdir(f"{BASE}/made/deep/down")
    expect(store.read(f"{BASE}/kept"), b"1")
    expect(store.read(f"{BASE}/made/deep"), b"")


@point
def removal(store: Store) -> Any:
    store.write(f"{BASE}/gone/below", "1")
    store.remove(f"{BASE}/gone")
    expect((store.exists(f"{BASE}/gone"), store.exists(f"{BASE}/gone/below")), (False, False))
    store.remove(f"{BASE}/gone")
    with refused(NoNode):
        store.remove(f"{BASE}/no/parent/here")


@point
def absent_nodes(store: Store) -> Any:
    for ask in (store.read, store.list, store.get_permissions):
        with refused(FileNotFoundError, errno.ENOENT):
            ask(f"{BASE}/absent")


@point
def bad_paths(store: Store) -> Any:
    reasons = {}
    for path in ("", f"{BASE}//x", f"{BASE}/", f"{BASE}/a b", f"{BASE}/a!", f"{BASE}/\u00e4", f"{BASE}/" + "x" * 3100):
        try:
            store.write(path, "")
            reasons[path[:40]] = "accepted"
        except StoreError as error:
            reasons[path[:40]] = str(error)[-90:]
            expect(error.errno, errno.EINVAL)
    expect("accepted" in reasons.values(), False)
    return reasons


@point
def too_large(store: Store) -> Any:
    with refused(StoreError, errno.E2BIG):
        store.write(f"{BASE}/large", bytes(4096))
    try:
        store.write(f"{BASE}/large", bytes(4000))
    except StoreError as error:
        expect(error.errno in (errno.ENOSPC, errno.E2BIG), True)
        return f"4000 bytes: {error}"
    expect(len(store.read(f"{BASE}/large")), 4000)
    return "4000 bytes: accepted"


@point
def permissions(store: Store) -> Any:
    store.write(f"{BASE}/mine", "")
    before = store.get_permissions(f"{BASE}/mine")
    wanted = (Permission(before[0].domid, "n"), Permission(12, "r"), Permission(13, "b"))
    store.set_permissions(f"{BASE}/mine", wanted)
    expect(store.get_permissions(f"{BASE}/mine"), wanted)
    return [str(entry) for entry in before]


@point
def lists(store: Store) -> Any:
    expect(store.list(f"{BASE}/mine"), ())
    names = sorted(f"child-{number}" for number in range(5))
    for name in names:
        store.write(f"{BASE}/list/{name}", "")
    expect(sorted(store.list(f"{BASE}/list")), names)


@point
def lists_beyond_one_message(store: Store) -> Any:
    names = sorted(f"a-rather-long-name-of-a-child-{number:03}" for number in range(300))
    try:
        for name in names:
            store.write(f"{BASE}/long/{name}", "")
    except StoreError as error:
        # A guest's nodes may hold 2048 bytes, names of children included.
        expect(error.errno, errno.ENOSPC)
        here = store.list(f"{BASE}/long")
        expect(sorted(here), names[: len(here)])
        store.remove(f"{BASE}/long")
        return f"the quota ends it after {len(here)}"
    expect(sorted(store.list(f"{BASE}/long")), names)
    with store.transaction() as transaction:
        expect(sorted(transaction.list(f"{BASE}/long")), names)
    store.remove(f"{BASE}/long")
    return f"{sum(len(name) + 1 for name in names)} bytes of names"


@point
def transactions(store: Store) -> Any:
    path = f"{BASE}/tx"
    store.write(path, "0")
    with store.transaction() as transaction:
        transaction.write(path, "1")
        expect(transaction.read(path), b"1")
        expect(store.read(path), b"0")
    expect(store.read(path), b"1")
    with contextlib.suppress(KeyError), store.transaction() as transaction:
        transaction.write(path, "2")
        raise KeyError
    expect(store.read(path), b"1")
    with refused(StoreError):
        transaction.read(path)


@point
def conflicts(store: Store) -> Any:
    path = f"{BASE}/tx"
    store.write(path, "0")
    with refused(Conflict, errno.EAGAIN), store.transaction() as transaction:
        transaction.write(path, transaction.read(path) + b"!")
        store.write(path, "other")
    expect(store.read(path), b"other")
    attempts = []

    def work(transaction: Transaction) -> str:
        attempts.append(1)
        value = transaction.read_text(path)
        if len(attempts) < 3:
            store.write(path, f"meanwhile {len(attempts)}")
        transaction.write(path, value + "+")
        return value

    expect(store.transact(work), "meanwhile 2")
    expect((len(attempts), store.read(path)), (3, b"meanwhile 2+"))


@point
def many_transactions(store: Store) -> Any:
    """More than the quota of ten at a time, one after another: none may be left open."""
    for number in range(25):
        store.transact(lambda transaction, number=number: transaction.write(f"{BASE}/tx", str(number)))  # type: ignore[misc]
        store.transaction().abort()


@point
def transaction_quota(store: Store) -> Any:
    opened = []
    try:
        for _ in range(12):
            opened.append(store.transaction())  # noqa: PERF401  (what was opened before a refusal counts)
    except StoreError as error:
        return f"after {len(opened)}: {error}"
    finally:
        for transaction in opened:
            transaction.abort()
    return f"{len(opened)} at once are allowed"


@point
def watches(store: Store) -> Any:
    path = f"{BASE}/watched"
    store.write(path, "0")
    with store.watch(path) as watch:
        expect(watch.wait(timeout=5), path)
        drain(watch)
        store.write(path, "1")
        expect(watch.wait(timeout=5), path)
        store.write(f"{path}/below", "1")
        expect(watch.wait(timeout=5), f"{path}/below")
        store.set_permissions(path, store.get_permissions(path))
        expect(watch.wait(timeout=5), path)
        store.remove(f"{path}/below")
        expect(watch.wait(timeout=5), f"{path}/below")
        store.remove(path)
        expect(watch.wait(timeout=5), path)
        store.write(f"{BASE}/not-watched", "1")
        expect(drain(watch), [])
    absolute = f"{store.get_domain_path(store.domid)}/{path}"
    with store.watch(absolute) as watch:
        expect(watch.wait(timeout=5), absolute)
        drain(watch)
        store.write(path, "1")
        expect(watch.wait(timeout=5), absolute)


@point
def watch_of_a_parent_that_goes(store: Store) -> Any:
    store.write(f"{BASE}/parent/child", "")
    with store.watch(f"{BASE}/parent/child") as watch:
        drain(watch)
        store.remove(f"{BASE}/parent")
        expect(watch.wait(timeout=5), f"{BASE}/parent/child")


@point
def watch_and_transaction(store: Store) -> Any:
    path = f"{BASE}/watched"
    with store.watch(path) as watch:
        drain(watch)
        with store.transaction() as transaction:
            transaction.write(path, "in")
            expect(drain(watch), [])
        expect(watch.wait(timeout=5), path)


@point
def several_watches_of_one_path(store: Store) -> Any:
    path = f"{BASE}/watched"
    with store.watch(path) as one, store.watch(path) as two:
        drain(one)
        drain(two)
        store.write(path, "1")
        expect((one.wait(timeout=5), two.wait(timeout=5)), (path, path))
        one.close()
        store.write(path, "2")
        expect(two.wait(timeout=5), path)


@point
def watches_come_and_go(store: Store) -> Any:
    for number in range(150):  # more than the quota of 128, were one left behind
        with store.watch(f"{BASE}/come/{number}") as watch:
            expect(watch.wait(timeout=5), f"{BASE}/come/{number}")


@point
def select_finds_watches(store: Store) -> Any:
    path = f"{BASE}/watched"
    with store.watch(path) as watch:
        drain(watch)
        expect(select.select([watch], [], [], 0)[0], [])
        store.write(path, "1")
        expect(select.select([watch], [], [], 5)[0], [watch])
        deadline = time.monotonic() + 5
        while (found := watch.poll()) is None and time.monotonic() < deadline:
            select.select([watch], [], [], 1)
        expect(found, path)
        store.write(path, "2")
        store.read(path)
        store.read(path)
        expect(select.select([watch], [], [], 5)[0], [watch])
        expect(drain(watch), [path])
        expect(select.select([watch], [], [], 0)[0], [])


@point
def another_connection_is_seen(store: Store) -> Any:
    path = f"{BASE}/watched"
    with Store(*sys.argv[1:2]) as other, store.watch(path) as watch:
        drain(watch)
        other.write(path, "from the other")
        expect(watch.wait(timeout=5), path)
        expect(store.read(path), b"from the other")


@point
def special_watches(store: Store) -> Any:
    found = {}
    for name in ("@releaseDomain", "@introduceDomain"):
        try:
            with store.watch(name) as watch:
                expect(watch.wait(timeout=5), name)
            found[name] = "can be watched"
        except StoreError as error:
            found[name] = str(error)
    return found


@point
def privileged_questions(store: Store) -> Any:
    try:
        expect(store.is_domain_introduced(store.domid), True)
        expect(store.is_domain_introduced(4321), False)
    except Denied as error:
        return str(error)
    return "answered"


@point
def threads(store: Store) -> Any:
    failures: list[str] = []

    def work(name: str) -> None:
        try:
            with store.watch(f"{BASE}/threads/{name}") as watch:
                drain(watch)
                for number in range(20):
                    store.write(f"{BASE}/threads/{name}", f"{name}{number}")
                    expect(store.read_text(f"{BASE}/threads/{name}"), f"{name}{number}")
                    expect(watch.wait(timeout=10), f"{BASE}/threads/{name}")
        except Exception:
            failures.append(traceback.format_exc(limit=2))

    started = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(60)
    expect(failures, [])
    expect([thread.is_alive() for thread in started], [False] * 4)


@point
def waiting_has_an_end(store: Store) -> Any:
    with store.watch(f"{BASE}/quiet") as watch:
        drain(watch)
        begin = time.monotonic()
        with refused(TimedOut):
            watch.wait(timeout=0.2)
        expect(0.1 < time.monotonic() - begin < 5, True)


@point
def close_ends_who_waits(store: Store) -> Any:
    del store
    ended: list[str] = []
    with Store(*sys.argv[1:2]) as other:
        watch = other.watch(f"{BASE}/quiet")
        drain(watch)

        def wait() -> None:
            try:
                watch.wait()
            except Closed:
                ended.append("closed")

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        other.close()
        thread.join(10)
    watch.close()
    expect(ended, ["closed"])


@point
def fork(store: Store) -> Any:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.read("domid")
        except Closed:
            with Store(*sys.argv[1:2]) as own:
                code = 0 if own.read_text("domid").isdigit() else 2
        finally:
            os._exit(code)
    expect(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0)
    expect(store.read_text("domid").isdigit(), True)


@point
def speed(store: Store) -> Any:
    store.write(f"{BASE}/speed", "x" * 100)
    begin = time.perf_counter()
    for _ in range(200):
        store.read(f"{BASE}/speed")
    return f"{(time.perf_counter() - begin) / 200 * 1e6:.0f} us per read"


@point
def nothing_is_left(store: Store) -> Any:
    store.remove(BASE)
    expect(store.exists(BASE), False)


def main() -> int:
    report = []
    with Store(*sys.argv[1:2]) as store:
        with contextlib.suppress(StoreError):
            store.remove(BASE)
        for check in POINTS:
            entry: dict[str, Any] = {"point": check.__name__, "ok": True}
            print(f"... {check.__name__}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
            try:
                if (note := check(store)) is not None:
                    entry["note"] = note
            except Exception as error:
                entry |= {"ok": False, "error": f"{type(error).__name__}: {error}", "at": traceback.format_exc()}
            report.append(entry)
    faulthandler.cancel_dump_traceback_later()
    failed = [entry["point"] for entry in report if not entry["ok"]]
    print(json.dumps({"points": len(report), "failed": failed, "report": report}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
