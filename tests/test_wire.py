"""Messages: whole, in pieces, and none at all."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import rawwire as wire
from hypothesis import given
from hypothesis import strategies as st

from gntalloc.wire.form import Piece
from gntalloc.wire.messages import FORMS, decode, encode

BYTES = st.binary(max_size=300)
U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
I64 = st.integers(-(1 << 63), (1 << 63) - 1)
MESSAGES = st.lists(st.tuples(U16, U32, BYTES, U16), max_size=8)
CUTS = st.lists(st.integers(1, 40), max_size=100)


def pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    found = []
    for size in sizes:
        found.append(data[:size])
        data = data[size:]
    return [*found, data]


@given(MESSAGES, CUTS)
def test_messages_come_out_as_they_went_in_however_they_are_cut(
    messages: list[tuple[int, int, bytes, int]], cuts: list[int]
) -> None:
    decoder = wire.Decoder()
    data = b"".join(wire.encode(*message) for message in messages)
    out = [message for piece in pieces(data, cuts) for message in decoder.feed(piece)]
    expected = [wire.Message(kind, number, descriptors, payload) for kind, number, payload, descriptors in messages]
    assert out == expected
    assert not decoder.in_the_middle


@given(st.binary(max_size=2000), CUTS)
def test_any_bytes_are_messages_or_garbage(data: bytes, cuts: list[int]) -> None:
    decoder = wire.Decoder()
    try:
        for piece in pieces(data, cuts):
            for message in decoder.feed(piece):
                assert len(message.payload) <= wire.MAX_PAYLOAD
    except wire.Garbage:
        pass


def test_the_longest_payload_is_taken_and_no_longer_one() -> None:
    decoder = wire.Decoder()
    (message,) = decoder.feed(wire.encode(1, 2, bytes(wire.MAX_PAYLOAD)))
    assert len(message.payload) == wire.MAX_PAYLOAD
    with pytest.raises(wire.Garbage):
        list(decoder.feed(wire.HEADER.pack(wire.MAX_PAYLOAD + 1, 1, 0, 2)))


@given(st.binary(max_size=200))
def test_any_bytes_are_regions_or_garbage(data: bytes) -> None:
    try:
        regions = wire.decode_regions(data)
    except wire.Garbage:
        return
    assert len(wire.encode_regions(regions)) == len(data)


@given(st.lists(st.tuples(U64, st.booleans(), BYTES), max_size=5))
def test_regions_come_out_as_they_went_in(regions: list[tuple[int, bool, bytes]]) -> None:
    expected = [wire.Region(*region) for region in regions]
    assert wire.decode_regions(wire.encode_regions(expected)) == expected


@given(st.binary(max_size=200))
def test_any_bytes_are_a_reply_or_garbage(data: bytes) -> None:
    try:
        reply = wire.decode_reply(data)
    except wire.Garbage:
        return
    assert len(reply.body) <= len(data)


@given(U32, st.integers(0, 4095), st.text(st.characters(codec="utf-8")), I64, BYTES)
def test_a_reply_comes_out_as_it_went_in(number: int, error: int, why: str, result: int, body: bytes) -> None:
    (message,) = wire.Decoder().feed(wire.encode_reply(3, number, error=error, why=why, result=result, body=body))
    assert (message.kind, message.id) == (3 | wire.REPLY, number)
    assert wire.decode_reply(message.payload) == wire.Reply(error, why, result, body)


def test_a_reason_that_is_no_text_is_sent_all_the_same() -> None:
    (message,) = wire.Decoder().feed(wire.encode_reply(3, 1, error=22, why="half a character: \ud800"))
    assert wire.decode_reply(message.payload).why == "half a character: ?"


def test_the_largest_answers_fit_into_a_message() -> None:
    """65536 scattered pages in one mmap, and as many references in one MAP_GRANT_REF."""
    assert 65536 * wire.PIECE.size + 1000 < wire.MAX_PAYLOAD
    assert wire.MAX_PAYLOAD > 65536 * 8 + 1000


def test_the_page_has_the_table_that_the_classes_make() -> None:
    root = Path(__file__).parents[1]
    made = runpy.run_path(str(root / "tools" / "wire_table.py"))["table"]()
    assert made in (root / "docs" / "wire.md").read_text(), "python tools/wire_table.py prints it"


@pytest.mark.parametrize("kind", FORMS, ids=lambda kind: kind.__name__)
def test_every_message_comes_out_as_it_went_in_and_no_shorter(kind: type) -> None:
    """Each field another number; cut anywhere in the fixed part it is Garbage, and named."""
    form = FORMS[kind]
    head = form.head.unpack(bytes(range(form.head.size)))
    tails = {
        "bytes": b"more",
        "text": "name",
        "regions": [wire.Region(1, True, b"two")],
        "pieces": (Piece(0, 1, 2),),
        "domids u32": (1, 2),
        "references u32": b"8bytes..",
    }
    fields = head if form.tail is None else (*head, tails[form.tail.name])
    payload = encode(kind(*fields))
    assert decode(kind, payload) == kind(*fields)
    for length in range(form.head.size):
        with pytest.raises(wire.Garbage, match=kind.__name__):
            decode(kind, payload[:length])
