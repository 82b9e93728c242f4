"""The two ways a call is served: by the machine itself, for programs of its own user, and by their run's supervisor."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import rawwire as wire
from held import ask_to_serve
from limits import status_of
from runs import Runs, order, python, refusing_machine, said, tell, wait_for

from gntalloc.abi.gntalloc import ALLOC_GREF
from gntalloc.embed import Machine
from gntalloc.errors import DeviceError, MachineGone
from gntalloc.guest.connection import MachineConnection
from gntalloc.places import domain_path
from gntalloc.run.files import Files, OpenFile
from gntalloc.run.filter import filter_program, install
from gntalloc.syscalls.listener import Call
from gntalloc.syscalls.serving import IOCTL, MMAP
from gntalloc.wire.messages import Lend, Serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root can become other users")


FORKS = """
f = device('gntalloc')
if not os.fork():
    g = device('gntdev'); say(os.getpid()); input(); os._exit(0)
os.wait()
"""


def test_a_file_is_its_own_process_s(runs: Runs) -> None:
    parent = runs.start(1, *python("say(os.getpid())" + FORKS))
    pids = [int(said(parent)), int(said(parent))]
    openers = {file["device"]: file["opener"] for file in order(runs, "files")}
    assert openers == dict(zip(("gntalloc", "gntdev"), pids, strict=True))
    tell(parent, "")


@root_only
def test_the_same_where_the_machine_is_another_user_s() -> None:
    from users import interpreter, machine_of_users

    found = interpreter()
    if found is None:
        pytest.skip("no Python here can be started by every user")
    with machine_of_users() as users:
        command = (found, *python("say(os.getpid())" + FORKS)[1:])
        parent = users.start(1, *command)
        pids = [int(said(parent)), int(said(parent))]
        assert [file["opener"] for file in order(users, "files") if file["domid"] == 1] != []
        assert {file["opener"] for file in order(users, "files")} == set(pids)
        tell(parent, "")


TWO_PROCESSES = """
libc = ctypes.CDLL(None, use_errno=True); libc.mmap.restype = ctypes.c_void_p
f = device('gntdev')
indexes = [reserve(f, 1, [ref]) for ref in map(int, sys.argv[1:])]
def offset_of(index):
    at = 0x7000000000
    assert libc.mmap(ctypes.c_void_p(at), 4096, 3, 0x11, f, ctypes.c_long(index)) == at
    say('mapped'); os.read(0, 1)
    data = bytearray(struct.pack('=QQII', at, 0, 0, 0)); fcntl.ioctl(f, 0x184702, data, True)
    return struct.unpack_from('=QQI', data)[1]
a, b = os.pipe()
if not os.fork():
    os.write(b, str(offset_of(indexes[0])).encode()); os._exit(0)
say(offset_of(indexes[1]) == indexes[1])
say(int(os.read(a, 99)) == indexes[0]); os.wait()
"""


def test_two_processes_with_different_pages_at_one_address(runs: Runs) -> None:
    """Each is told its own: the machine knows them apart."""
    granter = runs.start(
        1, *python("f = device('gntalloc'); i, r = alloc(f, 2, 2); m = place(f, i, 2); say(*r); input()")
    )
    refs = said(granter).split()
    process = runs.start(2, *python(TWO_PROCESSES, *refs))
    assert [said(process), said(process)] == ["mapped", "mapped"]
    tell(process, "\n")
    assert [said(process), said(process)] == ["True", "True"]


def test_notify_of_a_file_whose_number_another_has_now(runs: Runs) -> None:
    code = """
def code_of(file, port):
    try: call(file, NOTIFY, '=I', port); say('sent')
    except OSError as error: say(errno.errorcode[error.errno])
e = device('evtchn'); p = call(e, UNBOUND, '=I', 2); code_of(e, p); code_of(e, p); code_of(e, p + 1)
spare = os.dup(e); os.close(e); f = device('evtchn'); assert f == e
q = call(f, UNBOUND, '=I', 2); code_of(f, q); code_of(f, q); code_of(spare, p)
os.close(f); g = device('gntalloc'); assert g == f; code_of(g, q)
libc = ctypes.CDLL(None, use_errno=True); say(libc.ioctl(spare, NOTIFY, None), errno.errorcode[ctypes.get_errno()])
"""
    done = runs(1, *python(code))
    assert done.stderr == ""
    assert done.stdout.split() == ["sent", "sent", "ENOTCONN", "sent", "sent", "sent", "ENOTTY", "-1", "EFAULT"]


@root_only
def test_a_program_that_becomes_another_user_s(runs: Runs) -> None:
    """From then on its supervisor serves it: no other user's memory is looked into by the machine."""
    code = """
f = device('gntalloc'); i, r = alloc(f, 2); m = place(f, i); m[:4] = b'good'
os.setresuid(65533, 65533, 65533)
j, s = alloc(f, 2); n = place(f, j); n[:4] = b'more'; g = device('gntalloc')
say(*r, *s, os.geteuid()); input(); say(m[:4].decode(), n[:4].decode())
"""
    program = runs.start(1, *python(code))
    *refs, user = said(program).split()
    assert user == "65533"
    code = f"""
f = device('gntdev'); m = place(f, reserve(f, 1, [{",".join(refs)}]), 2); say(m[:4], m[4096:4100]); m[:4] = b'same'
"""
    assert runs(2, *python(code)).stdout == "b'good' b'more'\n"
    tell(program, "")
    assert said(program) == "same more"


def test_a_machine_that_may_not_look_into_programs(tmp_path: Path) -> None:
    """As where Yama lets only a parent: process_vm_readv says EPERM. The supervisor serves, from the first call on."""
    with refusing_machine(tmp_path) as runs:
        code = """
import threading
def work():
    f = device('gntalloc'); e = device('evtchn'); p = call(e, UNBOUND, '=I', 2)
    for _ in range(50):
        i, r = alloc(f, 2); m = place(f, i); m[:2] = b'ok'; m.close(); free(f, i); call(e, NOTIFY, '=I', p)
threads = [threading.Thread(target=work) for _ in range(4)]
for each in threads: each.start()
for each in threads: each.join()
say(os.getpid()); f = device('gntalloc'); input()
"""
        program = runs.start(1, *python(code))
        pid = int(said(program))
        wait_for(lambda: pid in [file["opener"] for file in order(runs, "files")], "it has no file open")
        program.communicate("\n", timeout=20)
        assert program.returncode == 0


OPENS = """
import threading
killed = False
def opens():
    left = 100
    while left:
        left -= killed
        try: os.close(os.open('/dev/null', os.O_RDWR))
        except OSError as error: assert error.errno == errno.EIO, error
threads = [threading.Thread(target=opens) for _ in range(4)]
for each in threads: each.start()
say('opens'); input(); killed = True
for each in threads: each.join()
"""


def test_the_machine_killed_while_it_serves(runs: Runs) -> None:
    """Calls that it had taken fail, and the supervisor serves those that follow: nobody waits for ever."""
    for _ in range(8):
        process = runs.start(1, *python(OPENS))
        assert said(process) == "opens"
        machine = order(runs, "statistics")["pid"]
        os.kill(machine, signal.SIGKILL)
        tell(process, "")
        assert process.wait(20) == 0
        wait_for(lambda: not os.path.exists(f"/proc/{machine}/fd"), "the machine lives")  # noqa: B023


@root_only
@pytest.mark.parametrize("user", [0, 65532])
def test_nobody_else_s_machine_is_given_the_listener(tmp_path: Path, user: int) -> None:
    """Who has it can put files into the program, and answer its calls as it likes. Whoever's machine we joined."""
    path = str(tmp_path / "1")
    theirs = socket.socket(socket.AF_UNIX)
    theirs.bind(path)
    os.chmod(path, 0o666)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.setresuid(user, user, user)
        theirs.listen()  # whoever does this is who the other end sees
        os.write(writing, b"!")
        sock, _ = theirs.accept()
        sock.recv(4096)
        sock.sendall(wire.encode_reply(wire.HELLO, 0, result=1))
        if not sock.recv(4096):
            os._exit(0)  # it was not asked
        line, its_end = socket.socketpair()
        socket.send_fds(sock, [wire.encode_reply(wire.LEND, 2, result=1, descriptors=1)], [its_end.fileno()])
        its_end.close()
        _, descriptors, _, _ = socket.recv_fds(line, 4096, 1)
        os._exit(len(descriptors))
    theirs.close()
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    files = Files(path, lambda *_: None, lambda _: True)
    try:
        with listener_of_a_child() as listener, suppress(MachineGone):
            assert files.have_served(listener) is None
    finally:
        files.channel.close()
    status = status_of(child)
    assert os.waitstatus_to_exitcode(status) == (user == os.getuid())  # it was sent a descriptor, or not


def test_what_a_machine_answers_goes_only_where_the_call_said(tmp_path: Path) -> None:
    """It may be another user's. Here it is one that writes over a program's memory, and maps over it."""
    path = str(tmp_path / "1")
    memory = ctypes.create_string_buffer(b"precious", 8)
    argument = ctypes.create_string_buffer(24)
    evil = wire.encode_regions([wire.Region(ctypes.addressof(memory), True, b"evil")])
    bodies = {
        wire.IOCTL: [evil, wire.encode_regions([wire.Region(ctypes.addressof(argument), True, bytes(25))])],
        wire.MMAP: [wire.MARK.pack(0) + wire.PIECE.pack(place, 0, size) for place, size in ((0, 8192), (1, 4096))],
    }
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(path)
        theirs.listen()
        machine = threading.Thread(target=answer_badly, args=(theirs, bodies))
        machine.start()
        placed: list[object] = []
        files = Files(path, lambda *what: placed.append(what), lambda _: True)
        file = OpenFile(1, "gntalloc", files.channel.generation, 0)
        for _ in range(2):
            arguments = (0, ALLOC_GREF, ctypes.addressof(argument), 0, 0, 0)
            with pytest.raises(DeviceError, match="does not name"):
                files.ioctl(Call(1, threading.get_native_id(), IOCTL, arguments), os.getpid(), file)
            with pytest.raises(DeviceError, match="another map"):
                files.map(Call(1, threading.get_native_id(), MMAP, (0, 4096, 3, 1, 0, 0)), os.getpid(), file)
        files.channel.close()
        machine.join(20)
    assert memory.raw == b"precious"
    assert placed == []


def answer_badly(theirs: socket.socket, bodies: dict[int, list[bytes]]) -> None:
    """A machine that has been taken over."""
    sock, _ = theirs.accept()
    with sock, sock.makefile("rb") as stream:
        while head := stream.read(wire.HEADER.size):
            size, kind, _, number = wire.HEADER.unpack(head)
            stream.read(size)
            if kind == wire.HELLO:
                sock.sendall(wire.encode_reply(kind, number, result=1))
            elif kind in bodies:
                body = bodies[kind].pop(0)
                memory = os.memfd_create("evil")
                sent = wire.encode_reply(kind, number, body=body, descriptors=kind == wire.MMAP)
                socket.send_fds(sock, [sent], [memory] * (kind == wire.MMAP))
                os.close(memory)


MAPS = """
libc = ctypes.CDLL(None, use_errno=True); libc.mmap.restype = ctypes.c_void_p
file = os.open(sys.argv[1], os.O_RDWR)
say('open'); input()
say(libc.mmap(None, 4096, 3, 1, file, ctypes.c_long(0)) != 2**64 - 1)
"""


@root_only
def test_nobody_waits_for_the_file_system_of_a_program(runs: Runs, tmp_path: Path) -> None:
    """A map of a file on FUSE or NFS, whose server hangs, is the kernel's and the program's affair."""
    libc = ctypes.CDLL(None, use_errno=True)
    channel = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC) if os.path.exists("/dev/fuse") else -1
    options = f"fd={channel},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"test", str(tmp_path).encode(), b"fuse", 0, options):
        pytest.skip("nothing can be mounted here")
    hangs = threading.Event()
    server = threading.Thread(target=serve_files, args=(channel, hangs), daemon=True)
    server.start()
    try:
        process = runs.start(1, *python(MAPS, str(tmp_path / "file")))
        assert said(process) == "open"
        hangs.set()
        tell(process, "")
        assert process.stdout is not None
        assert select.select([process.stdout.fileno()], [], [], 20)[0], "the machine waits for the file system"
        assert said(process) == "True"
        assert runs(2, *python("device('gntdev'); say('served')")).stdout == "served\n"
    finally:
        libc.umount2(str(tmp_path).encode(), 3)  # by force, and later if need be
        os.close(channel)


def serve_files(channel: int, hangs: threading.Event) -> None:
    """A file system of one folder with one file, that answers no more when it hangs. Source: linux/fuse.h."""
    init, lookup, getattr_, open_ = 26, 1, 3, 14
    while True:
        try:
            request = os.read(channel, 1 << 20)
        except OSError:
            return
        if hangs.is_set():
            return
        _, what, number, node = struct.unpack_from("=IIQQ", request)
        node = 2 if what == lookup else node
        mode = 0o100666 if node == 2 else 0o40777
        attributes = struct.pack("=6Q10I", node, 4096, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
        answers = {
            init: struct.pack("=IIIIHHIIHH32x", 7, 31, 0, 0, 1, 1, 4096, 1, 1, 0),
            lookup: struct.pack("=QQQQII", 2, 0, 0, 0, 0, 0) + attributes,
            getattr_: struct.pack("=QII", 0, 0, 0) + attributes,
            open_: bytes(16),
        }
        body = answers.get(what, b"")
        if what not in {2, 36, 42}:  # FORGET, INTERRUPT, BATCH_FORGET
            error = 0 if body else -errno.ENOSYS
            os.write(channel, struct.pack("=IiQ", 16 + len(body), error, number) + body)


@root_only
def test_a_name_is_not_looked_for_in_somebody_else_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They could have made it in /tmp before we came."""
    runs = Runs()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    theirs = tmp_path / "gntalloc" / runs.machine
    theirs.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(theirs / "1"))
        for path in (theirs, theirs.parent):
            os.chown(path, 65532, 65532)
        for command in (runs.command(1, "true"), [sys.executable, "-m", "gntalloc", "list", runs.machine]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
            assert done.returncode == (125 if "run" in command else 1)
            assert "is not a folder of yours" in done.stderr


def test_programs_of_the_machine_s_user_could_stop_it_anyway(runs: Runs) -> None:
    """Why the machine may look into them itself: a namespace does not keep anybody from kill(2)."""
    keeper = runs.start(9, "sh", "-c", "echo up; read x")
    assert said(keeper) == "up"
    machine = order(runs, "statistics")["pid"]
    assert runs(1, *python(f"os.kill({machine}, 0); say('yes')"), options=("--userns",)).stdout == "yes\n"


def test_a_run_in_an_embedded_machine_leaves_nothing() -> None:
    runs = Runs()
    with Machine() as machine:
        runs.machine = runs.folder = machine.folder
        assert runs(1, *python("device('gntalloc'); say('there')")).stdout == "there\n"
    assert runs.over()


@pytest.mark.parametrize(
    "command", [("run", "--domid", "1", "--machine", "{}", "--", "true"), ("machine", "--name", "{}")]
)
@pytest.mark.parametrize("what", ["letter", "folder", "1", "socket"])
def test_a_folder_that_is_no_machine_s_is_left_as_it_is(tmp_path: Path, command: tuple[str, ...], what: str) -> None:
    """Whatever --machine is by mistake: nothing is taken away but the sockets of a machine that was killed."""
    folder = tmp_path / "precious"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as dead, socket.socket(socket.AF_UNIX) as other:
        dead.bind(str(folder / "control"))
        if what == "socket":
            other.bind(str(folder / what))
    if what == "folder":
        (folder / what).mkdir()
    elif what != "socket":
        (folder / what).write_text("dear")
    words = [word.format(folder) for word in command]
    done = subprocess.run(
        [sys.executable, "-m", "gntalloc", *words], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == (125 if "run" in words else 1)
    assert what in done.stderr
    assert sorted(os.listdir(folder)) == sorted(["control", what])
    assert os.listdir(tmp_path) == ["precious"]


def in_a_namespace(*command: str) -> subprocess.CompletedProcess[str]:
    """As root of a user namespace that has no other id, as in many containers."""
    if subprocess.run(["unshare", "-Ur", "true"], check=False, capture_output=True, timeout=50).returncode:
        pytest.skip("user namespaces cannot be entered here")
    return subprocess.run(["unshare", "-Ur", *command], capture_output=True, text=True, timeout=50, check=False)


def test_a_namespace_within_one_that_has_few_ids(tmp_path: Path) -> None:
    runs = Runs()
    runs.machine = runs.folder = str(tmp_path / "machine")
    done = in_a_namespace(*runs.command(1, *python("device('gntdev'); say(os.getuid())"), options=("--userns",)))
    assert (done.stdout, done.stderr) == ("0\n", "")
    runs.finish()


def test_a_proc_of_another_namespace(tmp_path: Path) -> None:
    runs = Runs()
    runs.machine = runs.folder = str(tmp_path / "machine")
    done = in_a_namespace("unshare", "-pf", *runs.command(1, "true"))
    assert done.returncode == 125
    assert "mount -t proc proc /proc" in done.stderr
    done = in_a_namespace("unshare", "-pf", sys.executable, "-m", "gntalloc", "doctor", "--json")
    assert done.returncode == 1
    (proc,) = (each for each in json.loads(done.stdout)["findings"] if each["name"] == "/proc")
    assert not proc["ok"]


def test_a_doctor_in_such_a_namespace() -> None:
    done = in_a_namespace(sys.executable, "-m", "gntalloc", "doctor", "--json")
    (namespaces,) = (each for each in json.loads(done.stdout)["findings"] if each["name"] == "user namespaces")
    assert namespaces["ok"], namespaces["found"]


def test_a_doctor_in_a_run_knows_what_stands_in_the_way(runs: Runs) -> None:
    done = runs(1, sys.executable, "-m", "gntalloc", "doctor", "--strict", "--json")
    assert done.returncode == 1
    lacking = [each for each in json.loads(done.stdout)["findings"] if not each["ok"] and each["of_run"]]
    assert lacking
    for each in lacking:
        assert "gntalloc run" in each["found"]
        assert "sysctl" not in each["advice"]


def test_a_folder_for_machines_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc")
    done = runs(1, "true")
    assert done.returncode == 125
    assert "set XDG_RUNTIME_DIR" in done.stderr


def test_what_a_killed_machine_has_left_is_no_hindrance(tmp_path: Path) -> None:
    runs = Runs()
    runs.machine = runs.folder = str(tmp_path / "dead")
    os.mkdir(runs.folder)
    for name in ("control", "control-", "1", "1.store", "32751.store-"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(f"{runs.folder}/{name}")
    assert runs(1, "echo", "alive").stdout == "alive\n"
    runs.finish()


def test_only_a_listener_is_served() -> None:
    with Machine() as machine, listener_of_a_child() as listener:
        machine.domain(1)
        channel = MachineConnection(domain_path(machine.folder, 1))
        namespace = os.stat("/proc/self/ns/pid").st_ino

        assert channel.call(Serve()).result == 0
        assert channel.call(Lend(namespace + 1)).result == 0
        assert ask_to_serve(channel, 0).result == 0
        assert channel.call(Lend(namespace)).result == 0  # a second line
        channel.close()
        answer = ask_to_serve(channel, listener)
        assert answer.result == 1
        (notes,) = answer.descriptors
        for attack in (
            lambda: os.pwrite(notes.fileno(), b"evil", 0),
            lambda: os.ftruncate(notes.fileno(), 0),
            lambda: mmap.mmap(notes.fileno(), 4096),
        ):
            with pytest.raises(PermissionError):
                attack()
        assert channel.call(Lend(namespace)).result == 0  # one each
        assert channel.call(Serve()).result == 0
        channel.close()
        assert machine.statistics().domains


@contextmanager
def listener_of_a_child() -> Iterator[int]:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        socket.send_fds(theirs, [b"x"], [install(filter_program(1))])
        signal.pause()
        os._exit(0)
    with ours, theirs:
        _, (listener,), _, _ = socket.recv_fds(ours, 1, 1)
    yield listener
    os.close(listener)
    os.kill(child, signal.SIGKILL)
    status_of(child)


def test_a_supervisor_whose_line_was_closed_speaks_over_another(tmp_path: Path) -> None:
    """As after a call that was interrupted."""
    with Machine() as machine:
        machine.domain(1)
        files = Files(domain_path(machine.folder, 1), lambda *_: None, lambda _: True)
        for process in (os.getpid(), 1, 1):
            files.channel.close()
            files.open(process, "gntdev", os.O_RDWR).close()
        files.channel.close()


def test_after_that_it_speaks_for_the_same_program(tmp_path: Path) -> None:
    with Machine() as machine:
        machine.domain(1)
        files = Files(domain_path(machine.folder, 1), lambda *_: None, lambda _: True)
        opened = [files.open(1, "gntdev", os.O_RDWR) for _ in range(2)]
        files.channel.close()
        opened.append(files.open(1, "gntdev", os.O_RDWR))
        assert [file.opener for file in machine.files()] == [1, 1, 1]
        for each in opened:
            each.close()
        files.channel.close()
