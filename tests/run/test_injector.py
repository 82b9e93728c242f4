"""A map placed in a program that waits, step by step: what may come between two of the steps, and what is left then.

The program is tests/run/programs/held.c, under the filter; the test serves it, as a supervisor does.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import signal
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from held import PATIENCE, Held, libc, refuse, state_of
from runs import order, python, said, tell, wait_for

from gntalloc.run import injector as injector_module
from gntalloc.run.files import Piece
from gntalloc.run.injector import Traced
from gntalloc.syscalls.listener import Call, CallerGone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from runs import Runs

    Build = Callable[..., str]
    Hold = Callable[..., Held]
    Disturb = Callable[..., Iterator["Disturbed"]]

PAGE = mmap.PAGESIZE
MAP_SHARED, MAP_FIXED, MAP_FIXED_NOREPLACE = 1, 0x10, 0x100000
FREE = 0x70_0000_0000  # an address where nothing is
SEIZE, INTERRUPT, CONT, SINGLESTEP, DETACH = 0x4206, 0x4207, 7, 9, 17
SYS_TGKILL = 234


@pytest.fixture
def hold(build: Build) -> Iterator[Callable[..., Held]]:
    """Start held.c, with a way to do it."""
    path = build("held", "-pthread")
    all_of_them: list[Held] = []

    def start(how: str = "-", pages: int = 1, flags: int = MAP_SHARED, at: int = 0, *, old: bool = False) -> Held:
        all_of_them.append(Held(path, how, str(pages * PAGE), str(flags), str(at), old=old))
        return all_of_them[-1]

    yield start
    for each in all_of_them:
        each.end()


@pytest.fixture
def pages() -> Iterator[list[int]]:
    """Memory files with a word in each."""
    files = [os.memfd_create(word, os.MFD_CLOEXEC) for word in ("first", "other")]
    for file, word in zip(files, (b"first", b"other"), strict=True):
        os.write(file, word.ljust(PAGE, b"\0"))
    yield files
    for file in files:
        os.close(file)


def place(held: Held, call: Call, pages: list[int], **how: Any) -> int | None:
    """Map one page of each. None: the caller is gone."""
    try:
        return held.injector.place(call, [Piece(number, 0, PAGE) for number in range(len(pages))], pages, **how)
    except CallerGone:
        return None


class Disturbed(NamedTuple):
    """A map that something came between, just before or after this request; its result."""

    held: Held
    call: Call
    request: int
    result: int | None


@pytest.fixture
def disturb(hold: Hold, pages: list[int], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Iterator[Disturbed]]:
    """Make a map for each of its steps, with something done just before that step, or just after it."""
    real = injector_module._ptrace

    def maps(how: str, do: Callable[[Held, int], None], *, after: bool = False) -> Iterator[Disturbed]:
        def disturbed(step: int) -> Disturbed | None:
            """None: there are not so many steps."""
            held = hold(how)
            call = held.call()
            requests: list[int] = []
            reached = False

            def ptrace(request: int, thread: int, *rest: Any) -> None:
                nonlocal reached
                requests.append(request)
                now = len(requests) == step + 1 and not (after and request == DETACH)
                reached |= now
                if now and not after:
                    do(held, thread)
                real(request, thread, *rest)
                if now and after:
                    do(held, thread)

            monkeypatch.setattr(injector_module, "_ptrace", ptrace)
            result = place(held, call, pages[:1])
            if reached:
                return Disturbed(held, call, requests[step], result)
            assert (requests[0], requests[-1], requests.count(SINGLESTEP)) == (SEIZE, DETACH, 2)
            return None

        for step in itertools.count():
            found = disturbed(step)
            if found is None:
                return
            yield found
            found.held.end()

    return maps


# What the caller has afterwards: its registers, its mask, its handlers; the pages, and nothing more.


@pytest.mark.parametrize("how", ["-", "b", "h", "bh"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_caller_has_what_it_had_and_the_pages(hold: Hold, pages: list[int], how: str, count: int) -> None:
    held = hold(how, count)
    told: list[int] = []

    def done(result: int) -> None:
        told.append(result)
        assert state_of(held.pid) == "t"  # it has not gone on

    result = place(held, held.call(), pages[:count], done=done)
    assert result is not None
    trap = "handler" if "h" in how else "default"
    expected = {"result": str(result), "registers": "", "mask": "same", "trap": trap, "traps": "0"}
    saw = held.saw()
    assert {name: saw[name] for name in expected} == expected
    assert (saw["text"], saw["descriptors"]) == ("first,other,"[: 6 * count], "+0")
    assert told == [result]
    assert held.status() == 0


def test_of_a_map_whose_second_part_cannot_be_nothing_stays(hold: Hold, pages: list[int]) -> None:
    for flags in (MAP_SHARED | MAP_FIXED_NOREPLACE, MAP_SHARED | MAP_FIXED):
        held = hold("-", 2, flags, FREE)
        again = os.open(f"/proc/self/fd/{pages[1]}", os.O_RDONLY)
        told: list[int] = []
        assert place(held, held.call(), [pages[0], again], done=told.append) == -errno.EACCES
        os.close(again)
        saw = held.saw()
        assert (saw["result"], saw["there"], saw["descriptors"]) == (str(-errno.EACCES), "0", "+0")
        assert saw["registers"] == ""
        assert told == [-errno.EACCES]


# Signals between the steps.


def test_a_signal_before_any_step_is_handled_once_and_after_the_map(disturb: Disturb) -> None:
    def send(held: Held, _thread: int) -> None:
        assert libc.sigqueue(held.pid, signal.SIGUSR1, ctypes.c_void_p(42)) == 0

    for held, _, request, result in disturb("-", send):
        saw = held.saw()
        heard = saw["result"], saw["handled"], saw["with_result"], saw["value"], saw["text"]
        assert heard == (str(result), "1", "1", "42", "first,"), hex(request)


def test_a_stop_before_any_step_is_not_lost(disturb: Disturb) -> None:
    """SIGSTOP cannot be blocked; so it comes between two of the calls that the thread makes for us."""
    for held, _, request, result in disturb("-", lambda held, _: os.kill(held.pid, signal.SIGSTOP)):
        status = held.status(os.WUNTRACED)
        assert os.WIFSTOPPED(status), hex(request)
        os.kill(held.pid, signal.SIGCONT)
        assert held.saw()["result"] == str(result)


def test_a_stop_that_another_thread_takes(disturb: Disturb) -> None:
    """Then all threads of the process stop, ours with an event, and none that is meant for us."""

    def stop(held: Held, _thread: int) -> None:
        (other,) = {int(name) for name in os.listdir(f"/proc/{held.pid}/task")} - {held.pid}
        libc.syscall(SYS_TGKILL, held.pid, other, signal.SIGSTOP)
        wait_for(lambda: state_of(other) == "T", "it does not stop")

    for held, _, request, result in disturb("t", stop):
        assert os.WIFSTOPPED(held.status(os.WUNTRACED)), hex(request)
        os.kill(held.pid, signal.SIGCONT)
        assert held.saw()["result"] == str(result)


def test_what_ends_a_stop_before_any_step(disturb: Disturb) -> None:
    """SIGCONT, of which a thread that is traced has an event, and its program a handler or nothing."""
    for held, _, request, result in disturb("-", lambda held, _: os.kill(held.pid, signal.SIGCONT)):
        saw = held.saw()
        assert (saw["result"], saw["registers"], saw["text"]) == (str(result), "", "first,"), hex(request)


def test_a_trap_that_somebody_sends_is_the_program_s(disturb: Disturb) -> None:
    """It cannot be blocked either: the steps end with one."""
    for held, _, request, result in disturb("h", lambda held, _: os.kill(held.pid, signal.SIGTRAP)):
        saw = held.saw()
        assert (saw["result"], saw["traps"], saw["registers"]) == (str(result), "1", ""), hex(request)


def test_a_signal_that_interrupts_the_call(hold: Hold, pages: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.19 one did, also while we served it. It stops for that; then the call is made again.

    There our own stop may interrupt it too, as often as it comes before the answer.
    """
    held = hold("-", old=True)
    real = injector_module._ptrace

    def ptrace(request: int, thread: int, *rest: Any) -> None:
        if request == INTERRUPT:
            interrupt(thread)
        real(request, thread, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(injector_module, "_ptrace", ptrace)
        assert place(held, held.call(), pages[:1]) is None
    while (result := place(held, held.call(), pages[:1])) is None:
        pass
    saw = held.saw()
    assert (saw["result"], saw["handled"], saw["text"]) == (str(result), "1", "first,")


def interrupt(thread: int) -> None:
    """Until it has stopped for that."""
    os.kill(thread, signal.SIGUSR1)
    wait_for(lambda: state_of(thread) == "t", "the signal does not interrupt it")


def test_who_is_traced_already_waits_on(hold: Hold, pages: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    held = hold()
    call = held.call()
    with monkeypatch.context() as patch:
        patch.setattr(injector_module, "_ptrace", refuse)
        with pytest.raises(Traced):
            place(held, call, pages[:1])
    assert held.listener.waits(call)
    result = place(held, call, pages[:1])
    assert held.saw()["result"] == str(result)


# Callers that end, or lose what they called with.


def kill(_held: Held, thread: int) -> None:
    """Until it is dead."""
    os.kill(thread, signal.SIGKILL)
    wait_for(lambda: state_of(thread) in {"", "Z"}, "it does not die")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("how", ["-", "f"])
def test_a_caller_killed_at_any_step(disturb: Disturb, how: str, after: bool) -> None:
    """Its parent hears of it; and so do we, once, who may be the parent."""
    for held, call, request, result in disturb(how, kill, after=after):
        assert result is None
        traced = after or request != SEIZE
        assert held.died == [(call.thread, signal.SIGKILL)] * traced, hex(request)
        if how == "f":
            assert held.said() == "status=9", hex(request)
        elif not traced:
            assert held.status() == signal.SIGKILL


@pytest.mark.parametrize("when", [CONT, DETACH])
def test_a_caller_killed_after_its_call_was_interrupted(
    hold: Hold, pages: list[int], monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    held = hold("f", old=True)
    real = injector_module._ptrace

    def ptrace(request: int, thread: int, *rest: Any) -> None:
        if request == INTERRUPT:
            interrupt(thread)
        if request == when:
            kill(held, thread)
        real(request, thread, *rest)

    monkeypatch.setattr(injector_module, "_ptrace", ptrace)
    call = held.call()
    assert place(held, call, pages[:1]) is None
    assert held.said() == "status=9"
    assert held.died == [(call.thread, signal.SIGKILL)]


@pytest.mark.parametrize("after", [False, True])
def test_another_thread_execs_at_any_step(disturb: Disturb, after: bool) -> None:
    """Then the caller is gone, with no status, and another program has its number."""

    def execute(held: Held, _thread: int) -> None:
        held.tell("x")
        assert held.said() == "another"

    for held, _, request, result in disturb("t", execute, after=after):
        assert result is None, hex(request)
        held.tell("alive")
        assert held.said() == "alive", hex(request)
        assert held.status() == 0
        assert held.died == []


@pytest.mark.parametrize("how", ["t", "ts"])
def test_the_instruction_is_gone(hold: Hold, pages: list[int], how: str) -> None:
    """What the kernel would do: it comes out of its call where nothing is. The fault is its own, and comes once."""
    held = hold(how)
    call = held.call()
    held.tell("u")
    assert held.said() == "done"
    assert place(held, call, pages[:1]) == -errno.EFAULT
    if "s" in how:
        assert held.saw() == {"fault": "there"}
    else:
        assert held.status() in {signal.SIGSEGV, signal.SIGSEGV | 0x80}


def test_the_instruction_is_another(hold: Hold, pages: list[int]) -> None:
    """One that never ends must not keep us."""
    held = hold("t")
    call = held.call()
    held.tell("j")
    assert held.said() == "done"
    assert place(held, call, pages[:1]) == -errno.EFAULT
    saw = held.saw()
    assert (saw["result"], saw["registers"]) == (str(-errno.EFAULT), "")


# A program without room for descriptors.

GRANTER = "f = device('gntalloc'); say(*alloc(f, 2)[1], *alloc(f, 2)[1]); input()"
NO_ROOM = """
import resource
libc = ctypes.CDLL(None, use_errno=True); libc.mmap.restype = ctypes.c_void_p
f = device('gntdev'); refs = list(map(int, sys.argv[1:])); most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
def tried(refs, room):
    i = reserve(f, 1, refs); first = os.dup(0); os.close(first)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first + room, most))
    at = libc.mmap(None, 4096 * len(refs), 3, 1, f, ctypes.c_long(i)); code = ctypes.get_errno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return errno.errorcode[code] if at == 2**64 - 1 else 'mapped'
before = os.listdir('/proc/self/fd')
say(tried(refs[:1], 0), tried(refs, 1), os.listdir('/proc/self/fd') == before); input()
say(tried(refs[:1], 1), tried(refs, 2), os.listdir('/proc/self/fd') == before); input()
"""


def test_a_program_without_room_for_descriptors(runs: Runs) -> None:
    """It needs one for each ALLOC that it maps a page of, for a moment. It is told, goes on, and keeps nothing."""
    granter = runs.start(1, *python(GRANTER))
    grantee = runs.start(2, *python(NO_ROOM, *said(granter).split()))

    def mapped() -> list[int]:
        return [file["mapped"] for file in order(runs, "files") if file["domid"] == 2]

    assert said(grantee) == "EMFILE EMFILE True"
    assert mapped() == [0]
    tell(grantee, "")
    assert said(grantee) == "mapped mapped True"
    assert mapped() == [3 * PAGE]
    tell(grantee, "")
    assert grantee.wait(PATIENCE) == 0
