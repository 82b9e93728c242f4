"""GRANT_COPY and GET_OFFSET_FOR_VADDR from another process: memory that travels, addresses that are told."""

from __future__ import annotations

import ctypes
import errno
import os
from struct import pack, unpack_from
from typing import TYPE_CHECKING

import pytest
from limits import status_of

from gntalloc.abi.gntdev import (
    GET_OFFSET_FOR_VADDR,
    GRANT_COPY,
    MAP_GRANT_REF,
    ForeignPage,
    GetOffsetForVaddr,
    GrantCopy,
    GrantCopySegment,
    MapGrantRef,
)
from gntalloc.errors import DeviceError
from gntalloc.maps import PAGE_SIZE, PROT_READ, PROT_WRITE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc import Domain
    from gntalloc.guest.devices import DeviceFile

FROM = 1
RW = PROT_READ | PROT_WRITE


def address_of(memory: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.fixture
def gntdev(bob: Domain) -> Iterator[DeviceFile]:
    file = bob.devices.open("gntdev")
    yield file
    file.close()


def test_copy_with_real_addresses(alice: Domain, bob: Domain, gntdev: DeviceFile) -> None:
    """The call that works on a real kernel as well: memory lies where it says."""
    with alice.share(bob) as shared:
        shared.memory[10:15] = b"hello"
        buffer = bytearray(5)
        source = ForeignPage(shared.refs[0], 10, 1).to_word()
        segments = bytearray(GrantCopySegment(source, address_of(buffer), 5, FROM, 77).pack())
        memory = [(address_of(segments), segments), (address_of(buffer), buffer)]
        head = GrantCopy(1, address_of(segments)).pack()
        assert gntdev.ioctl(GRANT_COPY, head, memory=memory) == 0
        assert buffer == b"hello"
        assert GrantCopySegment.unpack_from(segments).status == 0
        with pytest.raises(DeviceError) as caught:
            gntdev.ioctl(GRANT_COPY, head, memory=[(address_of(segments), bytes(segments))])
        assert caught.value.errno == errno.EFAULT
        with pytest.raises(DeviceError) as caught:
            gntdev.ioctl(GRANT_COPY, head, memory=memory[:1])
        assert caught.value.errno == errno.EFAULT


@pytest.mark.parametrize("sizes", [[3 << 20], [1] * 4096])
def test_more_memory_than_a_message_holds(gntdev: DeviceFile, sizes: list[int]) -> None:
    memory = [((1 << 20) + at, bytes(size)) for at, size in enumerate(sizes)]
    with pytest.raises(DeviceError, match="several calls") as caught:
        gntdev.ioctl(GRANT_COPY, GrantCopy(0, 0).pack(), memory=memory)
    assert caught.value.errno == errno.E2BIG
    assert gntdev.ioctl(GRANT_COPY, GrantCopy(0, 0).pack(), memory=memory[:4095] if len(sizes) > 1 else ()) == 0


def reserve(file: DeviceFile, *refs: int) -> int:
    argument = bytearray(MapGrantRef(len(refs), 0).pack() + b"".join(pack("=II", 1, ref) for ref in refs))
    file.ioctl(MAP_GRANT_REF, argument)
    index: int = MapGrantRef.unpack_from(argument).index
    return index


def ask(file: DeviceFile, address: int) -> tuple[int, int]:
    argument = bytearray(GetOffsetForVaddr(address, 0, 0).pack())
    file.ioctl(GET_OFFSET_FOR_VADDR, argument)
    offset, count = unpack_from("=QI", argument, 8)
    return offset, count


def test_the_offset_of_a_map(alice: Domain, bob: Domain, gntdev: DeviceFile) -> None:
    with alice.share(bob, 3, writable=True) as shared:
        maps = []
        for refs in (shared.refs[:1], shared.refs[1:]):
            index = reserve(gntdev, *refs)
            maps.append((gntdev.mmap(index, len(refs) * PAGE_SIZE, prot=RW), index, len(refs)))
        for mapping, index, count in maps:
            assert ask(gntdev, mapping.address) == (index, count)
            assert ask(gntdev, mapping.address + mapping.length - 1) == (index, count)
        for mapping, _, _ in maps:
            mapping.close()
            with pytest.raises(DeviceError) as caught:
                ask(gntdev, mapping.address)
            assert caught.value.errno == errno.EINVAL


def test_a_child_asks_for_what_it_inherited(alice: Domain, bob: Domain, gntdev: DeviceFile) -> None:
    with alice.share(bob, 1, writable=True) as shared:
        index = reserve(gntdev, *shared.refs)
        mapping = gntdev.mmap(index, PAGE_SIZE, prot=RW)
        child = os.fork()
        if not child:
            code = 1
            try:
                code = ask(gntdev, mapping.address) != (index, 1)
            finally:
                os._exit(code)
        assert status_of(child) == 0
        mapping.close()
