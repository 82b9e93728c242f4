"""The client against a strict daemon in a thread, as a Unix socket and as the kernel's device."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import fake_xenstored
import pytest
from fake_xenstored import HEADER, HOME, Daemon
from limits import status_of

from gntalloc.errors import Closed, MachineGone, NoMachine, PeerBroke, TimedOut
from gntalloc.xenstore.client import Store, Transaction
from gntalloc.xenstore.errors import Conflict, Denied, NoNode, StoreError
from gntalloc.xenstore.path import Permission

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(params=["socket", "device"])
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    daemon = Daemon(device=request.param == "device")
    yield daemon
    daemon.stop()
    assert daemon.complaints == []


@pytest.fixture
def store(daemon: Daemon) -> Iterator[Store]:
    with Store(daemon.client, timeout=5) as store:
        yield store


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start work in a thread; the function returned waits for it, and returns or raises what it did."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> Any:
        thread.join(10)
        assert not thread.is_alive()
        value, error = outcome[0]
        if error:
            raise error
        return value

    return result


# Nodes


def test_values(store: Store) -> None:
    store.write("data/a", "hello")
    assert store.read("data/a") == store.read(f"{HOME}/data/a") == b"hello"
    store.write("data/b", b"\0\xff\0")
    assert store.read("data/b") == b"\0\xff\0"
    assert store.read_text("data/b") == "\0\ufffd\0"
    store.write("data/a", "")
    assert store.read("data/a") == b""
    assert store.list("data") == ("a", "b")
    assert store.list("data/a") == ()
    assert store.exists("data/a")
    store.remove("data/a")
    store.remove("data/a")
    assert not store.exists("data/a")
    store.mkdir("data/b")
    assert store.read("data/b") == b"\0\xff\0"


def test_permissions(store: Store) -> None:
    store.write("p", "")
    store.set_permissions("p", ("n7", Permission(3, "r")))
    assert store.get_permissions("p") == (Permission(7, "n"), Permission(3, "r"))


def test_domains(store: Store) -> None:
    assert store.domid == 7
    assert store.get_domain_path(3) == "/local/domain/3"
    assert store.is_domain_introduced(7)
    assert not store.is_domain_introduced(8)


@pytest.mark.parametrize("count", [0, 1, 300, 1500])
def test_long_lists(daemon: Daemon, store: Store, count: int) -> None:
    names = sorted(f"node-{number:05}" for number in range(count))
    store.mkdir("long")
    daemon.tree |= {f"{HOME}/long/{name}": (b"", ("n7",)) for name in names}
    assert store.list("long") == tuple(names)


def test_a_long_list_that_changes_meanwhile_is_read_again(
    daemon: Daemon, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.mkdir("long")
    daemon.tree |= {f"{HOME}/long/node-{number:05}": (b"", ("n7",)) for number in range(1000)}
    part = Daemon.part
    calls: list[int] = []

    def change_after_the_first(self: Daemon, names: bytes, offset: int) -> bytes:
        calls.append(offset)
        if len(calls) == 2:
            self.generation += 1
        return part(self, names, offset)

    monkeypatch.setattr(Daemon, "part", change_after_the_first)
    assert len(store.list("long")) == len(set(store.list("long"))) == 1000
    assert calls[:3] == [0, calls[1], 0]


def test_a_list_without_an_end_is_the_daemons_fault(
    daemon: Daemon, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.mkdir("long")
    daemon.tree |= {f"{HOME}/long/node-{number:05}": (b"", ("n7",)) for number in range(1000)}
    monkeypatch.setattr(Daemon, "part", lambda self, names, offset: b"1\0")
    with pytest.raises(PeerBroke, match="without an end"):
        store.list("long")


def test_answers_in_pieces(daemon: Daemon, store: Store) -> None:
    daemon.pieces = 3
    store.write("x", "a value of some length")
    assert store.read("x") == b"a value of some length"
    with store.watch("x") as watch:
        assert watch.wait(timeout=5) == "x"


# Refusals


def test_refusals(store: Store) -> None:
    with pytest.raises(NoNode, match=r"^xenstore read nothing: there is no such node \(ENOENT\)$") as caught:
        store.read("nothing")
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(NoNode):
        store.remove("no/parent")
    store.write("secret", "")
    with pytest.raises(Denied, match="permissions"):
        store.read("secret")
    with pytest.raises(Denied):
        store.exists("secret")
    with pytest.raises(StoreError, match=r"two slashes in a row.*EINVAL"):
        store.read("a//b")
    with pytest.raises(StoreError, match="'!' cannot be in a path"):
        store.write("a!", "")
    assert store.domid == 7


@pytest.mark.parametrize("path", ["a\0b", "ä", "/" + "x" * 3072])
def test_what_would_break_the_connection_is_not_sent(daemon: Daemon, store: Store, path: str) -> None:
    for ask in (store.read, store.watch, store.remove):
        with pytest.raises(StoreError) as caught:
            ask(path)
        assert caught.value.errno == errno.EINVAL
    assert daemon.requests == []


def test_the_largest_value(daemon: Daemon, store: Store) -> None:
    store.write("x", bytes(4094))
    assert store.read("x") == bytes(4094)
    with pytest.raises(StoreError, match="4097 bytes together") as caught:
        store.write("x", bytes(4095))
    assert caught.value.errno == errno.E2BIG
    assert daemon.requests.count(fake_xenstored.WRITE) == 1


# Transactions


def test_a_transaction_happens_at_its_end(store: Store) -> None:
    with store.transaction() as transaction:
        transaction.write("t", "1")
        assert transaction.read("t") == b"1"
        assert not store.exists("t")
    assert store.read("t") == b"1"


def test_an_exception_aborts(daemon: Daemon, store: Store) -> None:
    def fail() -> None:
        with store.transaction() as transaction:
            transaction.write("t", "1")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert not store.exists("t")
    assert daemon.transactions == {}


def test_an_abort_of_your_own(daemon: Daemon, store: Store) -> None:
    with store.transaction() as transaction:
        transaction.write("t", "1")
        transaction.abort()
        transaction.abort()
    assert not store.exists("t")
    assert daemon.transactions == {}


def test_a_conflict(store: Store) -> None:
    def collide() -> None:
        with store.transaction() as transaction:
            transaction.write("t", "1")
            store.write("t", "2")

    with pytest.raises(Conflict, match="run the transaction again"):
        collide()
    assert store.read("t") == b"2"


def test_transact_tries_again(daemon: Daemon, store: Store) -> None:
    store.write("n", "0")
    daemon.conflicts = 3
    calls = []

    def increment(transaction: Transaction) -> int:
        calls.append(1)
        number = int(transaction.read("n")) + 1
        transaction.write("n", str(number))
        return number

    assert store.transact(increment) == 1
    assert len(calls) == 4
    assert store.read("n") == b"1"


def test_transact_gives_up(daemon: Daemon, store: Store) -> None:
    daemon.conflicts = 10**9
    with pytest.raises(TimedOut, match="attempts"):
        store.transact(lambda transaction: transaction.write("n", ""), timeout=0.05)
    daemon.conflicts = 0


# Watches


def test_a_watch(store: Store) -> None:
    with store.watch("data") as watch:
        assert watch.wait(timeout=5) == "data"  # the one that always comes
        assert watch.poll() is None
        store.write("data/a", "1")
        assert watch.wait(timeout=5) == "data/a"
        store.write(f"{HOME}/data/b", "1")
        store.write("elsewhere", "1")
        assert watch.wait(timeout=5) == "data/b"
        with pytest.raises(TimedOut, match="nothing changed at data"):
            watch.wait(timeout=0.01)


def test_events_of_one_path_are_one(store: Store) -> None:
    with store.watch("data") as watch:
        watch.wait(timeout=5)
        for number in range(5):
            store.write("data/a", str(number))
            store.write("data/b", str(number))
        assert store.domid == 7  # all events have been read by now
        assert [watch.poll(), watch.poll(), watch.poll()] == ["data/a", "data/b", None]


def test_very_many_changes_that_nobody_takes_are_one(store: Store) -> None:
    with store.watch("data") as watch, store.watch("data") as other:
        for number in range(1500):
            store.write(f"data/{number}", "")
        assert store.domid == 7  # all events have been read by now
        assert len(watch._paths) <= 1024
        taken = []
        while (path := watch.poll()) is not None:
            taken.append(path)
        assert "data" in taken
        assert taken[-1] == "data/1499"
        assert other.drain()
        assert not other.drain()
        assert other.poll() is None
        assert select.select([other], [], [], 0) == ([], [], [])
        store.write("data", "")
        assert other.wait(timeout=5) == "data"


def test_watches_do_not_mix(store: Store) -> None:
    with store.watch("a") as one, store.watch("a") as two, store.watch("b") as other:
        assert len({one.token, two.token, other.token}) == 3
        assert [watch.wait(timeout=5) for watch in (other, two, one)] == ["b", "a", "a"]
        store.write("a", "")
        assert [two.wait(timeout=5), one.wait(timeout=5), other.poll()] == ["a", "a", None]


def test_a_closed_watch(daemon: Daemon, store: Store) -> None:
    watch = store.watch("a")
    watch.close()
    watch.close()
    assert daemon.watches == []
    for use in (watch.wait, watch.poll, watch.fileno):
        with pytest.raises(Closed, match="watch on a was closed"):
            use()
    assert store.domid == 7


def test_select(store: Store) -> None:
    with store.watch("a") as watch, store.watch("b") as other:
        for each in (watch, other):
            each.wait(timeout=5)
            assert select.select([each], [], [], 0) == ([], [], [])
        store.write("a", "1")
        assert select.select([watch], [], [], 5) == ([watch], [], [])
        assert watch.poll() == "a"
        assert other.poll() is None
        assert select.select([watch, other], [], [], 0) == ([], [], [])


def test_select_finds_what_another_call_has_read(store: Store) -> None:
    """The event is off the socket already, so only the watch's own bell can tell."""
    with store.watch("a") as watch:
        watch.wait(timeout=5)
        watch.fileno()
        store.write("a", "1")
        assert store.domid == 7
        assert select.select([watch], [], [], 5) == ([watch], [], [])
        assert watch.poll() == "a"
        assert select.select([watch], [], [], 0) == ([], [], [])


def test_fileno_after_the_event(store: Store) -> None:
    with store.watch("a") as watch:
        assert store.domid == 7
        assert select.select([watch], [], [], 5) == ([watch], [], [])


def test_closing_the_store_wakes_select(store: Store) -> None:
    watch = store.watch("a")
    watch.wait(timeout=5)
    watch.fileno()
    store.close()
    assert select.select([watch], [], [], 5) == ([watch], [], [])
    with pytest.raises(Closed, match="store was closed"):
        watch.poll()
    watch.close()


# Threads


def test_many_threads(store: Store) -> None:
    def work(name: str) -> int:
        with store.watch(f"threads/{name}") as watch:
            assert watch.wait(timeout=5) == f"threads/{name}"
            for number in range(30):
                store.write(f"threads/{name}", f"{name} {number}")
                assert watch.wait(timeout=5) == f"threads/{name}"
                assert store.read_text(f"threads/{name}") == f"{name} {number}"
        return 1

    results = [in_thread(lambda name=name: work(name)) for name in "abcdef"]  # type: ignore[misc]
    assert sum(result() for result in results) == 6


def test_a_waiting_thread_does_not_hold_up_others(store: Store) -> None:
    with store.watch("a") as watch:
        watch.wait(timeout=5)
        result = in_thread(lambda: watch.wait(timeout=5))
        time.sleep(0.05)
        assert store.domid == 7
        store.write("a", "")
        assert result() == "a"


def test_the_reader_may_leave_before_the_others(daemon: Daemon, store: Store) -> None:
    """The thread that reads times out; the one that relied on it goes on reading."""
    with store.watch("a") as watch:
        watch.wait(timeout=5)
        short = in_thread(lambda: watch.wait(timeout=0.1))
        time.sleep(0.03)
        long = in_thread(lambda: watch.wait(timeout=5))
        with pytest.raises(TimedOut):
            short()
        daemon.event("a", watch.token)
        assert long() == "a"


def test_two_threads_at_one_watch(store: Store) -> None:
    with store.watch("a") as watch:
        watch.wait(timeout=5)
        results = [in_thread(lambda: watch.wait(timeout=5)) for _ in range(2)]
        time.sleep(0.03)
        store.write("a/1", "")
        store.write("a/2", "")
        assert sorted(result() for result in results) == ["a/1", "a/2"]


def test_close_ends_who_waits(store: Store) -> None:
    watch = store.watch("a")
    watch.wait(timeout=5)
    results = [in_thread(watch.wait) for _ in range(3)]
    time.sleep(0.05)
    store.close()
    for result in results:
        with pytest.raises(Closed, match="store was closed"):
            result()
    watch.close()


# Deadlines and ends


def test_a_deadline_loses_nothing(daemon: Daemon) -> None:
    with Store(daemon.client, timeout=0.05) as store:
        daemon.mute = {fake_xenstored.READ}
        with pytest.raises(TimedOut, match="has not answered READ"):
            store.read("domid")
        daemon.mute = set()
        daemon.send(fake_xenstored.READ, 1, 0, b"late")
        assert store.read("domid") == b"7"


def test_a_late_answer_to_watch_is_not_the_next_ones(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """With answers that carry no id, the order tells them apart."""
    with Store(daemon.client, timeout=0.1) as store:
        watch = daemon.watch
        with monkeypatch.context() as patch:
            held: list[tuple[int, int, bytes]] = []
            patch.setattr(daemon, "watch", lambda *request: held.append(request))
            with pytest.raises(TimedOut):
                store.watch("slow")
        for request in held:
            watch(*request)
        with store.watch("next") as after:
            assert after.wait(timeout=1) == "next"
        assert store.read("domid") == b"7"


def test_a_daemon_that_takes_nothing() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            theirs.send(bytes(4000))
    with ours, Store(theirs.detach(), timeout=0.01) as store:
        for _ in range(2):
            with pytest.raises(TimedOut, match="takes no requests"):
                store.write("x", bytes(4000))
        ours.recv(1 << 20)
        with pytest.raises(TimedOut, match="has not answered WRITE"):
            store.write("x", "")


def test_a_request_that_is_cut_off_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    write = os.write
    done: list[int] = []

    def half(fd: int, data: bytes) -> int:
        if done:
            raise BlockingIOError
        done.append(write(fd, data[:10]))
        return 10

    with ours, Store(theirs.detach(), timeout=0) as store:
        monkeypatch.setattr(os, "write", half)
        monkeypatch.setattr(select, "poll", NeverReady)
        with pytest.raises(TimedOut, match="takes no requests"):
            store.read("x")
        monkeypatch.undo()
        with pytest.raises(MachineGone, match="cut off"):
            store.read("x")


class NeverReady:
    def register(self, *_: object) -> None: ...

    def poll(self, _: object) -> list[tuple[int, int]]:
        return []


def test_the_daemon_goes(daemon: Daemon, store: Store) -> None:
    watch = store.watch("a")
    watch.wait(timeout=5)
    watch.fileno()
    result = in_thread(watch.wait)
    time.sleep(0.03)
    daemon.stop()
    with pytest.raises(MachineGone, match="open the store again"):
        result()
    assert select.select([watch], [], [], 5) == ([watch], [], [])
    for _ in range(2):
        with pytest.raises(MachineGone):
            store.read("domid")
    watch.close()


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (HEADER.pack(2, 1, 0, 5000), "announces 5000 bytes"),
        (HEADER.pack(11, 1, 0, 0), "answered READ with WRITE"),
        (HEADER.pack(2, 9, 0, 0), "answered request 9 instead of 1"),
        (HEADER.pack(2, 0, 0, 0), "answered request 0 instead of 1"),
        (HEADER.pack(2, 1, 0, 0) * 2, "nobody asked for"),
        (HEADER.pack(15, 0, 0, 2) + b"x\0", "without a token"),
        (HEADER.pack(15, 0, 0, 1) + b"x", "NUL"),
        (os.urandom(16)[:12] + b"\xff\xff\xff\xff", "announces 4294967295 bytes"),
    ],
)
def test_a_daemon_that_breaks_the_protocol(raw: bytes, what: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, Store(theirs.detach(), timeout=5) as store:
        result = in_thread(lambda: [store.read("x"), store.read("x")])
        ours.recv(100)
        ours.sendall(raw)
        with pytest.raises(PeerBroke, match=what):
            result()
        with pytest.raises(PeerBroke):
            store.read("x")


def test_one_request_at_a_time(daemon: Daemon) -> None:
    """Linux's device locks up the whole domain if a watch is asked for while another answer is to come."""
    with Store(daemon.client, timeout=0.2) as store:
        daemon.mute = {fake_xenstored.READ}
        results = [in_thread(lambda: store.read("domid")), in_thread(lambda: store.watch("a"))]
        for result in results:
            with pytest.raises(TimedOut):
                result()
        with pytest.raises(TimedOut, match="what came before"):
            store.watch("a")
        assert len(daemon.requests) == 1


def test_a_device_that_refuses_in_write(monkeypatch: pytest.MonkeyPatch, daemon: Daemon, store: Store) -> None:
    write = os.write

    def refuse(fd: int, data: bytes) -> int:
        if data[:4] == b"\4\0\0\0":
            raise OSError(errno.ENOSPC, "full")
        return write(fd, data)

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(StoreError, match="quota") as caught:
        store.watch("a")
    assert caught.value.errno == errno.ENOSPC
    assert store.domid == 7
    assert fake_xenstored.WATCH not in daemon.requests


def test_closed(store: Store) -> None:
    store.close()
    store.close()
    with pytest.raises(Closed, match="open another"):
        store.read("domid")


def test_an_unclosed_store_is_noticed(daemon: Daemon) -> None:
    store = Store(daemon.client)
    with pytest.warns(ResourceWarning, match="xenstore.* was never closed"):
        del store


def test_after_a_fork(store: Store) -> None:
    watch = store.watch("a")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for use in (lambda: store.read("domid"), watch.wait, watch.poll, lambda: store.watch("b")):
                with pytest.raises(Closed, match="in its child"):
                    use()
            watch.close()
            store.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(status_of(child)) == 0
    assert store.domid == 7
    assert watch.wait(timeout=5) == "a"
    watch.close()


# Where the daemon is


def test_a_socket_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        with Store(name):
            pass
        monkeypatch.setenv("XENSTORED_PATH", name)
        with Store() as store:
            assert repr(store) == f"<Store xenstore at {name}>"


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoMachine, match="nothing: No such file"):
        Store(str(tmp_path / "nothing"))
    monkeypatch.delenv("XENSTORED_PATH", raising=False)
    monkeypatch.setattr("gntalloc.xenstore.client.SOCKETS", (str(tmp_path / "a"),))
    monkeypatch.setattr("gntalloc.xenstore.client.DEVICES", (str(tmp_path / "b"),))
    with pytest.raises(NoMachine, match=r"a: No such file.*b: No such file.*xenfs"):
        Store()


def test_no_descriptor_is_left_behind(daemon: Daemon) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Store(daemon.client, timeout=5) as store, store.watch("a") as watch:
        watch.fileno()
        assert len(os.listdir("/proc/self/fd")) == before + 3
    assert len(os.listdir("/proc/self/fd")) == before - 1
