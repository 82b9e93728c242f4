"""Listener: clients are waited for by a thread. `gntalloc.aio` has the same for asyncio."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

from gntalloc.clock import Deadline
from gntalloc.errors import Closed, GntallocError, TimedOut
from gntalloc.vchan.offers import SIZE, Offers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc.guest.domain import BareDomain
    from gntalloc.vchan.channel import Channel
    from gntalloc.vchan.nodes import Tree

__all__ = ["SIZE", "Listener"]


class Listener:
    """Waits for clients of one domain at one path. Made by `Domain.listen`. Any thread may accept, one at a time.

    Attributes:
        peer: whose clients.
        path: where the nodes are, in full.
    """

    def __init__(
        self,
        domain: BareDomain,
        peer: int,
        path: str,
        *,
        size: int | tuple[int, int] = SIZE,
        extensions: bool | None = None,
        spin: float | None = None,
        most_per_peer: int | None = None,
        store: Tree | None = None,
    ) -> None:
        self._offers = Offers(
            domain,
            peer,
            path,
            size=size,
            extensions=extensions,
            spin=spin,
            most_per_peer=most_per_peer,
            store=store,
        )
        self._accepting = threading.Lock()  # held while a client is waited for
        self.peer = peer
        self.path = self._offers.path

    def offer(self) -> Channel:
        """Give the channel of the next client, which may not have come yet: what is written is there when it comes.

        `accept` is this and `Channel.wait_connected`; a thread that is in it does not hold this up. The same channel,
        until somebody has come or it is closed. If the machine or the domain has ended and is there again, it is
        another one.

        Raises:
            MachineGone: nobody answers at the domain's address. This listener serves again once somebody does.
        """
        return self._offers.offer()

    def accept(self, *, timeout: float | None = None) -> Channel:
        """Wait for a client.

        Args:
            timeout: seconds; None waits for ever.

        Returns:
            The channel with it.

        Raises:
            TimedOut: nobody came. The next call goes on waiting.
            Closed: this was closed.
            PeerQuotaReached: EDQUOT the peer has as many pages as it may have. The next call tries again.
            DeviceError: ENOSPC there are not enough pages for another channel, or no port.
            MachineGone: nobody answers at the domain's address. This listener serves again once somebody does: accept
                again.
        """
        offers = self._offers
        offers.check_owner()
        deadline = Deadline(timeout)
        if not deadline.acquire(self._accepting):
            raise TimedOut(f"another thread accepts at {self.path}, and had nobody within {timeout} s")
        try:
            while True:
                channel = offers.offer()
                try:
                    channel.wait_connected(timeout=deadline.remaining)
                except TimedOut:
                    raise
                except GntallocError as error:
                    offers.go_on_after(error, channel)
                else:
                    offers.take()
                    return channel
        finally:
            self._accepting.release()

    def __iter__(self) -> Iterator[Channel]:
        """Yield a channel for each client that comes."""
        while True:
            try:
                yield self.accept()
            except Closed:
                return

    def close(self) -> None:
        """Wait for nobody any more. Channels that were accepted live on. Can be repeated."""
        self._offers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._offers)
