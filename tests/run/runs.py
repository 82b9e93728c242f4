"""Runs of `gntalloc run` that share a machine, and talking with programs."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from limits import Limited

from gntalloc.guest.control import ControlClient
from gntalloc.places import lock_path, machine_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_numbers = itertools.count(1)


WORDS = """
import ctypes, errno, fcntl, mmap, os, select, signal, socket, struct, sys
ALLOC, DEALLOC, MAP, UNMAP = 0x184705, 0x104706, 0x184700, 0x104701
UNBOUND, INTERDOMAIN, NOTIFY = 0x044502, 0x084501, 0x044504
def device(name, flags=os.O_RDWR): return os.open('/dev/xen/' + name, flags | os.O_CLOEXEC)
def alloc(file, peer, count=1, writable=1):
    data = bytearray(struct.pack('=HHIQ', peer, writable, count, 0) + bytes(max(8, 4 * count)))
    fcntl.ioctl(file, ALLOC, data, True)
    return struct.unpack_from('=Q', data, 8)[0], struct.unpack_from(f'={count}I', data, 16)
def reserve(file, peer, refs):
    data = bytearray(struct.pack('=I4xQ', len(refs), 0) + b''.join(struct.pack('=II', peer, ref) for ref in refs))
    fcntl.ioctl(file, MAP, data, True)
    return struct.unpack_from('=Q', data, 8)[0]
def call(file, request, layout, *values):
    return fcntl.ioctl(file, request, bytearray(struct.pack(layout, *values)), True)
def free(file, index): call(file, DEALLOC, '=QI4x', index, 1)
def place(file, index, count=1, prot=3): return mmap.mmap(file, 4096 * count, mmap.MAP_SHARED, prot, offset=index)
def say(*what): print(*what, flush=True)
def descriptors():  # less the one that libffi keeps (3.8)
    there = {name: os.path.realpath('/proc/self/fd/' + name) for name in os.listdir('/proc/self/fd')}
    return [name for name, file in there.items() if '/libffi.so' not in file]
"""


class Runs:
    """Runs of one machine, which is over when the last of them is."""

    def __init__(self) -> None:
        self.machine = f"test-{os.getpid()}-{next(_numbers)}"
        self.folder = machine_folder(self.machine)
        self.started: list[subprocess.Popen[str]] = []

    def command(self, domid: int, *program: str, options: tuple[str, ...] = ()) -> list[str]:
        """The command line of a run."""
        ours = [sys.executable, "-m", "gntalloc", "run", "--domid", str(domid), "--machine", self.machine]
        return [*ours, *options, "--", *program]

    def __call__(
        self, domid: int, *program: str, options: tuple[str, ...] = (), **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        settings = {"capture_output": True, "text": True, "timeout": 50, "stdin": subprocess.DEVNULL, **how}
        return subprocess.run(self.command(domid, *program, options=options), check=False, **settings)

    def start(self, domid: int, *program: str, options: tuple[str, ...] = (), **how: Any) -> subprocess.Popen[str]:
        """Run beside the test."""
        settings = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, **how}
        process = subprocess.Popen(self.command(domid, *program, options=options), **settings)
        self.started.append(process)
        return process

    def over(self) -> bool:
        """Whether the machine has ended, and left nothing."""
        return not os.path.exists(self.folder) and not os.path.exists(lock_path(self.folder))

    def end_all(self) -> None:
        """Everything that was started ends."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            if not all(stream.closed for stream in (process.stdin, process.stdout) if stream is not None):
                process.communicate(timeout=20)

    def finish(self) -> None:
        """Everything that was started ends, and the machine with it."""
        self.end_all()
        deadline = time.monotonic() + 20
        while not self.over():
            assert time.monotonic() < deadline, "the machine did not end"
            time.sleep(0.02)


def order(runs: Runs, name: str) -> Any:
    """What the machine of these runs answers, as `gntalloc list` asks."""
    with closing(ControlClient(runs.folder)) as control:
        return control.order(name)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Until it is so."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def said(process: subprocess.Popen[str]) -> str:
    """Its next line."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def tell(process: subprocess.Popen[str], line: str) -> None:
    """A line for it."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def python(code: str, *arguments: str) -> tuple[str, ...]:
    """A script without any package, that makes the calls of the drivers itself."""
    return (sys.executable, "-I", "-S", "-c", WORDS + code, *arguments)


REFUSING = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, 310), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
code = b''.join(struct.pack('=HBBI', *line) for line in lines)
program = struct.pack('=H6xQ', len(lines), ctypes.cast(ctypes.c_char_p(code), ctypes.c_void_p).value)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program) == 0
os.execv(sys.executable, [sys.executable, '-m', 'gntalloc', 'machine', '--name', sys.argv[1], '--domain', '1'])
"""


@contextmanager
def refusing_machine(folder: Path) -> Iterator[Runs]:
    """Runs of a machine in `folder` that may not look into their programs: process_vm_readv says EPERM to it."""
    runs = Runs()
    runs.machine = runs.folder = str(folder / "machine")
    command = [sys.executable, "-c", REFUSING, runs.folder]
    with Limited(command, stdout=subprocess.PIPE, text=True) as machine:
        while "runs as pid" not in said(machine):
            pass
        try:
            yield runs
        finally:
            runs.end_all()
            machine.terminate()
