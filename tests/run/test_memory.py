"""Copies from and to another process's memory, up to the byte where they end."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from typing import TYPE_CHECKING

import pytest
from limits import status_of

from gntalloc.abi.gntdev import COPY_SOURCE_GREF, GRANT_COPY, GrantCopy, GrantCopySegment
from gntalloc.syscalls.arguments import regions_of
from gntalloc.syscalls.memory import Memory
from gntalloc.syscalls.threads import leader_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def other() -> Iterator[tuple[int, int]]:
    """A process, and the address of six of its pages: three to write, two to read, one that is not there."""
    pages = mmap.mmap(-1, 6 * PAGE)
    pages[:] = b"".join(bytes([65 + page]) * PAGE for page in range(6))
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    child = os.fork()
    if not child:
        libc.mprotect(ctypes.c_void_p(start + 3 * PAGE), 2 * PAGE, mmap.PROT_READ)
        libc.mprotect(ctypes.c_void_p(start + 5 * PAGE), PAGE, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    status_of(child, os.WUNTRACED)
    yield child, start
    os.kill(child, signal.SIGKILL)
    status_of(child)


def test_reading_within_a_page_and_over_several(other: tuple[int, int]) -> None:
    process, start = other
    memory = Memory()
    assert memory.read(process, start + 7, 3) == b"AAA"
    assert memory.read(process, start + PAGE - 2, 4) == b"AABB"
    assert memory.read(process, start + PAGE - 1, 2 * PAGE + 2) == b"A" + b"B" * PAGE + b"C" * PAGE + b"D"


def test_reading_ends_where_the_memory_does(other: tuple[int, int]) -> None:
    process, start = other
    assert Memory().read(process, start + 5 * PAGE - 3, 100) == b"EEE"
    assert Memory().read(process, start + 5 * PAGE, 1) == b""
    assert Memory().read(process, 0, 16) == b""
    assert Memory().read(process, (1 << 64) - 8, 16) == b""


def test_writing_ends_where_it_may_not(other: tuple[int, int]) -> None:
    process, start = other
    memory = Memory()
    assert memory.write(process, start + 3 * PAGE - 2, b"12345") == 2
    assert memory.read(process, start + 3 * PAGE - 3, 5) == b"C12DD"
    assert memory.write(process, start + 4 * PAGE, b"x") == 0


def test_what_is_writable_is_left_as_it_is(other: tuple[int, int]) -> None:
    process, start = other
    memory = Memory()
    before = memory.read(process, start, 5 * PAGE)
    assert memory.writable(process, start + 5, 8 * PAGE) == 3 * PAGE - 5
    assert memory.writable(process, start + 4 * PAGE, 1) == 0
    assert memory.writable(process, start, 10) == 10
    assert memory.read(process, start, 5 * PAGE) == before


def test_a_path_that_goes_over_a_page(other: tuple[int, int]) -> None:
    process, start = other
    memory = Memory()
    memory.write(process, start + PAGE - 4, b"/dev/xen\0")
    assert memory.path(process, start + PAGE - 4) == b"/dev/xen"
    assert memory.path(process, start + 2 * PAGE) == b""  # it does not end


def test_what_a_copy_names_goes_with_it(other: tuple[int, int]) -> None:
    """Buffers that touch go as one. Where they cannot: what can only be read, and nothing of what is not there."""
    process, start = other
    memory = Memory()
    table = start + 64

    def regions(*buffers: tuple[int, int]) -> list[tuple[int, bool, bytes]]:
        segments = [GrantCopySegment(0, start + at, size, COPY_SOURCE_GREF, 0).pack() for at, size in buffers]
        memory.write(process, start, GrantCopy(len(segments), table).pack())
        memory.write(process, table, b"".join(segments))
        found = regions_of("gntdev", GRANT_COPY, start, memory, process)
        assert (found[0].address, found[0].writable) == (start, True)
        return [(each.address - start, each.writable, bytes(each.data)) for each in found[1:]]

    assert regions((PAGE + 5, PAGE), (2 * PAGE + 5, PAGE - 5)) == [(PAGE + 5, True, b"B" * (PAGE - 5) + b"C" * PAGE)]
    assert regions((PAGE + 5, PAGE), (2 * PAGE + 5, PAGE), (4 * PAGE + 7, 2 * PAGE - 7)) == [
        (PAGE + 5, True, b"B" * (PAGE - 5)),
        (2 * PAGE, True, b"C" * PAGE),
        (3 * PAGE, False, b"D" * 5),
        (4 * PAGE + 7, False, b"E" * (PAGE - 7)),
    ]
    assert regions((PAGE, 10), (PAGE + 20, 10)) == [(PAGE, True, b"B" * 30)]  # of one page all between goes too


def test_the_process_of_a_thread() -> None:
    assert leader_of(os.getpid()) == os.getpid()
