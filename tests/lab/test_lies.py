"""What the lab reads and has not written itself: cut, mutated, or of any bytes, it makes one of our errors at most."""

from __future__ import annotations

import binascii
import contextlib
import gzip
import json
import lzma
import random
import socket
import struct
import tracemalloc
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from liar import change

from gntalloc.clock import Deadline
from gntalloc.lab import kernel, modules
from gntalloc.lab.apt import parse_plan
from gntalloc.lab.errors import BuildFailed, LabBroke, LabError, NothingToRunOn
from gntalloc.lab.images import Images
from gntalloc.lab.inside.messages import LineDecoder, Message, Nonsense, StreamDecoder, to_line, to_stream
from gntalloc.lab.session import Session

if TYPE_CHECKING:
    from pathlib import Path

UP = {"from": "dom0", "is": "up", "versions": {"kernel": "6.1"}}
HEADS: list[dict[str, Any]] = [
    UP,
    {"from": "pv", "is": "up", "versions": {}, "domid": 3},
    {"from": "dom0", "is": "log"},
    {"from": "pv", "is": "lost", "why": "it went down"},
    {"from": "dom0", "is": "failed", "asked": "put x", "why": "no room"},
    {"from": "dom0", "is": "output", "id": 1, "stream": 1},
    {"from": "dom0", "is": "file", "id": 1, "path": "x"},
    {"from": "dom0", "is": "ended", "id": 1, "status": 0},
    {"from": "dom0", "is": "got", "id": 1, "missing": ["x"]},
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


class FakeQemu:
    """A socket to an agent, and a log."""

    def __init__(self) -> None:
        self.socket, self.agent = socket.socketpair()

    def log(self) -> str:
        return ""

    def stop(self) -> None:
        self.socket.close()
        self.agent.close()


def hear(*sent: bytes) -> None:
    """A session that runs a command, with an agent that sends these."""
    qemu = FakeQemu()
    with Session(qemu, {}, lambda: None) as session:  # type: ignore[arg-type]
        qemu.agent.sendall(to_stream(Message(UP)))
        session.wait_up("dom0", Deadline(20))
        for each in sent:
            qemu.agent.sendall(each)
        qemu.agent.shutdown(socket.SHUT_WR)
        session.run(["true"], timeout=20)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: str(head["is"]))
def test_an_agent_that_sends_what_cannot_be(head: dict[str, Any]) -> None:
    chance = random.Random(1)
    whole = to_stream(Message(head, b"body"))
    for _ in range(60):
        with contextlib.suppress(LabError):
            hear(change(whole, chance))


@given(head=st.sampled_from(HEADS), name=st.sampled_from(["from", "is", "id", "stream", "status", "missing", "path",
       "why", "asked", "versions", "domid"]), value=VALUES)  # fmt: skip
def test_a_field_that_is_of_any_kind(head: dict[str, Any], name: str, value: object) -> None:
    with contextlib.suppress(LabError):
        hear(to_stream(Message({**head, name: value}, b"body")))


@pytest.mark.parametrize("missing", ["from", "versions", "id", "stream"])
def test_a_field_that_is_missing_is_named(missing: str) -> None:
    head = {**HEADS[5], "is": "up" if missing == "versions" else "output"}
    head.pop(missing, None)
    with pytest.raises(LabBroke, match=missing):
        hear(to_stream(Message(head)))


@given(st.binary(max_size=200))
def test_any_bytes_of_a_stream_are_messages_or_nonsense(data: bytes) -> None:
    with contextlib.suppress(Nonsense):
        list(StreamDecoder().feed(data))


@pytest.mark.parametrize("head", [b"[" * 100_000, b"\xff", b"7", b"NaN", b'{"a":' * 50_000])
def test_heads_that_are_none(head: bytes) -> None:
    with pytest.raises(Nonsense):
        list(StreamDecoder().feed(struct.pack(">II", len(head), 0) + head))


def test_a_message_that_is_too_long_is_not_waited_for() -> None:
    with pytest.raises(Nonsense, match="is the most"):
        list(StreamDecoder().feed(struct.pack(">II", 10, 1 << 31)))
    with pytest.raises(LabBroke, match="is the most"):
        hear(struct.pack(">II", 1 << 30, 0))


@given(st.binary(max_size=200))
def test_any_bytes_of_a_console_are_lines(data: bytes) -> None:
    list(LineDecoder().feed(data + b"\n" + b"\x02lab:" + data + b"\n"))


def test_mutated_lines_are_the_kernels() -> None:
    chance = random.Random(2)
    for head in HEADS:
        for _ in range(100):
            list(LineDecoder().feed(change(to_line(Message(head, b"body")), chance) + b"\n"))


def most_memory(work: Any) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_line_is_not_inflated_without_bound() -> None:
    bomb = binascii.b2a_base64(zlib.compress(bytes(200 << 20), 9))
    found: list[Any] = []
    assert most_memory(lambda: found.extend(LineDecoder().feed(b"\x02lab:" + bomb))) < 40 << 20
    assert [type(each) for each in found] == [bytes]


def test_a_line_without_an_end_is_not_kept() -> None:
    decoder, piece, came = LineDecoder(), bytes(1 << 20), 0

    def feed() -> None:
        nonlocal came
        for _ in range(30):
            came += sum(len(line) for line in decoder.feed(piece) if isinstance(line, bytes))

    assert most_memory(feed) < 30 << 20
    assert came >= 20 << 20


# Files of packages.


def bz_image(packed: bytes) -> bytes:
    image = bytearray(1024)
    image[0x1F1] = 1
    struct.pack_into("<II", image, 0x248, 0, len(packed))
    return bytes(image) + packed


def test_a_kernel_is_unwrapped() -> None:
    elf = b"\x7fELF" + random.Random(3).randbytes(5000)
    assert kernel.unwrapped(bz_image(gzip.compress(elf))) == elf
    assert kernel.unwrapped(bz_image(lzma.compress(elf))) == elf
    assert kernel.gunzipped(gzip.compress(elf), "hypervisor") == elf
    other = bz_image(b"\x28\xb5\x2f\xfd...")
    assert kernel.unwrapped(other) == other


def test_a_broken_kernel_is_one_of_our_errors() -> None:
    chance = random.Random(4)
    elf = b"\x7fELF" + chance.randbytes(500)
    for pack in (gzip.compress, lzma.compress):
        for _ in range(150):
            with contextlib.suppress(BuildFailed):
                kernel.unwrapped(bz_image(change(pack(elf), chance)))
            with contextlib.suppress(BuildFailed):
                kernel.unwrapped(change(bz_image(pack(elf)), chance))
            with contextlib.suppress(BuildFailed):
                kernel.gunzipped(change(pack(elf), chance), "hypervisor")
    for cut in (b"", bytes(583)):
        with pytest.raises(BuildFailed):
            kernel.unwrapped(cut)


def test_a_kernel_is_not_inflated_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_LARGEST", 4 << 20)
    for bomb in (gzip.compress(bytes(100 << 20)), lzma.compress(bytes(100 << 20), preset=0)):

        def unwrap(bomb: bytes = bomb) -> None:
            with pytest.raises(BuildFailed, match=r"more than|[Mm]emory"):
                kernel.unwrapped(bz_image(bomb))

        assert most_memory(unwrap) < 30 << 20


def test_modules_that_depend_on_each_other_and_on_nonsense(tmp_path: Path) -> None:
    (tmp_path / "modules.builtin").write_bytes(b"kernel/a.ko\n\xff\xfe.ko\n")
    (tmp_path / "b.ko").write_bytes(b"\0depends=c\0")
    (tmp_path / "c.ko").write_bytes(b"\0depends=b,a\0")
    assert [path.name for path in modules.load_order(tmp_path, ("b",))] == ["c.ko", "b.ko"]
    (tmp_path / "d.ko").write_bytes(b"\0depends=\xff\0")
    with pytest.raises(BuildFailed, match="kernel module"):
        modules.load_order(tmp_path, ("d",))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "7", "[" * 100_000, '{"a": 1}', "\udcff", json.dumps(dict.fromkeys(
        ("release", "xen", "linux", "kernel", "packages", "extra"), 1))],
)  # fmt: skip
def test_a_manifest_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "gntalloc" / "lab" / "current"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(NothingToRunOn, match="another version"):
        Images.current()


@given(st.text(max_size=100))
def test_any_answer_of_apt_is_a_plan(text: str) -> None:
    parse_plan(text + f"\n'http://x/{text}' a_1_all.deb {'9' * 5000}\n'http://x/y' a_1_all.deb ٤\n")
