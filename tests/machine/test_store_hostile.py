"""Programs that use xenstore badly: bounded, refused or dropped, and nobody else notices."""

from __future__ import annotations

import random
import socket
from typing import TYPE_CHECKING, Self

import pytest

from gntalloc.machine import store as front
from gntalloc.xenstore import wire
from gntalloc.xenstore.wire import Decoder, Message, Type, join

if TYPE_CHECKING:
    from gntalloc import Domain, Machine

PATIENCE = 20.0


class Raw:
    """A connection to a domain's xenstore, by hand."""

    def __init__(self, machine: Machine, domid: int) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(machine.environ(domid)["XENSTORED_PATH"])
        self._decoder = Decoder()
        self._messages: list[Message] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, kind: int, body: bytes, *, tx_id: int = 0) -> None:
        self.sock.sendall(wire.encode(Message(kind, 7, tx_id, body)))

    def receive(self) -> Message:
        while not self._messages:
            data = self.sock.recv(65536)
            assert data, "the machine hung up"
            self._messages = self._decoder.feed(data)
        return self._messages.pop(0)

    def answer(self) -> Message:
        """The next message that is no event."""
        while (message := self.receive()).type == Type.WATCH_EVENT:
            pass
        return message

    def ask(self, kind: int, body: bytes, *, tx_id: int = 0) -> Message:
        self.send(kind, body, tx_id=tx_id)
        return self.answer()

    def hung_up(self) -> bool:
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionResetError:
            pass
        return True


@pytest.fixture(autouse=True)
def _bystander(alice: Domain, bob: Domain) -> object:
    """Domain 2 uses xenstore before, meanwhile and after, and never notices. Domain 1 is where the hostile ones are."""
    bob.store.write("data/bystander", "before")
    with bob.store.watch("data/bystander") as watch:
        watch.wait(timeout=PATIENCE)
        yield
        bob.store.write("data/bystander", "after")
        assert watch.wait(timeout=PATIENCE) == "data/bystander"
    bob.store.remove("data/bystander")
    assert set(alice.store.list("data")) <= {"flood"}
    alice.store.remove("data/flood")


@pytest.mark.parametrize("length", [4097, 1 << 20, 0xFFFFFFFF])
def test_a_length_beyond_all_bounds_ends_the_connection(machine: Machine, length: int) -> None:
    with Raw(machine, 1) as raw:
        raw.send(Type.READ, join("domid"))
        raw.sock.sendall(wire.HEADER.pack(Type.WRITE, 1, 0, length))
        assert raw.receive().body == b"1"  # what came before it is served
        assert raw.hung_up()


@pytest.mark.parametrize("body", [b"", b"no end", b"data/flood", b"\0", b"\0\0\0", b"\xff" * 4096, bytes(4096)])
def test_bodies_of_any_kind_are_answered(machine: Machine, body: bytes) -> None:
    with Raw(machine, 1) as raw:
        for kind in range(30):
            for tx_id in (0, 1, 0xFFFFFFFF):
                if kind == Type.RESET_WATCHES:
                    continue
                answer = raw.ask(kind, body, tx_id=tx_id)
                assert answer.req_id == 7
                assert answer.type in {kind, Type.ERROR}
        raw.ask(Type.RESET_WATCHES, b"")


def test_random_bytes(machine: Machine) -> None:
    dice = random.Random(5)
    for _ in range(50):
        with Raw(machine, 1) as raw:
            try:
                raw.sock.sendall(dice.randbytes(dice.randrange(1, 3000)))
            except OSError:
                pass  # it has hung up already


def test_half_a_message_holds_nobody_up(machine: Machine, alice: Domain) -> None:
    message = wire.encode(Message(Type.WRITE, 7, 0, join("data/flood") + b"x" * 2100))
    with Raw(machine, 1) as raw:
        for cut in (1, 15, 16, 17, 1000):
            raw.sock.sendall(message[:cut])
            assert alice.store.domid == 1
            raw.sock.sendall(message[cut:])
            assert raw.answer().type == Type.ERROR  # the node would be too large
        raw.sock.sendall(message[:100])


def test_who_asks_and_never_reads_is_not_listened_to(machine: Machine, alice: Domain) -> None:
    """The machine keeps twenty answers and no more; the rest waits in the sender's socket."""
    question = wire.encode(Message(Type.DIRECTORY, 7, 0, join("/local/domain/1")))
    with Raw(machine, 1) as raw:
        raw.sock.settimeout(0.5)
        sent = 0
        try:
            while True:
                sent += raw.sock.send(question * 100)
        except TimeoutError:
            pass  # nobody takes any more
        assert alice.store.domid == 1
        raw.sock.settimeout(PATIENCE)
        asked = sent // len(question)
        for _ in range(asked):
            assert raw.receive().type == Type.DIRECTORY


def test_who_does_not_read_its_events_misses_some(machine: Machine, alice: Domain) -> None:
    """As with the real daemon: a domain's unread events count against its memory, and then there are no more."""
    with Raw(machine, 1) as raw:
        for number in range(100):
            assert raw.ask(Type.WATCH, join("data", f"{number}" + "t" * 1500)).type == Type.WATCH
        for number in range(60):
            alice.store.write(f"data/flood/{number}", "x" * 500)
        # Its answers still come, after all the events that were kept: less than the quota and what sockets hold.
        raw.send(Type.READ, join("domid"))
        received = 0
        while (message := raw.receive()).type == Type.WATCH_EVENT:
            received += len(message.body)
        assert message.body == b"1"
        assert 500_000 < received < 4_000_000


def test_ten_thousand_watches(machine: Machine) -> None:
    with Raw(machine, 1) as raw:
        codes = [raw.ask(Type.WATCH, join("data", str(number))) for number in range(10_000)]
        assert [code.type for code in codes[:129]] == [Type.WATCH] * 129
        assert {code.body for code in codes[129:]} == {b"E2BIG\0"}


def test_as_many_transactions_as_there_may_be(machine: Machine) -> None:
    with Raw(machine, 1) as raw:
        answers = [raw.ask(Type.TRANSACTION_START, b"\0") for _ in range(100)]
        assert [answer.type for answer in answers[:11]] == [Type.TRANSACTION_START] * 11
        assert {answer.body for answer in answers[11:]} == {b"ENOSPC\0"}
    with Raw(machine, 1) as raw:  # and they end with their connection
        assert raw.ask(Type.TRANSACTION_START, b"\0").type == Type.TRANSACTION_START


def test_a_transaction_that_sees_too_much_fails(machine: Machine) -> None:
    with Raw(machine, 1) as raw:
        number = int(raw.ask(Type.TRANSACTION_START, b"\0").body[:-1])
        answers = [raw.ask(Type.READ, join(f"data/no-{name}"), tx_id=number).body for name in range(1100)]
        assert set(answers[:1000]) == {b"ENOENT\0"}
        assert answers[-1] == b"ENOSPC\0"
        assert raw.ask(Type.TRANSACTION_END, join("T"), tx_id=number).body == b"ENOMEM\0"


def test_a_thousand_nodes_and_no_more(machine: Machine, alice: Domain) -> None:
    made = 0
    with Raw(machine, 1) as raw:
        for number in range(1100):
            answer = raw.ask(Type.WRITE, join(f"data/flood/{number % 100}/{number}"))
            made += answer.type == Type.WRITE
        assert answer.body == b"ENOSPC\0"
        assert 800 < made < 1000
        # Deep is as good as many.
        assert raw.ask(Type.RM, join("data/flood")).type == Type.RM
        deep = "/".join(["d"] * 990)
        assert raw.ask(Type.MKDIR, join(f"data/flood/{deep}")).body == b"ENOSPC\0"
        deep = "/".join(["d"] * 900)
        assert raw.ask(Type.MKDIR, join(f"data/flood/{deep}")).type == Type.MKDIR
        assert alice.store.list("data") == ("flood",)


def test_connections_are_counted(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    raws = []
    while True:
        raw = Raw(machine, 1)
        raws.append(raw)
        try:
            raw.send(Type.READ, join("domid"))
            raw.receive()
        except (AssertionError, ConnectionResetError, BrokenPipeError):
            break
    assert front.MAX_LINES - 8 <= len(raws) <= front.MAX_LINES + 1
    for raw in raws:
        raw.sock.close()


def test_watches_of_a_connection_that_ended_cost_nothing(machine: Machine, alice: Domain) -> None:
    for _ in range(5):
        with Raw(machine, 1) as raw:
            for number in range(129):
                raw.send(Type.WATCH, join("data", str(number)))
            for _ in range(129):
                assert raw.answer().type == Type.WATCH
    with alice.store.watch("data") as watch:
        watch.wait(timeout=PATIENCE)
