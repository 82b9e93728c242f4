"""Stream bytes from one domain to another through pages that the sender granted, on the machine and on real Xen.

There are two grants: a *ring* of pages that the receiver may only read, and one *control* page that both write. Nothing
else passes between the two but the text of these grants. The receiver's digest comes back in the control page.

    control page, little-endian
    0     u64   produced: bytes the sender has put into the ring, ever     (written by the sender)
    8     u64   ended: 1 when `produced` is final
    64    u64   consumed: bytes the receiver has taken, ever               (written by the receiver)
    72    u64   state: 0 not there yet, 1 reading, 2 done, 3 failed
    128   32 B  SHA-256 of the bytes that the receiver took
    192   u64   bytes the receiver got by read(2) and its kin meanwhile, as its kernel counts them
    256   512 B text of an error, UTF-8

Each counter is one aligned word with one writer, so neither side needs a lock.
"""

from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING, NamedTuple, Self

from gntalloc.clock import Deadline, now
from gntalloc.errors import GntallocError, PeerBroke, TimedOut
from gntalloc.guest.grant import Grant
from gntalloc.looking import Look
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.domain import Domain

__all__ = ["Outcome", "Sender", "receive"]

_PRODUCED, _ENDED, _CONSUMED, _STATE, _READ_BYTES = 0, 1, 8, 9, 24  # words
_DIGEST = slice(128, 160)
_TROUBLE = slice(256, 768)
_READING, _DONE, _FAILED = 1, 2, 3

_CHUNK = 256 * 1024  # at most, at a time: small enough to stay in the processor's cache
_LOOK = 50e-6  # seconds to look at the other's counter before the first nap
_NAP = 0.00005


class Outcome(NamedTuple):
    """Tell what the sender knows in the end."""

    moved: int  # bytes
    seconds: float
    sent: str  # SHA-256, hexadecimal
    received: str
    read_bytes: int  # bytes that the receiver got in any other way


class Sender:
    """Be the granting side.

    Args:
        domain: the domain that grants its pages.
        peer: the receiver's domid.
        pages: the size of the ring.
    """

    def __init__(self, domain: Domain, peer: int, *, pages: int = 512) -> None:
        self._control = domain.share(peer, writable=True)
        try:
            self._ring = domain.share(peer, pages)
        except BaseException:
            self._control.close()
            raise
        self._words = self._control.memory.cast("Q")

    @property
    def text(self) -> str:
        """All that the receiver has to be told."""
        return f"{self._control.grant} {self._ring.grant}"

    @property
    def pages(self) -> int:
        """The number of granted pages, both grants together."""
        return len(self._control.refs) + len(self._ring.refs)

    @property
    def mapped_by(self) -> tuple[int, ...]:
        """The domains that map the ring, where that can be known."""
        return self._ring.mapped_by

    def send(
        self,
        fill: Callable[[memoryview], int],
        *,
        here: Callable[[], None] = lambda: None,
        moved: Callable[[int], None] = lambda _: None,
        alive: Callable[[], bool] = lambda: True,
        timeout: float = 60.0,
    ) -> Outcome:
        """Send the bytes that `fill` puts into its buffer, until it returns 0, and wait for the receiver's digest.

        Args:
            fill: fills some of the buffer, straight in the granted pages, as readinto does, and returns how much.
            here: called once, when the receiver has mapped the pages.
            moved: told now and then how many bytes have gone.
            alive: says whether the receiver's process still runs.
            timeout: seconds without any progress of the receiver.

        Raises:
            PeerBroke: the receiver told of an error, or ended, or claims to have taken bytes that were never there.
            TimedOut: the receiver does not come, or does not go on.
        """
        words, ring = self._words, self._ring.memory
        size = len(ring)
        digest = hashlib.sha256()
        waiter = _Waiter(timeout, alive, self._trouble)
        waiter.until(lambda: words[_STATE] != 0, "come")
        here()
        produced = 0
        started = now()
        while True:
            room = size - (produced - self._consumed(produced))
            if not room:
                waiter.until(lambda: words[_CONSUMED] != produced - size, "go on")  # noqa: B023  called at once
                continue
            at = produced % size
            with ring[at : min(size, at + min(room, _CHUNK))] as chunk:
                filled = fill(chunk)
                digest.update(chunk[:filled])
            if not filled:
                break
            produced += filled
            words[_PRODUCED] = produced
            moved(produced)
        words[_ENDED] = 1
        waiter.until(lambda: words[_STATE] == _DONE, "finish")
        seconds = now() - started
        received = bytes(self._control.memory[_DIGEST]).hex()
        return Outcome(produced, seconds, digest.hexdigest(), received, words[_READ_BYTES])

    def close(self) -> None:
        """Take the pages back."""
        self._words.release()
        self._ring.close()
        self._control.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _consumed(self, produced: int) -> int:
        consumed = self._words[_CONSUMED]
        if not produced - len(self._ring.memory) <= consumed <= produced:
            raise PeerBroke(
                f"the receiver claims to have taken {consumed} bytes of {produced}; it is not to be trusted"
            )
        return consumed

    def _trouble(self) -> str | None:
        if self._words[_STATE] != _FAILED:
            return None
        return bytes(self._control.memory[_TROUBLE]).rstrip(b"\0").decode(errors="replace")


def receive(domain: Domain, text: str, *, digest: hashlib._Hash | None = None, timeout: float = 60.0) -> int:
    """Take everything, on the grantee's side, and put its SHA-256 into the control page. Return the number of bytes.

    Args:
        domain: the grantee's domain.
        text: the sender's `Sender.text`.
        digest: a new SHA-256 to use, if the caller wants to know it too.
        timeout: seconds without any progress of the sender.

    Raises:
        PeerBroke: the sender's counters make no sense.
        TimedOut: the sender does not go on.
        BadGrantText: `text` is no `Sender.text`.
    """
    control_grant, ring_grant = (Grant.parse(part) for part in _two(text))
    with (
        domain.map(control_grant, writable=True) as control,
        domain.map(ring_grant, writable=False) as ring,
        control.memory.cast("Q") as words,
    ):
        try:
            before = _read_bytes()
            words[_STATE] = _READING
            taken = _take(words, ring.memory, control.memory, digest or hashlib.sha256(), timeout)
            words[_READ_BYTES] = _read_bytes() - before
            words[_STATE] = _DONE
        except GntallocError as error:
            control.memory[_TROUBLE] = str(error).encode()[:512].ljust(512, b"\0")
            words[_STATE] = _FAILED
            raise
        return taken


def _take(words: memoryview, ring: memoryview, control: memoryview, digest: hashlib._Hash, timeout: float) -> int:
    size = len(ring)
    waiter = _Waiter(timeout, lambda: True, lambda: None)
    consumed = 0
    while True:
        ended = words[_ENDED]  # before `produced`, or the last bytes could be missed
        ready = words[_PRODUCED] - consumed
        if not 0 <= ready <= size:
            raise PeerBroke(f"the sender claims {ready} bytes in a ring of {size}; it is not to be trusted")
        if not ready:
            if ended:
                break
            waiter.until(lambda: words[_PRODUCED] != consumed or words[_ENDED] == 1, "go on")  # noqa: B023
            continue
        at = consumed % size
        with ring[at : min(size, at + ready)] as chunk:
            digest.update(chunk)
            consumed += len(chunk)
        words[_CONSUMED] = consumed
    control[_DIGEST] = digest.digest()
    return consumed


class _Waiter:
    """Wait for the other side: look for a while, then nap, and give up in the end."""

    def __init__(self, timeout: float, alive: Callable[[], bool], trouble: Callable[[], str | None]) -> None:
        self._timeout = timeout
        self._alive = alive
        self._trouble = trouble
        self._look = Look(_LOOK)

    def until(self, ready: Callable[[], bool], what: str) -> None:
        deadline = Deadline(self._timeout)
        if not (ready() or self._look_for(ready, deadline)):
            self._nap_until(ready, what, deadline)
            self._look.woken()
        trouble = self._trouble()
        if trouble is not None:
            raise PeerBroke(f"the other side failed: {trouble}")

    def _look_for(self, ready: Callable[[], bool], deadline: Deadline) -> bool:
        until = self._look.until(deadline)
        while now() < until:
            if ready():
                self._look.paid()
                return True
        return False

    def _nap_until(self, ready: Callable[[], bool], what: str, deadline: Deadline) -> None:
        while not ready():
            time.sleep(_NAP)
            if self._trouble() is not None:
                return
            if not self._alive() and not ready():
                raise PeerBroke("the other side's process has ended in the middle")
            if deadline.expired:
                raise TimedOut(f"the other side did not {what} for {self._timeout:.0f} s; does it still run?")


def _two(text: str) -> tuple[str, str]:
    parts = text.split()
    if len(parts) != 2:
        # The parser's error says what a grant looks like.
        Grant.parse(text)
        raise PeerBroke("two grants are needed, the control page's and the ring's; here is one")
    return parts[0], parts[1]


def _read_bytes() -> int:
    """Count the bytes that this process has read with read(2) and its kin, less those of this very look."""
    descriptor = os.open("/proc/self/io", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(descriptor, PAGE_SIZE)
    finally:
        os.close(descriptor)
    counters = dict(line.split(": ") for line in text.decode().splitlines())
    looks = _read_bytes_looks
    total = int(counters["rchar"]) - sum(looks)
    looks.append(len(text))
    return total


_read_bytes_looks: list[int] = []
