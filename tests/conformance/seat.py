"""A seat: a process that carries out system-call-level steps on device files and says what happened.

It reads one JSON list a line, [step, arguments...], and answers one JSON value a line: {"ok": value} or {"errno":
"EINVAL"}. Three kinds of seat:

    kernel    system calls on /dev/xen, with argument buffers at real addresses, next to unmapped or read-only pages
    run       the same, under `gntalloc run --all-opens`
    machine   the native provider of gntalloc, for a domain of the machine

A step that a kind of seat cannot express is answered {"cannot": why}: the row is then not applicable, never faked.
Memory is read and written through a pipe, where a bad address is EFAULT and no signal.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import select
import signal
import sys
from typing import Any, TextIO

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
libc.write.argtypes = libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.write.restype = libc.read.restype = ctypes.c_ssize_t
libc.lseek.argtypes = [ctypes.c_int, ctypes.c_longlong, ctypes.c_int]
libc.lseek.restype = ctypes.c_longlong

PAGE = 4096
NO_REQUEST = 0x45FE  # of evtchn's kind, and none
FAILED = ctypes.c_void_p(-1).value


class Cannot(Exception):
    """This kind of seat has no way to express that."""


def check(result: int | None) -> int:
    """A system call's result, or its errno as an OSError."""
    if result is None or result in {-1, FAILED}:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class Seat:
    """What both kinds share: mappings are ranges of addresses, and memory is touched through a pipe."""

    def __init__(self) -> None:
        self.maps: dict[str, tuple[int, int]] = {}
        self.pipe = os.pipe()
        self.count = 0

    def name(self, kind: str) -> str:
        """A new name for a file or a map."""
        self.count += 1
        return f"{kind}{self.count}"

    # Steps on mappings.

    def munmap(self, name: str, start: int, length: int) -> None:
        """Unmap a part or all."""
        address, size = self.maps[name]
        check(libc.munmap(address + start, length))
        if length == size:
            del self.maps[name]

    def mremap(self, name: str, length: int, may_move: bool) -> None:
        """Change the length."""
        address, size = self.maps[name]
        self.maps[name] = check(libc.mremap(address, size, length, int(may_move), None)), length

    def mprotect(self, name: str, prot: int) -> None:
        """Change the rights."""
        check(libc.mprotect(*self.maps[name], prot))

    def madvise(self, name: str, advice: int) -> None:
        """Advise."""
        check(libc.madvise(*self.maps[name], advice))

    def peek(self, name: str, start: int, length: int) -> str:
        """Read memory: hexadecimal."""
        check(libc.write(self.pipe[1], self.maps[name][0] + start, length))
        return os.read(self.pipe[0], length).hex()

    def poke(self, name: str, start: int, data: str) -> None:
        """Write memory."""
        raw = bytes.fromhex(data)
        os.write(self.pipe[1], raw)
        if libc.read(self.pipe[0], self.maps[name][0] + start, len(raw)) < 0:
            code = ctypes.get_errno()
            os.read(self.pipe[0], len(raw))
            raise OSError(code, os.strerror(code))

    def touch(self, name: str, start: int) -> str:
        """Load a byte in a child made by fork, which inherits what the driver lets it: what became of it."""
        child = os.fork()
        if not child:
            ctypes.string_at(self.maps[name][0] + start, 1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "ok"

    def own_touch(self, name: str, start: int) -> str:
        """Whether this process can read a byte there, without a signal: ok or fault."""
        return (
            "ok"
            if libc.write(self.pipe[1], self.maps[name][0] + start, 1) == 1 and os.read(self.pipe[0], 1)
            else "fault"
        )

    def offset_hole(self, name: str) -> int:
        """An address just below a map, where nothing is."""
        return self.maps[name][0] - PAGE

    def scratch(self) -> str:
        """A page of ordinary memory, as a map: an argument that an ioctl's argument points to."""
        name = self.name("m")
        self.maps[name] = check(libc.mmap(None, PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)), PAGE
        return name

    def address(self, name: str) -> int:
        """Where a map begins."""
        return self.maps[name][0]

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()


class KernelSeat(Seat):
    """System calls on /dev/xen."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, int] = {}

    def open(self, device: str, flags: int) -> str:
        """Open a device."""
        name = self.name("f")
        self.files[name] = os.open(f"/dev/xen/{device}", flags | os.O_CLOEXEC)
        return name

    def open_as_nobody(self, device: str) -> int:
        """Open in a child that has become another user."""
        child = os.fork()
        if not child:
            try:
                os.setuid(65534)
                os.open(f"/dev/xen/{device}", os.O_RDWR)
            except OSError as error:
                os._exit(error.errno or 1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            raise OSError(code, os.strerror(code))
        return 0

    def close(self, file: str) -> None:
        """Close a device."""
        os.close(self.files.pop(file))

    def ioctl(self, file: str, request: int, spec: dict[str, Any]) -> list[Any]:
        """[result, the buffer afterwards]. `spec`: data, and null, readonly or writable (bytes of it that are)."""
        if spec.get("null"):
            return [check(libc.ioctl(self.files[file], request, None)), ""]
        data = bytes.fromhex(spec["data"])
        area = 2 + len(data) // PAGE
        base = check(libc.mmap(None, (area + 1) * PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0))
        try:
            writable = spec.get("writable")
            end = base + area * PAGE
            # The buffer ends where its page does: what follows is not mapped. With `writable` the page boundary lies
            # after that many bytes instead, and the rest is read-only.
            start = end - len(data) if writable is None else base + PAGE - writable
            check(libc.munmap(end, PAGE))
            ctypes.memmove(start, data, len(data))
            if spec.get("readonly"):
                check(libc.mprotect(base, area * PAGE, 1))
            elif writable is not None:
                check(libc.mprotect(base + PAGE, (area - 1) * PAGE, 1))
            failure = None
            result = libc.ioctl(self.files[file], request, start)
            if result < 0:
                failure = ctypes.get_errno()
            after = ctypes.string_at(start, len(data)).hex()
        finally:
            libc.munmap(base, area * PAGE)
        if failure:
            raise Refused(failure, after)
        return [result, after]

    def mmap(self, file: str, offset: int, length: int, prot: int, shared: bool) -> str:
        """Map."""
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        name = self.name("m")
        address = check(libc.mmap(None, length, prot, flags, self.files[file], offset))
        self.maps[name] = address, -(-length // PAGE) * PAGE
        return name

    def read(self, file: str, size: int) -> str:
        """Read."""
        return os.read(self.files[file], size).hex()

    def read_nowhere(self, file: str, size: int) -> int:
        """Read into memory that is not there."""
        return check(libc.read(self.files[file], 8, size))

    def write(self, file: str, data: str) -> int:
        """Write."""
        return os.write(self.files[file], bytes.fromhex(data))

    def lseek(self, file: str) -> int:
        """Seek."""
        return check(libc.lseek(self.files[file], 0, 0))

    def poll(self, file: str) -> int:
        """What is ready at once."""
        poll = select.poll()
        poll.register(self.files[file], select.POLLIN | select.POLLOUT)
        return sum(events for _, events in poll.poll(0))

    def get_limit(self) -> int:
        """Pages."""
        with open("/sys/module/xen_gntalloc/parameters/limit") as file:
            return int(file.read())

    def set_limit(self, pages: int) -> None:
        """Pages."""
        descriptor = os.open("/sys/module/xen_gntalloc/parameters/limit", os.O_WRONLY)
        try:
            os.write(descriptor, str(pages).encode())
        finally:
            os.close(descriptor)


class RunSeat(KernelSeat):
    """System calls on the /dev/xen that `gntalloc run` serves."""

    def __init__(self) -> None:
        super().__init__()
        from gntalloc.domain import current_domain

        self.names: dict[str, str] = {}
        self.domain = current_domain()  # for the limit, which is no file here: as `gntalloc limit` does

    def get_limit(self) -> int:
        """Pages."""
        return self.domain.limit

    def set_limit(self, pages: int) -> None:
        """Pages."""
        self.domain.limit = pages

    def read(self, file: str, size: int) -> str:
        """Read. Events that a munmap, a close or a write caused come a moment later there: see docs/run.md.

        So that the answer does not depend on who is faster, the machine is asked something first.
        """
        if self.names[file] == "evtchn":
            if size % 4:
                raise Cannot("an evtchn file is a stream of bytes there, of which any number can be read")
            libc.ioctl(self.files[file], NO_REQUEST, None)
        return super().read(file, size)

    def open(self, device: str, flags: int) -> str:
        """Open a device."""
        name = super().open(device, flags)
        self.names[name] = device
        return name


class Refused(OSError):
    """An ioctl failed, and its buffer may have been written all the same."""

    def __init__(self, code: int, after: str) -> None:
        super().__init__(code, os.strerror(code))
        self.after = after


class MachineSeat(Seat):
    """The native provider, in the domain of $GNTALLOC_DOMAIN."""

    def __init__(self) -> None:
        super().__init__()
        from gntalloc.domain import current_domain

        self.devices = current_domain().devices
        self.files: dict[str, Any] = {}
        self.kept: dict[str, Any] = {}
        self.pages: list[str] = []

    def open(self, device: str, flags: int) -> str:
        """Open a device."""
        name = self.name("f")
        self.files[name] = self.devices.open(device, flags)
        return name

    def open_as_nobody(self, device: str) -> int:
        """There is no node with a mode."""
        raise Cannot("a domain's socket decides by uid at connect, not at open: tests/machine")

    def close(self, file: str) -> None:
        """Close a device."""
        self.files.pop(file).close()

    def scratch(self) -> str:
        """A page of ordinary memory. It goes with every ioctl, as the kernel would find it."""
        name = super().scratch()
        self.pages.append(name)
        return name

    def ioctl(self, file: str, request: int, spec: dict[str, Any]) -> list[Any]:
        """See KernelSeat."""
        from gntalloc.guest.devices.machine import ARGUMENT_ADDRESS

        if spec.get("null"):
            return [self.files[file].ioctl(request, None), ""]
        data = bytes.fromhex(spec["data"])
        writable = spec.get("writable", len(data))
        argument = data if spec.get("readonly") else bytearray(data[:writable])
        rest = data[len(argument) :]
        memory: list[tuple[int, Any]] = [(ARGUMENT_ADDRESS + writable, rest)] if rest else []
        for address, size in (self.maps[name] for name in self.pages):
            memory.append((address, memoryview((ctypes.c_char * size).from_address(address)).cast("B")))
        try:
            result = self.files[file].ioctl(request, argument, memory=memory)
        except OSError as error:
            raise Refused(error.errno or 0, (bytes(argument) + rest).hex()) from error
        return [result, (bytes(argument) + rest).hex()]

    def mmap(self, file: str, offset: int, length: int, prot: int, shared: bool) -> str:
        """Map."""
        mapping = self.files[file].mmap(offset, length, prot=prot, shared=shared)
        name = self.name("m")
        self.kept[name] = mapping  # its memory is ours to unmap
        self.maps[name] = mapping.address, mapping.length
        return name

    def munmap(self, name: str, start: int, length: int) -> None:
        """Unmap, by the system call: the provider has no part in it."""
        super().munmap(name, start, length)
        if name not in self.maps:
            # The range is not CPython's any more: leak its object, so that it is never unmapped a second time.
            mapping = self.kept.pop(name)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping._range))

    def mremap(self, name: str, length: int, may_move: bool) -> None:
        """Change the length, by the system call."""
        raise Cannot("the mapping's object knows its length and address; mremap(2) behind its back is not offered")

    def read(self, file: str, size: int) -> str:
        """Read."""
        data: bytes = self.files[file].read(size)
        return data.hex()

    def write(self, file: str, data: str) -> int:
        """Write."""
        written: int = self.files[file].write(bytes.fromhex(data))
        return written

    def lseek(self, file: str) -> int:
        """Seek: on the descriptor itself."""
        return check(libc.lseek(self.files[file].fileno(), 0, 0))

    def read_nowhere(self, file: str, size: int) -> int:
        """Of evtchn: the descriptor's own read."""
        return check(libc.read(self._events(file), 8, size))

    def poll(self, file: str) -> int:
        """Of evtchn: the descriptor's own poll."""
        poll = select.poll()
        poll.register(self._events(file), select.POLLIN | select.POLLOUT)
        return sum(events for _, events in poll.poll(0))

    def _events(self, file: str) -> int:
        if self.files[file].name != "evtchn":
            raise Cannot("the home of a file is a socket, whose readiness is its own")
        descriptor: int = self.files[file].fileno()
        return descriptor

    def get_limit(self) -> int:
        """Pages."""
        return self.devices.limit

    def set_limit(self, pages: int) -> None:
        """Pages."""
        self.devices.limit = pages


STEPS = (
    "open", "close", "ioctl", "mmap", "munmap", "mremap", "mprotect", "madvise", "peek", "poke", "touch", "own_touch",
    "offset_hole", "address", "scratch", "open_as_nobody", "pid", "read", "write", "lseek", "poll",
    "read_nowhere", "get_limit", "set_limit",
)  # fmt: skip


def carry_out(seat: Seat, step: str, arguments: list[Any]) -> dict[str, Any]:
    """One step, and what happened."""
    assert step in STEPS, step
    try:
        return {"ok": getattr(seat, step)(*arguments)}
    except Cannot as why:
        return {"cannot": str(why)}
    except Refused as refusal:
        return {"errno": errno.errorcode[refusal.errno or 0], "after": refusal.after}
    except OSError as error:
        return {"errno": errno.errorcode[error.errno or 0]}


def serve(seat: Seat, steps: TextIO, answers: TextIO) -> None:
    """Answer steps until there are no more."""
    for line in steps:
        step, *arguments = json.loads(line)
        print(json.dumps(carry_out(seat, step, arguments)), file=answers, flush=True)


def make(kind: str) -> Seat:
    """`kernel`, `run` or `machine`."""
    return {"kernel": KernelSeat, "run": RunSeat, "machine": MachineSeat}[kind]()


if __name__ == "__main__":
    serve(make(sys.argv[1]), sys.stdin, sys.stdout)
