"""Pages that lie in memory twice in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gntalloc import Domain

SIZE = 3 * 4096


@pytest.mark.parametrize("writable", [True, False])
def test_what_wraps_is_in_one_piece(alice: Domain, bob: Domain, writable: bool) -> None:
    with alice.share(bob, pages=3, writable=writable, mirrored=True) as shared:
        assert (len(shared.refs), len(shared.memory)) == (3, 2 * SIZE)
        shared.memory[SIZE - 3 : SIZE + 3] = b"around"
        with bob.map(shared.grant, mirrored=True) as mapped:
            assert bytes(mapped.memory[SIZE - 3 : SIZE + 3]) == b"around"
            assert bytes(mapped.memory[:3]) + bytes(mapped.memory[2 * SIZE - 3 :]) == b"undaro"
            if writable:
                mapped.memory[2 * SIZE - 1] = ord("!")
                assert shared.memory[SIZE - 1] == ord("!")
            assert shared.mapped_by == (bob.domid,)
        assert not shared.held


def test_either_side_alone_may_be_mirrored(alice: Domain, bob: Domain) -> None:
    with alice.share(bob, pages=3) as shared, bob.map(shared.grant, mirrored=True) as mapped:
        shared.memory[0] = 7
        assert (mapped.memory[0], mapped.memory[SIZE], len(shared.memory)) == (7, 7, SIZE)
