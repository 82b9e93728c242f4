"""`gntalloc demo`, run as a person and as a program would run it."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from gntalloc.places import top_folder

if TYPE_CHECKING:
    from pathlib import Path

DEMO = [sys.executable, "-m", "gntalloc", "demo"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DEMO, *arguments], capture_output=True, text=True, timeout=50, check=False)


def test_without_a_file_it_streams_256_mib_and_plays_the_scenes() -> None:
    done = run()
    assert done.stderr == ""
    assert done.returncode == 0
    pids = re.findall(r"^(machine|granter|grantee) +pid (\d+)", done.stdout, re.MULTILINE)
    assert [who for who, _ in pids] == ["machine", "granter", "grantee"]
    assert len({pid for _, pid in pids}) == 3
    assert "moved                268435456 bytes" in done.stdout
    assert "moved any other way  0 bytes; descriptors in common: none" in done.stdout
    sent, received = re.findall(r"SHA-256 \w+ +([0-9a-f]{64})", done.stdout)
    assert sent == received
    assert re.findall(r"^(\d)\. ", done.stdout, re.MULTILINE) == ["1", "2", "3", "4"]
    assert "WRONG" not in done.stdout


@pytest.mark.parametrize("size", [0, 1, 4096 * 7, 4096 * 7 - 1, 1_000_003])
def test_a_file_of_any_size_arrives(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    done = run("--json", "--pages", "7", str(tmp_path / "file"))
    assert done.stderr == ""
    outcome = json.loads(done.stdout)
    assert outcome["moved"] == size
    assert outcome["read_bytes"] == 0
    assert outcome["received"] == outcome["sent"] == hashlib.sha256(data).hexdigest()


def test_every_answer_of_the_kernel_in_the_scenes() -> None:
    scenes = json.loads(run("--json", __file__).stdout)["scenes"]
    assert [line["answer"].split()[0] for line in scenes[0]["lines"]] == [
        *("opened", "EPERM", "EPERM", "EPERM", "EACCES", "EIO", "SIGSEGV", "unchanged", "it"),
    ]
    assert all(line["as_it_must_be"] for scene in scenes for line in scene["lines"])


def test_a_file_that_is_not_there_is_an_error_of_usage() -> None:
    done = run("/no/such/file")
    assert done.returncode == 2
    assert "/no/such/file" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_it_all(tmp_path: Path) -> None:
    """A source that never ends: Ctrl-C in the middle leaves no process and no folder."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    demo = subprocess.Popen([*DEMO, str(fifo)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert demo.stdout is not None
    pids = [int(re.findall(r"pid (\d+)", demo.stdout.readline())[0]) for _ in range(3)]
    with open(fifo, "wb") as writer:
        writer.write(b"x" * 100_000)
        writer.flush()
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=20)
    assert demo.returncode == 130
    assert errors.strip() == "interrupted"
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []
    assert not os.path.exists(os.path.join(top_folder(), f"of-{demo.pid}-1"))


def test_the_grantee_killed_in_the_middle_is_said_and_ends_it(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    demo = subprocess.Popen([*DEMO, str(fifo)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert demo.stdout is not None
    grantee = [int(re.findall(r"pid (\d+)", demo.stdout.readline())[0]) for _ in range(3)][2]
    with open(fifo, "wb") as writer:
        writer.write(b"x" * 100_000)
        writer.flush()
        os.kill(grantee, signal.SIGKILL)
    _, errors = demo.communicate(timeout=20)
    assert demo.returncode == 1
    assert "ended in the middle" in errors
    assert "Traceback" not in errors


def test_a_reader_that_leaves_is_no_traceback() -> None:
    demo = subprocess.Popen([*DEMO, __file__], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert demo.stdout is not None
    demo.stdout.readline()
    demo.stdout.close()
    assert demo.stderr is not None
    with demo.stderr:
        assert demo.stderr.read() == ""
    assert demo.wait(20) == 1


def test_on_a_terminal_there_is_a_progress_bar_and_a_table(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(50_000_000))
    ours, theirs = pty.openpty()
    demo = subprocess.Popen([*DEMO, str(tmp_path / "file")], stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:
            break
    os.close(ours)
    assert demo.wait(20) == 0
    text = shown.decode()
    assert "granter → grantee" in text
    assert "50.0 MB" in text or "47.7/47.7 MiB" in text
    assert "━" in text
