"""The conformance kit, with our own channels: between two ends of this package, and as libxenvchan sees us."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from gntalloc.testing import channels
from gntalloc.testing.channels import ChannelConformance

if TYPE_CHECKING:
    from gntalloc import Domain

PATIENCE = 30.0


class TestOurs(ChannelConformance):
    """With all that two of our own ends can."""

    settings: ClassVar[dict[str, Any]] = {}

    @classmethod
    def serve(cls, domain: Domain, peer: int) -> Any:
        with domain.listen(peer, "conformance", size=cls.ring, **cls.settings) as listener:
            return listener.accept(timeout=PATIENCE)

    @classmethod
    def connect(cls, domain: Domain, peer: int) -> Any:
        return domain.connect(peer, "conformance", timeout=PATIENCE, **cls.settings)

    @classmethod
    def indexes(cls, channel: Any) -> memoryview:
        page: memoryview = channel._end.pages.memory
        return page[:16].cast("I")


class TestOursAsLibxenvchan(TestOurs):
    """Nothing that libxenvchan would not do; wake-ups are events of the machine."""

    settings: ClassVar[dict[str, Any]] = {"extensions": False}
    half_close = False
    tells_death = False


class TestOursWithSmallRings(TestOurs):
    """In the header page; and they sleep at once."""

    ring = 1024
    longest = 1020
    settings: ClassVar[dict[str, Any]] = {"spin": 0}

    @classmethod
    def serve(cls, domain: Domain, peer: int) -> Any:
        with domain.listen(peer, "conformance", size=(2048, 1024), **cls.settings) as listener:
            return listener.accept(timeout=PATIENCE)


# A kit that lets everything pass would be worse than none.


class Worse:
    """A channel with one fault."""

    def __init__(self, channel: Any, fault: str) -> None:
        self._channel = channel
        self._fault = fault
        self._kept = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def read(self, size: int | None = None, timeout: float | None = None) -> bytes:
        if self._fault == "has no patience":
            timeout = 0
        try:
            data: bytes = self._channel.read(size, timeout=timeout)
        except TimeoutError:
            if self._fault == "says end for timeout":
                return b""
            raise
        except OSError:
            if self._fault in {"takes death for the end", "takes a lie for the end"}:
                return b""
            raise
        if self._fault == "turns a byte around" and len(data) > 1000:
            return data[:999] + bytes([data[999] ^ 1]) + data[1000:]
        if self._fault == "loses the rest" and size is not None:
            self._channel.read(timeout=0) if self._channel.ready else None
        return data

    def write(self, data: bytes, timeout: float | None = None) -> None:
        try:
            if self._fault != "loses the last words" or len(data) != 10:
                self._channel.write(data, timeout=timeout)
        except TimeoutError as error:
            if self._fault == "does not say how much":
                error.done += 1  # type: ignore[attr-defined]
            raise
        except ConnectionError:
            if self._fault != "writes to nobody":
                raise

    def send(self, message: bytes, timeout: float | None = None) -> None:
        if self._fault == "sends by pieces":
            self._channel.write(len(message).to_bytes(4, "little"), timeout=timeout)
            self._channel.write(message, timeout=timeout)
        else:
            self._channel.send(message, timeout=timeout)

    def close(self) -> None:
        if self._fault == "leaves things behind":
            LEFT.append(os.open(os.devnull, os.O_RDONLY))
        self._channel.close()


LEFT: list[int] = []
FAULTS = {
    "turns a byte around": "every_byte_in_order",
    "loses the rest": "read_gives_what_is_there",
    "has no patience": "a_reader_that_waits_is_woken",
    "says end for timeout": "a_read_times_out",
    "does not say how much": "a_write_times_out",
    "sends by pieces": "a_message_that_times_out",
    "loses the last words": "what_was_written_before_the_close",
    "writes to nobody": "writing_to_a_peer_that_has_closed",
    "takes death for the end": "sigkill_of_a_peer_that_writes",
    "takes a lie for the end": "a_client_that_lies_about_what_it_wrote",
    "leaves things behind": "a_close_wakes_the_peer_that_reads",
}


class OneFault(TestOurs):
    __test__ = False
    fault: ClassVar[str]

    @classmethod
    def serve(cls, domain: Domain, peer: int) -> Any:
        return Worse(super().serve(domain, peer), cls.fault)

    @classmethod
    def connect(cls, domain: Domain, peer: int) -> Any:
        return Worse(super().connect(domain, peer), getattr(cls, "fault", ""))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_channel_with_a_fault_is_told(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = (name for name in dir(ChannelConformance) if name.startswith(f"test_{FAULTS[fault]}"))
    monkeypatch.setattr(OneFault, "fault", fault, raising=False)
    monkeypatch.setattr(channels, "PATIENCE", 5.0)
    try:
        with pytest.raises((AssertionError, TimeoutError)):
            getattr(OneFault(), check)()
    finally:
        while LEFT:
            os.close(LEFT.pop())
