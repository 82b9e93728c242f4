"""The probes of what `gntalloc run` needs. Each is tried in a child, since it cannot be undone.

What the child does is in `run/selftest.py`.
"""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from functools import partial

import gntalloc
from gntalloc.cli.probe import Lacking, Probe, probe, setting

__all__ = ["PROBES"]

PROBES: list[Probe] = []
_probe = partial(probe, PROBES)


_TRIAL = """
import sys
sys.path.insert(0, sys.argv[1])
from gntalloc.run import selftest
try: print(getattr(selftest, sys.argv[2])())
except OSError as error:
    print(error.strerror or error, file=sys.stderr)
    sys.exit(error.errno or 1)
"""


@_probe(
    "seccomp notification",
    "unmodified programs (run)",
    "Linux 5.14 or newer on x86-64; in a container: --security-opt seccomp=unconfined",
    of_run=True,
)
def seccomp() -> str:
    """Have a child's open brought to us, and answer it with a descriptor."""
    if platform.machine() != "x86_64":
        raise Lacking(f"programs for {platform.machine()} cannot be served")
    return _in_child("notification")


@_probe(
    "a child's memory",
    "unmodified programs (run)",
    "sysctl -w kernel.yama.ptrace_scope=1 (or 0); in a container: --security-opt seccomp=unconfined, or --cap-add "
    "SYS_PTRACE",
    of_run=True,
)
def memory() -> str:
    """Read the memory that a child's call points to (process_vm_readv)."""
    return _with_scope("memory")


@_probe(
    "ptrace",
    "maps in unmodified programs (run)",
    "sysctl -w kernel.yama.ptrace_scope=1 (or 0); in a container: --security-opt seccomp=unconfined, or --cap-add "
    "SYS_PTRACE; not under strace or gdb",
    of_run=True,
)
def ptrace() -> str:
    """Map a page in a child that does not know this package."""
    return _with_scope("placing")


@_probe(
    "user namespaces",
    "domains of one user that cannot reach each other (run --userns)",
    "sysctl -w user.max_user_namespaces=10000, kernel.unprivileged_userns_clone=1 (Debian) or "
    "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu); or run as root",
)
def user_namespaces() -> str:
    """Enter one in a child, and write its ids."""
    return _in_child("namespace")


def _with_scope(trial: str) -> str:
    """Run a trial, and name the setting that decides about it."""
    try:
        scope = f"kernel.yama.ptrace_scope is {setting('kernel/yama/ptrace_scope')}"
    except OSError:
        scope = "no Yama"
    try:
        return f"{_in_child(trial)}; {scope}"
    except Lacking as lack:
        raise Lacking(f"{lack}; {scope}", lack.advice) from None


def _in_child(trial: str) -> str:
    """Run a trial of `run/selftest.py` in another Python, since it cannot be undone. Return what the trial found."""
    where = os.path.dirname(os.path.dirname(os.path.abspath(gntalloc.__file__)))
    command = [sys.executable, "-I", "-S", "-c", _TRIAL, where, trial]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=20, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise Lacking("it did not come to an end within 20 s") from None
    if done.returncode == errno.EBUSY:
        raise Lacking(
            "another process serves our system calls already: `gntalloc run`, or a container's keeper",
            "run the doctor outside of `gntalloc run`: a process has one supervisor",
        )
    if done.returncode != 0:
        raise Lacking((done.stderr.strip().splitlines() or [f"the child ended with {done.returncode}"])[-1])
    return done.stdout.strip()
