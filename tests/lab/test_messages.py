"""Messages on a clean stream, and among a kernel's."""

from gntalloc.lab.inside.messages import LineDecoder, Message, StreamDecoder, to_line, to_stream

MESSAGES = [Message({"is": "output", "id": 1}, bytes(range(256)) * 20), Message({"is": "up"}), Message({}, b"\n\n")]


def same(found: list[Message]) -> None:
    assert [(message.head, message.body) for message in found] == [(message.head, message.body) for message in MESSAGES]


def in_pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def test_a_stream_may_come_in_any_pieces() -> None:
    data = b"".join(map(to_stream, MESSAGES))
    for size in (1, 7, len(data)):
        decoder = StreamDecoder()
        same([message for piece in in_pieces(data, size) for message in decoder.feed(piece)])


def test_lines_of_the_kernel_do_not_disturb() -> None:
    data = b"[ 0.1] booting\r\n[ 0.2] half a line" + b"[ 0.3] more\r\n".join(map(to_line, MESSAGES))
    for size in (1, 7, len(data)):
        decoder = LineDecoder()
        found = [item for piece in in_pieces(data, size) for item in decoder.feed(piece)]
        same([item for item in found if isinstance(item, Message)])
        noise = b"".join(item for item in found if isinstance(item, bytes))
        assert noise == b"[ 0.1] booting\n[ 0.2] half a line\n[ 0.3] more\n[ 0.3] more\n"


def test_a_line_the_kernel_ran_into_is_noise() -> None:
    line = to_line(MESSAGES[0])
    spoiled = line[:40] + b"[ 9.9] oops" + line[40:]
    (found,) = LineDecoder().feed(spoiled)
    assert isinstance(found, bytes)
    assert b"oops" in found
