"""Programs as distributions ship them, and channels whose two ends are C's and ours."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from runs import said, tell

if TYPE_CHECKING:
    from collections.abc import Callable

    from runs import Runs

    Build = Callable[..., str]

PATH = "/local/domain/1/data/vchan/test"
PATTERN = "def pattern(at, size): return bytes((n * 31 + (n >> 12)) & 255 for n in range(at, at + size))\n"
OURS = "import gntalloc, os, sys\nhere = gntalloc.current_domain()\n" + PATTERN
SEATS: dict[str, tuple[str, ...]] = {"joined": (), "served": ("env", "GNTALLOC_DOMAIN=/dev/xen")}
SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
RINGS = [2000, 65536]  # beside each other in the page, and of pages of their own


def python(seat: str, code: str) -> tuple[str, ...]:
    """A program of ours: it joins the domain without a detour, or opens /dev/xen as any other."""
    return (*SEATS[seat], sys.executable, "-c", OURS + code)


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("seat", SEATS)
def test_a_client_in_c_of_a_server_of_ours(runs: Runs, build: Build, seat: str, ring: int) -> None:
    code = f"""
with here.listen(2, {PATH!r}, size={ring}) as listener:
    print('listening', flush=True)
    channel = listener.accept(timeout=30)
while data := channel.read(timeout=30): channel.write(data, timeout=30)
print('over', flush=True)
"""
    server = runs.start(1, *python(seat, code))
    assert said(server) == "listening"
    done = runs(2, build("vchan", "-O2"), "client", "1", PATH, "0", "ask", "50", "1500")
    assert (done.returncode, done.stderr) == (0, "")
    assert said(server) == "over"
    assert server.wait(20) == 0


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("seat", SEATS)
def test_a_client_of_ours_of_a_server_in_c(runs: Runs, build: Build, seat: str, ring: int) -> None:
    server = runs.start(1, build("vchan", "-O2"), "server", "2", PATH, str(ring), "echo", "0", "4096")
    assert said(server) == "listening"
    code = f"""
channel = here.connect(1, {PATH!r}, timeout=30)
for n in range(50):
    data, back = os.urandom(1500), b''
    channel.write(data, timeout=30)
    while len(back) < len(data): back += channel.read(timeout=30)
    assert back == data
channel.close(); print('same')
"""
    done = runs(2, *python(seat, code))
    assert (done.stdout, done.stderr) == ("same\n", "")
    assert server.wait(20) == 0


@pytest.mark.parametrize("ring", RINGS)
def test_bulk_from_c_to_us_and_back(runs: Runs, build: Build, ring: int) -> None:
    """Each end checks each byte."""
    size = 1 << 20
    code = f"""
channel = here.connect(1, {PATH!r}, timeout=30)
whole, at = pattern(0, {size}), 0
while at < {size}:
    data = channel.read(timeout=30)
    assert data == whole[at:at + len(data)], at
    at += len(data)
channel.write(b'!', timeout=30)
try: channel.read(timeout=30)
except gntalloc.PeerClosed: pass
print(at)
"""
    server = runs.start(1, build("vchan", "-O2"), "server", "2", PATH, str(ring), "pour", str(size), "512")
    assert said(server) == "listening"
    done = runs(2, *python("joined", code))
    assert (done.stdout, done.stderr) == (f"{size}\n", "")
    assert server.wait(20) == 0
    code = f"""
with here.listen(2, {PATH!r}, size={ring}) as listener:
    print('listening', flush=True)
    channel = listener.accept(timeout=30)
channel.write(pattern(0, {size}), timeout=30)
print(channel.read(1, timeout=30))
"""
    poured = runs.start(1, *python("joined", code))
    assert said(poured) == "listening"
    done = runs(2, build("vchan", "-O2"), "client", "1", PATH, "0", "drain", str(size), "512")
    assert (done.returncode, done.stderr) == (0, "")
    assert said(poured) == "b'!'"


def vchan_socket_proxy() -> str:
    """Debian's, installed, or unpacked by .ci/run."""
    root = Path(__file__).parents[2]
    for folder in (Path("/"), root / "build/xen-utils"):
        for found in sorted(folder.glob("usr/lib/xen-*/bin/vchan-socket-proxy")):
            return str(found)
    pytest.skip("there is no vchan-socket-proxy: see .ci/run, which unpacks it from xen-utils")


@pytest.mark.timeout(300)
def test_megabytes_through_the_proxy_of_xen(runs: Runs) -> None:
    """There, and a tenth of it back at the same time, through small rings. It asks /dev/xen/privcmd for its peer.

    GNTALLOC_STORM=1 sends 50 MB, which takes most of a minute on a busy computer.
    """
    proxy = vchan_socket_proxy()
    size = 50_000_000 if os.environ.get("GNTALLOC_STORM") else 10_000_000
    there, back = random.Random(1).randbytes(size), random.Random(2).randbytes(size // 10)
    binary: dict[str, Any] = {"text": False, "bufsize": 0}
    server = runs.start(1, proxy, "-m", "server", "2", PATH, "-", **binary)
    client = runs.start(2, proxy, "-m", "client", "1", PATH, "-", **binary)
    got: dict[str, str] = {}

    def receive(name: str, process: subprocess.Popen[Any], size: int) -> None:
        digest = hashlib.sha256()
        assert process.stdout is not None
        while size and (data := process.stdout.read(min(size, 1 << 16))):
            digest.update(data)
            size -= len(data)
        got[name] = digest.hexdigest()

    def send(process: subprocess.Popen[Any], data: bytes) -> None:
        assert process.stdin is not None
        view = memoryview(data)
        while view:
            view = view[process.stdin.write(view[: 1 << 16]) :]

    work = [
        threading.Thread(target=receive, args=("there", server, len(there)), daemon=True),
        threading.Thread(target=receive, args=("back", client, len(back)), daemon=True),
        threading.Thread(target=send, args=(client, there), daemon=True),
        threading.Thread(target=send, args=(server, back), daemon=True),
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join(200)
    assert got == {"there": hashlib.sha256(there).hexdigest(), "back": hashlib.sha256(back).hexdigest()}
    client.communicate(timeout=20)  # closes its input; what it has not passed on when it sees that is lost
    server.communicate(timeout=20)
    assert (client.returncode, server.returncode) == (0, 0)


@pytest.mark.skipif(
    shutil.which("xenstore-ls") is None, reason="the tools of xenstore are not there (apt install xenstore-utils)"
)
def test_the_tools_of_xenstore(runs: Runs) -> None:
    watch = runs.start(2, "xenstore-watch", "-n", "2", "/local/domain/1/data/note")
    assert said(watch) == "/local/domain/1/data/note"
    script = """
set -e
xenstore-write data/note hello data/other/deep there
xenstore-chmod data/note n1 r2
xenstore-read domid data/note
xenstore-list data
xenstore-ls data
xenstore-exists data/none || echo none
xenstore-rm data/other
xenstore-list data
"""
    done = runs(1, "sh", "-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        *("1", "hello"),
        *("note", "other"),
        *('note = "hello"', 'other = ""', ' deep = "there"'),
        *("none", "note"),
    ]
    assert said(watch) == "/local/domain/1/data/note"
    assert watch.wait(20) == 0


@pytest.mark.parametrize("debugger", ["gdb", "strace"])
def test_a_debugger_that_comes_when_the_pages_are_mapped(runs: Runs, build: Build, debugger: str) -> None:
    """It looks at the program's memory and goes; the program goes on as if nothing had been."""
    if shutil.which(debugger) is None:
        pytest.skip(f"there is no {debugger} (apt install {debugger})")
    if os.getuid() and SCOPE.exists() and SCOPE.read_text().strip() != "0":
        pytest.skip("kernel.yama.ptrace_scope lets only root attach to a program that runs")
    granter = runs.start(1, "sh", "-c", 'echo $$; exec "$@"', "sh", build("share"), "2", "1", "1", "hello")
    process = said(granter)
    (ref,) = said(granter).split()
    if debugger == "gdb":
        command = ["gdb", "-nx", "-batch", "-p", process, "-ex", "info proc mappings"]
    else:
        command = ["timeout", "-s", "INT", "1", "strace", "-f", "-p", process]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert ("memfd:gntalloc" in done.stdout) if debugger == "gdb" else ("attached" in done.stderr)
    assert runs(2, build("map"), "1", "1", ref).stdout == "hello 0\n"
    tell(granter, "?")
    assert said(granter) == "answer"
    granter.communicate(timeout=20)
    assert granter.returncode == 0


@pytest.mark.parametrize("device", ["gntalloc", "gntdev", "evtchn", "privcmd", "xenbus"])
def test_a_device_is_no_folder(runs: Runs, device: str) -> None:
    code = f"""
import errno, os
for flags in os.O_DIRECTORY, os.O_TMPFILE:
    try: os.open('/dev/xen/{device}', os.O_RDWR | flags)
    except OSError as error: print(errno.errorcode[error.errno])
"""
    done = runs(1, sys.executable, "-c", code)
    assert (done.stdout, done.stderr) == ("ENOTDIR\nENOTDIR\n", "")
