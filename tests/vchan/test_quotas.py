"""One peer cannot use up a server: what a client keeps counts for it alone, and others are served as before."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NoReturn

import pytest
from limits import status_of

import gntalloc
from gntalloc import DeviceError, PeerQuotaReached, aio
from gntalloc.clock import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc import Domain, Machine

PATIENCE = 30.0

# Connects as often as it can, and never lets go.
GREEDY = """
import gntalloc, sys
domain, kept = gntalloc.current_domain(), []
while True:
    kept.append(domain.connect(1, "echo"))
    print(len(kept), flush=True)
"""
# One connection, and out again.
HONEST = """
import gntalloc
with gntalloc.current_domain().connect(1, "echo", timeout=30) as channel:
    channel.send(b"hello")
    print(channel.recv(timeout=30).decode(), flush=True)
"""


@contextmanager
def program(machine: Machine, domid: int, code: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], env=machine.environ(domid), stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


def entered(machine: Machine, domid: int, stack: ExitStack) -> Domain:
    domain = machine.domain(domid)
    stack.callback(domain.devices.close)
    stack.callback(domain.close)
    return domain


def serve(listener: gntalloc.Listener) -> None:
    """One client of the honest kind."""
    with listener.accept(timeout=PATIENCE) as channel:
        channel.send(channel.recv(timeout=PATIENCE))
        channel.drain(timeout=PATIENCE)


def accept_all(
    listener: gntalloc.Listener,
    process: subprocess.Popen[str],
    channels: list[gntalloc.Channel],
    stack: ExitStack,
    *,
    closing: bool,
) -> None:
    assert process.stdout is not None
    while True:
        channels.append(stack.enter_context(listener.accept(timeout=PATIENCE)))
        assert process.stdout.readline() == f"{len(channels)}\n"  # it has the channel, and will keep it
        if closing:
            channels[-1].close()


def offer_again(listener: gntalloc.Listener) -> None:
    """Once the machine has seen that the peer has let go."""
    deadline = Deadline(PATIENCE)
    while True:
        try:
            listener.offer()
        except PeerQuotaReached:
            assert not deadline.expired
        else:
            return


def see_served(machine: Machine, listener: gntalloc.Listener, domid: int) -> None:
    with program(machine, domid, HONEST) as process:
        serve(listener)
        assert process.communicate(timeout=PATIENCE)[0] == "hello\n"


@pytest.mark.parametrize("closing", [False, True], ids=["kept here too", "closed here at once"])
def test_a_client_that_never_lets_go(make_machine: Callable[..., Machine], closing: bool) -> None:
    machine = make_machine(limit=1024)
    with ExitStack() as stack:
        server, _, _ = (entered(machine, domid, stack) for domid in (1, 2, 3))
        greedy, others = (stack.enter_context(server.listen(domid, "echo")) for domid in (2, 3))
        process = stack.enter_context(program(machine, 2, GREEDY))
        channels: list[gntalloc.Channel] = []
        with pytest.raises(PeerQuotaReached, match=r"domain 2 .* has 495 of this program's.* may have 512") as caught:
            accept_all(greedy, process, channels, stack, closing=closing)
        assert (caught.value.errno, len(channels)) == (errno.EDQUOT, 15)
        assert ("kept by it" in str(caught.value)) == closing
        for _ in range(3):
            see_served(machine, others, 3)
        with pytest.raises(PeerQuotaReached):
            greedy.accept(timeout=PATIENCE)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
        for channel in channels:
            channel.close()
        offer_again(greedy)
        see_served(machine, greedy, 2)  # it is another program of that domain


def test_a_bound_of_ones_own(alice: Domain, bob: Domain) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(alice.listen(2, "echo", size=0, most_per_peer=2))
        for _ in range(2):
            channel = listener.offer()
            stack.enter_context(bob.connect(1, "echo", timeout=PATIENCE))
            assert stack.enter_context(listener.accept(timeout=PATIENCE)) is channel
        with pytest.raises(PeerQuotaReached, match=r"1 page for domain 2 .* raise most_per_peer"):
            listener.offer()
        with alice.share(2), pytest.raises(PeerQuotaReached):  # a share without a bound is free to do so
            listener.offer()
    for wrong, error in ((-1, ValueError), ("many", TypeError)):
        with pytest.raises(error, match="most_per_peer"):
            alice.listen(2, "echo", most_per_peer=wrong)  # type: ignore[arg-type]
    with pytest.raises(PeerQuotaReached):
        alice.listen(2, "echo", size=4096, most_per_peer=2)


def test_two_large_channels_are_always_possible(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(limit=8000)
    with ExitStack() as stack:
        alice, bob = entered(machine, 1, stack), entered(machine, 2, stack)
        listener = stack.enter_context(alice.listen(2, "echo", size=4 << 20))
        stack.enter_context(bob.connect(1, "echo", timeout=PATIENCE))
        stack.enter_context(listener.accept(timeout=PATIENCE))
        listener.offer()


def test_in_asyncio_too(alice: Domain, bob: Domain) -> None:
    async def run() -> None:
        async with aio.listen(alice, 2, "echo", size=0, most_per_peer=1) as listener:
            client = asyncio.create_task(aio.connect(bob, 1, "echo"))
            async with await listener.accept(), await client:
                with pytest.raises(PeerQuotaReached):
                    await listener.accept()
            client = asyncio.create_task(aio.connect(bob, 1, "echo"))
            async with await listener.accept(), await client:
                pass

    asyncio.run(asyncio.wait_for(run(), PATIENCE))


# share.


def test_share_on_request(alice: Domain, bob: Domain) -> None:
    shared = alice.share(2, pages=3)
    with pytest.raises(
        PeerQuotaReached, match=r"2 pages for domain 2 would be too many: it has 3 .* may have 4 at"
    ) as caught:
        alice.share(2, pages=2, most_per_peer=4)
    assert isinstance(caught.value, DeviceError)
    with alice.share(3, pages=2, most_per_peer=4), alice.share(2, most_per_peer=4), alice.share(2, pages=20):
        pass
    shared.close()
    kept = alice.share(2, pages=3, most_per_peer=4)
    mapped = bob.map(kept.grant)
    kept.close()
    with pytest.raises(PeerQuotaReached, match=r"it has 3 of this program's \(3 of them closed here, and kept by it\)"):
        alice.share(2, pages=2, most_per_peer=4)
    mapped.close()
    deadline = Deadline(PATIENCE)
    while True:
        try:
            alice.share(2, pages=4, most_per_peer=4).close()
        except PeerQuotaReached:
            assert not deadline.expired
        else:
            break


def test_what_failed_does_not_count(alice: Domain) -> None:
    for _ in range(3):
        with pytest.raises(DeviceError) as caught:
            alice.share(2, pages=1000, most_per_peer=1000)
        assert caught.value.errno == errno.ENOSPC
    alice.share(2, pages=4, most_per_peer=4).close()
    lost = [alice.share(2, pages=4, most_per_peer=4)]
    with pytest.warns(ResourceWarning):
        lost.clear()
    alice.share(2, pages=4, most_per_peer=4).close()


def test_what_could_not_even_be_asked_for_does_not_count(alice: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of a program opens the device file, too."""

    def refuse(*_: object) -> NoReturn:
        raise DeviceError(errno.EMFILE, "no descriptors are left")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(alice.devices, "open", refuse)
        for _ in range(3):
            with pytest.raises(DeviceError, match="no descriptors are left"):
                alice.share(2, pages=4, most_per_peer=4)
    alice.share(2, pages=4, most_per_peer=4).close()


def test_a_child_made_by_fork_begins_anew(alice: Domain) -> None:
    with alice.share(2, pages=4, most_per_peer=4) as shared:
        child = os.fork()
        if not child:
            status = 1
            try:
                shared.close()
                alice.share(2, pages=4, most_per_peer=4).close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(status_of(child)) == 0
        with pytest.raises(PeerQuotaReached):
            alice.share(2, most_per_peer=4)


def test_a_detached_channel_counts_until_its_client_has_gone(alice: Domain, bob: Domain) -> None:
    with alice.listen(2, "echo", size=0, most_per_peer=2) as listener:
        client = bob.connect(1, "echo", timeout=PATIENCE)
        with listener.accept(timeout=PATIENCE).detach() as ticket:
            child = os.fork()
            if not child:
                status = 1
                try:
                    with gntalloc.adopt(ticket) as channel:
                        channel.recv(timeout=PATIENCE)
                    status = 0
                finally:
                    os._exit(status)
        listener.offer()
        second = bob.connect(1, "echo", timeout=PATIENCE)
        accepted = listener.accept(timeout=PATIENCE)
        with pytest.raises(PeerQuotaReached):
            listener.offer()
        client.send(b"end")
        client.close()
        assert os.waitstatus_to_exitcode(status_of(child)) == 0
        offer_again(listener)
        second.close()
        accepted.close()
