"""Load the C library, for the calls that Python's own modules do not have.

The package loads it once, here. A prototype is declared here for each function whose arguments or result are wider
than an int. A call that fails leaves its errno to ctypes: `failure` and `check` make an OSError of it.
"""

from __future__ import annotations

import ctypes
import os

__all__ = [
    "PR_SET_CHILD_SUBREAPER",
    "PR_SET_DUMPABLE",
    "PR_SET_PDEATHSIG",
    "check",
    "failure",
    "give_memory_back",
    "libc",
    "libc_with_gil",
    "trim",
]

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
libc.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
libc.ptrace.restype = ctypes.c_long
libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
)
libc.mmap.restype = ctypes.c_void_p
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

libc_with_gil = ctypes.PyDLL(None, use_errno=True)
"""The C library for calls that return at once. No other thread of Python runs meanwhile, so the call waits for none."""
libc_with_gil.process_vm_readv.restype = ctypes.c_ssize_t
libc_with_gil.process_vm_writev.restype = ctypes.c_ssize_t


def failure() -> OSError:
    """Make the OSError that the last failed call of this thread left in errno."""
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def check(result: int) -> int:
    """Return the result of a call that answers with a negative number when it fails.

    Raises:
        OSError: the call failed.
    """
    if result < 0:
        raise failure()
    return result


def give_memory_back() -> None:
    """Have the C library give the memory of long messages back to the computer as soon as it is freed.

    glibc keeps memory of a size that was freed once. Other C libraries have no such call, and need none.
    """
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 16)
        mallopt(_M_TRIM_THRESHOLD, 1 << 18)


def trim() -> None:
    """Have the C library give back what is free within its memory. This takes a millisecond or so."""
    malloc_trim = getattr(libc, "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
