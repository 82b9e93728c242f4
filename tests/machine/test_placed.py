"""A granter says by a lock that it has its pages mapped; and a file that is kept without a home."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import suppress
from struct import Struct, pack
from typing import TYPE_CHECKING

import pytest
import rawwire as wire
from raw_client import RawClient

from gntalloc import TimedOut
from gntalloc.descriptions import lock_place
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from gntalloc import Domain, Machine

FLOCK = Struct("=hh4xqqi4x")


def test_a_granter_that_has_not_mapped_yet_is_waited_for(alice: Domain, bob: Domain) -> None:
    """The lock on its own description says that it has. A lock of another mark, or a shared one, says nothing."""
    with RawClient(alice) as client:
        handle, home = client.open("gntalloc")
        index, refs = client.alloc(handle, bob.domid, flags=0)
        mapped = client.mmap(handle, index)
        (mark,) = wire.MARK.unpack_from(mapped.body)
        (description,) = mapped.descriptors
        for wrong, kind in ((mark + (1 << 44), fcntl.F_WRLCK), (mark, fcntl.F_RDLCK), (0, fcntl.F_WRLCK)):
            with suppress(BlockingIOError):
                fcntl.fcntl(description, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, wrong + 16, 1, 0))
            with pytest.raises(TimedOut, match="its granter has not mapped it yet"):
                bob.map(alice.domid, refs, timeout=0)
        lock_place(description, mark, 0x10000, PAGE_SIZE)
        with bob.map(alice.domid, refs, timeout=0) as pages:
            assert bytes(pages.memory[:4]) == bytes(4)
        mapped.close()
        os.close(home)


def test_a_granters_map_that_is_gone_was_there(alice: Domain, bob: Domain) -> None:
    with RawClient(alice) as client:
        handle, home = client.open("gntalloc")
        index, refs = client.alloc(handle, bob.domid, flags=0)
        client.mmap(handle, index).close()
        client.call(wire.HELLO, pack("=I", wire.VERSION))  # when that is answered the munmap has been seen
        with bob.map(alice.domid, refs, timeout=0) as pages:
            assert bytes(pages.memory[:4]) == bytes(4)
        os.close(home)


# A home that is kept: see KEEP in wire/messages.py.


def files_of(machine: Machine) -> int:
    return sum(int(domain.files) for domain in machine.statistics().domains)


def test_a_file_is_kept_as_long_as_something_is_mapped(machine: Machine, alice: Domain) -> None:
    with RawClient(alice) as client:
        handle, home = client.open("gntalloc")
        request = wire.KEEP_REQUEST.pack(handle)
        assert client.call(wire.HOME, request).error == errno.EBADF
        assert client.call(wire.KEEP, request).error == errno.EINVAL
        index, _ = client.alloc(handle, 2)
        mapped = client.mmap(handle, index)
        other, its_home = client.open("gntalloc")
        assert client.call(wire.HOME, wire.HOME_REQUEST.pack(other)).error == errno.EBADF
        for _ in range(2):
            assert client.call(wire.KEEP, request).error == 0
        copy = os.dup(home)
        os.close(home)
        (second,) = client.call(wire.HOME, request).descriptors
        os.close(copy)
        assert client.show(second).result == handle
        os.close(second)
        assert files_of(machine) == 2
        (again,) = client.call(wire.HOME, request).descriptors
        assert client.show(again).result == handle
        os.close(again)
        mapped.close()
        deadline = time.monotonic() + 20
        while files_of(machine) > 1:
            assert time.monotonic() < deadline, "the file is open though nobody has it"
        assert client.call(wire.HOME, request).error == errno.EBADF
        os.close(its_home)
