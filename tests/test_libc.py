"""The C library: loaded once, and its refusals are OSErrors."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

import gntalloc
from gntalloc.libc import check, failure, libc


def test_a_refusal_is_an_os_error_of_its_own_kind() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        check(libc.chdir(b"/nowhere at all"))
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOENT, os.strerror(errno.ENOENT))
    assert libc.close(-1) == -1
    assert (type(failure()), failure().errno) == (OSError, errno.EBADF)


def test_what_succeeded_is_handed_on() -> None:
    descriptor = check(libc.inotify_init1(os.O_CLOEXEC))
    os.close(descriptor)
    assert check(0) == 0


def test_the_package_loads_it_once() -> None:
    folder = Path(gntalloc.__file__).parent
    loading = re.compile(r"DLL\(None|get_errno")
    loads = {str(path.relative_to(folder)) for path in folder.rglob("*.py") if loading.search(path.read_text("utf-8"))}
    assert loads == {"libc.py"}
