"""The probes of what a machine needs, and of what adds to it."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
import resource
import shutil
import socket
import struct
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING

from gntalloc.claims import sweep
from gntalloc.cli.probe import Lacking, Probe, probe, setting
from gntalloc.descriptors import receive_with
from gntalloc.errors import GntallocError
from gntalloc.libc import check, libc
from gntalloc.places import machine_folder, make_top_folder, top_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PROBES"]

PROBES: list[Probe] = []
_probe = partial(probe, PROBES)

_F_SEAL_FUTURE_WRITE = 0x10  # in fcntl since Python 3.13
_FLOCK = struct.Struct("=hh4xqqi4x")  # struct flock: type, whence, start, length, process
_IN_CLOSE = 0x08 | 0x10
_XEN_DEVICES = ("/dev/xen/gntalloc", "/dev/xen/gntdev", "/dev/xen/evtchn")
_SPARE_DESCRIPTORS = 64  # a machine needs these besides one for each live allocation


# Without these nothing runs.


@_probe("Python", "everything", "install Python 3.11 or newer", required=True)
def python() -> str:
    """Name the Python that runs this. An older one would not have come so far."""
    return f"{platform.python_version()} at {sys.executable}"


@_probe("Linux", "everything", "run it on Linux 5.1 or newer, or in a virtual machine that does", required=True)
def linux() -> str:
    """Name the kernel's version. The other probes try what it can do."""
    if sys.platform != "linux":
        raise Lacking(f"this is {platform.system()}")
    numbers = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    if numbers < (5, 1):
        raise Lacking(f"{platform.release()} is too old")
    return f"{platform.release()} on {platform.machine()}"


@_probe(
    "/proc", "opening a memory file a second time, and seeing who maps it", "mount -t proc proc /proc", required=True
)
def proc() -> str:
    """Check that /proc is mounted, shows our own processes, and lets us open our own descriptors anew."""
    if os.readlink("/proc/self") != str(os.getpid()):
        raise Lacking("it shows the processes of another namespace")
    with _memory_file() as (_, again):
        return f"mounted; /proc/self/fd/{again} can be opened anew"


@_probe("/dev/null", "starting any program", "mount a /dev that has it; bwrap: --dev /dev", required=True)
def nowhere() -> str:
    """Check that /dev/null can be opened, read and written."""
    descriptor = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(descriptor, b"x")
        if os.read(descriptor, 1):
            raise Lacking("something can be read from it")
    finally:
        os.close(descriptor)
    return "nothing comes of it"


@_probe(
    "a folder for machines",
    "programs that find a machine",
    "set XDG_RUNTIME_DIR to a folder of yours that can be written, with a short path",
    required=True,
)
def folder() -> str:
    """Check that the folder is there or can be made, is ours, and that its path leaves room for a machine's sockets."""
    try:
        make_top_folder()
        machine_folder(f"of-{os.getpid()}-1")
    except GntallocError as error:
        raise Lacking(str(error)) from None
    if not os.access(top_folder(), os.W_OK | os.X_OK):
        raise Lacking(f"{top_folder()} cannot be written")
    gone = sweep()
    return f"{top_folder()}{f'; killed machines had left {len(gone)} names there, which are gone now' * bool(gone)}"


@_probe(
    "memory files that can be sealed",
    "pages that a peer can read and never write",
    "a newer kernel (5.1), or a sandbox that allows memfd_create and its seals",
    required=True,
)
def seals() -> str:
    """Map for writing, seal against further writable maps, and check that they are refused and the first goes on."""
    with _memory_file() as (first, again), mmap.mmap(again, mmap.PAGESIZE) as early:
        fcntl.fcntl(first, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        fcntl.fcntl(first, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
        early[0] = 1
        with mmap.mmap(again, mmap.PAGESIZE, prot=mmap.PROT_READ) as reader:
            if reader[0] != 1:
                raise Lacking("an earlier map no longer writes to a sealed file")
        with contextlib.suppress(PermissionError):
            mmap.mmap(again, mmap.PAGESIZE).close()
            raise Lacking("a file sealed against it can still be mapped for writing")
        try:
            os.ftruncate(again, 0)
        except PermissionError:
            return "size and future writes can be sealed"
        raise Lacking("a file sealed against it can still be made smaller")


@_probe("OFD locks", "knowing which mappings of a page live", "a sandbox that allows F_OFD_SETLK", required=True)
def ofd_locks() -> str:
    """Lock a byte on one description. The other must see the lock, until the first is closed."""
    lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
    with _memory_file() as (_, first):
        second = os.open(f"/proc/self/fd/{first}", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.fcntl(second, fcntl.F_OFD_SETLK, lock)
            seen = _FLOCK.unpack(fcntl.fcntl(first, fcntl.F_OFD_GETLK, lock))[0]
        finally:
            os.close(second)
        if seen != fcntl.F_WRLCK:
            raise Lacking("a lock is not seen by others")
        if _FLOCK.unpack(fcntl.fcntl(first, fcntl.F_OFD_GETLK, lock))[0] != fcntl.F_UNLCK:
            raise Lacking("a lock does not end with its description")
        return "seen by others, and gone with their holder"


@_probe("write leases", "knowing that nobody maps a page any more", "a sandbox that allows F_SETLEASE", required=True)
def leases() -> str:
    """Ask for a lease: it must be refused while another description is open, and given when none is."""
    with _memory_file() as (_, first):
        second = os.open(f"/proc/self/fd/{first}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.fcntl(first, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except BlockingIOError:
            pass
        else:
            raise Lacking("given although the file is open a second time")
        finally:
            os.close(second)
        fcntl.fcntl(first, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(first, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return "refused while the file is open elsewhere, given when not"


@_probe(
    "inotify",
    "being told at once that a page was unmapped",
    "close what uses it up, or raise fs.inotify.max_user_watches and max_user_instances with sysctl",
    required=True,
)
def inotify() -> str:
    """Watch a description, and check that its closing is told."""
    queue = check(libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
    try:
        with _memory_file() as (_, first):
            path = f"/proc/self/fd/{first}"
            check(libc.inotify_add_watch(queue, path.encode(), _IN_CLOSE))
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            try:
                os.read(queue, 4096)
            except BlockingIOError:
                raise Lacking("a memory file was closed, and nothing was said") from None
    finally:
        os.close(queue)
    limits = (
        f"{setting('fs/inotify/' + name)} {what}"
        for name, what in (
            ("max_user_watches", "watches"),
            ("max_queued_events", "queued events"),
            ("max_user_instances", "instances"),
        )
    )
    return ", ".join(limits)


@_probe(
    "descriptors", "one for each live allocation", "raise the hard limit: ulimit -Hn, or LimitNOFILE=", required=True
)
def descriptors() -> str:
    """Read the limit that a machine will raise itself to, and count the allocations that it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return f"soft limit {soft}, hard limit none"
    room = hard - _SPARE_DESCRIPTORS
    text = f"soft limit {soft}, hard limit {hard}: {max(0, room)} live allocations"
    if room < 128:
        raise Lacking(text)
    return text


@_probe("passing descriptors", "giving pages to another process", "a sandbox that allows Unix sockets", required=True)
def passing() -> str:
    """Send a descriptor over a pair of sockets, and use what arrives."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, _memory_file() as (first, _):
        socket.send_fds(ours, [b"x"], [first])
        _, received = receive_with(theirs, 1, 1)
        try:
            if os.fstat(received[0]).st_ino != os.fstat(first).st_ino:
                raise Lacking("another file arrived")
        finally:
            for descriptor in received:
                os.close(descriptor)
    return "over Unix sockets"


# These add something.


@_probe("real Xen", "the kernel's own drivers", "be root, and load xen-gntalloc, xen-gntdev and xen-evtchn")
def xen() -> str:
    """Open the device files. A computer without Xen lacks nothing."""
    there = [path for path in _XEN_DEVICES if os.path.exists(path)]
    if not there:
        if os.path.exists("/proc/xen/capabilities"):
            raise Lacking("a Xen domain without the devices")
        return "not a Xen domain: programs here join a machine instead"
    if len(there) < len(_XEN_DEVICES):
        raise Lacking(f"only {', '.join(there)}")
    for path in there:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    return f"{', '.join(there)} can be opened"


@_probe("libatomic", "vchan without a wake-up too many", "apt install libatomic1")
def libatomic() -> str:
    """Change a byte with libatomic."""
    try:
        library = ctypes.CDLL("libatomic.so.1")
    except OSError as error:
        raise Lacking("libatomic.so.1 is not there") from error
    byte = ctypes.c_uint8(1)
    library["__atomic_fetch_or_1"](ctypes.byref(byte), ctypes.c_uint8(2), 5)
    if byte.value != 3:
        raise Lacking("it does not do what it should")
    return "libatomic.so.1"


# These add something else.


@_probe("QEMU", "the lab", "apt install qemu-system-x86")
def qemu() -> str:
    """Name the version of QEMU."""
    return _version("qemu-system-x86_64", "--version")


@_probe("mke2fs", "the lab's images", "apt install e2fsprogs")
def mke2fs() -> str:
    """Name the version of mke2fs."""
    return _version("mke2fs", "-V")


@_probe("C compiler", "tests that compare with C", "apt install gcc libc6-dev")
def compiler() -> str:
    """Name the version of the C compiler."""
    for name in ("cc", "gcc", "clang"):
        with contextlib.suppress(Lacking):
            return _version(name, "--version")
    raise Lacking("neither cc nor gcc nor clang is there")


@contextlib.contextmanager
def _memory_file() -> Iterator[tuple[int, int]]:
    """Make a memory file of a page: give its first description, and another one, opened through /proc."""
    first = os.memfd_create("gntalloc-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(first, mmap.PAGESIZE)
        try:
            again = os.open(f"/proc/self/fd/{first}", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Lacking("this cannot be tried: /proc is not mounted", "mount -t proc proc /proc") from None
        try:
            yield first, again
        finally:
            os.close(again)
    finally:
        os.close(first)


def _version(program: str, option: str) -> str:
    """Give the first line that a program prints about its version."""
    found = shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if found is None:
        raise Lacking(f"{program} is not there")
    done = subprocess.run(
        [found, option], capture_output=True, text=True, check=False, timeout=10, stdin=subprocess.DEVNULL
    )
    said = (done.stdout or done.stderr).strip()
    if done.returncode != 0 or not said:
        raise Lacking(f"{found} {option} ended with {done.returncode}")
    return said.splitlines()[0]
