"""Device files under a run are files: dup, fork, exec, passing them on, threads; by whichever way they are called."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
from runs import order, python, said, tell, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from runs import Runs

    Build = Callable[..., str]


def both(runs: Runs, code: str) -> list[str]:
    done = runs(1, *python(code))
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout.split()


def test_a_script_that_opens_the_devices_itself(runs: Runs) -> None:
    code = """
f = device('gntalloc'); i, r = alloc(f, 2, 3); m = place(f, i, 3)
m[8192:8197] = b'third'; say(*r); input(); say(m[:3].decode())
"""
    granter = runs.start(1, *python(code))
    refs = said(granter).split()
    code = f"""
f = device('gntdev'); m = place(f, reserve(f, 1, [{",".join(reversed(refs))}]), 3)
say(m[:5].decode()); m[8192:8195] = b'new'
"""
    assert runs(2, *python(code)).stdout == "third\n"
    tell(granter, "")
    assert said(granter) == "new"


def test_many_grants_of_many_allocations_in_one_map(runs: Runs) -> None:
    granter = runs.start(
        1,
        *python(
            "f = device('gntalloc')\n"
            "for n in range(20):\n"
            "    i, r = alloc(f, 2); m = place(f, i); m[:2] = b'%02d' % n; say(*r)\n"
            "input()"
        ),
    )
    refs = [said(granter) for _ in range(20)]
    code = f"""
f = device('gntdev'); m = place(f, reserve(f, 1, [{",".join(reversed(refs))}]), 20)
say(*(m[4096*n:4096*n+2].decode() for n in range(20))); say(len(descriptors()))
"""
    numbers, descriptors = runs(2, *python(code)).stdout.splitlines()
    assert numbers.split() == [f"{n:02}" for n in reversed(range(20))]
    assert int(descriptors) == 6  # three streams, the file, CPython's copy of it for the map, and the folder


PARTS = """
import resource
libc = ctypes.CDLL(None, use_errno=True); libc.mmap.restype = ctypes.c_void_p
f = device('gntdev'); at = 0x7000000000; refs = list(map(int, sys.argv[1:]))
def parts(flags):
    i = reserve(f, 1, refs)
    found = libc.mmap(ctypes.c_void_p(at), 4096 * len(refs), 3, 1 | flags, f, ctypes.c_long(i))
    return 'there' if found == at else errno.errorcode[ctypes.get_errno()]
def is_mapped(): return any(int(line.split('-')[0], 16) in range(at, at + 8192) for line in open('/proc/self/maps'))
"""


def test_a_map_of_many_parts_goes_where_nothing_is(runs: Runs) -> None:
    """MAP_FIXED_NOREPLACE is for the whole range, and not for each part over it; MAP_FIXED replaces."""
    granter = runs.start(1, *python("f = device('gntalloc')\nfor n in range(2): say(*alloc(f, 2)[1])\ninput()"))
    code = "say(parts(0x100000), parts(0x100000), parts(0x10)); ctypes.memset(at, 7, 8192)"
    done = runs(2, *python(PARTS + code, said(granter), said(granter)))
    assert (done.stdout, done.stderr) == ("there EEXIST there\n", "")


def test_of_a_map_whose_second_part_cannot_be_nothing_stays(runs: Runs) -> None:
    """Here since no more than a page may be locked."""
    granter = runs.start(1, *python("f = device('gntalloc')\nfor n in range(2): say(*alloc(f, 2)[1])\ninput()"))
    code = """
resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))
say(parts(0x100000 | 0x2000), is_mapped(), len(descriptors()))
"""
    done = runs(2, *python(PARTS + code, said(granter), said(granter)), options=("--userns",))
    assert (done.stdout, done.stderr) == ("EAGAIN False 5\n", "")


def test_a_child_inherits_files_and_maps(runs: Runs) -> None:
    code = """
f = device('gntalloc'); i, r = alloc(f, 2); m = place(f, i)
if not os.fork():
    m[:5] = b'child'
    j, _ = alloc(f, 2)
    os._exit(j // 4096)
say(os.waitstatus_to_exitcode(os.wait()[1]), m[:5].decode())
"""
    assert both(runs, code) == ["1", "child"]


def test_a_file_survives_exec_and_its_copies_are_the_same_file(runs: Runs) -> None:
    code = """
f = device('gntalloc'); alloc(f, 2); g = os.dup(f); os.close(f); os.set_inheritable(g, True)
again = '''import fcntl, struct, sys
d = bytearray(struct.pack("=HHIQQ", 2, 1, 1, 0, 0)); fcntl.ioctl(int(sys.argv[1]), 0x184705, d, True)
print(struct.unpack_from("=Q", d, 8)[0])'''
os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', again, str(g)])
"""
    assert both(runs, code) == ["4096"]


def test_a_file_that_was_passed_on(runs: Runs) -> None:
    code = """
a, b = socket.socketpair()
if not os.fork():
    (g,) = socket.recv_fds(b, 1, 1)[1]
    os._exit(alloc(g, 2)[0] // 4096)
f = device('gntalloc'); alloc(f, 2); alloc(f, 2)
socket.send_fds(a, [b'x'], [f]); os.close(f)
say(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert both(runs, code) == ["2"]


def test_events_wait_in_poll_and_do_not_block_where_they_should_not(runs: Runs) -> None:
    code = """
e = device('evtchn', os.O_RDWR | os.O_NONBLOCK)
try: os.read(e, 4)
except BlockingIOError: say('empty')
p = call(e, UNBOUND, '=I', 1)
q = call(e, INTERDOMAIN, '=II', 1, p)
select.select([e], [], [], 20); say(struct.unpack('=I', os.read(e, 4))[0] == q)
call(e, NOTIFY, '=I', q)
select.select([e], [], [], 20); say(struct.unpack('=I', os.read(e, 4))[0] == p)
"""
    assert both(runs, code) == ["empty", "True", "True"]


def test_a_program_that_is_killed_releases_everything(runs: Runs) -> None:
    granter = runs.start(
        1, *python("f = device('gntalloc'); i, r = alloc(f, 2, 4); m = place(f, i, 4); say(*r); input()")
    )
    said(granter)
    code = """
from gntalloc.guest.control import ControlClient
import sys
c = ControlClient(sys.argv[1]); print(*(d['pages_in_use'] + d['files'] for d in c.order('statistics')['domains']))
"""
    show = (sys.executable, "-c", code, runs.folder)
    assert runs(2, *show).stdout == "5 0\n"
    granter.kill()
    granter.wait(20)
    assert runs(2, *show).stdout.split()[-1] == "0"


def test_addresses_that_are_none(runs: Runs) -> None:
    code = """
libc = ctypes.CDLL(None, use_errno=True)
f = device('gntalloc')
for address in (None, ctypes.c_void_p(8), ctypes.c_void_p(-8)):
    say(libc.ioctl(f, ALLOC, address), errno.errorcode[ctypes.get_errno()])
page = mmap.mmap(-1, 4096); page[:16] = struct.pack('=HHIQ', 2, 1, 1, 7)
at = ctypes.addressof(ctypes.c_char.from_buffer(page)); libc.mprotect(ctypes.c_void_p(at), 4096, 1)
say(libc.ioctl(f, ALLOC, ctypes.c_void_p(at)), errno.errorcode[ctypes.get_errno()])
say(alloc(f, 2)[0])
"""
    assert both(runs, code) == ["-1", "EFAULT"] * 4 + ["0"]


RESETS = """
libc = ctypes.CDLL(None, use_errno=True)
def left(reset):
    e = device('evtchn', os.O_RDWR | os.O_NONBLOCK)
    call(e, INTERDOMAIN, '=II', 1, call(e, UNBOUND, '=I', 1))
    if select.select([e], [], [], 20)[0] and reset(e) == 0:
        try: return os.read(e, 4)
        except BlockingIOError: return 'nothing'
"""


def test_reset_of_whatever_is_in_the_upper_half_of_the_registers(runs: Runs) -> None:
    """The kernel looks at the lower half of a request and of a descriptor only."""
    high = "ctypes.c_long(1 << 40 | %s)"
    code = f"say(left(lambda e: libc.syscall(16, {high % 'e'}, {high % '0x4505'}, None)))"
    assert both(runs, RESETS + code) == ["nothing"]


def test_reset_by_a_thread_that_has_descriptors_of_its_own(runs: Runs) -> None:
    if not thread_handles():
        pytest.skip("this kernel has no handles of threads (Linux 6.9)")
    code = """
import threading
def work():
    libc.unshare(0x400)
    while os.dup(0) < 40: pass  # so that the number is nobody's in the other threads
    say(left(lambda e: libc.ioctl(e, 0x4505, None)))
thread = threading.Thread(target=work); thread.start(); thread.join()
"""
    assert both(runs, RESETS + code) == ["nothing"]


def thread_handles() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid(), os.O_EXCL))
    except OSError:
        return False
    return True


def test_nothing_of_a_run_stays_with_the_machine(runs: Runs) -> None:
    keeper = runs.start(9, "sh", "-c", "echo up; read x")
    assert said(keeper) == "up"

    def descriptors() -> int:
        number: int = order(runs, "statistics")["descriptors"]
        return number

    def run(count: int) -> None:
        for _ in range(count):
            assert runs(1, *python("alloc(device('gntalloc'), 2)")).returncode == 0

    run(2)  # by then the keeper has come in
    few = descriptors()
    run(12)
    wait_for(lambda: descriptors() <= few + 2, "the machine keeps descriptors")


def test_xenbus_is_xenstore(runs: Runs) -> None:
    code = """
x = device('xenbus')
os.write(x, struct.pack('=IIII', 2, 1, 0, 6) + b'domid\\0')
h = os.read(x, 16); say(os.read(x, struct.unpack('=IIII', h)[3]).decode())
"""
    assert both(runs, code) == ["1"]


def test_privcmd_knows_domains_and_ports(runs: Runs) -> None:
    code = """
c = device('privcmd'); e = device('evtchn'); p = call(e, UNBOUND, '=I', 2)
def hypercall(op, *words):
    fcntl.ioctl(c, 0x305000, bytearray(struct.pack('=6Q', op, *(words + (0,) * 5)[:5])), True)
def buffer(data):
    b = ctypes.create_string_buffer(data, len(data)); return b, ctypes.addressof(b)
b, at = buffer(struct.pack('=IIH6x', 5, 0x15, 0).ljust(144, b'\\0')); hypercall(36, at)
say(*struct.unpack_from('=8xH6xH2xI', b.raw))
b, at = buffer(struct.pack('=H2xI16x', 0x7FF0, p)); hypercall(32, 5, at)
say(*struct.unpack_from('=8xI4xH', b.raw))
for op in (1, 36):
    try: hypercall(op, 0)
    except OSError as error: say(errno.errorcode[error.errno])
try: fcntl.ioctl(c, 0x50FF, 0)
except OSError as error: say(errno.errorcode[error.errno])
"""
    assert both(runs, code) == ["1", "1", "32", "1", "2", "ENOSYS", "EFAULT", "ENOTTY"]


def test_a_device_that_is_none_and_other_files(runs: Runs, tmp_path: Path) -> None:
    code = f"""
try: device('other')
except FileNotFoundError: say('none')
path = {str(tmp_path / "file")!r}
f = os.open(path, os.O_RDWR | os.O_CREAT); os.ftruncate(f, 4096); g = os.open(path, os.O_RDWR)
m = mmap.mmap(g, 4096); m[:2] = b'ok'; say(os.pread(f, 2, 0).decode())
"""
    assert both(runs, code) == ["none", "ok"]


def test_a_static_binary(runs: Runs, build: Build) -> None:
    granter = runs.start(1, build("raw", "-static"), "2")
    ref = said(granter)
    assert (
        runs(2, *python(f"f = device('gntdev'); say(place(f, reserve(f, 1, [{ref}]))[:3].decode())")).stdout == "raw\n"
    )


def test_a_program_that_makes_its_system_calls_itself(runs: Runs, build: Build) -> None:
    granter = runs.start(1, build("raw", "-nostdlib", "-static", "-DBARE"), "2")
    ref = said(granter)
    assert (
        runs(2, *python(f"f = device('gntdev'); say(place(f, reserve(f, 1, [{ref}]))[:3].decode())")).stdout == "raw\n"
    )


@pytest.mark.parametrize("options", [(), ("--userns",), ("--all-opens",)])
def test_options_do_not_change_what_is_shared(runs: Runs, build: Build, options: tuple[str, ...]) -> None:
    granter = runs.start(1, build("share"), "2", "2", "0", "look", options=options)
    refs = said(granter).split()
    assert runs(2, build("map"), "1", "0", *refs, options=options).stdout == "look 0\nlook 1\n"
