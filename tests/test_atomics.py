"""What is chosen where, and that a bit is taken once."""

from __future__ import annotations

import ctypes
import errno
import mmap
import platform
import threading

import pytest

from gntalloc.atomics import Atomics, atomics, find, plain
from gntalloc.errors import DeviceError


@pytest.fixture
def byte() -> tuple[memoryview, int]:
    memory = mmap.mmap(-1, 4096)
    return memoryview(memory), ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.mark.usefixtures("libatomic")
def test_with_libatomic_a_bit_is_cleared_and_no_other(byte: tuple[memoryview, int]) -> None:
    memory, address = byte
    memory[7] = 0b111
    assert atomics().clears
    assert atomics().take(memory, 7, address, 2)
    assert memory[7] == 0b101
    assert not atomics().take(memory, 7, address, 2)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only there it is safe without libatomic")
def test_without_it_the_bit_stays(byte: tuple[memoryview, int]) -> None:
    memory, address = byte
    memory[7] = 0b11
    assert not plain().clears
    assert plain().take(memory, 7, address, 2)
    assert memory[7] == 0b11


@pytest.mark.usefixtures("libatomic")
def test_of_many_takers_one_has_the_bit(byte: tuple[memoryview, int]) -> None:
    memory, address = byte
    taken: list[int] = []

    def take() -> None:
        taken.extend(1 for _ in range(2000) if atomics().take(memory, 0, address, 1))

    threads = [threading.Thread(target=take) for _ in range(4)]
    set_bits = 50
    for thread in threads:
        thread.start()
    for _ in range(set_bits):
        memory[0] = 1
        while memory[0] and any(thread.is_alive() for thread in threads):
            pass
    for thread in threads:
        thread.join(20)
    assert 0 < len(taken) <= set_bits


def test_no_libatomic_on_a_processor_that_needs_it_is_refused() -> None:
    with pytest.raises(DeviceError, match="apt install libatomic1") as caught:
        find("aarch64", None)
    assert caught.value.errno == errno.ENOSYS


@pytest.mark.usefixtures("libatomic")
@pytest.mark.parametrize(("machine", "ordered"), [("x86_64", True), ("AMD64", True), ("aarch64", False)])
def test_what_a_processor_gets(machine: str, ordered: bool) -> None:
    library = ctypes.CDLL("libatomic.so.1")
    found: Atomics = find(machine, library)
    assert (found.ordered, found.clears) == (ordered, True)
    found.fence()
