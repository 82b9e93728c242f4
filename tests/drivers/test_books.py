"""Books that are wrong: the machine stops rather than go on, and `recount` says what is wrong."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
import rawwire as wire
from event_program import pair
from fake_program import Program
from notifying import EVENT, set_notify

from gntalloc.drivers.grefs import Pages
from gntalloc.errors import BooksWrong
from gntalloc.machine.machine import Machine as Core
from gntalloc.machine.server import Server
from gntalloc.maps import PAGE_SIZE
from gntalloc.testing import recount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Scene:
    """Pages of domain 1, listed, mapped here, mapped there, and lingering."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.granter, self.peer = Program(core, 1, "gntalloc"), Program(core, 2, "gntdev")
        self.driver = self.granter.guest.gntalloc
        refs = self.granter.alloc(2, 3).refs
        self.mine = self.granter.mmap(0, 2)
        self.entry = self.peer.map_refs(1, refs[1:])
        self.theirs = self.peer.mmap(self.entry, 2)
        self.granter.dealloc(2 * PAGE_SIZE)
        self.table = self.granter.guest.table
        self.listed, _, self.lingering = [span for _, span in self.table.each()]
        self.events, self.port, *_ = pair(core)
        set_notify(self.granter, 0, EVENT, self.port)


def more_in_use(scene: Scene) -> None:
    scene.driver._pages.in_use += 1


def less_in_use(scene: Scene) -> None:
    scene.driver._pages.in_use -= 1


def a_user_too_many(scene: Scene) -> None:
    scene.listed.users += 1


def a_user_too_few(scene: Scene) -> None:
    scene.listed.users -= 1


def a_reference_that_is_free_twice(scene: Scene) -> None:
    scene.granter.guest.table._free.append(400)


def a_reference_lost(scene: Scene) -> None:
    scene.granter.guest.table._free.take_newest(1)


def a_reference_nobody_owns(scene: Scene) -> None:
    scene.table.permit(Pages(scene.listed.grant), 1)


def a_page_of_memory_too_many(scene: Scene) -> None:
    scene.core.frames.pages += 1


def an_extent_too_few(scene: Scene) -> None:
    scene.core.frames.extents -= 1


def an_extent_with_a_page_too_few(scene: Scene) -> None:
    scene.listed.grant.memory.in_use -= 1


def a_loan_forgotten(scene: Scene) -> None:
    scene.listed.grant.memory.loans.popitem()


def a_loan_counted_twice(scene: Scene) -> None:
    scene.listed.grant.memory.live[0] += 1


def nobody_listens(scene: Scene) -> None:
    scene.core.frames._watches.things.clear()
    for extent in list(scene.core.frames._planned):
        scene.core.frames._planned.discard(extent)


def a_pin_too_few(scene: Scene) -> None:
    scene.lingering.pins -= 1


def a_pin_too_many(scene: Scene) -> None:
    scene.lingering.pins += 1


def a_span_that_is_too_long(scene: Scene) -> None:
    scene.listed.count += 1


def a_page_of_another_span(scene: Scene) -> None:
    scene.table._slots[scene.lingering.refs[0]] = scene.listed


def a_page_with_another_number(scene: Scene) -> None:
    scene.table._pages[scene.listed.refs[0]] += 1


def a_handle_too_many(scene: Scene) -> None:
    scene.core._hypervisor._handles[2] += 1


def references_noted_too_few(scene: Scene) -> None:
    scene.peer.guest.gntdev._noted -= 1


def a_page_off_its_list(scene: Scene) -> None:
    scene.listed.listed = False


def a_page_that_does_not_linger(scene: Scene) -> None:
    scene.driver._pages.lingering.clear()


def a_reference_to_a_port_too_many(scene: Scene) -> None:
    scene.granter.guest.evtchn._bound[scene.port].references += 1


def a_port_that_leads_elsewhere(scene: Scene) -> None:
    scene.granter.guest.evtchn._ports._ports[scene.port].remote = 1


def a_port_forgotten(scene: Scene) -> None:
    del scene.granter.guest.evtchn._bound[scene.port]


WRONGS = [
    more_in_use,
    less_in_use,
    a_user_too_many,
    a_user_too_few,
    a_reference_that_is_free_twice,
    a_reference_lost,
    a_reference_nobody_owns,
    a_page_of_memory_too_many,
    an_extent_too_few,
    an_extent_with_a_page_too_few,
    a_loan_forgotten,
    a_loan_counted_twice,
    nobody_listens,
    a_pin_too_few,
    a_pin_too_many,
    a_span_that_is_too_long,
    a_page_of_another_span,
    a_page_with_another_number,
    a_handle_too_many,
    references_noted_too_few,
    a_page_off_its_list,
    a_page_that_does_not_linger,
    a_reference_to_a_port_too_many,
    a_port_that_leads_elsewhere,
    a_port_forgotten,
]


@pytest.fixture
def scene() -> Iterator[Scene]:
    """Of a machine that is not asked to be right at the end."""
    core = Core(limit=64, table_frames=1)
    for domid in (1, 2):
        core.create(domid, uid=os.getuid())
    scene = Scene(core)
    extent = scene.listed.grant.memory
    yield scene
    core.frames.close()
    os.close(extent.master)


def test_right_books(scene: Scene) -> None:
    recount(scene.core)


@pytest.mark.parametrize("wrong", WRONGS)
def test_recount_finds(scene: Scene, wrong: Callable[[Scene], None]) -> None:
    wrong(scene)
    with pytest.raises(AssertionError, match="the books are wrong: "):
        recount(scene.core)


def test_the_next_alloc_finds(scene: Scene) -> None:
    more_in_use(scene)
    with pytest.raises(BooksWrong, match="3 pages, 3 references, and 4 in use"):
        scene.granter.alloc(2, 0)


@pytest.mark.parametrize("wrong", [less_in_use, a_reference_nobody_owns])
def test_the_next_page_freed_finds(scene: Scene, wrong: Callable[[Scene], None]) -> None:
    wrong(scene)
    with pytest.raises(BooksWrong, match=r"domain 1 has \d pages"):
        scene.granter.dealloc(0)


@pytest.mark.parametrize("whose", ["mine", "theirs"])
def test_the_end_of_a_map_finds(scene: Scene, whose: str) -> None:
    more_in_use(scene)
    with pytest.raises(BooksWrong, match="in use"):
        getattr(scene, whose).unmap()


def test_a_page_with_less_than_no_users_is_found(scene: Scene) -> None:
    scene.listed.users = 0
    with pytest.raises(BooksWrong, match="-1 users"):
        scene.granter.dealloc(0)


def test_a_page_unmapped_too_often_is_found(scene: Scene) -> None:
    scene.lingering.pins = 0
    with pytest.raises(BooksWrong, match="too often"):
        scene.theirs.unmap()


def test_the_machine_ends_and_says_why(tmp_path: Path) -> None:
    """No handler of the server's keeps it alive."""
    server = Server(Core(), str(tmp_path))
    server.create(1, uid=os.getuid())

    def go_wrong(*_: object) -> None:
        raise BooksWrong("on purpose")

    server.machine.guest(1).gntalloc.holders = go_wrong  # type: ignore[method-assign, assignment]
    with socket.socket(socket.AF_UNIX) as program:
        program.connect(str(tmp_path / "1"))
        opened = wire.encode(wire.OPEN, 1, wire.OPEN_REQUEST.pack(os.O_RDWR) + b"gntalloc")
        program.sendall(opened + wire.encode(wire.HOLDERS, 2, wire.HOLDERS_REQUEST.pack(1, 0, 0, 1)))
        try:
            with pytest.raises(BooksWrong, match="on purpose"):
                server.run()
        finally:
            server.close()
