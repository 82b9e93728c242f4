"""Whatever waits on a child has a limit that ends it. tests/tools/test_limits.py holds the tests to it.

A call that waits by itself gets `timeout=`, or is pytest-timeout's to interrupt. What that leaves is what comes after
the interruption, which has no timer any more: `with subprocess.Popen(...)` waits at its end for as long as it takes.
"""

from __future__ import annotations

import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, AnyStr

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["LIMIT", "Child"]

LIMIT = 50.0  # seconds: less than a test has, so that it is the wait that fails and says on what it waited


class Child(subprocess.Popen[AnyStr]):
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
