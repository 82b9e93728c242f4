"""Whatever waits on a child has a limit that ends it: that tests keep to it, and that the limits hold."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from limits import Limited, status_of

TESTS = Path(__file__).parents[1]
TO_THE_END = frozenset({"subprocess.run", "subprocess.call", "subprocess.check_call", "subprocess.check_output"})
WAITS = frozenset({"wait", "join", "communicate"})
KERNELS = frozenset({"os.wait", "os.waitpid", "os.waitid"})
# Programs that a test, or the lab, runs as processes of their own, and ends.
PROGRAMS = frozenset(
    {
        "conformance/driving.py",
        "conformance/seat.py",
        "lab/blk/front.py",
        "lab/vchan/events.py",
        "lab/vchan/peer.py",
        "machine/kill_program.py",
        "xenstore/probe.py",
    }
)


def without_limit(source: str) -> list[str]:
    """The lines that may wait for ever."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.With):
            opened = [
                ast.unparse(item.context_expr.func) for item in node.items if isinstance(item.context_expr, ast.Call)
            ]
            if "subprocess.Popen" in opened:
                found.append(f"{node.lineno}: with subprocess.Popen; use limits.Limited")
        elif isinstance(node, ast.Call):
            what, named = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
            has_limit = "timeout" in named or None in named  # None: **settings
            if what.endswith("enter_context") and "subprocess.Popen(" in ast.unparse(node):
                found.append(f"{node.lineno}: {what}(subprocess.Popen); use limits.Limited")
            elif what in KERNELS and "WNOHANG" not in ast.unparse(node):
                found.append(f"{node.lineno}: {what}; use limits.status_of")
            elif what in TO_THE_END and not has_limit:
                found.append(f"{node.lineno}: {what} without timeout=")
            elif isinstance(node.func, ast.Attribute) and node.func.attr in WAITS and not has_limit:
                given = [] if node.func.attr == "communicate" else node.args  # its argument is what to say
                if not given:
                    found.append(f"{node.lineno}: {what} without a timeout")
    return found


def test_nothing_waits_for_ever() -> None:
    files = {str(path.relative_to(TESTS)): path for path in TESTS.rglob("*.py")}
    assert files.keys() >= PROGRAMS
    kept = files.keys() - PROGRAMS - {"helpers/limits.py"}
    found = {name: lines for name in sorted(kept) if (lines := without_limit(files[name].read_text()))}
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "with subprocess.Popen(x) as y: pass",
        "with a, subprocess.Popen(x) as y: pass",
        "stack.enter_context(subprocess.Popen(x))",
        "subprocess.run(x, check=True)",
        "subprocess.check_output(x)",
        "process.wait()",
        "process.communicate('text')",
        "thread.join()",
        "_, status = os.waitpid(child, 0)",
    ],
)
def test_what_waits_for_ever_is_found(line: str) -> None:
    assert without_limit(line)


@pytest.mark.parametrize(
    "line",
    [
        "with Limited(x) as y: pass",
        "subprocess.run(x, timeout=5)",
        "subprocess.run(x, **settings)",
        "process.wait(5)",
        "process.communicate('text', timeout=5)",
        "', '.join(words)",
        "os.waitpid(child, os.WNOHANG)",
    ],
)
def test_what_has_a_limit_is_left_alone(line: str) -> None:
    assert not without_limit(line)


SLEEPS = (sys.executable, "-c", "import time; time.sleep(1000)")


def test_a_child_does_not_outlive_a_failure() -> None:
    with pytest.raises(KeyError), Limited(SLEEPS) as child:
        raise KeyError
    assert child.returncode == -signal.SIGKILL


def test_a_child_does_not_outlive_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limits.LIMIT", 0.2)
    with pytest.raises(subprocess.TimeoutExpired), Limited(SLEEPS) as child:
        pass
    assert child.returncode == -signal.SIGKILL


def test_nor_does_one_that_was_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limits.LIMIT", 0.2)
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    with pytest.raises(subprocess.TimeoutExpired):
        status_of(child)
    with pytest.raises(ChildProcessError):
        os.waitpid(child, os.WNOHANG)


HANGS = """
import threading
def test_hangs():
    try: threading.Event().wait()
    finally: threading.Event().wait()
def test_next(): pass
"""


def test_what_cleans_up_after_the_time_is_over_has_a_limit_too(tmp_path: Path) -> None:
    (tmp_path / "test_hangs.py").write_text(HANGS)
    command = [sys.executable, "-m", "pytest", "-p", "limits", "-p", "no:cacheprovider", "--timeout=1", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS / "helpers")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=50
    )
    assert "1 failed, 1 passed" in done.stdout, done
