"""`gntalloc cat`: processes joined by pipes, as people use it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from limits import status_of

from gntalloc.vchan.pump import pump

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gntalloc import Domain, Machine

    Cat = Callable[..., subprocess.Popen[bytes]]

PATIENCE = 30.0


@pytest.fixture
def cat(machine: Machine) -> Iterator[Cat]:
    """Starts `gntalloc cat` in a domain."""
    with ExitStack() as stack:

        def start(domid: int, *arguments: str, **settings: Any) -> subprocess.Popen[bytes]:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
            command = [sys.executable, "-m", "gntalloc", "cat", *arguments]
            process: subprocess.Popen[bytes] = subprocess.Popen(command, env=machine.environ(domid), **pipes)
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield start


def test_both_ways_and_each_end_by_itself(cat: Cat) -> None:
    server, client = cat(1, "-l", "2", "test", "--size", "65536"), cat(2, "1", "test")
    assert client.stdin
    assert client.stdout
    assert server.stdin
    assert server.stdout
    client.stdin.write(b"question")
    client.stdin.close()
    client.stdin = None
    assert server.stdout.read() == b"question"  # to the end: the client's direction is over
    server.stdin.write(b"answer")
    server.stdin.close()
    server.stdin = None
    assert client.stdout.read() == b"answer"
    assert (client.wait(PATIENCE), server.wait(PATIENCE)) == (0, 0)
    assert (client.stderr.read(), server.stderr.read()) == (b"", b"")  # type: ignore[union-attr]


@pytest.mark.parametrize("size", ["0", "2048", "60000"])
def test_a_tree_arrives_unharmed(cat: Cat, tmp_path: Path, size: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for number in range(20):
        folder = source / f"folder {number}"
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(os.urandom(number * 10_001))
        (folder / "empty").touch()
        (folder / "link").symlink_to("file")
    server = cat(1, "-l", "2", "tree", "--size", size, stdin=subprocess.DEVNULL)
    client = cat(2, "1", "tree", stdout=subprocess.DEVNULL)
    assert server.stdout
    target.mkdir()
    packing = subprocess.Popen(["tar", "-c", "-C", tmp_path, "source"], stdout=client.stdin)
    assert client.stdin
    client.stdin.close()
    client.stdin = None
    subprocess.run(["tar", "-x", "-C", target], stdin=server.stdout, timeout=PATIENCE, check=True)
    assert packing.wait(PATIENCE) == 0
    assert (client.wait(PATIENCE), server.wait(PATIENCE)) == (0, 0)
    compared = subprocess.run(["diff", "-r", "--no-dereference", source, target / "source"], check=False, timeout=50)
    assert compared.returncode == 0


def test_a_killed_peer_is_a_failure_and_is_named(cat: Cat) -> None:
    server, client = cat(1, "-l", "2", "test", "--size", "0"), cat(2, "1", "test")
    assert client.stdin
    assert server.stdout
    client.stdin.write(b"x")
    client.stdin.flush()
    assert server.stdout.read(1) == b"x"
    client.kill()
    _, errors = server.communicate(timeout=PATIENCE)
    assert server.returncode == 1
    assert b"ended without closing" in errors


def test_ctrl_c(cat: Cat) -> None:
    server, client = cat(1, "-l", "2", "test", "--size", "0"), cat(2, "1", "test")
    assert client.stdin
    assert server.stdout
    client.stdin.write(b"x")
    client.stdin.flush()
    assert server.stdout.read(1) == b"x"
    client.send_signal(signal.SIGINT)
    assert client.wait(PATIENCE) == 130
    assert server.wait(PATIENCE) == 0  # it was closed, and everything was read
    waiting = cat(1, "-l", "2", "test", "--size", "0")
    assert server.stdout.read() == b""
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(PATIENCE) in {130, -signal.SIGINT}  # before Python's own handler is there


def test_who_reads_no_more_ends_both(cat: Cat) -> None:
    server, client = cat(1, "-l", "2", "test", "--size", "4096", stdin=subprocess.DEVNULL), cat(2, "1", "test")
    assert server.stdout
    assert client.stdin
    server.stdout.close()
    server.stdout = None
    client.stdin.write(b"x" * 1000)
    client.stdin.flush()
    assert server.wait(PATIENCE) == 1
    assert client.wait(PATIENCE) in {0, 1}


def test_nobody_there(cat: Cat) -> None:
    client = cat(2, "1", "none", "--timeout", "0.1")
    _, errors = client.communicate(timeout=PATIENCE)
    assert client.returncode == 124  # as `timeout` says it
    assert b"no server waits at /local/domain/1/data/vchan/2/none" in errors


def test_wrong_usage(cat: Cat) -> None:
    client = cat(2, "one", "none")
    client.communicate(timeout=PATIENCE)
    assert client.returncode == 2


def test_no_domain() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GNTALLOC_DOMAIN"}
    command = [sys.executable, "-m", "gntalloc", "cat", "1", "test"]
    outcome = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=50
    )
    assert outcome.returncode == 3


def test_progress_is_shown_on_a_terminal_only(cat: Cat) -> None:
    ours, theirs = pty.openpty()
    server = cat(1, "-l", "2", "test", "--size", "0", stdin=subprocess.DEVNULL, stderr=theirs)
    client = cat(2, "1", "test", stdout=subprocess.DEVNULL)
    os.close(theirs)
    out, errors = client.communicate(b"x" * 3000, timeout=PATIENCE)
    assert not out
    assert errors == b""
    assert server.wait(PATIENCE) == 0
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:
        pass
    os.close(ours)
    assert "⇄".encode() in shown


@pytest.mark.parametrize("mine", [b"", b"some"])
def test_towards_a_libxenvchan(cat: Cat, bob: Domain, mine: bytes, tmp_path: Path) -> None:
    """The end of our input is the end of all, once everything was read; if there was no input, theirs is waited for."""
    server = cat(1, "-l", "2", "test", "--size", "0", "--linger", "0")
    assert server.stdin
    with bob.connect(1, "test", timeout=PATIENCE, extensions=False) as channel:
        server.stdin.write(mine)
        server.stdin.close()
        server.stdin = None
        if mine:
            assert channel.read(timeout=PATIENCE) == mine
            assert channel.read(timeout=PATIENCE) == b""
        else:
            channel.write(b"theirs")
            channel.drain(timeout=PATIENCE)
    out, _ = server.communicate(timeout=PATIENCE)
    assert out == (b"" if mine else b"theirs")
    assert server.returncode == 0


@pytest.mark.parametrize("extensions", [None, False], ids=["ours", "libxenvchan"])
@pytest.mark.parametrize("more", [b"", b"more"], ids=["the end follows", "more follows"])
def test_a_peer_that_reads_what_there_is_and_closes(
    cat: Cat, bob: Domain, extensions: bool | None, more: bytes
) -> None:
    """It closes before our input ends: everything arrived, unless more is to be sent then."""
    server = cat(1, "-l", "2", "test", "--size", "4096")
    assert server.stdin
    assert server.stdout
    with bob.connect(1, "test", timeout=PATIENCE, extensions=extensions) as channel:
        server.stdin.write(b"x" * 10_000)
        server.stdin.flush()
        left = 10_000
        while left:
            left -= len(channel.read(timeout=PATIENCE))
        os.kill(server.pid, signal.SIGSTOP)  # so that it finds both at once
        assert os.WIFSTOPPED(status_of(server.pid, os.WUNTRACED))
        channel.write(b"!")
    server.stdin.write(more)
    server.stdin.close()
    server.stdin = None
    os.kill(server.pid, signal.SIGCONT)
    out, errors = server.communicate(timeout=PATIENCE)
    assert (out, server.returncode) == (b"!", 1 if more else 0), errors
    assert (b"closed its end" in errors) == bool(more)


def test_a_libxenvchan_that_has_read_everything_may_answer(cat: Cat, bob: Domain) -> None:
    server = cat(1, "-l", "2", "test", "--size", "0", "--linger", str(PATIENCE))
    with bob.connect(1, "test", timeout=PATIENCE, extensions=False) as channel:
        server.stdin.write(b"question")  # type: ignore[union-attr]
        server.stdin.close()  # type: ignore[union-attr]
        server.stdin = None
        assert channel.read(timeout=PATIENCE) == b"question"
        for _ in range(3):
            channel.write(b"answer")
            channel.drain(timeout=PATIENCE)
    out, errors = server.communicate(timeout=PATIENCE)
    assert (out, server.returncode) == (b"answer" * 3, 0), errors


def test_bytes_that_the_peer_did_not_read_are_a_failure(alice: Domain, bob: Domain, tmp_path: Path) -> None:
    with (
        alice.listen(2, "test") as listener,
        open(os.devnull, "r+b") as nothing,
        (tmp_path / "in").open("w+b") as source,
    ):
        source.write(b"unread")
        source.seek(0)
        listener.offer()
        other = bob.connect(1, "test", timeout=PATIENCE)
        channel = listener.accept(timeout=PATIENCE)

        def moved(_count: int) -> None:
            other.close()

        with pytest.raises(ConnectionError, match="closed"):
            pump(channel, source.fileno(), nothing.fileno(), moved=moved)
        assert channel.closed
