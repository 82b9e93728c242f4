"""Choose the system calls that the kernel brings to the supervisor: a seccomp filter in BPF, which a thread installs.

Everything passes but this:

* ioctl, if the request has no direction and is of the kinds 'G', 'E' or 'P', as those of /dev/xen are;
* open and openat for reading and writing without O_CREAT. Xen's libraries open devices so, and few programs open
  anything else so. BPF cannot read the path. With `all_opens` every open, and every map of a file;
* if asked for, the calls by which root's programs become another user's;
* mmap of a shared file, unless the upper half of the descriptor's register has our mark. The kernel looks at the lower
  half only, so the injector's own calls pass by that mark;
* openat2 and io_uring_setup, which answer ENOSYS, so that programs take the calls above. The first keeps its flags in
  memory, the second makes system calls that no filter sees.

Numbers and layouts are x86-64's. Programs of the 32-bit and x32 kinds pass, and find no /dev/xen.

Sources: seccomp(2), linux/filter.h, linux/audit.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import NamedTuple

from gntalloc.libc import failure, libc
from gntalloc.syscalls.serving import CHANGES_OF_USER, IOCTL, MMAP, OPEN, OPENAT

__all__ = ["filter_program", "install"]

_OPENAT2, _IO_URING_SETUP, _SECCOMP = 437, 425, 317
_X32 = 0x40000000
_AUDIT_ARCH_X86_64 = 0xC000003E

_ALLOW, _NOTIFY, _ERRNO = 0x7FFF0000, 0x7FC00000, 0x00050000
_SET_MODE_FILTER = 1
_FLAG_SPEC_ALLOW, _FLAG_NEW_LISTENER, _FLAG_WAIT_KILLABLE_RECV = 1 << 2, 1 << 3, 1 << 5
_PR_SET_NO_NEW_PRIVS = 38

_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06  # a word of seccomp_data; with a constant
_IF_EQUAL, _IF_NOT_LESS = 0x15, 0x35
_NUMBER, _ARCH = 0, 4  # offsets in seccomp_data
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20
_KIND = 0xC000FF00  # direction and kind of a request


class _Line(NamedTuple):
    """Hold one instruction. `then` and `otherwise` are labels; without one the next instruction follows."""

    code: int
    constant: int
    then: str = ""
    otherwise: str = ""


def _low(argument: int) -> int:
    return 16 + 8 * argument


def _lines(mark: int, *, all_opens: bool, users: bool) -> list[_Line | str]:
    """Give the program, line by line. A string is a label."""
    opens: list[_Line | str] = [_Line(_IF_EQUAL, OPEN, "notify"), _Line(_IF_EQUAL, OPENAT, "notify")]
    map_flags: list[_Line | str] = [_Line(_AND, _MAP_ANONYMOUS), _Line(_IF_EQUAL, 0, "notify", "allow")]
    if not all_opens:
        opens = [_Line(_IF_EQUAL, OPEN, "open"), _Line(_IF_EQUAL, OPENAT, "openat")]
        map_flags = [
            _Line(_AND, _MAP_SHARED | _MAP_ANONYMOUS),
            _Line(_IF_EQUAL, _MAP_SHARED, "notify", "allow"),
        ]
    kinds: list[_Line | str] = [_Line(_IF_EQUAL, ord(kind) << 8, "notify") for kind in "GEP"]
    changes: list[_Line | str] = [_Line(_IF_EQUAL, number, "notify") for number in CHANGES_OF_USER if users]
    return [
        _Line(_LOAD, _ARCH),
        _Line(_IF_EQUAL, _AUDIT_ARCH_X86_64, "", "allow"),
        _Line(_LOAD, _NUMBER),
        _Line(_IF_NOT_LESS, _X32, "allow"),
        _Line(_IF_EQUAL, IOCTL, "ioctl"),
        _Line(_IF_EQUAL, MMAP, "mmap"),
        *opens,
        *changes,
        _Line(_IF_EQUAL, _OPENAT2, "refuse"),
        _Line(_IF_EQUAL, _IO_URING_SETUP, "refuse", "allow"),
        "ioctl",
        _Line(_LOAD, _low(1)),
        _Line(_AND, _KIND),
        *kinds,
        _Line(_RETURN, _ALLOW),
        "mmap",
        _Line(_LOAD, _low(4) + 4),
        _Line(_IF_EQUAL, mark, "allow"),
        _Line(_LOAD, _low(3)),
        *map_flags,
        "open",
        _Line(_LOAD, _low(1)),
        _Line(_AND, os.O_ACCMODE | os.O_CREAT),
        _Line(_IF_EQUAL, os.O_RDWR, "notify", "allow"),
        "openat",
        _Line(_LOAD, _low(2)),
        _Line(_AND, os.O_ACCMODE | os.O_CREAT),
        _Line(_IF_EQUAL, os.O_RDWR, "notify", "allow"),
        "refuse",
        _Line(_RETURN, _ERRNO | errno.ENOSYS),
        "notify",
        _Line(_RETURN, _NOTIFY),
        "allow",
        _Line(_RETURN, _ALLOW),
    ]


def filter_program(mark: int, *, all_opens: bool = False, users: bool = False) -> bytes:
    """Make the filter as the kernel takes it: an array of struct sock_filter.

    Args:
        mark: 32 bits that the injector puts above the descriptor of its own mmap calls.
        all_opens: bring every open and every map of a file.
        users: bring changes of user.
    """
    lines: list[_Line] = []
    labels: dict[str, int] = {}
    for line in _lines(mark, all_opens=all_opens, users=users):
        if isinstance(line, str):
            labels[line] = len(lines)
        else:
            lines.append(line)
    code = b""
    for number, line in enumerate(lines, 1):
        then, otherwise = (labels[label] - number if label else 0 for label in (line.then, line.otherwise))
        code += struct.pack("=HBBI", line.code, then, otherwise, line.constant)
    return code


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(program: bytes) -> int:
    """Put this thread, and all that it will start, under the filter. Return the listener's descriptor.

    Raises:
        OSError: EBUSY: it has a listener already (`run` in `run`). Or the kernel's or a sandbox's refusal.
    """
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise failure()
    head = _Program(len(program) // 8, program)
    wanted = _FLAG_NEW_LISTENER | _FLAG_SPEC_ALLOW
    # Only a deadly signal interrupts a call that was taken. Otherwise the call would be made twice. Since Linux 5.19.
    for flags in (wanted | _FLAG_WAIT_KILLABLE_RECV, wanted):
        listener: int = libc.syscall(_SECCOMP, _SET_MODE_FILTER, flags, ctypes.byref(head))
        if listener >= 0:
            return listener
        error = failure()
        if error.errno != errno.EINVAL:
            break
    raise error
