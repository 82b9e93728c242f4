"""Which rings go together: the C library's choice, and what it should have refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gntalloc.errors import PeerBroke
from gntalloc.vchan.extension import DIRECT, LARGE, Confirmation, Offer, place
from gntalloc.vchan.layout import Orders, in_page, pages_of

MIB = 1 << 20


@pytest.mark.parametrize(
    ("asked", "orders"),
    [
        # printed by the real library, read and write as the server sees them
        ((0, 0), (10, 11)),
        ((1024, 1024), (10, 11)),
        ((1024, 2048), (10, 11)),
        ((2048, 1024), (11, 10)),
        ((1025, 1024), (11, 10)),
        ((2048, 2048), (11, 12)),
        ((1025, 1025), (11, 12)),
        ((1, 4096), (11, 12)),
        ((0, 3000), (11, 12)),
        ((2048, 2049), (11, 12)),
        ((4096, 1), (12, 11)),
        ((3000, 0), (12, 11)),
        ((4096, 4096), (12, 12)),
        ((4097, 8192), (13, 13)),
        ((MIB, MIB), (20, 20)),
    ],
)
def test_the_servers_choice(asked: tuple[int, int], orders: tuple[int, int]) -> None:
    assert Orders.choose(*asked) == orders


@pytest.mark.parametrize("asked", [(MIB + 1, 0), (0, MIB + 1), (-1, 0)])
def test_more_than_a_mebibyte_is_refused(asked: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="1048576"):
        Orders.choose(*asked)


@given(st.integers(0, MIB), st.integers(0, MIB))
def test_every_choice_is_enough_and_passes_the_clients_check(read: int, write: int) -> None:
    orders = Orders.choose(read, write)
    orders.check()
    assert 1 << orders.left >= read
    assert 1 << orders.right >= write


@pytest.mark.parametrize("orders", [(9, 11), (21, 20), (10, 10), (11, 11), (0, 0), (65535, 12), (10, 20), (20, 10)])
def test_what_a_client_refuses(orders: tuple[int, int]) -> None:
    page = bytearray(4096)
    Orders(*orders).write(memoryview(page))
    with pytest.raises(PeerBroke):
        Orders.read(memoryview(page))


@pytest.mark.parametrize("orders", [(10, 11), (11, 20), (20, 20), (10, 19), (12, 12)])
def test_what_a_client_takes_and_where_the_extension_lies(orders: tuple[int, int]) -> None:
    page = bytearray(4096)
    Orders(*orders).write(memoryview(page))
    read = Orders.read(memoryview(page))
    assert read == orders
    at = place(read)
    assert at >= read.end_of_references
    assert at + 64 <= min(in_page(order) or 4096 for order in read)


def test_pages_of_a_ring() -> None:
    assert [pages_of(order) for order in (10, 11, 12, 13, 20)] == [0, 0, 1, 2, 256]


def test_an_offer_goes_into_the_page_and_comes_out() -> None:
    page = memoryview(bytearray(4096))
    at = place(Orders(20, 20))
    assert Offer.read(page, at) is None
    offer = Offer(LARGE | DIRECT, Orders(22, 22), b"\0abcde", (8, 9))
    offer.write(page, at)
    assert Offer.read(page, at) == offer
    assert Confirmation.read(page, at, offer.flags) is None
    Confirmation(DIRECT, b"\0name").write(page, at)
    assert Confirmation.read(page, at, offer.flags) == (DIRECT, b"\0name")
    with pytest.raises(PeerBroke, match="cannot be"):
        Confirmation.read(page, at, LARGE)


@given(st.binary(min_size=64, max_size=256), st.sampled_from([(10, 11), (20, 20), (11, 20)]))
def test_whatever_lies_there_is_an_offer_or_none_or_named(junk: bytes, orders: tuple[int, int]) -> None:
    page = memoryview(bytearray(4096))
    at = place(Orders(*orders))
    for magic in (b"", b"gntalloc\x01\x00\x02\x00"):
        found = magic + junk
        page[at : at + len(found)] = found
        try:
            offer = Offer.read(page, at)
        except PeerBroke:
            continue
        assert offer is None or (offer.flags & LARGE == 0) == (offer.directory == ())
