"""Indexes in a file of gntdev: exactly Linux's choice, which is written here as Linux does it."""

from __future__ import annotations

import random

import pytest

from gntalloc.drivers.indexes import Indexes


def as_linux_does(there: dict[int, int], pages: int) -> int:
    first = 0
    for start, count in sorted(there.items()):
        if first + pages < start:
            break
        first = start + count
    return first


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_linuxs_whatever_is_there(seed: int) -> None:
    chance = random.Random(seed)
    indexes: Indexes[str] = Indexes()
    there: dict[int, int] = {}
    for _ in range(300):
        if there and chance.random() < 0.45:
            gone = chance.choice(list(there))
            del there[gone]
            indexes.remove(gone)
        pages = chance.choice([1, 1, 2, 3, 8])
        first = indexes.first_gap(pages)
        assert first == as_linux_does(there, pages)
        if chance.random() < 0.8:
            indexes.put(first, pages, f"{pages} at {first}")
            there[first] = pages
        assert list(indexes) == [f"{count} at {start}" for start, count in sorted(there.items())]
        for page in range(max(there, default=0) + 10):
            covering = [f"{count} at {start}" for start, count in there.items() if start <= page < start + count]
            assert indexes.around(page) == (covering[0] if covering else None)
            assert indexes.at(page) == (f"{there[page]} at {page}" if page in there else None)


def test_a_gap_that_would_just_fit_is_not_taken() -> None:
    indexes: Indexes[str] = Indexes()
    for first in range(0, 8, 2):
        indexes.put(first, 2, "")
    indexes.remove(2)
    assert (indexes.first_gap(1), indexes.first_gap(2)) == (2, 8)


class Counted(dict[int, tuple[int, str]]):
    """How often something was looked up."""

    looks = 0

    def __getitem__(self, key: int) -> tuple[int, str]:
        self.looks += 1
        return super().__getitem__(key)


def test_what_is_packed_is_not_looked_at() -> None:
    indexes: Indexes[str] = Indexes()
    indexes._things = things = Counted()
    for number in range(1000):
        indexes.put(indexes.first_gap(2), 2, str(number))
    assert things.looks <= 2000
    assert indexes.around(999) == "499"
