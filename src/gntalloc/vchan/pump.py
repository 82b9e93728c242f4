"""Two descriptors and a channel: what one gives goes into it, what comes out of it goes to the other. For `cat`.

Bytes are read into the ring and written from it, with no memory in between. The end of the source is the end of this
direction only: of a peer of this package it is said (`finish`), and the other direction goes on. A libxenvchan can be
told nothing but that all is over: it is, once it has read everything and has had a while to answer; but a source that
was empty from the start ends nothing there, and the peer's close is waited for.

It is over when both directions are, and the peer has read everything that it was sent; or when the peer has closed. A
peer may close as soon as it has read the last byte, so that alone is no failure: what it left unread is, in the ring or
in the source.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

from gntalloc import waits
from gntalloc.errors import Closed, GntallocError, PeerClosed, PeerGone, TimedOut
from gntalloc.vchan.channel import core_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.vchan.channel import Channel

__all__ = ["LINGER", "pump"]

LINGER = 1.0
"""Seconds of silence after which a libxenvchan that has read everything is taken to have no answer."""
_PIECE = 1 << 18  # bytes at most that are read from the source at once


def pump(
    channel: Channel,
    source: int,
    sink: int,
    *,
    linger: float = LINGER,
    moved: Callable[[int], None] = lambda _count: None,
    received: Callable[[], None] = lambda: None,
) -> None:
    """Move bytes until the end, and close the channel.

    Args:
        channel: connected, and then closed.
        source: a descriptor to read.
        sink: a descriptor to write.
        linger: seconds that a libxenvchan is waited for, after it has read everything, and after each of its answers.
        moved: is told how many bytes went either way, from two threads.
        received: is called when nothing more will go to the sink.

    Raises:
        PeerClosed: the peer closed before it had read everything.
        PeerDied: the peer's program ended without closing.
        BrokenPipeError: nobody reads the sink any more.
        GntallocError: the source cannot be read, or the sink not written; the errno is its own.
    """
    sender = _Sender(channel, source, moved)
    sender.start()
    try:
        _receive(channel, sink, moved, sender, linger)
        received()
        _wait_for(sender, channel)
        sender.stop()
        sender.join()  # or it could put more into the ring, after the look at what is unread
        if sender.outcome is None and (unread := channel.unread):
            raise PeerClosed(f"domain {channel.peer} closed, and {unread} bytes were not read by it")
    finally:
        sender.stop()
        channel.close()
        sender.join()
        sender.close()
    if sender.outcome is not None:
        raise sender.outcome


def _receive(channel: Channel, sink: int, moved: Callable[[int], None], sender: _Sender, linger: float) -> None:
    """Until the peer writes no more; or, if it cannot say so, until it has been silent after it had read everything."""
    while True:
        drained = sender.drained
        patience = None if channel.extended else linger if drained else LINGER
        try:
            view = channel.peek(timeout=patience)
        except TimedOut:
            if drained:
                return
            continue
        if not view:
            return
        with view:
            count = _write(sink, view)
        channel.release(count)
        moved(count)


def _wait_for(sender: _Sender, channel: Channel) -> None:
    """Wait until all is sent, or the peer is gone. The peer writes no more, but may read."""
    poll = waits.poll()
    poll.register(sender.done, waits.POLLIN)
    bells = core_of(channel).end.bells
    poll.register(bells.fileno(), waits.POLLIN)
    while channel.connected:
        for descriptor, _ in poll.poll():
            if descriptor == sender.done:
                return
            bells.hear_now()


def _write(sink: int, view: memoryview) -> int:
    try:
        return os.write(sink, view)
    except BlockingIOError:  # a pipe that somebody else who has it made so
        poll = waits.poll()
        poll.register(sink, waits.POLLOUT)
        poll.poll()
        return 0
    except BrokenPipeError:
        raise
    except OSError as error:
        why = f"what came cannot be written: {error.strerror}"
        raise GntallocError(error.errno or errno.EIO, why) from error


def _unreadable(error: OSError) -> GntallocError:
    return GntallocError(error.errno or errno.EIO, f"what is to be sent cannot be read: {error.strerror}")


class _Sender:
    """A thread: from the source into the channel.

    Attributes:
        outcome: what went wrong.
        drained: the source has ended, a libxenvchan has read everything, and cannot be told.
        done: readable when it has ended.
    """

    def __init__(self, channel: Channel, source: int, moved: Callable[[int], None]) -> None:
        self.outcome: Exception | None = None
        self.drained = False
        self._channel = channel
        self._source = source
        self._moved = moved
        self.done = os.eventfd(0, os.EFD_CLOEXEC)
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Wait for the source no more."""
        os.eventfd_write(self._bell, 1)

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()

    def close(self) -> None:
        """Put the bells away, after `join`."""
        os.close(self._bell)
        os.close(self.done)

    def _run(self) -> None:
        channel = self._channel
        try:
            sent = self._send()
            if sent is None:
                return
            if channel.extended:
                channel.finish()
            if sent or channel.extended:
                channel.drain()
                self.drained = True
        except Closed:
            pass  # so somebody else has ended it
        except Exception as error:
            self.outcome = error
        finally:
            os.eventfd_write(self.done, 1)

    def _send(self) -> int | None:
        """How many bytes it was, at the end of the source; None: stopped, with nothing to send just then."""
        channel = self._channel
        poll = waits.poll()
        poll.register(self._bell, waits.POLLIN)
        try:
            poll.register(self._source, waits.POLLIN)
        except OSError as error:
            raise _unreadable(error) from error
        sent = 0
        while True:
            ready = [descriptor for descriptor, _ in poll.poll(None if channel.connected else 0)]
            if self._source not in ready:
                return None
            # Only once there is something to read, so that nothing is reserved when the channel is to be closed.
            try:
                view = channel.reserve()
            except PeerGone:
                if os.read(self._source, 1):
                    raise  # that, and what follows it, nobody will read
                return sent
            try:
                with view:
                    count = os.readv(self._source, [view[:_PIECE]])
            except BlockingIOError:  # another reader of it was faster
                channel.commit(0)
                continue
            except OSError as error:
                channel.commit(0)
                raise _unreadable(error) from error
            except BaseException:
                channel.commit(0)
                raise
            channel.commit(count)
            if not count:
                return sent
            sent += count
            self._moved(count)
