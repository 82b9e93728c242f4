"""A debugger around a program: it sees the devices opened, called and mapped, and the pages are the right ones."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING

import pytest
from runs import order, python, said, tell, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from runs import Runs

    Build = Callable[..., str]

DEBUGGERS = {
    "strace": ("strace", "-f", "-o", "/dev/null"),
    "gdb": ("gdb", "-nx", "-q", "-batch", "-ex", "set debuginfod enabled off", "-ex", "run", "--args"),
}
PATH = "data/vchan/test"


@pytest.fixture(params=DEBUGGERS)
def under(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The beginning of a command that debugs what follows."""
    name: str = request.param
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name} (apt install {name})")
    return DEBUGGERS[name]


def lines_of(text: str, word: str) -> list[str]:
    """What the program said, among what gdb says."""
    return [line for line in text.splitlines() if line.startswith(word)]


def test_around_a_grantee(runs: Runs, build: Build, under: tuple[str, ...]) -> None:
    granter = runs.start(1, build("share"), "2", "1", "1", "hello")
    (ref,) = said(granter).split()
    mapped = runs(2, *under, build("map"), "1", "1", ref)
    assert lines_of(mapped.stdout, "hello") == ["hello 0"], mapped
    tell(granter, "?")
    assert said(granter) == "answer"
    granter.communicate(timeout=20)
    assert granter.returncode == 0


def test_around_a_granter(runs: Runs, build: Build, under: tuple[str, ...]) -> None:
    granter = runs.start(1, *under, build("share"), "2", "3", "0", "page")
    while not (line := said(granter)).replace(" ", "").isdigit():
        pass
    mapped = runs(2, build("map"), "1", "0", *line.split())
    assert (mapped.stdout, mapped.stderr) == ("page 0\npage 1\npage 2\n", "")
    granter.communicate(timeout=20)


@pytest.mark.parametrize("ring", [1000, 65536])
@pytest.mark.parametrize("which", ["server", "client", "both"])
def test_a_vchan(runs: Runs, build: Build, under: tuple[str, ...], which: str, ring: int) -> None:
    """Rings in the page, and rings of their own: three maps on one file."""
    program = build("vchan", "-O2")
    server = runs.start(1, *(under if which != "client" else ()), program, "server", "2", PATH, str(ring), "echo")
    while said(server) != "listening":
        pass
    end = (program, "client", "1", f"/local/domain/1/{PATH}", "0", "ask", "20", "700")
    done = runs(2, *(under if which != "server" else ()), *end)
    assert "a round trip" in done.stdout, done
    assert "while another program traces it" not in done.stderr
    server.communicate(timeout=20)
    assert server.returncode == 0


GRANTER = """
f = device('gntalloc')
for letter in sys.argv[1]:
    i, r = alloc(f, 2); m = place(f, i); m[:1] = letter.encode(); say(*r)
input()
"""


def test_threads_on_one_file(runs: Runs, build: Build, under: tuple[str, ...]) -> None:
    """The descriptor that is replaced is everybody's: no thread ever gets another one's pages."""
    granter = runs.start(1, *python(GRANTER, "ABCD"))
    refs = [said(granter) for _ in "ABCD"]
    done = runs(2, *under, build("storm", "-pthread"), "25", "0", "1", *refs)
    assert re.search(r"(?<!\d)0 0$", done.stdout, re.MULTILINE), done  # gdb may be in the middle of a line of its own
    assert order(runs, "statistics")["domains"][0]["pages_in_use"] == 4


STRACE = DEBUGGERS["strace"]
no_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace (apt install strace)")
STEPS = """
import stat
def kind(): return 'device' if stat.S_ISSOCK(os.fstat(f).st_mode) else 'memory'
f = device('gntdev'); ref = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True); libc.mmap.restype = ctypes.c_void_p
def map_at(index):
    at = libc.mmap(None, 4096, 3, 1, f, ctypes.c_long(index)); assert at != 2**64 - 1, ctypes.get_errno(); return at
def asked(at):
    data = bytearray(struct.pack('=QQII', at, 0, 0, 0)); fcntl.ioctl(f, 0x184702, data, True)
    return struct.unpack_from('=8xQI', data)
def unmap(at): assert libc.munmap(ctypes.c_void_p(at), ctypes.c_long(4096)) == 0
"""


@no_strace
def test_the_device_is_back_at_the_next_call(runs: Runs) -> None:
    """In the process that mapped, and in a child that was made meanwhile, each for itself; close-on-exec as it was."""
    granter = runs.start(1, *python(GRANTER, "A"))
    code = """
os.set_inheritable(f, True); i = reserve(f, 1, [ref]); at = map_at(i); say(kind())
if not os.fork():
    say(kind(), asked(at) == (i, 1), kind()); os._exit(0)
os.wait(); say(kind(), asked(at) == (i, 1), kind(), os.get_inheritable(f))
os.set_inheritable(f, False); unmap(at); call(f, UNMAP, '=QI4x', i, 1)
at = map_at(reserve(f, 1, [ref])); say(kind(), ctypes.string_at(at, 1), os.get_inheritable(f))
"""
    done = runs(2, *STRACE, *python(STEPS + code, said(granter)))
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "memory",
        "memory True device",
        "memory True device True",
        "memory b'A' False",
    ]


@no_strace
def test_what_is_closed_meanwhile_is_released(runs: Runs) -> None:
    granter = runs.start(1, *python(GRANTER, "A"))
    code = "at = map_at(reserve(f, 1, [ref])); os.close(f); say('closed'); input(); unmap(at); say('unmapped'); input()"
    grantee = runs.start(2, *STRACE, *python(STEPS + code, said(granter)))

    def maps() -> int:
        there = {domain["domid"]: domain for domain in order(runs, "statistics")["domains"]}
        return int(there[2]["files"])

    assert said(grantee) == "closed"
    assert maps() == 1
    tell(grantee, "")
    assert said(grantee) == "unmapped"
    wait_for(lambda: maps() == 0, "the file is still open")
    tell(grantee, "")


@no_strace
def test_what_a_call_of_its_own_cannot_map_is_refused_with_the_reason(runs: Runs) -> None:
    """Two allocations under one map; one page twice on one file. And who comes after that is served."""
    granter = runs.start(1, *python(GRANTER, "AB"))
    code = """
a, b = ref, int(sys.argv[2])
def tried(refs):
    try: return place(f, reserve(f, 1, refs), len(refs))[:1]
    except OSError as error: return errno.errorcode[error.errno]
say(tried([a, b]), tried([b]), tried([b]), tried([a]))
"""
    done = runs(2, *STRACE, *python(STEPS + code, said(granter), said(granter)))
    assert done.stdout == "EBUSY b'B' EBUSY b'A'\n"
    assert "while another program traces it" in done.stderr


@no_strace
def test_strace_shows_what_was_asked(runs: Runs, build: Build, tmp_path: Path) -> None:
    log = tmp_path / "log"
    granter = runs.start(1, "strace", "-f", "-o", str(log), build("share"), "2", "1", "1", "hello")
    said(granter)
    granter.communicate(timeout=20)
    text = log.read_text()
    assert '"/dev/xen/gntalloc", O_RDWR' in text
    assert "PROT_READ|PROT_WRITE, MAP_SHARED, 3, 0) = 0x" in text
