"""Write the machine's log without ever waiting for its reader, and only so much of it a second.

Programs can cause as many lines as they like, and nobody may read them: a full pipe, a stopped terminal. So a line that
has no room is left out, and of lines of one kind about one domain only the first few of each second are written. The
log says how many were left out, before its next line and at its end.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import socket
import stat
from collections import Counter
from typing import TYPE_CHECKING

from gntalloc import clock

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LINES_A_KIND", "LINES_A_SECOND", "Logbook", "Outlet", "keep_log"]

LINES_A_KIND = 10
"""Lines of one kind about one domain that are written in a second."""
LINES_A_SECOND = 200
_KINDS = 100  # kinds of which lines that were left out are counted apart
_LONGEST = select.PIPE_BUF  # bytes that a pipe takes whole or not at all
_NEVER_WAIT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


def keep_log(level: int, form: str) -> Outlet:
    """Let the log of this process go to standard error, and return the way there, for all else that may be said."""
    outlet = Outlet(2)
    logbook = Logbook(outlet)
    logbook.setFormatter(logging.Formatter(form))
    logging.basicConfig(level=level, handlers=[logbook], force=True)
    return outlet


class Outlet(io.TextIOBase):
    """Write to a descriptor what it has room for. It may be shared, so its own mode is left as it is.

    A regular file is written to as ever.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._own = contextlib.ExitStack()  # what it has opened
        self._cut = False  # whether the last line did not go out whole
        self._try = self._way()

    def fileno(self) -> int:
        """Give the descriptor that was asked for."""
        return self._descriptor

    def close(self) -> None:
        """Close what it has opened, and leave the descriptor that was given to it."""
        self._own.close()
        super().close()

    def writable(self) -> bool:
        """Say that it can be written to."""
        return True

    def write(self, text: str) -> int:
        """Write a text as far as there is room, and say that all of it was written."""
        self.put(text)
        return len(text)

    def put(self, text: str) -> bool:
        """Write a text, of which the middle is left out if it is long. False: there is no room, or nobody to read."""
        data = (b"\n" if self._cut else b"") + text.encode(errors="backslashreplace")
        if len(data) > _LONGEST:
            half = _LONGEST // 2 - len(_GAP)
            data = data[:half] + _GAP + data[-half:]
        try:
            written = self._try(data)
        except OSError:
            return False
        self._cut = written < len(data)
        return True

    def _way(self) -> Callable[[bytes], int]:
        """Choose how to write: over a description of our own if one can be had, which does not wait."""
        try:
            mode = os.fstat(self._descriptor).st_mode
        except OSError:
            return len  # it is closed: nobody wants to know
        if stat.S_ISREG(mode):
            return lambda data: os.write(self._descriptor, data)
        if stat.S_ISSOCK(mode):
            sock = self._own.enter_context(socket.socket(fileno=os.dup(self._descriptor)))
            return lambda data: sock.send(data, _NEVER_WAIT)
        try:
            own = os.open(f"/proc/self/fd/{self._descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            return self._write_if_there_is_room
        self._own.callback(os.close, own)
        return lambda data: os.write(own, data)

    def _write_if_there_is_room(self, data: bytes) -> int:
        """Write to what others may write to as well: they could take the room between the look and the writing."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        if not poll.poll(0):
            raise BlockingIOError
        return os.write(self._descriptor, data)


class Logbook(logging.Handler):
    """Write records to an outlet, and count those that it leaves out."""

    def __init__(self, outlet: Outlet) -> None:
        super().__init__()
        self._outlet = outlet
        self._begun = 0.0  # the second for which is counted
        self._lines = 0
        self._written: dict[object, tuple[int, str]] = {}  # kind -> the lines of it in this second, and the first
        self._left_out: Counter[str] = Counter()  # the first line of a kind -> those like it that were not written
        self._unread = 0  # lines for which there was no room

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, if it is not one too many."""
        now = clock.now()
        if now >= self._begun + 1:
            self._begin(now)
        kind = _kind(record)
        lines, first = self._written.get(kind, (0, ""))
        if lines >= LINES_A_KIND or self._lines >= LINES_A_SECOND:
            known = first if len(self._left_out) < _KINDS or first in self._left_out else ""
            self._left_out[known] += 1
            return
        text = self.format(record)
        self._written[kind] = (lines + 1, first or text.partition("\n")[0])
        self._lines += 1
        self._put(text)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """Do without a record that cannot be written: to complain would mean to write."""

    def close(self) -> None:
        """Say what was left out."""
        self._begin(clock.now())
        super().close()

    def _begin(self, now: float) -> None:
        """Begin another second, and say what was left out until now."""
        left_out, self._left_out = self._left_out, Counter()
        self._begun, self._lines = now, 0
        self._written.clear()
        for first, count in left_out.items():
            like = f" like this one: {first}" if first else " of other kinds"
            self._put(f"({count} more lines were left out{like})")

    def _put(self, text: str) -> None:
        if self._unread and self._outlet.put(f"({self._unread} lines were left out: there was no room for them)\n"):
            self._unread = 0
        if self._unread or not self._outlet.put(text + "\n"):
            self._unread += 1


_GAP = b" [...] "


def _kind(record: logging.LogRecord) -> object:
    """Say what is one kind: the same text about the same domain."""
    before, found, _ = str(record.msg).partition("domain %d")
    if found and isinstance(record.args, tuple):
        return record.msg, record.args[before.count("%")]
    return record.msg
