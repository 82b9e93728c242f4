"""Write the output of programs in several domains: as it is, or with the domain's name in front of every line."""

from __future__ import annotations

import sys

__all__ = ["Labelled", "plain"]


def plain(_domain: str, stream: int, data: bytes) -> None:
    """Write standard output to standard output, and errors to errors."""
    file = sys.stdout.buffer if stream == 1 else sys.stderr.buffer
    file.write(data)
    file.flush()


class Labelled:
    """Write whole lines with the domain's name in front, so that two programs do not mix within one."""

    def __init__(self, domains: list[str]) -> None:
        self._width = max(map(len, domains))
        self._rests: dict[tuple[str, int], bytes] = {}

    def __call__(self, domain: str, stream: int, data: bytes) -> None:
        """Take the bytes that came, and write the lines that are complete."""
        *lines, rest = (self._rests.pop((domain, stream), b"") + data).split(b"\n")
        self._rests[domain, stream] = rest
        for line in lines:
            self._write(domain, stream, line)

    def finish(self) -> None:
        """Write the last lines, which had no end."""
        for (domain, stream), rest in self._rests.items():
            if rest:
                self._write(domain, stream, rest)
        self._rests.clear()

    def _write(self, domain: str, stream: int, line: bytes) -> None:
        plain(domain, stream, f"{domain:{self._width}} | ".encode() + line + b"\n")
