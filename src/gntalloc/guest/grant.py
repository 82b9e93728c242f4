"""A grant, as it is told to a peer: whose pages, which, and whether they may be written."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

from gntalloc.errors import BadGrantText
from gntalloc.guest.peers import count_of, domid_of

__all__ = ["Grant"]

_RUN = r"[0-9]{1,10}(?:-[0-9]{1,10})?"
_TEXT = re.compile(rf"([0-9]{{1,5}}):({_RUN}(?:,{_RUN})*):(ro|rw)")
_MOST_REFS = 65536  # that one map can take


class Grant(NamedTuple):
    """`refs` of domain `granter`, in the order they are mapped.

    As a text it is `1:8-11,15:rw`: granter, references, and `rw` or `ro`. `Grant.parse` reads that back.
    """

    granter: int
    refs: tuple[int, ...]
    writable: bool

    def __str__(self) -> str:
        runs: list[list[int]] = [[self.refs[0]]] if self.refs else []
        for before, ref in pairwise(self.refs):
            if ref == before + 1:
                runs[-1].append(ref)
            else:
                runs.append([ref])
        refs = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
        return f"{self.granter}:{refs}:{'rw' if self.writable else 'ro'}"

    @classmethod
    def parse(cls, text: str) -> Grant:
        """Read what str() wrote.

        Raises:
            BadGrantText: it is none.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise BadGrantText(
                f"{text[:80]!r} is no grant; one looks like 1:8-11,15:rw (granter, references, ro or rw)"
            )
        refs: list[int] = []
        for run in match[2].split(","):
            first, _, last = run.partition("-")
            end = int(last or first)
            if end < int(first) or end - int(first) + len(refs) >= _MOST_REFS:
                raise BadGrantText(f"{run!r} is no run of references, or makes more than {_MOST_REFS} of them")
            refs.extend(range(int(first), end + 1))
        grant = cls(int(match[1]), tuple(refs), match[3] == "rw")
        try:
            grant.check()
        except ValueError as error:
            raise BadGrantText(f"{text[:80]!r} is no grant: {error}") from None
        return grant

    def check(self) -> None:
        """See that these are numbers a domain and its references can have.

        Raises:
            TypeError: one is no whole number.
            ValueError: one is out of range.
        """
        domid_of(self.granter)
        for ref in self.refs:
            count_of(ref, "a grant reference")
