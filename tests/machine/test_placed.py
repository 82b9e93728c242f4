"""PLACED is posted, not called: what if the machine hears of it late."""

from __future__ import annotations

import errno
import os
import time
from struct import pack
from typing import TYPE_CHECKING

import rawwire as wire
from raw_client import RawClient

if TYPE_CHECKING:
    from gntalloc import Domain, Machine

ANYWHERE = 0x10000


def test_a_map_that_was_gone_before_the_machine_heard_of_it_was_there(alice: Domain, bob: Domain) -> None:
    with RawClient(alice) as client:
        handle, home = client.open("gntalloc")
        index, refs = client.alloc(handle, bob.domid, flags=0)
        mapped = client.mmap(handle, index).close()
        client.call(wire.HELLO, pack("=I", wire.VERSION))  # when that is answered the munmap has been seen
        client.send(wire.PLACED, wire.PLACED_REQUEST.pack(mapped.result, ANYWHERE))
        client.call(wire.HELLO, pack("=I", wire.VERSION))
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
