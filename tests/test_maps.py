"""Reservations, pieces, views: nothing that is still looked at is ever unmapped."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gntalloc.errors import Closed, ViewsStillExported
from gntalloc.maps import PAGE_SIZE, PROT_READ, Mapping
from gntalloc.testing import Snapshot, assert_cleaned_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _cleaned_up() -> Iterator[None]:
    before = Snapshot.of(None)
    yield
    assert_cleaned_up(None, before)


@pytest.fixture
def memory() -> Iterator[int]:
    """A memory file of four pages, each of its own letter."""
    descriptor = os.memfd_create("gntalloc test")
    os.write(descriptor, b"".join(letter.encode() * PAGE_SIZE for letter in "abcd"))
    yield descriptor
    os.close(descriptor)


VIEWS: dict[str, Callable[[memoryview], Any]] = {
    "slice": lambda memory: memory[:10],
    "cast": lambda memory: memory.cast("I"),
    "numpy": lambda memory: np.frombuffer(memory, np.uint8),
    "ctypes": (ctypes.c_char * 8).from_buffer,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_closing_under_a_view_is_refused_and_can_be_repeated(memory: int, view: Callable[[memoryview], Any]) -> None:
    mapping = Mapping(PAGE_SIZE, name="the map of grant 1:8:rw")
    mapping.place(0, PAGE_SIZE, memory, 0)
    alive = view(mapping.memory)
    for _ in range(2):
        with pytest.raises(ViewsStillExported, match="the map of grant 1:8:rw") as caught:
            mapping.close()
        assert isinstance(caught.value, BufferError)
        assert not mapping.closed
        assert mapping.memory[0] == ord("a")
        del caught
    del alive
    mapping.close()
    mapping.close()
    assert mapping.closed
    with pytest.raises(Closed, match=r"1:8:rw.*map it again"):
        _ = mapping.memory


def test_a_view_outlives_its_mapping_object(memory: int) -> None:
    mapping = Mapping(PAGE_SIZE)
    mapping.place(0, PAGE_SIZE, memory, 0)
    array = np.frombuffer(mapping.memory, np.uint8)
    del mapping
    gc.collect()
    assert array[PAGE_SIZE - 1] == ord("a")


def test_a_range_is_composed_of_pieces_in_any_order(memory: int) -> None:
    mapping = Mapping(4 * PAGE_SIZE)
    for at, page in enumerate((3, 1, 1)):
        mapping.place(at * PAGE_SIZE, PAGE_SIZE, memory, page * PAGE_SIZE)
    assert bytes(mapping.memory[::PAGE_SIZE]) == b"dbb\0"
    mapping.memory[PAGE_SIZE] = 0x21
    assert (mapping.memory[2 * PAGE_SIZE], os.pread(memory, 1, PAGE_SIZE)) == (0x21, b"!")
    mapping.close()


def test_no_descriptor_is_needed_after_placing(memory: int) -> None:
    mapping = Mapping(PAGE_SIZE)
    copy = os.dup(memory)
    mapping.place(0, PAGE_SIZE, copy, 0)
    os.close(copy)
    assert mapping.memory[0] == ord("a")
    mapping.close()


def test_a_private_piece_keeps_its_changes_to_itself(memory: int) -> None:
    mapping = Mapping(PAGE_SIZE)
    mapping.place(0, PAGE_SIZE, memory, 0, shared=False)
    mapping.memory[0] = 0
    assert os.pread(memory, 1, 0) == b"a"
    mapping.close()


def test_read_only_memory_is_a_read_only_view(memory: int) -> None:
    mapping = Mapping(PAGE_SIZE, prot=PROT_READ)
    mapping.place(0, PAGE_SIZE, memory, 0)
    assert mapping.memory.readonly
    with pytest.raises(TypeError):
        mapping.memory[0] = 1
    assert not np.frombuffer(mapping.memory, np.uint8).flags.writeable
    mapping.close()


def test_what_is_unmapped_reads_zero_and_kills_nobody(memory: int) -> None:
    mapping = Mapping(2 * PAGE_SIZE)
    mapping.place(0, 2 * PAGE_SIZE, memory, 0)
    view = mapping.memory[:]
    mapping.unmap(0, PAGE_SIZE)
    assert (view[0], view[PAGE_SIZE]) == (0, ord("b"))
    view.release()
    mapping.close()


@pytest.mark.parametrize(
    ("start", "length"),
    [(1, PAGE_SIZE), (-PAGE_SIZE, PAGE_SIZE), (0, 3 * PAGE_SIZE), (2 * PAGE_SIZE, 1), (0, 0), (0, -PAGE_SIZE)],
)
def test_nothing_is_placed_outside(memory: int, start: int, length: int) -> None:
    """With MAP_FIXED that would be somebody else's memory."""
    mapping = Mapping(2 * PAGE_SIZE)
    with pytest.raises(ValueError, match="not a range of whole pages"):
        mapping.place(start, length, memory, 0)
    with pytest.raises(ValueError, match="not a range of whole pages"):
        mapping.unmap(start, length)
    mapping.close()


def test_nothing_is_placed_after_the_end(memory: int) -> None:
    """The addresses are somebody else's by then."""
    mapping = Mapping(PAGE_SIZE)
    mapping.close()
    with pytest.raises(Closed):
        mapping.place(0, PAGE_SIZE, memory, 0)
    with pytest.raises(Closed):
        mapping.unmap(0, PAGE_SIZE)


def test_what_the_kernel_refuses_is_an_oserror() -> None:
    mapping = Mapping(PAGE_SIZE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        mapping.place(0, PAGE_SIZE, 9999, 0)
    mapping.close()


def test_length_is_rounded_up() -> None:
    mapping = Mapping(PAGE_SIZE + 1)
    assert mapping.length == len(mapping.memory) == 2 * PAGE_SIZE
    mapping.close()


def test_close_unmaps_all_of_it(memory: int) -> None:
    mapping = Mapping(3 * PAGE_SIZE)
    mapping.place(PAGE_SIZE, PAGE_SIZE, memory, 0)
    inside = f"{mapping.address + PAGE_SIZE:x}-"
    assert inside in Path("/proc/self/maps").read_text()
    mapping.close()
    assert inside not in Path("/proc/self/maps").read_text()


def test_a_view_is_no_thing_to_send() -> None:
    mapping = Mapping(PAGE_SIZE)
    with pytest.raises(TypeError):
        pickle.dumps(mapping.memory)
    mapping.close()


def test_after_a_refusal_memory_is_taken_anew(memory: int) -> None:
    """The refused close has released the view that was handed out before; slices of it live on."""
    mapping = Mapping(PAGE_SIZE)
    mapping.place(0, PAGE_SIZE, memory, 0)
    part = mapping.memory[:1]
    with pytest.raises(ViewsStillExported):
        mapping.close()
    assert (part[0], mapping.memory[0]) == (ord("a"), ord("a"))
    part.release()
    mapping.close()
