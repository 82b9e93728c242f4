"""What a process has open: its own code is not counted, everything that could be a way for bytes is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gntalloc.descriptors import open_files
from gntalloc.testing import Snapshot, assert_cleaned_up


def library() -> str:
    """A library that this process runs."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[-1] for line in lines if "r-xp" in line and ".so" in line.split()[-1])


def test_a_library_that_is_read_by_itself_is_not_counted() -> None:
    """As libffi 3.8 keeps its own file open, from `import ctypes` on: here by hand, so that any libffi will do."""
    before = Snapshot.of(None)
    descriptor = os.open(library(), os.O_RDONLY)
    try:
        assert library() not in open_files()
        assert_cleaned_up(None, before)
    finally:
        os.close(descriptor)


def test_importing_ctypes_opens_nothing_that_counts() -> None:
    code = "from gntalloc.descriptors import open_files as f; a = sorted(f()); import ctypes; print(sorted(f()) == a)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_files_that_are_no_code_of_this_process_count(tmp_path: Path) -> None:
    """Also read-only, and also a library, if it is only read."""
    copy = tmp_path / "copy.so"
    copy.write_bytes(Path(library()).read_bytes())
    for path, flags in ((copy, os.O_RDONLY), (copy, os.O_RDWR), (Path(__file__), os.O_RDONLY)):
        before = Snapshot.of(None)
        descriptor = os.open(path, flags)
        try:
            assert str(path) in open_files()
            with pytest.raises(AssertionError, match=path.name):
                assert_cleaned_up(None, before)
        finally:
            os.close(descriptor)


def test_another_process_and_one_that_is_gone() -> None:
    reading, writing = os.pipe()
    process = subprocess.Popen(["sleep", "50"], stdin=reading)
    pipe = os.readlink(f"/proc/self/fd/{reading}")
    try:
        assert pipe in open_files(process.pid)
    finally:
        process.kill()
        process.wait(20)
        os.close(reading)
        os.close(writing)
    with pytest.raises(OSError, match=str(process.pid)):
        open_files(process.pid)
