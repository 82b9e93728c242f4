"""The probes try the real thing, so these tests take the real thing away and see that it is missed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from gntalloc.cli import probes, run_probes
from gntalloc.cli.doctor import look_at_everything
from gntalloc.cli.probe import Finding, Lacking, Probe, look

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


PROBES = [*probes.PROBES, *run_probes.PROBES]


def probe(name: str) -> Finding:
    return look(next(probe for probe in PROBES if probe.name == name))


@pytest.fixture
def fcntl_answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, object], None]:
    """Make one fcntl command return something, or raise it."""

    def answer(command: int, outcome: object) -> None:
        real = fcntl.fcntl

        def fake(fd: int, asked: int, argument: Any = 0) -> object:
            if asked != command:
                return real(fd, asked, argument)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(fcntl, "fcntl", fake)

    return answer


def test_this_computer_can_run_the_tests() -> None:
    findings = look_at_everything()
    assert [finding for finding in findings if finding.required and not finding.ok] == []
    assert [finding.required for finding in findings] == sorted(
        (finding.required for finding in findings), reverse=True
    )
    assert len({finding.name for finding in findings}) == len(findings)
    assert all(finding.found and finding.purpose for finding in findings)
    assert [finding.name for finding in findings if not finding.advice] == [
        finding.name for finding in findings if finding.ok
    ]


def test_probes_leave_nothing_behind() -> None:
    look_at_everything()
    before = os.listdir("/proc/self/fd")
    look_at_everything()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("trouble", "found"),
    [
        (Lacking("nothing there"), "nothing there"),
        (PermissionError(errno.EPERM, "Operation not permitted"), "Operation not permitted (EPERM)"),
        (OSError("odd"), "odd (no errno)"),
        (AttributeError("memfd_create"), "AttributeError: memfd_create"),
    ],
)
def test_trouble_is_a_finding(trouble: Exception, found: str) -> None:
    def attempt() -> str:
        raise trouble

    finding = look(Probe("x", "tests", "do this", required=True, attempt=attempt))
    assert finding == Finding("x", ok=False, required=True, found=found, purpose="tests", advice="do this")


def test_an_old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "4.19.0-27-amd64")
    assert probe("Linux").found == "4.19.0-27-amd64 is too old"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not probe("Linux").ok


def test_no_memory_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    names = ("/proc", "memory files that can be sealed", "OFD locks", "write leases", "inotify", "passing descriptors")
    for name in names:
        assert probe(name).found == "Operation not permitted (EPERM)"


def test_seals_that_are_refused(fcntl_answers: Callable[[int, object], None]) -> None:
    fcntl_answers(fcntl.F_ADD_SEALS, OSError(errno.EINVAL, "Invalid argument"))
    assert probe("memory files that can be sealed").found == "Invalid argument (EINVAL)"


def test_seals_without_effect(fcntl_answers: Callable[[int, object], None]) -> None:
    fcntl_answers(fcntl.F_ADD_SEALS, 0)
    assert "can still be mapped for writing" in probe("memory files that can be sealed").found


def test_locks_that_nobody_sees(fcntl_answers: Callable[[int, object], None]) -> None:
    fcntl_answers(fcntl.F_OFD_SETLK, 0)
    assert probe("OFD locks").found == "a lock is not seen by others"


def test_leases_that_are_always_given(fcntl_answers: Callable[[int, object], None]) -> None:
    fcntl_answers(fcntl.F_SETLEASE, 0)
    assert "although the file is open a second time" in probe("write leases").found


def test_leases_that_are_never_given(fcntl_answers: Callable[[int, object], None]) -> None:
    fcntl_answers(fcntl.F_SETLEASE, BlockingIOError(errno.EAGAIN, "try again"))
    assert probe("write leases").found == "try again (EAGAIN)"


def test_silent_inotify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_IN_CLOSE", 0x4)  # of attributes, which do not change
    assert "nothing was said" in probe("inotify").found


@pytest.mark.parametrize(
    ("hard", "ok", "found"),
    [
        (191, False, "hard limit 191: 127 live allocations"),
        (192, True, "hard limit 192: 128 live allocations"),
        (10, False, "hard limit 10: 0 live allocations"),
        (resource.RLIM_INFINITY, True, "hard limit none"),
    ],
)
def test_descriptors(monkeypatch: pytest.MonkeyPatch, hard: int, ok: bool, found: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10, hard))
    finding = probe("descriptors")
    assert finding.ok == ok
    assert finding.found.endswith(found)


def test_passing_the_wrong_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.send_fds
    monkeypatch.setattr(socket, "send_fds", lambda to, data, fds: real(to, data, [to.fileno() for _ in fds]))
    assert probe("passing descriptors").found == "another file arrived"


def test_xen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    devices = [tmp_path / name for name in ("gntalloc", "gntdev", "evtchn")]
    monkeypatch.setattr(probes, "_XEN_DEVICES", tuple(map(str, devices)))
    assert probe("real Xen").found.startswith("not a Xen domain")
    devices[0].touch()
    assert probe("real Xen").found == f"only {devices[0]}"
    for path in devices[1:]:
        path.touch()
    assert probe("real Xen").found.endswith("can be opened")
    monkeypatch.setattr(
        os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied"))
    )
    finding = probe("real Xen")
    assert finding.found == "Permission denied (EACCES)"
    assert "be root" in finding.advice


def test_no_libatomic(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    finding = probe("libatomic")
    assert (finding.ok, finding.required, finding.advice) == (False, False, "apt install libatomic1")


def test_a_child_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a child cannot do is tried for real in cli/test_doctor.py."""
    monkeypatch.setattr(run_probes, "_TRIAL", "import os; os._exit(3)")
    assert probe("ptrace").found.startswith("the child ended with 3; ")


def test_another_kind_of_computer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert probe("seccomp notification").found == "programs for aarch64 cannot be served"


@pytest.mark.parametrize("name", ["QEMU", "mke2fs", "C compiler"])
def test_programs_that_are_not_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    finding = probe(name)
    assert not finding.ok
    assert "there" in finding.found
    assert finding.advice.startswith("apt install")


def test_a_program_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "/usr/bin/broken")
    done = SimpleNamespace(stdout="", stderr="cannot open shared object", returncode=127)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert probe("QEMU").found == "/usr/bin/broken --version ended with 127"
