"""Who can reach into whom: a program of a sibling domain and of the same user attacks a granter and its supervisor.

With a user namespace for each domain none of it works. Without one, an ordinary user's programs are open to each other,
as everywhere; that is a test too, so that nobody believes otherwise.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from runs import python as scripted
from runs import said

if TYPE_CHECKING:
    from runs import Runs

ATTACKS = """
import ctypes, json, os, sys
victim, address = int(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
worked = []
def attack(name):
    def run(what):
        try:
            if what() is not False: worked.append(name)
        except OSError: pass
    return run
def check(result):
    if result < 0: raise OSError(ctypes.get_errno(), '')
@attack('read the memory')
def _(): os.pread(os.open(f'/proc/{victim}/mem', os.O_RDONLY), 1, address)
@attack('write the memory')
def _(): os.pwrite(os.open(f'/proc/{victim}/mem', os.O_WRONLY), b'evil', address)
@attack('list the descriptors')
def _(): [os.stat(f'/proc/{victim}/fd/{name}') for name in os.listdir(f'/proc/{victim}/fd')]
@attack('take a descriptor')
def _(): check(libc.syscall(438, os.pidfd_open(victim), 0, 0))
@attack('trace it')
def _(): check(libc.ptrace(0x4206, victim, None, None))
@attack('open a mapped file')
def _():
    names = os.listdir(f'/proc/{victim}/map_files')
    for name in names: os.close(os.open(f'/proc/{victim}/map_files/{name}', os.O_RDWR))
    return bool(names)
print(json.dumps(worked))
"""

VICTIM = """
import ctypes, fcntl, mmap, os, struct
f = os.open('/dev/xen/gntalloc', os.O_RDWR)
d = bytearray(struct.pack('=HHIQQ', 2, 0, 1, 0, 0)); fcntl.ioctl(f, 0x184705, d, True)
m = mmap.mmap(f, 4096); m[:4] = b'good'
print(os.getpid(), os.getppid(), ctypes.addressof(ctypes.c_char.from_buffer(m)), flush=True)
input(); print(m[:4].decode(), flush=True)
"""


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", code, *arguments)


def attacked(runs: Runs, *options: str) -> tuple[list[str], list[str], str]:
    """What worked against a granter, and against its supervisor, and what its page says afterwards."""
    victim = runs.start(1, *python(VICTIM), options=options)
    program, supervisor, address = said(victim).split()
    worked = [
        json.loads(runs(2, *python(ATTACKS, process, address), options=options).stdout)
        for process in (program, supervisor)
    ]
    out, _ = victim.communicate("\n", timeout=20)
    return worked[0], worked[1], out.strip()


def test_with_namespaces_no_attack_works(runs: Runs) -> None:
    assert attacked(runs, "--userns") == ([], [], "good")


def test_without_them_one_user_is_open_to_itself(runs: Runs) -> None:
    program, _, text = attacked(runs)
    assert {"read the memory", "write the memory", "take a descriptor", "trace it"} <= set(program)
    assert text == "evil"


READ_ONLY = """
import ctypes, fcntl, mmap, os, struct, sys
f = os.open('/dev/xen/gntdev', os.O_RDWR)
d = bytearray(struct.pack('=I4xQII', 1, 0, 1, int(sys.argv[1]))); fcntl.ioctl(f, 0x184700, d, True)
m = mmap.mmap(f, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
start = next(line.split('-')[0] for line in open('/proc/self/maps') if 'memfd:gntalloc' in line)
at = int(start, 16)
worked = []
if libc.mprotect(ctypes.c_void_p(at), 4096, 3) == 0: worked.append('mprotect')
for name, attack in {
    'mem': lambda: os.pwrite(os.open('/proc/self/mem', os.O_RDWR), b'evil', at),
    'write': lambda: os.pwrite(opened(os.O_RDWR), b'evil', 0),
    'write only': lambda: os.pwrite(opened(os.O_WRONLY), b'evil', 0),
    'map': lambda: mmap.mmap(opened(os.O_RDWR), 4096),
    'truncate': lambda: os.ftruncate(opened(os.O_RDWR), 0),
    'grow': lambda: os.ftruncate(opened(os.O_RDWR), 1 << 20),
    'mode': lambda: (os.chmod(opened(os.O_RDONLY), 0o777), os.pwrite(opened(os.O_RDWR), b'evil', 0)),
}.items():
    try: attack(); worked.append(name)
    except OSError: pass
print(worked, m[:4].decode())
""".replace(
    "opened(",
    "os.open(next('/proc/self/map_files/' + n for n in os.listdir('/proc/self/map_files')"
    " if int(n.split('-')[0], 16) == at), ",
)


@pytest.mark.parametrize("options", [(), ("--userns",)])
def test_read_only_pages_stay_so_whoever_tries(runs: Runs, options: tuple[str, ...]) -> None:
    """By a root user too, if that is who runs the tests."""
    code = VICTIM.replace("print(os.getpid()", "print(struct.unpack_from('=I', d, 16)[0], os.getpid()")
    victim = runs.start(1, *python(code), options=options)
    ref = said(victim).split()[0]
    done = runs(2, *python(READ_ONLY, ref), options=options)
    assert (done.stdout, done.stderr) == ("[] good\n", "")


LINGERS = """
listener = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(listener.getsockname())
reader, _ = listener.accept(); c.setblocking(False)
try:
    while True: c.send(bytes(65536))
except BlockingIOError: pass
c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 100000))
home = socket.socket(fileno=device(sys.argv[1])); home.setblocking(False)
while True:
    try:
        while True: home.send(b'.')  # so that the machine comes to it after it was closed here
    except BlockingIOError: pass
    except OSError: say('gone'); break
    try: socket.send_fds(home, [b'.'], [c.fileno()])
    except BlockingIOError: continue
    except PermissionError: say('refused'); break
    os.close(c.detach()); say('sent'); break
sys.stdin.readline()
"""


@pytest.mark.parametrize("device", ["gntalloc", "gntdev", "evtchn", "privcmd"])
def test_a_socket_that_lingers_in_a_home(runs: Runs, device: str) -> None:
    """To close it waits for a network, for as long as its owner said: nobody but its owner, though."""
    attacker = runs.start(1, *scripted(LINGERS, device))
    assert said(attacker) in {"sent", "refused"}
    assert runs(2, *scripted("say(alloc(device('gntalloc'), 1)[0])")).stdout == "0\n"
