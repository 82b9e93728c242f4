"""Keep maps that were given out, until their program says where it has them.

Read-only pages may be sealed only when their granter has them mapped. So a peer's map waits for the message `Placed`.
That is needed once: a number names a record until the message has come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gntalloc.drivers.chardev import Record

__all__ = ["Placements"]

_MANY = 64


class Placements:
    """Keep the records of one program, or of one run, for which no `Placed` has come."""

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
        if len(self._waiting) >= self._many:  # pages that were mapped, and unmapped without a message
            self._waiting = {old: (kept, pid) for old, (kept, pid) in self._waiting.items() if kept.loans}
            self._many = 2 * len(self._waiting) + _MANY
        self._waiting[number] = record, process
        return number

    def placed(self, number: int, address: int) -> None:
        """Note where record `number` is. A number that was not given out is ignored."""
        record, process = self._waiting.pop(number, (None, 0))
        if record is None:
            return
        if record.loans:
            record.place(process, address)
        record.file.driver.placed(record)  # even if it was unmapped since: it was there
