"""Maps that were given out, until their program says where it has them.

Read-only pages may be sealed only when their granter has them mapped, so a peer's map waits for that word (`Placed`).
It is needed once: a number names a record until it has come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gntalloc.drivers.chardev import Record

__all__ = ["Placements"]

_MANY = 64


class Placements:
    """The records of one program, or of one run's, of which no word has come."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Record, int]] = {}  # number -> record, pid
        self._next = 1
        self._many = _MANY

    def __len__(self) -> int:
        return len(self._waiting)

    def expect(self, record: Record, process: int) -> int:
        """Give a record a number, for process `process` to name it by."""
        number = self._next
        self._next += 1
        if len(self._waiting) >= self._many:  # mapped, and unmapped without a word
            self._waiting = {old: (kept, pid) for old, (kept, pid) in self._waiting.items() if kept.loans}
            self._many = 2 * len(self._waiting) + _MANY
        self._waiting[number] = record, process
        return number

    def placed(self, number: int, address: int) -> None:
        """Take in where record `number` is; a number that was not given out says nothing."""
        record, process = self._waiting.pop(number, (None, 0))
        if record is None:
            return
        if record.loans:
            record.place(process, address)
        record.file.driver.placed(record)  # also if it was unmapped at once, and that was seen first: it was there
