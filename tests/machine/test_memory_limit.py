"""Where there is no more memory for pages, whoever asks is told so (ENOMEM), and the machine lives on."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import gntalloc
from gntalloc.headroom import MARGIN, Headroom

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gntalloc import Machine

MIB = 1 << 20

GREEDY = """
import sys, gntalloc
with gntalloc.Machine(limit=1_000_000) as machine:
    alice, bob = machine.domain(1), machine.domain(2)
    for pages in (int(sys.argv[1]), 16):
        got = []
        try:
            while True:
                got.append(alice.share(2, pages))
                assert len(got) < 20_000
        except gntalloc.DeviceError as error:
            print(error.errno, len(got), error)
        for shared in got:
            shared.close()
    alice.share(2, 4).close()
    print("the machine lives:", len(machine.statistics().domains))
    alice.close(), bob.close()
"""


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def proc(folder: Path, group: str) -> str:
    write(folder / "self", cgroup=group)
    write(folder, meminfo="MemTotal: 99999999 kB\nMemAvailable: 90000000 kB\nSwapFree: 0 kB")
    return str(folder)


@pytest.mark.parametrize(
    ("group", "where", "limit", "usage"),
    [
        ("0::/", "", "memory__max", "memory__current"),
        ("0::/a/b", "a", "memory__max", "memory__current"),
        ("0::/a/b", "a/b", "memory__max", "memory__current"),
        ("0::/../x", "", "memory__max", "memory__current"),
        ("4:cpu,memory:/a\n0::/", "memory/a", "memory__limit_in_bytes", "memory__usage_in_bytes"),
        ("4:memory:/not/seen/here", "memory", "memory__limit_in_bytes", "memory__usage_in_bytes"),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, group: str, where: str, limit: str, usage: str) -> None:
    files = {limit: 100 * MIB, usage: 70 * MIB, "memory__stat": f"anon 5\ninactive_file {10 * MIB}"}
    if "limit" in limit:
        files["memory__stat"] = f"inactive_file 5\ntotal_inactive_file {10 * MIB}"
    write(tmp_path / "groups" / where, **files)
    headroom = Headroom(str(tmp_path / "groups"), proc(tmp_path / "proc", group))
    assert headroom.shortage(40 * MIB - MARGIN) is None
    assert "leaves 40960 KiB" in str(headroom.shortage(40 * MIB - MARGIN + 1))


def test_no_limit_and_nothing_to_be_seen(tmp_path: Path) -> None:
    write(tmp_path / "groups", memory__max="max", memory__current=5)
    assert Headroom(str(tmp_path / "groups"), proc(tmp_path / "proc", "0::/")).shortage(1 << 30) is None
    assert Headroom("/nothing", "/nothing").shortage(1 << 30) is None


def test_a_computer_that_is_full(tmp_path: Path) -> None:
    folder = proc(tmp_path, "0::/")
    write(tmp_path, meminfo="MemAvailable: 10240 kB\nSwapFree: 1024 kB")
    assert "this computer's memory leaves 11264 KiB" in str(Headroom("/nothing", folder).shortage(10 * MIB))
    assert Headroom("/nothing", folder).shortage(1 * MIB) is None


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_machine_with_little_address_space(make_machine: Callable[..., Machine], limit: str) -> None:
    machine = make_machine(limit=1_000_000)
    alice, bob = machine.domain(1), machine.domain(2)
    column = 0 if limit == "RLIMIT_AS" else 5
    used = int(Path(f"/proc/{machine.pid}/statm").read_text().split()[column]) * resource.getpagesize()
    resource.prlimit(machine.pid, getattr(resource, limit), (used + MARGIN + 2 * MIB,) * 2)
    with pytest.raises(gntalloc.DeviceError, match="ulimit -") as refused:
        alice.share(bob, 100_000)
    assert refused.value.errno == errno.ENOMEM
    pairs: list[gntalloc.SharedPages | gntalloc.MappedPages] = []

    def take_all() -> None:
        while len(pairs) < 100_000:
            shared = alice.share(bob, writable=True)
            pairs.insert(0, shared)
            pairs.insert(0, bob.map(shared.grant))

    with pytest.raises(gntalloc.DeviceError) as refused:
        take_all()
    assert refused.value.errno in {errno.ENOMEM, errno.ENOSPC}
    for pages in pairs:
        pages.close()
    assert len(machine.statistics().domains) == 2
    alice.close()
    bob.close()


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 64 MiB, where one can be made."""
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    path = next((path for _, names, path in groups if "memory" in names.split(",")), None)
    parent, limit = Path(f"/sys/fs/cgroup/memory{path}"), "memory.limit_in_bytes"
    if path is None:
        parent, limit = (
            Path("/sys/fs/cgroup" + next((path for number, _, path in groups if number == "0"), "/")),
            "memory.max",
        )
    group = parent / f"gntalloc-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        try:
            (group / limit).write_text(str(64 * MIB))
        except OSError as error:
            pytest.skip(f"no limit of memory can be set here: {error}")
        yield group
    finally:
        group.rmdir()


def test_a_container_s_limit(small_group: Path) -> None:
    """The kernel would kill the machine, if it took what it is asked for."""
    enter = f'echo $$ >"{small_group}/cgroup.procs" && exec "$@"'
    command = ["sh", "-c", enter, "sh", sys.executable, "-c", GREEDY, "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    for line in (first, second):
        code, count, why = line.split(" ", 2)
        assert int(code) == errno.ENOMEM
        assert int(count) > 0
        assert str(small_group) in why
    assert last == "the machine lives: 2"
