"""Attacks on a granter, its supervisor and its pages: by a peer of the same user, of another user, and of root.

What each test proves is a statement about security of docs/run.md; its name is in the first words of the docstring.
The granter is Alice's, in domain 1. Peers: Alice's other domain 2, Bob's 3, root's 4. Only root can set that up.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from runs import WORDS, said, tell
from users import BOB, UserRuns, interpreter, machine_of_users

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Command = Callable[..., tuple[str, ...]]

SAME, OTHER, ROOT = 2, 3, 4
PEERS = pytest.mark.parametrize("peer", [SAME, OTHER, ROOT], ids=["same user", "other user", "root"])
pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="only root can become other users"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="there is no setpriv (apt install util-linux)"),
]


@pytest.fixture(scope="module")
def everybodys_python() -> str:
    found = interpreter()
    if found is None:
        pytest.skip("no Python here can be started by every user")
    return found


@pytest.fixture
def users(everybodys_python: str) -> Iterator[UserRuns]:
    del everybodys_python
    with machine_of_users() as runs:
        yield runs


@pytest.fixture
def python(everybodys_python: str) -> Command:
    def command(code: str, *arguments: str) -> tuple[str, ...]:
        return (everybodys_python, "-I", "-S", "-c", WORDS + code, *arguments)

    return command


GRANTER = """
f = device('gntalloc'); i, r = alloc(f, int(sys.argv[1]), 1, int(sys.argv[2])); m = place(f, i); m[:4] = b'good'
at = ctypes.addressof(ctypes.c_char.from_buffer(m))
say(r[0], os.getpid(), os.getppid(), at, i)
for line in sys.stdin:
    if line.startswith('look'): say(bytes(m[:4]).decode(errors='replace'))
    if line.startswith('again'):
        libc = ctypes.CDLL(None); libc.munmap(ctypes.c_void_p(at), 4096); free(f, i)
        j, _ = alloc(f, int(sys.argv[1])); n = place(f, j); n[:] = b'secret: ' * 512; say('new')
"""
ATTACKS = """
import json
worked = []
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
def checked(result):
    if result < 0: raise OSError(ctypes.get_errno(), '')
    return result
def tried(**attacks):
    for name, attack in attacks.items():
        try: attack(); worked.append(name)
        except (OSError, StopIteration): pass
"""
REACH = f"""{ATTACKS}
victim, at = int(sys.argv[1]), int(sys.argv[2])
tried(
    read=lambda: os.pread(os.open(f'/proc/{{victim}}/mem', os.O_RDONLY), 1, at),
    write=lambda: os.pwrite(os.open(f'/proc/{{victim}}/mem', os.O_RDWR), b'evil', at),
    files=lambda: [os.readlink(f'/proc/{{victim}}/fd/{{name}}') for name in os.listdir(f'/proc/{{victim}}/fd')],
    take=lambda: checked(libc.syscall(438, os.pidfd_open(victim), 0, 0)),
    maps=lambda: os.listdir(f'/proc/{{victim}}/map_files'),
    trace=lambda: checked(libc.ptrace(0x4206, victim, None, None)),
)
print(json.dumps(worked))
"""
ALL = ["read", "write", "files", "take", "maps", "trace"]


@pytest.mark.parametrize(
    ("peer", "options", "program", "supervisor"),
    [
        (SAME, (), ALL, []),
        (SAME, ("--userns",), [], []),
        (OTHER, (), [], []),
        (OTHER, ("--userns",), [], []),
        (ROOT, (), ALL, ALL),
    ],
    ids=["same user", "same user, namespaces", "other user", "other user, namespaces", "root"],
)
def test_reaching_into_a_granter(
    users: UserRuns,
    python: Command,
    peer: int,
    options: tuple[str, ...],
    program: list[str],
    supervisor: list[str],
) -> None:
    """Processes of one user are not safe from each other, but for the supervisor; with namespaces they are.

    Root can do all of it to everybody.
    """
    granter = users.start(1, *python(GRANTER, str(peer), "1"), options=options)
    _, process, parent, at, _ = said(granter).split()
    for victim, expected in ((parent, supervisor), (process, program)):
        done = users(peer, *python(REACH, victim, at), options=options)
        assert done.stderr == ""
        worked = json.loads(done.stdout)
        not_there = {"read", "write"} if victim == parent else set()  # the address is the program's
        assert set(worked) - not_there == set(expected) - not_there
    tell(granter, "look")
    assert said(granter) == ("evil" if program else "good")


SEAL = f"""{ATTACKS}
ref, victim, at = map(int, sys.argv[1:4])
f = device('gntdev'); m = place(f, reserve(f, 1, [ref]), 1, 1)
mine = next(int(line.split('-')[0], 16) for line in open('/proc/self/maps') if 'memfd:gntalloc' in line)
def again(process, where, flags):
    path = next(n for n in os.listdir(f'/proc/{{process}}/map_files') if int(n.split('-')[0], 16) == where)
    return os.open(f'/proc/{{process}}/map_files/{{path}}', flags)
tried(
    protect=lambda: checked(libc.mprotect(ctypes.c_void_p(mine), 4096, 3)),
    own_memory=lambda: os.pwrite(os.open('/proc/self/mem', os.O_RDWR), b'evil', mine),
    writable_map_through_the_same_file=lambda: mmap.mmap(f, 4096, mmap.MAP_SHARED, 3),
)
for process, where in ((os.getpid(), mine), (victim, at)):
    tried(
        write=lambda: os.pwrite(again(process, where, os.O_RDWR), b'evil', 0),
        write_only=lambda: os.pwrite(again(process, where, os.O_WRONLY), b'evil', 0),
        map=lambda: mmap.mmap(again(process, where, os.O_RDWR), 4096),
        mode=lambda: (os.fchmod(again(process, where, 0), 0o777), os.pwrite(again(process, where, 2), b'x', 0)),
        shrink=lambda: os.ftruncate(again(process, where, os.O_RDWR), 0),
        cut=lambda: again(process, where, os.O_RDWR | os.O_TRUNC),
        grow=lambda: os.ftruncate(again(process, where, os.O_RDWR), 1 << 20),
        beyond=lambda: os.pwrite(again(process, where, os.O_RDWR), b'x', 1 << 20),
        allocate=lambda: checked(libc.fallocate(again(process, where, os.O_RDWR), 0, 0, 1 << 20)),
        punch=lambda: checked(libc.fallocate(again(process, where, os.O_RDWR), 3, 0, 4096)),
        seals=lambda: checked(libc.fcntl(again(process, where, os.O_RDWR), 1033, 16)),
    )
print(json.dumps(worked), m[:4].decode())
"""


@PEERS
def test_read_only_pages(users: UserRuns, python: Command, peer: int) -> None:
    """A page granted for reading is sealed: nobody writes to it through a file, root included, nor changes its size."""
    granter = users.start(1, *python(GRANTER, str(peer), "0"))
    ref, process, _, at, _ = said(granter).split()
    done = users(peer, *python(SEAL, ref, process, at))
    assert (done.stdout, done.stderr) == ("[] good\n", "")
    tell(granter, "look")
    assert said(granter) == "good"


SIZE = (
    SEAL.replace("1, 1)", "1, 3)").split("tried(\n    protect")[0]
    + """
had = len(descriptors())
tried(
    shrink=lambda: os.ftruncate(again(victim, at, os.O_RDWR), 0),
    cut=lambda: again(victim, at, os.O_RDWR | os.O_TRUNC),
    grow=lambda: os.ftruncate(again(victim, at, os.O_RDWR), 1 << 20),
    beyond=lambda: os.pwrite(again(victim, at, os.O_RDWR), b'x', 1 << 20),
    allocate=lambda: checked(libc.fallocate(again(victim, at, os.O_RDWR), 0, 0, 1 << 20)),
    seals=lambda: checked(libc.fcntl(again(victim, at, os.O_RDWR), 1033, 16)),
)
print(json.dumps(worked), had)
m[:4] = b'over'
"""
)


@PEERS
def test_the_size_of_writable_pages(users: UserRuns, python: Command, peer: int) -> None:
    """No peer can make a page go away under its granter (SIGBUS), nor seal it; and it gets no descriptor of it."""
    granter = users.start(1, *python(GRANTER, str(peer), "1"))
    ref, process, _, at, _ = said(granter).split()
    done = users(peer, *python(SIZE, ref, process, at))
    assert (done.stdout, done.stderr) == ("[] 6\n", "")  # streams, the device, CPython's copy of it, the folder
    tell(granter, "look")
    assert said(granter) == "over"


@PEERS
def test_a_page_that_was_put_into_a_pipe(users: UserRuns, python: Command, peer: int) -> None:
    """A page that is pinned after its unmap is never put to another use: what is granted next is not in it."""
    granter = users.start(1, *python(GRANTER, str(peer), "1"))
    ref = said(granter).split()[0]
    code = f"""
f = device('gntdev'); m = place(f, reserve(f, 1, [{ref}])); libc = ctypes.CDLL(None)
class Part(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]
a, b = os.pipe(); at = ctypes.addressof(ctypes.c_char.from_buffer(m))
assert libc.vmsplice(b, ctypes.byref(Part(at, 4096)), 1, 0) == 4096
libc.munmap(ctypes.c_void_p(at), 4096); os.close(f); say('pinned'); input(); say(os.read(a, 4096)[:4].decode())
"""
    thief = users.start(peer, *python(code))
    assert said(thief) == "pinned"
    tell(granter, "again")
    assert said(granter) == "new"
    tell(thief, "")
    assert said(thief) == "good"


def test_doors_that_no_filter_sees(users: UserRuns, python: Command) -> None:
    """io_uring makes system calls that are not brought to us, and openat2 hides its flags: both are not there.

    Nor is there a listener of any run among the descriptors of a program: who has one answers for us.
    """
    holder = users.start(1, *python("say('up'); input()"))
    assert said(holder) == "up"
    code = """
libc = ctypes.CDLL(None, use_errno=True)
for number in (425, 437): say(libc.syscall(number, 0, 0, 0, 0), errno.errorcode[ctypes.get_errno()])
say([name for name in descriptors() if name not in '012' and os.path.exists('/proc/self/fd/' + name)])
"""
    assert users(2, *python(code)).stdout.splitlines() == ["-1 ENOSYS", "-1 ENOSYS", "[]"]


def test_arguments_that_change_under_our_hands(users: UserRuns, python: Command) -> None:
    """An argument is read once: whatever it becomes meanwhile, the answer is one of the answers, and all go on."""
    code = """
import threading
f = device('gntalloc'); libc = ctypes.CDLL(None, use_errno=True); over = False
page = mmap.mmap(-1, 8192); at = ctypes.addressof(ctypes.c_char.from_buffer(page)); seen = set()
def change():
    while not over:
        for count in (1, 0xFFFFFFFF, 3): page[4:8] = struct.pack('=I', count)
thread = threading.Thread(target=change); thread.start()
for _ in range(300):
    page[:16] = struct.pack('=HHIQ', 2, 1, 1, 0)
    if libc.ioctl(f, ALLOC, ctypes.c_void_p(at)): seen.add(errno.errorcode[ctypes.get_errno()])
    else: seen.add('ok'); free(f, struct.unpack_from('=Q', page, 8)[0])
over = True; thread.join()
say(seen <= {'ok', 'EINVAL', 'ENOSPC', 'ENOMEM', 'EFAULT'}, alloc(f, 2)[1][0] > 0)
"""
    done = users(1, *python(code))
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_files_that_are_opened_all_the_time(users: UserRuns, python: Command) -> None:
    """Opening a page's file while the machine looks who has it does not end the machine (SIGIO of its leases)."""
    granter = users.start(1, *python(GRANTER, str(ROOT), "1"))
    ref, process, _, at, _ = said(granter).split()
    code = (
        SEAL.split("tried(\n    protect", maxsplit=1)[0]
        + """
import threading
over = False
def opens():
    while not over: os.close(again(os.getpid(), mine, os.O_RDWR))
thread = threading.Thread(target=opens); thread.start()
g = device('gntdev'); h = device('gntalloc')
for _ in range(200):
    n = place(g, reserve(g, 1, [ref])); n.close(); i, _ = alloc(h, 1); free(h, i)
over = True; thread.join(); say(m[:4].decode())
"""
    )
    done = users(ROOT, *python(code, ref, process, at))
    assert (done.stdout, done.stderr) == ("good\n", "")


def test_a_stranger_cannot_join(users: UserRuns) -> None:
    """A domain is its owner's: nobody else's program gets in, nor to its store."""
    command = users.command_of(BOB, 1, "true")
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 125
    assert "domain 1" in done.stderr
    assert "not open to you" in done.stderr
