"""SET_UNMAP_NOTIFY of both drivers: rows 41 to 51 and 80 to 82, and when a promise is kept."""

from __future__ import annotations

import errno
from struct import pack
from typing import TYPE_CHECKING

import pytest
from event_program import Events, pair
from fake_program import ADDRESS, Granted, Program, refused
from notifying import BOTH, BYTE, EVENT, set_notify

from gntalloc.abi.gntdev import SET_UNMAP_NOTIFY
from gntalloc.maps import PAGE_SIZE, PROT_READ
from gntalloc.testing import FakeMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.machine.machine import Machine as Core


class Scene:
    """Domain 1 grants to 2; a channel between them, both ends quiet."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.granter, self.peer = Program(core, 1, "gntalloc"), Program(core, 2, "gntdev")
        self.near, self.port, self.far, self.remote = pair(core)

    def granted(self, count: int = 1, flags: int = 1) -> Granted:
        return self.granter.alloc(2, count, flags)

    def heard(self) -> bool:
        """Whether the far end had an event since it was asked last."""
        events = self.far.read()
        self.far.write(*events)
        assert events in ([], [self.remote])
        return bool(events)

    def heard_near(self) -> bool:
        events = self.near.read()
        self.near.write(*events)
        return bool(events)


@pytest.fixture
def scene(core: Core) -> Scene:
    return Scene(core)


# gntalloc: what is refused, in which order.


def test_row_41_at_the_null_pointer(scene: Scene) -> None:
    for program in (scene.granter, scene.peer):
        with refused(errno.EFAULT):
            program.file.ioctl(SET_UNMAP_NOTIFY, 0, FakeMemory())
        with refused(errno.EFAULT):
            program.ioctl(SET_UNMAP_NOTIFY, bytes(12))


def test_row_42_index_before_action(scene: Scene) -> None:
    with refused(errno.ENOENT, "0x1000"):
        set_notify(scene.granter, PAGE_SIZE + 5, 4)
    with refused(errno.ENOENT):
        set_notify(scene.granter, 0xFFFF_FFFF_FFFF_FFFF, EVENT, 0xFFFF_FFFF)


@pytest.mark.parametrize("action", [4, 7, 0x8000_0000, 0xFFFF_FFFF])
def test_row_43_actions_nobody_knows(scene: Scene, action: int) -> None:
    granted = scene.granted()
    with refused(errno.EINVAL, hex(action)):
        set_notify(scene.granter, granted.at, action, scene.port)


@pytest.mark.parametrize("port", [0, 1, 1000, 0xFFFF_FFFF], ids=["row_44", "row_46", "row_45", "row_47"])
def test_rows_44_to_47_ports(scene: Scene, port: int) -> None:
    granted = scene.granted()
    set_notify(scene.granter, granted.at, EVENT, scene.port)
    with refused(errno.EINVAL):
        set_notify(scene.granter, granted.at, EVENT, port)
    scene.granter.dealloc(granted.at)
    assert scene.heard()  # what was promised before stands


def test_a_port_nobody_asks_for_is_not_looked_at(scene: Scene) -> None:
    set_notify(scene.granter, scene.granted().at, BYTE, 1000)


def test_row_48_anybodys_port(scene: Scene) -> None:
    stranger = Events(scene.core, 1)
    set_notify(scene.granter, scene.granted().at, EVENT, stranger.bind_unbound(2))


def test_a_port_of_another_domain_is_none(scene: Scene) -> None:
    there = [Events(scene.core, 2).bind_unbound(1) for _ in range(3)][-1]
    with refused(errno.EINVAL):
        set_notify(scene.granter, scene.granted().at, EVENT, there)


def test_row_49_action_0_cancels(scene: Scene) -> None:
    granted = scene.granted()
    set_notify(scene.granter, granted.at, BOTH, scene.port)
    set_notify(scene.granter, granted.at, 0)
    mapped = scene.peer.map(1, *granted.refs)
    mapped.memory[0] = 1
    scene.granter.dealloc(granted.at)
    assert not scene.heard()
    assert mapped.memory[0] == 1
    mapped.unmap()
    assert scene.near.driver._bound[scene.port].references == 1


def test_row_50_after_dealloc_still_mapped(scene: Scene) -> None:
    granted = scene.granted()
    mapped = scene.granter.mmap(granted.at)
    scene.granter.dealloc(granted.at)
    with refused(errno.ENOENT):
        set_notify(scene.granter, granted.at, BYTE)
    mapped.unmap()


# gntalloc: when.


def test_row_51_that_byte_is_cleared(scene: Scene) -> None:
    granted = scene.granted(3)
    mapped = scene.peer.map(1, *granted.refs)
    mapped.memory[:] = b"\x11" * (3 * PAGE_SIZE)
    set_notify(scene.granter, granted.at + PAGE_SIZE + 7, BYTE)
    scene.granter.dealloc(granted.at, 3)
    left = bytes(mapped.memory)
    assert [at for at, byte in enumerate(left) if byte != 0x11] == [PAGE_SIZE + 7]
    mapped.unmap()


def test_dealloc_of_what_is_not_mapped(scene: Scene) -> None:
    granted = scene.granted()
    set_notify(scene.granter, granted.at, BOTH, scene.port)
    assert not scene.heard()
    scene.granter.dealloc(granted.at)
    assert scene.heard()


def test_dealloc_of_what_is_mapped_waits_for_the_last_munmap(scene: Scene) -> None:
    granted = scene.granted(2)
    maps = [scene.granter.mmap(granted.at, 2), scene.granter.mmap(granted.at)]
    set_notify(scene.granter, granted.at, EVENT, scene.port)
    scene.granter.dealloc(granted.at, 2)
    maps[0].unmap(0, 1)
    maps[1].unmap()
    assert not scene.heard()  # a part of it is left, and so the whole map is
    maps[0].unmap()
    assert scene.heard()


def test_munmap_of_what_is_still_listed(scene: Scene) -> None:
    granted = scene.granted()
    set_notify(scene.granter, granted.at, EVENT, scene.port)
    scene.granter.mmap(granted.at).unmap()
    assert not scene.heard()
    scene.granter.close()
    assert scene.heard()


def test_one_promise_a_page(scene: Scene) -> None:
    """Each page has its own; of one page the last counts, its byte too."""
    granted = scene.granted(2)
    mapped = scene.peer.map(1, *granted.refs)
    mapped.memory[:16] = mapped.memory[PAGE_SIZE : PAGE_SIZE + 16] = bytes(range(1, 17))
    for byte in (3, 5):
        set_notify(scene.granter, granted.at + byte, BOTH, scene.port)
    set_notify(scene.granter, granted.at + PAGE_SIZE, BYTE)
    scene.granter.dealloc(granted.at + PAGE_SIZE)
    assert mapped.memory[PAGE_SIZE] == 0
    assert not scene.heard()
    scene.granter.dealloc(granted.at)
    assert scene.heard()
    assert bytes(mapped.memory[:16]) == bytes([1, 2, 3, 4, 5, 0, *range(7, 17)])
    mapped.unmap()


def test_it_fires_once(scene: Scene) -> None:
    """At the end of this side, and not again when the peer lets go at last."""
    granted = scene.granted()
    mapped = scene.peer.map(1, *granted.refs)
    set_notify(scene.granter, granted.at, BOTH, scene.port)
    scene.granter.dealloc(granted.at)
    assert scene.heard()
    mapped.memory[0] = 9
    mapped.unmap()
    assert not scene.heard()


def test_who_is_woken_finds_the_byte_cleared_and_the_page_there(scene: Scene) -> None:
    """Byte, event, revocation, in this order."""
    granted = scene.granted()
    mapped = scene.peer.map(1, *granted.refs)
    mapped.memory[0] = 1
    seen = []

    class Looking:
        def put(self, port: int) -> bool:
            again = scene.peer.map(1, *granted.refs)
            seen.append((port, mapped.memory[0], again.memory[0]))
            again.unmap()
            return True

        def unread(self) -> int:
            return 0

    scene.far.driver.attach_outlet(scene.far.file, Looking())
    set_notify(scene.granter, granted.at, BOTH, scene.port)
    scene.granter.dealloc(granted.at)
    assert seen == [(scene.remote, 0, 0)]
    mapped.unmap()


@pytest.mark.parametrize("how", ["closed", "unbound"])
def test_a_port_whose_file_is_gone(scene: Scene, how: str) -> None:
    granted = scene.granted()
    set_notify(scene.granter, granted.at, EVENT, scene.port)
    if how == "closed":
        scene.near.close()
    else:
        scene.near.unbind(scene.port)
    scene.granter.dealloc(granted.at)
    assert scene.heard()
    assert scene.near.driver.in_use == 0


def test_set_anew_with_the_only_reference_to_its_port(scene: Scene) -> None:
    granted = scene.granted()
    set_notify(scene.granter, granted.at, EVENT, scene.port)
    scene.near.close()
    set_notify(scene.granter, granted.at, BOTH, scene.port)
    scene.granter.dealloc(granted.at)
    assert scene.heard()


def test_a_read_only_grants_byte(scene: Scene) -> None:
    """The granter may clear it, sealed or not."""
    granted = scene.granted(2, flags=0)
    mine = scene.granter.mmap(granted.at, 2)
    mine.memory[0] = mine.memory[PAGE_SIZE] = 7
    set_notify(scene.granter, granted.at, BYTE)
    mapped = scene.peer.map(1, *granted.refs, prot=PROT_READ)
    set_notify(scene.granter, granted.at + PAGE_SIZE, BYTE)
    scene.granter.dealloc(granted.at, 2)
    mine.unmap()
    assert (mapped.memory[0], mapped.memory[PAGE_SIZE]) == (0, 0)
    mapped.unmap()


def test_a_file_of_many_promises(scene: Scene) -> None:
    granted = scene.granted(60)
    for page in range(60):
        set_notify(scene.granter, granted.at + page * PAGE_SIZE, EVENT, scene.port)
    assert scene.near.driver._bound[scene.port].references == 61
    scene.granter.close()
    assert scene.near.driver._bound[scene.port].references == 1
    assert scene.heard()  # sixty in one, for none was written back


# gntdev.


def reserved(scene: Scene, count: int = 1, flags: int = 1) -> tuple[int, Granted]:
    """An entry of the peer's, and what it is to map."""
    granted = scene.granted(count, flags)
    return scene.peer.map_refs(1, granted.refs), granted


def test_row_80_action_before_index(scene: Scene) -> None:
    with refused(errno.EINVAL, "0x4"):
        set_notify(scene.peer, 5 * PAGE_SIZE, 4)


def test_port_before_index(scene: Scene) -> None:
    with refused(errno.EINVAL, "port 1000"):
        set_notify(scene.peer, 5 * PAGE_SIZE, EVENT, 1000)


def test_row_81_an_index_in_no_entry(scene: Scene) -> None:
    index, _ = reserved(scene, 2)
    for wrong in (index + 2 * PAGE_SIZE, 0xFFFF_FFFF_FFFF_FFFF):
        with refused(errno.ENOENT):
            set_notify(scene.peer, wrong, BOTH, scene.remote)
    assert scene.far.driver._bound[scene.remote].references == 1


def test_row_82_a_byte_of_a_read_only_map(scene: Scene) -> None:
    index, _ = reserved(scene)
    mapped = scene.peer.mmap(index, prot=PROT_READ)
    with refused(errno.EINVAL, "read-only"):
        set_notify(scene.peer, index, BOTH, scene.remote)
    assert scene.far.driver._bound[scene.remote].references == 1
    set_notify(scene.peer, index, EVENT, scene.remote)
    mapped.unmap()
    scene.peer.unmap_refs(index, 1)
    assert scene.heard_near()


def test_a_byte_promised_before_a_read_only_map_stays(scene: Scene) -> None:
    """Nothing a peer does may change what it may only read."""
    index, granted = reserved(scene, flags=0)
    mine = scene.granter.mmap(granted.at)
    mine.memory[0] = 7
    set_notify(scene.peer, index, BYTE)
    mapped = scene.peer.mmap(index, prot=PROT_READ)
    scene.peer.unmap_refs(index, 1)
    mapped.unmap()
    assert mine.memory[0] == 7
    mine.unmap()


@pytest.mark.parametrize("when", ["before the map", "after the map"])
@pytest.mark.parametrize("first", ["munmap", "UNMAP"])
def test_the_event_comes_after_both_munmap_and_unmap(scene: Scene, when: str, first: str) -> None:
    index, granted = reserved(scene, 2)
    mine = scene.granter.mmap(granted.at, 2)
    if when == "before the map":
        set_notify(scene.peer, index + PAGE_SIZE + 9, BOTH, scene.remote)
    mapped = scene.peer.mmap(index, 2)
    mapped.memory[PAGE_SIZE + 8 : PAGE_SIZE + 11] = b"abc"
    if when == "after the map":
        set_notify(scene.peer, index + PAGE_SIZE + 9, BOTH, scene.remote)
    steps = [mapped.unmap, lambda: scene.peer.unmap_refs(index, 2)]
    if first == "UNMAP":
        steps.reverse()
    steps[0]()
    assert not scene.heard_near()
    steps[1]()
    assert scene.heard_near()
    assert bytes(mine.memory[PAGE_SIZE + 8 : PAGE_SIZE + 11]) == b"a\0c"
    mine.unmap()


def test_ours_munmap_clears_the_byte_at_once(make_core: Callable[..., Core]) -> None:
    scene = Scene(make_core("ours"))
    index, granted = reserved(scene)
    mine = scene.granter.mmap(granted.at)
    mapped = scene.peer.mmap(index)
    mapped.memory[0] = 1
    set_notify(scene.peer, index, BYTE)
    mapped.unmap()
    assert mine.memory[0] == 0
    mine.memory[0] = 1
    scene.peer.unmap_refs(index, 1)
    assert mine.memory[0] == 1  # once
    mine.unmap()


def test_linux_munmap_alone_clears_nothing(make_core: Callable[..., Core]) -> None:
    scene = Scene(make_core("linux"))
    index, granted = reserved(scene)
    mine = scene.granter.mmap(granted.at)
    mapped = scene.peer.mmap(index)
    mapped.memory[0] = 1
    mapped.unmap()
    set_notify(scene.peer, index, BYTE)
    assert mine.memory[0] == 1
    scene.peer.unmap_refs(index, 1)
    assert mine.memory[0] == 0
    mine.unmap()


def test_an_entry_that_was_never_mapped_sends_its_event(scene: Scene) -> None:
    index, granted = reserved(scene)
    mine = scene.granter.mmap(granted.at)
    mine.memory[0] = 7
    set_notify(scene.peer, index, BOTH, scene.remote)
    scene.peer.unmap_refs(index, 1)
    assert scene.heard_near()
    assert mine.memory[0] == 7
    mine.unmap()


def test_one_promise_an_entry(scene: Scene) -> None:
    index, granted = reserved(scene, 2)
    mine = scene.granter.mmap(granted.at, 2)
    mapped = scene.peer.mmap(index, 2)
    mapped.memory[5] = mapped.memory[PAGE_SIZE] = 1
    set_notify(scene.peer, index + 5, BOTH, scene.remote)
    set_notify(scene.peer, index + PAGE_SIZE, BYTE)
    mapped.unmap()
    scene.peer.close()
    assert not scene.heard_near()
    assert (mine.memory[5], mine.memory[PAGE_SIZE]) == (1, 0)
    mine.unmap()


def test_a_promise_that_is_replaced_lets_go_of_its_port(scene: Scene) -> None:
    at, _ = reserved(scene)
    for action in (EVENT, BOTH, EVENT, 0):
        set_notify(scene.peer, at, action, scene.remote)
    assert scene.far.driver._bound[scene.remote].references == 1


def test_who_is_woken_by_the_mapper_finds_the_page_unmapped(scene: Scene) -> None:
    """Byte, unmap, event, in this order: the other way round than gntalloc."""
    at, granted = reserved(scene)
    mine = scene.granter.mmap(granted.at)
    mapped = scene.peer.mmap(at)
    mapped.memory[0] = 1
    seen = []

    class Looking:
        def put(self, port: int) -> bool:
            seen.append((port, mine.memory[0], scene.granter.guest.table.mapped_by(granted.refs[0])))
            return True

        def unread(self) -> int:
            return 0

    scene.near.driver.attach_outlet(scene.near.file, Looking())
    set_notify(scene.peer, at, BOTH, scene.remote)
    mapped.unmap()
    scene.peer.unmap_refs(at, 1)
    assert seen == [(scene.port, 0, ())]
    mine.unmap()


def test_close_of_everything_in_any_order(scene: Scene) -> None:
    index, _ = reserved(scene)
    mapped = scene.peer.mmap(index)
    set_notify(scene.peer, index, EVENT, scene.remote)
    scene.far.close()
    scene.peer.close()
    assert not scene.heard_near()
    mapped.unmap()
    assert scene.heard_near()
    assert scene.far.driver.in_use == 0


def test_a_domain_that_is_destroyed_keeps_its_promises(scene: Scene) -> None:
    index, _ = reserved(scene)
    set_notify(scene.peer, index, EVENT, scene.remote)
    scene.core.destroy(2)
    assert scene.heard_near()


def test_a_map_that_outlives_its_domain(scene: Scene) -> None:
    index, granted = reserved(scene)
    mine = scene.granter.mmap(granted.at)
    mapped = scene.peer.mmap(index)
    mapped.memory[0] = 1
    set_notify(scene.peer, index, BOTH, scene.remote)
    scene.core.destroy(2)
    mapped.unmap()
    assert mine.memory[0] == 0
    assert not scene.heard_near()  # its ports died with it
    mine.unmap()


def test_the_head_is_read_at_the_address(scene: Scene) -> None:
    memory = FakeMemory()
    memory.put(ADDRESS, pack("=QII", scene.granted().at, 0, 0), writable=False)
    assert scene.granter.file.ioctl(SET_UNMAP_NOTIFY, ADDRESS, memory) == 0
