"""What the conformance kit checks with: a peer in its own process, calls beside each other, comparisons that tell.

A check that fails says in one line what a channel should have done, and never hangs.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gntalloc.testing.fixtures import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.testing.program import Program

__all__ = ["PARTS", "Beside", "killed", "raises", "read_exactly", "read_what_is_there", "same", "write_in_pieces"]

__tracebackhide__ = True  # for pytest: what is raised here is about the caller's program

# What the other process does with its end.


def _echo(channel: Any) -> None:
    while data := channel.read(timeout=PATIENCE):
        channel.write(data, timeout=PATIENCE)
    channel.close()


def _write_and_die(channel: Any, length: int) -> None:
    channel.write(random.Random(length).randbytes(length), timeout=PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)


def _read_and_die(channel: Any, length: int) -> None:
    read_exactly(channel, length)
    os.kill(os.getpid(), signal.SIGKILL)


def _idle(channel: Any) -> None:
    channel.write(b"!", timeout=PATIENCE)
    time.sleep(PATIENCE)


PARTS: dict[str, Callable[..., None]] = {
    "echo": _echo,
    "write_and_die": _write_and_die,
    "read_and_die": _read_and_die,
    "idle": _idle,
}


# Small tools.


class Beside:
    """A call in a thread of its own, which cannot keep the tests from ending."""

    def __init__(self, function: Callable[..., Any], *args: Any, **named: Any) -> None:
        self._returned: Any = None
        self._raised: BaseException | None = None
        self._what = getattr(function, "__name__", repr(function))
        self._thread = threading.Thread(target=self._run, args=(function, args, named), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> None:
        try:
            self._returned = function(*args, **named)
        except BaseException as error:
            self._raised = error

    def result(self) -> Any:
        """Return what it returned, or raise what it raised."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), f"{self._what} hangs: nobody has woken it within {PATIENCE} s"
        if self._raised is not None:
            raise self._raised
        return self._returned


def killed(program: Program) -> None:
    """SIGKILL has ended it, and nothing before."""
    assert program.wait(timeout=PATIENCE) == -signal.SIGKILL, f"the peer in this check {program.ending} before its time"


def read_exactly(channel: Any, length: int) -> bytes:
    """So many bytes."""
    got = bytearray()
    while len(got) < length:
        piece = channel.read(length - len(got), timeout=PATIENCE)
        assert piece, f"the end came after {len(got)} of {length} bytes"
        got += piece
    return bytes(got)


def read_what_is_there(channel: Any) -> bytes:
    """Read all that can be read without waiting."""
    got = bytearray()
    with suppress(TimeoutError):
        while piece := channel.read(timeout=0):
            got += piece
    return bytes(got)


def write_in_pieces(channel: Any, data: bytes, sizes: list[int]) -> None:
    """All of it, in pieces of these sizes in turn."""
    at = number = 0
    while at < len(data):
        size = sizes[number % len(sizes)]
        channel.write(data[at : at + size], timeout=PATIENCE)
        at += size
        number += 1


def same(got: Any, expected: Any, otherwise: str) -> None:
    """Without a page of bytes in the failure."""
    if got != expected:
        at = next((at for at, (one, two) in enumerate(zip(got, expected, strict=False)) if one != two), None)
        where = f"from place {at} on" if at is not None else f"in length: {len(got)}, not {len(expected)}"
        raise AssertionError(f"{otherwise} (different {where}; {_short(got)}, not {_short(expected)})")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]}..."


def raises(kind: type[BaseException], why: str, call: Callable[[], object]) -> Any:
    """Call it: what it raised, which must be of this kind. `why`: it should."""
    try:
        returned = call()
    except kind as error:
        return error
    except OSError as error:
        raise AssertionError(f"{why}, so {kind.__name__} was expected, and not {error!r}") from error
    raise AssertionError(f"{why}, so {kind.__name__} was expected, and the call returned {_short(returned)}")
