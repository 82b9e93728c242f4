"""What a user writes: share, map, close, wait; and what is told when it is wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import threading
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest

import gntalloc
from gntalloc import (
    PAGE_SIZE,
    BadGrantText,
    Closed,
    DeviceError,
    Domain,
    Grant,
    Machine,
    NoMachine,
    TimedOut,
    ViewsStillExported,
    current_domain,
)
from gntalloc.maps import Mapping

if TYPE_CHECKING:
    from collections.abc import Callable


def test_both_sides_see_the_same_pages(alice: Domain, bob: Domain) -> None:
    with alice.share(bob, pages=4, writable=True) as shared, bob.map(shared.grant) as mapped:
        assert len(shared.memory) == len(mapped.memory) == 4 * PAGE_SIZE
        assert bytes(mapped.memory) == bytes(4 * PAGE_SIZE)
        mapped.memory[3 * PAGE_SIZE :] = b"\xa5" * PAGE_SIZE
        shared.memory[:5] = b"hello"
        assert (bytes(mapped.memory[:5]), shared.memory[-1]) == (b"hello", 0xA5)


def test_read_only_is_the_default_and_means_it(alice: Domain, bob: Domain) -> None:
    with alice.share(bob) as shared, bob.map(shared.grant) as mapped:
        assert not shared.grant.writable
        assert mapped.memory.readonly
        with pytest.raises(TypeError):
            mapped.memory[0] = 1
        with pytest.raises(DeviceError, match="granted read-only") as caught:
            bob.map(shared.grant, writable=True)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("arguments", "pages"),
    [({}, 1), ({"pages": 3}, 3), ({"size": 1}, 1), ({"size": PAGE_SIZE}, 1), ({"size": PAGE_SIZE + 1}, 2)],
)
def test_how_many_pages(alice: Domain, bob: Domain, arguments: dict[str, Any], pages: int) -> None:
    with alice.share(bob, **arguments) as shared:
        assert len(shared.refs) * PAGE_SIZE == len(shared.memory) == pages * PAGE_SIZE


@pytest.mark.parametrize(
    "arguments",
    [
        {"pages": 0},
        {"pages": -1},
        {"size": 0},
        {"size": -5},
        {"pages": 1, "size": 1},
        {"pages": 1 << 32},
        {"peer": -1},
        {"peer": 1 << 16},
    ],
    ids=str,
)
def test_what_cannot_be_shared_is_a_value_error_with_a_reason(alice: Domain, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\d|not both"):
        alice.share(arguments.pop("peer", 2), **arguments)


@pytest.mark.parametrize("pages", [65, 300_000, 2_000_000])
def test_more_than_the_limit_is_enospc_with_the_reason(alice: Domain, bob: Domain, pages: int) -> None:
    with pytest.raises(DeviceError, match="limit is 64 at once; raise the limit") as caught:
        alice.share(bob, pages=pages)
    assert caught.value.errno == errno.ENOSPC
    with alice.share(bob, pages=64):
        pass


@pytest.mark.parametrize("pages", [10**7, (1 << 32) - 1])
def test_more_pages_than_this_computer_has_are_beyond_the_limit(alice: Domain, bob: Domain, pages: int) -> None:
    """That is the reason to be told, and not that a program has no room for them."""
    with pytest.raises(DeviceError, match=f"{pages} pages were asked for, and the domain's limit is") as caught:
        alice.share(bob, pages)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("kept", [False, True])
def test_pages_that_could_not_be_placed_are_given_back(
    machine: Machine, alice: Domain, bob: Domain, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    file = alice.devices.open("gntalloc") if kept else None
    theirs = bob.devices.open("gntdev") if kept else None
    with alice.share(bob, writable=True) as shared:
        before = machine.statistics()

        def refuse(*_: object, **__: object) -> NoReturn:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(Mapping, "place", refuse)
            for call in (lambda: alice.share(bob, 3, file=file), lambda: bob.map(shared.grant, file=theirs)):
                with pytest.raises(DeviceError, match="could not be made") as caught:
                    call()
                assert caught.value.errno == errno.ENOMEM
        after = machine.statistics()
        for earlier, later in zip(before.domains, after.domains, strict=True):
            assert (later.pages_in_use, later.references) == (earlier.pages_in_use, earlier.references)
        shared.close()
        assert not shared.held
    for each in (file, theirs):
        if each is not None:
            each.close()


def test_the_limit_can_be_changed(alice: Domain, bob: Domain) -> None:
    assert alice.limit == 64
    try:
        alice.limit = 2
        assert (alice.limit, bob.limit) == (2, 64)
        with alice.share(bob, pages=2), pytest.raises(DeviceError, match="2 of the domain's limit of 2"):
            alice.share(bob)
        with pytest.raises(DeviceError, match="0 or more"):
            alice.limit = -1
    finally:
        alice.limit = 64


def test_what_can_be_given_to_map(alice: Domain, bob: Domain) -> None:
    with alice.share(bob, pages=2, writable=True) as shared:
        shared.memory[0], shared.memory[PAGE_SIZE] = 1, 2
        first, second = shared.refs
        for arguments, seen in (
            ((shared.grant,), (1, 2)),
            ((1, shared.refs), (1, 2)),
            ((alice, [second, first]), (2, 1)),
            ((1, second), (2,)),
            ((1, range(first, second + 1)), (1, 2)),
        ):
            with bob.map(*arguments) as mapped:
                assert tuple(mapped.memory[::PAGE_SIZE]) == seen
                assert mapped.memory.readonly == (arguments[0] is not shared.grant)
        with bob.map(shared.grant, writable=False) as mapped:
            assert mapped.memory.readonly


@pytest.mark.parametrize(
    "arguments",
    [(1,), (1, ()), (Grant(1, (8,), False), (8,)), (1, -1), (1, 1 << 32), (-1, 8), (1 << 32, 8)],
    ids=str,
)
def test_what_cannot_be_mapped_is_a_value_error_with_a_reason(bob: Domain, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"reference|domain"):
        bob.map(*arguments)


@pytest.mark.parametrize(("granter", "ref", "why"), [(1, 9999, "reference 9999"), (99, 8, "no domain 99")])
def test_what_is_not_there_is_einval_with_the_reason(bob: Domain, granter: int, ref: int, why: str) -> None:
    with pytest.raises(DeviceError, match=why) as caught:
        bob.map(granter, ref)
    assert caught.value.errno == errno.EINVAL


def test_a_grant_is_for_its_peer_alone(machine: Machine, alice: Domain, bob: Domain) -> None:
    carol = machine.domain(3)
    with alice.share(bob) as shared:
        with pytest.raises(DeviceError, match="not granted to domain 3"):
            carol.map(shared.grant)
        with pytest.raises(DeviceError, match="not granted to domain 1"):
            alice.map(shared.grant)
    carol.close()
    carol.devices.close()


def test_a_granter_that_is_not_ready_is_waited_for(alice: Domain, bob: Domain) -> None:
    from gntalloc.abi.gntalloc import ALLOC_GREF, DEALLOC_GREF, AllocGref, DeallocGref

    file = alice.devices.open("gntalloc")
    argument = bytearray(AllocGref(2, 0, 1, 0).pack().ljust(24, b"\0"))
    file.ioctl(ALLOC_GREF, argument)
    ref = int.from_bytes(argument[16:20], "little")
    with pytest.raises(TimedOut, match="has not mapped it yet") as caught:
        bob.map(1, ref, timeout=0)
    assert isinstance(caught.value, TimeoutError)

    later: list[Any] = []
    thread = threading.Thread(target=lambda: later.append(bob.map(1, ref, timeout=20)))
    thread.start()
    mapping = file.mmap(0, PAGE_SIZE, prot=3)
    thread.join(20)
    later.pop().close()
    mapping.close()
    file.ioctl(DEALLOC_GREF, DeallocGref(0, 1).pack())
    file.close()


# The headline: who holds it.


def test_held_mapped_by_and_wait_released(alice: Domain, bob: Domain) -> None:
    with alice.share(bob, pages=2) as shared:
        assert (shared.held, shared.mapped_by) == (False, ())
        shared.wait_released()  # at once
        with bob.map(1, shared.refs[1]):
            assert (shared.held, shared.mapped_by) == (True, (2,))
            with pytest.raises(TimedOut, match="still mapped by domain 2 after 0"):
                shared.wait_released(timeout=0)
        assert (shared.held, shared.mapped_by) == (False, ())


def test_closing_while_held_then_waiting(machine: Machine, alice: Domain, bob: Domain) -> None:
    shared = alice.share(bob)
    mapped = bob.map(shared.grant)
    shared.close()
    shared.close()
    assert (shared.held, shared.mapped_by) == (True, (2,))
    with pytest.raises(DeviceError, match="has ended grant"):
        bob.map(shared.grant)
    assert machine.statistics().domains[0].pages_in_use == 1
    mapped.close()
    assert not shared.held
    assert machine.statistics().domains[0].pages_in_use == 0


def test_any_number_of_threads_may_wait(alice: Domain, bob: Domain) -> None:
    shared = alice.share(bob)
    mapped = bob.map(shared.grant)
    ready = threading.Barrier(9)
    done: list[int] = []

    def wait(number: int) -> None:
        ready.wait(20)
        shared.wait_released(timeout=20)
        done.append(number)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    ready.wait(20)
    with pytest.raises(TimedOut):
        shared.wait_released(timeout=0.01)
    assert done == []
    shared.close()
    mapped.close()
    for thread in threads:
        thread.join(20)
    assert sorted(done) == list(range(8))


def test_any_object_from_any_thread(alice: Domain, bob: Domain) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                with alice.share(bob, writable=True) as shared, bob.map(shared.grant) as mapped:
                    mapped.memory[0] = 1
                    assert shared.memory[0] == 1
                    assert shared.held
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []


# Closing.


VIEWS: dict[str, Callable[[memoryview], object]] = {
    "slice": lambda memory: memory[10:20],
    "cast": lambda memory: memory.cast("Q"),
    "numpy": lambda memory: np.frombuffer(memory, np.uint16),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("side", ["shared", "mapped"])
def test_closing_under_a_view_names_the_grant_and_changes_nothing(
    alice: Domain, bob: Domain, side: str, view: Callable[[memoryview], object]
) -> None:
    with alice.share(bob, writable=True) as shared, bob.map(shared.grant) as mapped:
        pages: Any = {"shared": shared, "mapped": mapped}[side]
        alive = view(pages.memory)
        with pytest.raises(ViewsStillExported, match=str(shared.grant)) as caught:
            pages.close()
        assert caught.value.errno == errno.EBUSY
        del caught
        assert not pages.closed
        assert shared.mapped_by == (2,)
        pages.memory[0] = 1
        del alive
        pages.close()
        assert pages.closed
        with pytest.raises(Closed, match=str(shared.grant)):
            _ = pages.memory


def test_leaving_a_with_never_hides_what_went_wrong_inside(alice: Domain, bob: Domain) -> None:
    kept = []
    shared = alice.share(bob)

    def body() -> None:
        with shared:
            kept.append(shared.memory[:1])
            raise KeyError("what the body did")

    with pytest.raises(KeyError) as caught:
        body()
    assert any("view" in note for note in caught.value.__notes__)
    kept.clear()
    shared.close()


def test_leaving_a_with_under_a_view_says_so(alice: Domain, bob: Domain) -> None:
    kept = []

    def leave() -> Any:
        with alice.share(bob) as shared:
            kept.append(shared.memory[:1])
            kept.append(shared)  # type: ignore[arg-type]
        return shared

    with pytest.raises(ViewsStillExported):
        leave()
    shared: Any = kept.pop()
    kept.clear()
    shared.close()


def test_forgetting_to_close_is_a_resource_warning_and_gives_all_back(
    machine: Machine, alice: Domain, bob: Domain
) -> None:
    pages: list[Any] = [alice.share(bob, writable=True)]
    pages.append(bob.map(pages[0].grant))
    with pytest.warns(ResourceWarning, match=r"MappedPages 1:.*never closed"):
        pages.pop()
    assert not pages[0].held
    with pytest.warns(ResourceWarning, match=r"SharedPages 1:.*never closed"):
        pages.pop()
    assert machine.grants() == []


def test_an_array_outlives_everything_and_is_what_holds_the_page(alice: Domain, bob: Domain) -> None:
    with alice.share(bob, writable=True) as shared:
        pages = [bob.map(shared.grant)]
        array = np.frombuffer(pages[0].memory, np.uint8)
        with pytest.warns(ResourceWarning):
            pages.clear()
        shared.memory[0] = 9
        assert (array[0], shared.held) == (9, True)
        del array
        assert not shared.held


def test_a_closed_domain_opens_again(alice: Domain, bob: Domain) -> None:
    shared = alice.share(bob)
    alice.close()
    with pytest.raises(Closed):
        _ = shared.held
    with alice.share(bob), contextlib.suppress(Closed):
        shared.close()
    with contextlib.suppress(Closed):
        shared.close()


# Domains and grants as values.


def test_a_pickle_of_a_domain_is_its_address(alice: Domain, bob: Domain) -> None:
    copy = pickle.loads(pickle.dumps(bob))
    assert (copy.domid, copy.address) == (2, bob.address)
    with alice.share(copy) as shared, copy.map(shared.grant):
        assert shared.mapped_by == (2,)
    copy.close()
    copy.devices.close()


def test_current_domain(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNTALLOC_DOMAIN", machine.environ(2)["GNTALLOC_DOMAIN"])
    domain = current_domain()
    assert domain.domid == 2
    domain.devices.close()
    monkeypatch.setenv("GNTALLOC_DOMAIN", "nowhere/7")
    with pytest.raises(NoMachine, match=r"no machine answers at .*nowhere/7"):
        current_domain()


GRANTS = {
    "1:8:ro": Grant(1, (8,), False),
    "1:8-11,15:rw": Grant(1, (8, 9, 10, 11, 15), True),
    "0:12,11,10:ro": Grant(0, (12, 11, 10), False),
    "7:9,9,9-10:rw": Grant(7, (9, 9, 9, 10), True),
}


@pytest.mark.parametrize(("text", "grant"), GRANTS.items())
def test_a_grant_is_a_text_and_a_pickle(text: str, grant: Grant) -> None:
    assert str(grant) == text
    assert Grant.parse(f" {text}\n") == pickle.loads(pickle.dumps(grant)) == grant


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1:8",
        "1:8:rx",
        "1::ro",
        "a:8:ro",
        "1:8-:ro",
        "1:9-8:ro",
        "-1:8:ro",
        "1:8:ro:",
        "1:0-65536:ro",
        "1:0-99999999999999:ro",
        "1:8:ro\0",
        "1:" + "9" * 5000 + ":ro",
        "9" * 5000 + ":8:ro",
        "1:4294967296:ro",
        "70000000000:8:ro",
        "1:٨:ro",
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_grant(text: str) -> None:
    with pytest.raises(BadGrantText):
        Grant.parse(text)


# Devices, as a program of the kernel's interface uses them.


@pytest.mark.parametrize(
    ("offset", "length"), [(-PAGE_SIZE, PAGE_SIZE), (0, -1), (1 << 63, PAGE_SIZE), (0, 1 << 63), (-1, -1), (1 << 70, 1)]
)
def test_a_map_of_any_numbers_is_an_errno_and_a_reason(alice: Domain, offset: int, length: int) -> None:
    file = alice.devices.open("gntalloc")
    with pytest.raises(DeviceError) as caught:
        file.mmap(offset, length, prot=3)
    assert caught.value.errno in {errno.EINVAL, errno.EOVERFLOW, errno.ENOENT}
    file.close()


def test_an_ioctl_changes_its_argument_in_place(alice: Domain) -> None:
    file = alice.devices.open("gntalloc")
    argument = bytearray(b"\2\0\1\0\1\0\0\0" + b"\xff" * 16)
    assert file.ioctl(0x00184705, argument) == 0
    assert bytes(argument[:16]) == b"\2\0\1\0\1\0\0\0" + bytes(8)
    for wrong, code in ((bytes(argument), errno.EFAULT), (None, errno.EFAULT), (bytearray(23), errno.EFAULT)):
        with pytest.raises(DeviceError) as caught:
            file.ioctl(0x00184705, wrong)
        assert caught.value.errno == code
    with pytest.raises(DeviceError) as caught:
        file.ioctl(0xDEADBEEF, argument)
    assert caught.value.errno == errno.ENOTTY
    with pytest.raises(DeviceError) as caught:
        file.read(1)
    assert caught.value.errno == errno.EINVAL
    file.close()
    file.close()
    with pytest.raises(Closed):
        file.ioctl(0x00184705, argument)


def test_a_device_that_is_not_there(alice: Domain) -> None:
    with pytest.raises(DeviceError, match="there are gntalloc") as caught:
        alice.devices.open("null")
    assert caught.value.errno == errno.ENOENT


def test_the_example_of_the_package_works() -> None:
    assert gntalloc.__doc__ is not None
    lines = gntalloc.__doc__.split("\n\n")
    example = next(block for block in lines if block.startswith("    with gntalloc.Machine"))
    import textwrap

    exec(textwrap.dedent(example), {"gntalloc": gntalloc})
