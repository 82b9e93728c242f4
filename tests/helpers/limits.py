"""Whatever waits on a child has a limit that ends it. tests/tools/test_limits.py holds the tests to it.

pytest-timeout interrupts a test once. What the test does after that to clean up had no limit, and just then it may be
that a child does not end: `with subprocess.Popen(...)` waits for it as long as it takes. So each wait has a limit of
its own, and the interruption comes again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING, AnyStr

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import TracebackType

__all__ = ["LIMIT", "Limited", "pytest_timeout_set_timer", "status_of"]

LIMIT = 50.0  # seconds: less than a test has, so that it is the wait that fails and says on what it waited


class Limited(subprocess.Popen[AnyStr]):
    """A child that does not outlive its `with`: it has LIMIT to end, none after an exception, and then it is killed."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close its streams and wait for its end.

        Raises:
            TimeoutExpired: it had to be killed, and nothing else has gone wrong.
        """
        if kind is not None:
            self.kill()
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        try:
            self.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait(LIMIT)
            raise


def status_of(child: int, options: int = 0) -> int:
    """Wait for a child that was made by fork: its status, as os.waitpid gives it with these options.

    Raises:
        TimeoutExpired: none came within LIMIT. The child was killed.
    """
    deadline = time.monotonic() + LIMIT
    while True:
        there, status = os.waitpid(child, options | os.WNOHANG)
        if there:
            return status
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise subprocess.TimeoutExpired(f"child {child}", LIMIT)
        time.sleep(0.002)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_timeout_set_timer() -> Generator[None, object, object]:
    """Let a test's timer come again, so that also what it does to clean up after the first time has a limit."""
    done = yield
    seconds, _ = signal.getitimer(signal.ITIMER_REAL)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    return done
