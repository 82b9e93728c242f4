"""Messages as bytes: golden bytes, round trips in any pieces, and garbage."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gntalloc.errors import PeerBroke
from gntalloc.xenstore import wire
from gntalloc.xenstore.wire import Decoder, Message, Type

WORDS = st.integers(0, 0xFFFFFFFF)
MESSAGES = st.builds(Message, WORDS, WORDS, WORDS, st.binary(max_size=wire.PAYLOAD_MAX))


def test_golden_bytes() -> None:
    message = Message(Type.WRITE, 3, 9, b"a/b\0value")
    data = bytes.fromhex("0b000000 03000000 09000000 09000000") + b"a/b\0value"
    assert wire.encode(message) == data
    assert Decoder().feed(data) == [message]


def test_the_numbers_of_the_protocol() -> None:
    names = "CONTROL DIRECTORY READ GET_PERMS WATCH UNWATCH TRANSACTION_START TRANSACTION_END INTRODUCE RELEASE "
    names += "GET_DOMAIN_PATH WRITE MKDIR RM SET_PERMS WATCH_EVENT ERROR IS_DOMAIN_INTRODUCED RESUME SET_TARGET "
    names += "- RESET_WATCHES DIRECTORY_PART GET_FEATURE SET_FEATURE GET_QUOTA SET_QUOTA"
    numbers = {name: number for number, name in enumerate(names.split()) if name != "-"}
    assert {kind.name: kind.value for kind in Type} == numbers
    assert wire.type_name(16) == "ERROR"
    assert wire.type_name(20) == "type 20"


@given(st.lists(MESSAGES, max_size=4), st.lists(st.integers(1, 5000), min_size=1, max_size=8))
def test_round_trip_in_any_pieces(messages: list[Message], sizes: list[int]) -> None:
    data = b"".join(wire.encode(message) for message in messages)
    decoder = Decoder()
    found: list[Message] = []
    turn = 0
    while data:
        size = sizes[turn % len(sizes)]
        found += decoder.feed(data[:size])
        data = data[size:]
        turn += 1
    assert found == messages
    assert decoder.pending == 0


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_garbage_is_messages_or_a_named_error(pieces: list[bytes]) -> None:
    decoder = Decoder()
    for piece in pieces:
        try:
            for message in decoder.feed(piece):
                assert len(message.body) <= wire.PAYLOAD_MAX
                assert wire.error_code(message.body) in {*wire.ERROR_CODES.values()}
                wire.split(message.body)
        except PeerBroke:
            return
        assert decoder.pending < wire.HEADER.size + wire.PAYLOAD_MAX


def test_what_came_before_an_impossible_header_is_not_lost() -> None:
    decoder = Decoder()
    good = Message(Type.READ, 1, 0, b"x")
    assert decoder.feed(wire.encode(good) + wire.HEADER.pack(Type.READ, 2, 0, 4097)) == [good]
    for _ in range(2):
        with pytest.raises(PeerBroke, match=r"READ.* 4097 bytes"):
            decoder.feed(b"")


def test_a_body_can_be_4096_bytes_and_no_more() -> None:
    assert len(wire.encode(Message(Type.WRITE, 1, 0, bytes(4096)))) == 4112
    with pytest.raises(ValueError, match="4097"):
        wire.encode(Message(Type.WRITE, 1, 0, bytes(4097)))


def test_strings_end_in_nul() -> None:
    assert wire.join("a", b"b", "") == b"a\0b\0\0"
    assert wire.split(b"a\0b\0\0") == ["a", "b", ""]
    assert wire.split(b"") == []
    with pytest.raises(PeerBroke, match="NUL"):
        wire.split(b"a\0b")
    with pytest.raises(PeerBroke, match="text"):
        wire.split(b"\xff\0")


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=5))
def test_strings_round_trip(strings: list[str]) -> None:
    assert wire.split(wire.join(*strings)) == strings


def test_error_names() -> None:
    assert len(wire.ERROR_CODES) == 16
    for name, code in wire.ERROR_CODES.items():
        assert wire.error_code(name.encode() + b"\0") == code
        assert wire.error_name(code) == name
    assert wire.error_code(b"ENONSENSE\0") == errno.EIO
    assert wire.error_code(b"") == errno.EIO
    assert wire.error_name(errno.ECHILD) == "EIO"
    assert wire.error_name(0) == "EIO"
