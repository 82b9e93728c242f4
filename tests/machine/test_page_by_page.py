"""The limit counts pages, not ALLOCs: who keeps one page of an ALLOC keeps one page counted, and can read no other.

All pages of an ALLOC are in one memory file, so a peer that was given any of them has a way to all. What is freed must
be empty at once, whichever way it looks.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from limits import status_of
from raw_client import UNMAP, RawClient

from gntalloc import DeviceError, Domain, Grant
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from gntalloc import Machine

PAGES = 4
LIMIT = 64
SECRET = b"secret"
NOTHING = bytes(len(SECRET))


class Grantee:
    """What the peer's process does: maps each page for itself, and keeps more ways to them than it should."""

    def __init__(self, domain: Domain) -> None:
        self._client = RawClient(domain)
        self._handle, self._home = self._client.open("gntdev")
        self._maps: dict[int, mmap.mmap] = {}
        self._ways: list[mmap.mmap | int] = []

    def map(self, grant: Grant, kept: int) -> None:
        """One MAP_GRANT_REF and one mmap a page. Of `kept` it keeps the descriptor, and a map of all there is in it."""
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if grant.writable else 0)
        for page, ref in enumerate(grant.refs):
            index = self._client.map_refs(self._handle, grant.granter, [ref])
            answer = self._client.mmap(self._handle, index, 1, prot)
            assert (answer.error, answer.why) == (0, "")
            self._client.ioctl(self._handle, UNMAP, index.to_bytes(8, "little") + (1).to_bytes(8, "little"))
            self._maps[page] = mmap.mmap(answer.descriptors[0], PAGE_SIZE, prot=prot, offset=page * PAGE_SIZE)
            if page == kept:
                self._ways.append(os.dup(answer.descriptors[0]))
                self._ways.append(mmap.mmap(answer.descriptors[0], PAGES * PAGE_SIZE, prot=prot))
            answer.close()

    def open_again(self) -> None:
        """Besides, a description that the machine knows nothing of."""
        descriptor = next(way for way in self._ways if isinstance(way, int))
        self._ways.append(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY))

    def unmap(self, page: int) -> None:
        self._maps.pop(page).close()

    def let_go(self) -> None:
        """All but what was opened again, which only the end of the process closes."""
        for way in self._ways[:2]:
            if isinstance(way, int):
                os.close(way)
            else:
                way.close()

    def read(self, page: int) -> set[bytes]:
        """What is at the beginning of a page, by every way there is."""
        start = page * PAGE_SIZE
        return {
            os.pread(way, len(SECRET), start) if isinstance(way, int) else way[start : start + len(SECRET)]
            for way in self._ways
        }


def _serve(line: Connection, domain: Domain) -> None:
    grantee = Grantee(domain)
    while True:
        name, *arguments = line.recv()
        line.send(getattr(grantee, name)(*arguments))


class Peer:
    """The peer's process, told what to do. It is forked before anything is shared, so it inherits no map."""

    def __init__(self, domain: Domain) -> None:
        self._line, theirs = multiprocessing.Pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                self._line.close()
                _serve(theirs, domain)
            finally:
                os._exit(1)
        theirs.close()

    def __call__(self, name: str, *arguments: object) -> Any:
        self._line.send((name, *arguments))
        assert self._line.poll(20)
        return self._line.recv()

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            status_of(self.pid)
            self.pid = 0
            self._line.close()


@pytest.fixture
def peer(bob: Domain) -> Iterator[Peer]:
    peer = Peer(bob)
    yield peer
    peer.kill()


def counted(machine: Machine) -> tuple[int, int]:
    """Pages that count against domain 1's limit, and its references."""
    domain = machine.statistics().domains[0]
    return domain.pages_in_use, domain.references


@pytest.fixture(params=[True, False], ids=["rw", "ro"])
def writable(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def others(kept: int) -> list[int]:
    return [page for page in range(PAGES) if page != kept]


@pytest.mark.parametrize("kept", range(PAGES))
def test_one_page_kept_is_one_page_counted(
    machine: Machine, alice: Domain, bob: Domain, peer: Peer, writable: bool, kept: int
) -> None:
    shared = alice.share(bob, pages=PAGES, writable=writable)
    shared.memory[:] = SECRET.ljust(PAGE_SIZE, b"!") * PAGES
    peer("map", shared.grant, kept)
    for page in others(kept):
        peer("unmap", page)
    assert counted(machine) == (PAGES, PAGES)  # granted still
    for page in range(PAGES):
        assert peer("read", page) == {SECRET}
    shared.close()
    assert counted(machine) == (1, 1)
    assert [grant.ref for grant in machine.grants()] == [shared.refs[kept]]
    assert (shared.held, shared.mapped_by) == (True, (2,))
    assert peer("read", kept) == {SECRET}
    for page in others(kept):
        assert peer("read", page) == {NOTHING}
    with pytest.raises(DeviceError, match="1 of them released here but still mapped by a peer"):
        alice.share(bob, pages=LIMIT)
    alice.share(bob, pages=LIMIT - 1).close()
    peer("unmap", kept)
    assert counted(machine) == (1, 1)  # it still has the descriptor, and the map of all
    peer("let_go")
    assert counted(machine) == (0, 0)
    assert not shared.held


def test_each_page_is_free_and_empty_when_its_own_map_goes(
    machine: Machine, alice: Domain, bob: Domain, peer: Peer, writable: bool
) -> None:
    shared = alice.share(bob, pages=PAGES, writable=writable)
    shared.memory[:] = SECRET.ljust(PAGE_SIZE, b"!") * PAGES
    peer("map", shared.grant, 0)
    shared.close()
    assert counted(machine) == (PAGES, PAGES)
    for left in range(PAGES - 1, 0, -1):
        assert peer("read", left) == {SECRET}
        peer("unmap", left)
        assert counted(machine) == (left, left)
        assert peer("read", left) == {NOTHING}
    peer.kill()
    shared.wait_released(timeout=20)
    assert counted(machine) == (0, 0)


def test_a_description_of_its_own_keeps_no_page_readable(
    machine: Machine, alice: Domain, bob: Domain, peer: Peer, writable: bool
) -> None:
    """It holds the last page that is mapped by the books, and then the memory file until it is closed; no contents."""
    shared = alice.share(bob, pages=PAGES, writable=writable)
    shared.memory[:] = SECRET.ljust(PAGE_SIZE, b"!") * PAGES
    peer("map", shared.grant, 1)
    peer("open_again")
    for page in others(1):
        peer("unmap", page)
    shared.close()
    assert counted(machine) == (1, 1)
    for page in others(1):
        assert peer("read", page) == {NOTHING}
    peer("unmap", 1)
    peer("let_go")
    assert counted(machine) == (1, 1)
    assert (shared.held, shared.mapped_by) == (True, ())
    peer.kill()
    shared.wait_released(timeout=20)
    assert counted(machine) == (0, 0)


def test_pages_of_several_allocs_in_one_map(machine: Machine, alice: Domain, bob: Domain, writable: bool) -> None:
    """What is counted goes by what is mapped, whatever was allocated together."""
    first, second = (alice.share(bob, pages=2, writable=writable) for _ in range(2))
    with contextlib.ExitStack() as maps:
        mapped = maps.enter_context(bob.map(1, [first.refs[1], second.refs[0]], writable=writable))
        first.close()
        second.close()
        assert counted(machine) == (2, 2)
        assert {grant.ref for grant in machine.grants()} == {first.refs[1], second.refs[0]}
        assert len(mapped.memory) == 2 * PAGE_SIZE
    assert counted(machine) == (0, 0)
