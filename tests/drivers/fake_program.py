"""Programs without processes: device files of an in-process machine, a strict memory, and real maps of its plans."""

from __future__ import annotations

import os
from contextlib import contextmanager
from struct import pack, unpack_from
from typing import TYPE_CHECKING, NamedTuple

import pytest

from gntalloc.descriptions import lock_place
from gntalloc.errors import DeviceError
from gntalloc.maps import PAGE_SIZE, PROT_READ, PROT_WRITE, Mapping
from gntalloc.steps import finish_steps
from gntalloc.testing import FakeMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gntalloc.drivers.chardev import Loan, Plan
    from gntalloc.machine.machine import Guest, Machine

ALLOC = 0x00184705
DEALLOC = 0x00104706
MAP = 0x00184700
UNMAP = 0x00104701
ADDRESS = 0x7F00_0000_1000
RW = PROT_READ | PROT_WRITE


@contextmanager
def refused(code: int, reason: str = "") -> Iterator[None]:
    """What is inside fails with this errno, and with a reason that a person can read."""
    with pytest.raises(DeviceError) as caught:
        yield
    assert os.strerror(code) == os.strerror(caught.value.errno or 0)
    assert reason in str(caught.value)
    assert len(str(caught.value)) > 10


class Granted(NamedTuple):
    """What an ALLOC answered."""

    at: int  # its index
    refs: tuple[int, ...]


class Map:
    """A map as a process has it: the machine's plan, placed."""

    def __init__(self, machine: Machine, plan: Plan, prot: int) -> None:
        self._machine = machine
        self._mapping = Mapping(plan.record.length, prot=prot)
        loans = {loan.extent: loan for loan in finish_steps(machine.carry_out(plan))}
        at = 0
        for piece in plan.pieces:
            size = piece.pages * PAGE_SIZE
            self._mapping.place(at, size, loans[piece.extent].descriptor, piece.offset)
            at += size
        for loan in loans.values():
            if plan.locks:
                lock_place(loan.descriptor, plan.record.mark, self._mapping.address, self._mapping.length)
            loan.close()
        machine.settle()

    @property
    def memory(self) -> memoryview:
        return self._mapping.memory

    @property
    def address(self) -> int:
        return self._mapping.address

    def unmap(self, first: int = 0, pages: int | None = None) -> None:
        """munmap(2): all of it, or some pages."""
        if pages is None:
            self._mapping.close()
        else:
            self._mapping.unmap(first * PAGE_SIZE, pages * PAGE_SIZE)
        self._machine.settle()


class Program:
    """One open device file, and the calls a program makes on it."""

    def __init__(self, machine: Machine, domid: int, device: str, flags: int = os.O_RDWR) -> None:
        self.machine = machine
        self.guest: Guest = machine.guest(domid)
        self.file = machine.open(self.guest, device, flags, opener=1)

    def ioctl(self, request: int, argument: bytes, *, fail_at: int | None = None) -> bytes:
        """Call with an argument in memory that ends where the argument does; what is there afterwards."""
        memory = FakeMemory(fail_at=fail_at)
        there = memory.put(ADDRESS, argument)
        assert self.file.ioctl(request, ADDRESS, memory) == 0
        return bytes(there)

    def alloc(self, peer: int, count: int = 1, flags: int = 1, *, fail_at: int | None = None) -> Granted:
        argument = pack("=HHIQ", peer, flags, count, 0xABCD).ljust(max(24, 16 + 4 * count), b"\xee")
        answer = self.ioctl(ALLOC, argument, fail_at=fail_at)
        _, _, _, index, *refs = unpack_from(f"=HHIQ{count}I", answer)
        return Granted(index, tuple(refs))

    def dealloc(self, index: int, count: int = 1) -> None:
        self.ioctl(DEALLOC, pack("=QII", index, count, 0))

    def map_refs(self, granter: int, refs: tuple[int, ...], *, fail_at: int | None = None) -> int:
        array = b"".join(pack("=II", granter, ref) for ref in refs)
        argument = pack("=IIQ", len(refs), 0, 0xABCD) + array
        answer = self.ioctl(MAP, argument.ljust(24, b"\xee"), fail_at=fail_at)
        index: int = unpack_from("=Q", answer, 8)[0]
        return index

    def unmap_refs(self, index: int, count: int) -> None:
        self.ioctl(UNMAP, pack("=QII", index, count, 0))

    def plan(self, offset: int, pages: int = 1, prot: int = RW, *, shared: bool = True) -> Plan:
        return self.file.mmap(offset, pages * PAGE_SIZE, prot=prot, shared=shared)

    def mmap(self, offset: int, pages: int = 1, prot: int = RW, *, shared: bool = True) -> Map:
        return Map(self.machine, self.plan(offset, pages, prot, shared=shared), prot)

    def map(self, granter: int, *refs: int, prot: int = RW) -> Map:
        """MAP_GRANT_REF, mmap, UNMAP_GRANT_REF: what is left is the map, and munmap is its end in any behaviour."""
        index = self.map_refs(granter, refs)
        try:
            return self.mmap(index, len(refs), prot)
        finally:
            self.unmap_refs(index, len(refs))

    def close(self) -> None:
        self.machine.close(self.guest, self.file)

    def next_index(self) -> int:
        """What an ALLOC of no pages answers: it changes nothing."""
        return self.alloc(0, 0).at

    def in_use(self) -> int:
        return self.guest.gntalloc.in_use

    def references(self) -> int:
        return self.guest.table.usage().live


def close_loans(loans: list[Loan]) -> None:
    """A program that was handed descriptors and is gone."""
    for loan in loans:
        loan.close()
