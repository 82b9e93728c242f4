"""Images: what is served and what is refused, who else may use one, holes, a full disk, one that grows."""

from __future__ import annotations

import asyncio
import bz2
import errno
import fcntl
import gzip
import itertools
import lzma
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from struct import Struct
from typing import TYPE_CHECKING, Any

import pytest
from fuse import GETATTR, silent_files
from tests.frontend.conftest import DEVICE, PATIENCE, serve
from tests.frontend.kit import SIZE, run

from gntalloc import DeviceError, PeerClosed, aio
from gntalloc.errors import Busy
from gntalloc.frontend.blkback import Backend
from gntalloc.frontend.extents import MOST, Extent, pack, parse
from gntalloc.frontend.image import Full, Image
from gntalloc.testing import Program

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.frontend.conftest import Setting

    from gntalloc import Domain
    from gntalloc.frontend.blkfront import BlockDevice
    from gntalloc.frontend.nodes import Device

    Served = Callable[..., BlockDevice]

HOLDER = """
import sys
from gntalloc.frontend.image import Image
image = Image(sys.argv[1], read_only=sys.argv[2] == "r", unit=512)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "an image"
    path.write_bytes(random.Random(2).randbytes(64 << 10))
    return path


def opened(path: Path, **settings: Any) -> Image:
    return Image(path, **{"read_only": False, "unit": 512, **settings})


# What is served.


@pytest.mark.parametrize(("size", "unit", "left"), [(1000, 512, 488), (1, 512, 1), (8192 + 512, 4096, 512)])
def test_what_ends_within_a_sector_is_refused_unless_it_is_padded(image: Path, size: int, unit: int, left: int) -> None:
    image.write_bytes(b"x" * size)
    with pytest.raises(DeviceError, match=rf"no whole sectors of {unit}: the last {left} .*--pad") as caught:
        opened(image, unit=unit)
    assert caught.value.errno == errno.EINVAL
    padded = opened(image, unit=unit, pad=True)
    whole = -(-size // unit) * unit
    assert padded.size == whole
    buffer = bytearray(b"?" * whole)
    views = [memoryview(buffer)[: whole // 2], memoryview(buffer)[whole // 2 :]]
    padded.read(views, 0)
    assert buffer == (b"x" * size).ljust(whole, b"\0")
    assert image.stat().st_size == size  # as long as nobody writes there
    padded.write([memoryview(b"y" * unit)], whole - unit)
    assert image.stat().st_size == whole
    assert not padded.look()
    padded.close()


def test_what_is_missing_is_no_padding(image: Path) -> None:
    """Somebody has cut it off: zeros would be a lie."""
    padded = opened(image, pad=True)
    os.truncate(image, 1000)
    with pytest.raises(OSError, match="ends at 1000"):
        padded.read([memoryview(bytearray(4096))], 0)
    padded.close()


@pytest.mark.parametrize("form", ["qcow2", "qed", "vmdk", "vhdx", "vpc", "vdi", "parallels"])
def test_other_formats_are_refused_and_named(image: Path, form: str) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("there is no qemu-img (apt install qemu-utils)")
    made = subprocess.run(
        ["qemu-img", "create", "-f", form, image, "8M"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert made.returncode == 0, made.stderr
    with pytest.raises(DeviceError, match=rf"no raw image but a {form} one.*qemu-nbd.*--format raw"):
        opened(image, pad=True)
    insisting = opened(image, pad=True, form="raw")
    assert insisting.size >= 512
    insisting.close()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "zstd": lambda data: b"\x28\xb5\x2f\xfd" + data,  # Python has none before 3.14
}


@pytest.mark.parametrize("packer", PACKED)
def test_packed_images_are_refused_and_named(image: Path, packer: str) -> None:
    image.write_bytes(PACKED[packer](image.read_bytes()))
    with pytest.raises(DeviceError, match=rf"a {packer} one.*unpack"):
        opened(image, pad=True)


def test_what_is_no_image_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        with pytest.raises(DeviceError, match="neither a file nor a block device"):
            opened(path)  # type: ignore[arg-type]


# Who else may use it.


def start(script: str, *arguments: str, stderr: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def held(path: Path, how: str) -> subprocess.Popen[str]:
    process = start(HOLDER, str(path), how)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=PATIENCE)


@pytest.mark.parametrize(("first", "second", "together"), [("r", "r", 1), ("r", "w", 0), ("w", "r", 0), ("w", "w", 0)])
def test_many_may_read_or_one_may_write(image: Path, first: str, second: str, together: int) -> None:
    process = held(image, first)
    try:
        if together:
            opened(image, read_only=second == "r").close()
        else:
            with pytest.raises(Busy, match=rf"process {process.pid} \(") as caught:
                opened(image, read_only=second == "r")
            assert caught.value.errno == errno.EBUSY
    finally:
        end(process)
    opened(image).close()  # the locks went with a process that was killed


def test_the_holder_is_found_though_some_process_has_a_file_that_never_answers(image: Path, tmp_path: Path) -> None:
    """A stranger's file on FUSE: a look at it would never end."""
    first = held(image, "w")
    with silent_files(tmp_path / "silent", GETATTR) as files:
        script = "import os, sys; os.open(sys.argv[1], os.O_RDWR); print('ready', flush=True); sys.stdin.read()"
        stranger = start(script, files.path)
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "ready\n"
        second = start(HOLDER, str(image), "w", stderr=subprocess.PIPE)
        try:
            said = second.communicate(timeout=PATIENCE)[1]
        finally:
            files.end()
            for process in (first, stranger, second):
                end(process)
    assert f"process {first.pid} (" in said


@pytest.mark.parametrize(("byte", "how"), [(200, "r"), (200, "w"), (201, "w"), (103, "r"), (101, "r")])
def test_each_of_qemus_bytes_counts(image: Path, byte: int, how: str) -> None:
    """Somebody bears no reader, bears no writer, changes the size, or writes."""
    with image.open("rb") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, Struct("=hh4xqqi4x").pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        with pytest.raises(Busy, match=f"process {os.getpid()} "):
            opened(image, read_only=how == "r")
    opened(image, read_only=how == "r").close()


def test_one_process_does_not_lend_an_image_twice(image: Path) -> None:
    first = opened(image)
    with pytest.raises(Busy, match=f"process {os.getpid()} "):
        opened(image)
    first.close()
    opened(image).close()


def test_a_refused_image_is_not_held(image: Path) -> None:
    """Neither its descriptor nor its locks."""
    before = len(os.listdir("/proc/self/fd"))
    image.write_bytes(b"QFI\xfb" + bytes(1020))
    with pytest.raises(DeviceError):
        opened(image)
    first = opened(image, form="raw", read_only=True)
    with pytest.raises(Busy):
        opened(image, form="raw")
    opened(image, form="raw", read_only=True).close()
    first.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("ours", ["r", "w"])
@pytest.mark.parametrize("theirs", ["r", "w"])
def test_qemu_and_we_exclude_each_other(image: Path, ours: str, theirs: str) -> None:
    if shutil.which("qemu-io") is None:
        pytest.skip("there is no qemu-io (apt install qemu-utils)")
    together = ours == theirs == "r"
    command = ["qemu-io", "-f", "raw", *(["-r"] if theirs == "r" else []), str(image)]
    process = held(image, ours)
    try:
        ran = subprocess.run(
            [*command, "-c", "read 0 512"], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert ("lock" in ran.stderr) != together, (ran.stdout, ran.stderr)
        assert ("read 512/512" in ran.stdout) == together, (ran.stdout, ran.stderr)
    finally:
        end(process)

    theirs_first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert theirs_first.stdin is not None
        assert theirs_first.stdout is not None
        theirs_first.stdin.write("read 0 512\n")
        theirs_first.stdin.flush()
        while "read 512/512" not in (line := theirs_first.stdout.readline()):
            assert line
        if together:
            opened(image, read_only=True).close()
        else:
            with pytest.raises(Busy, match=rf"process {theirs_first.pid} \(qemu-io\)"):
                opened(image, read_only=ours == "r")
    finally:
        end(theirs_first)


def test_a_second_backend_of_the_same_image_is_refused(setting: Setting) -> None:
    setting.attach()
    setting.backend()
    setting.open()
    with pytest.raises(Busy, match="to write"):
        Backend(setting.dom0, DEVICE, setting.path, read_only=True)


# Holes.


def sparse(path: Path, size: int, data: list[tuple[int, int]]) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in data:
            file.seek(offset)
            file.write(b"d" * length)
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_DATA) == 0 and data and data[0][0]:
            pytest.skip("this file system knows no holes")


def test_extents_are_what_the_file_system_says_in_whole_sectors(image: Path) -> None:
    sparse(image, 1 << 20, [(64 << 10, 4096), (512 << 10, 128 << 10)])
    here = opened(image)
    told = here.extents(0)
    here.close()
    assert told == [
        Extent(64 << 10, hole=True),
        Extent(4096, hole=False),
        Extent((512 - 68) << 10, hole=True),
        Extent(128 << 10, hole=False),
        Extent(384 << 10, hole=True),
    ]


def test_an_answer_has_room_for_so_many_and_the_next_goes_on(image: Path) -> None:
    sparse(image, 16 << 20, [(number * 16384 + 8192, 4096) for number in range(1024)])
    here = opened(image)
    told = here.extents(0)
    assert len(told) == MOST
    rest = here.extents(sum(length for length, _ in told))
    assert rest[0].hole != told[-1].hole
    here.close()


def test_a_padded_hole_ends_with_the_disk(image: Path) -> None:
    sparse(image, (1 << 20) + 100, [(4096, 4096)])
    here = opened(image, pad=True)
    assert sum(length for length, _ in here.extents(0)) == (1 << 20) + 512
    assert here.extents(1 << 20) == [Extent(512, hole=True)]
    here.close()


LIES = {
    "nothing": (b"", (Extent(5000, hole=False),)),
    "too much": (pack([Extent(1 << 60, hole=True)]), (Extent(5000, hole=True),)),
    "too little": (pack([Extent(1024, hole=True)]), (Extent(1024 - 100, hole=True),)),
    "all before it": (b"\0" * 8 + pack([Extent(1024, hole=True)])[:16], (Extent(5000, hole=False),)),
    "many of a kind": (pack([Extent(512, hole=True)] * 9), (Extent(512 * 9 - 100, hole=True),)),
    "ones": (b"\xff" * 4096, (Extent(5000, hole=True),)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_backend_is_believed_no_further_than_the_range(lie: str) -> None:
    raw, wanted = LIES[lie]
    assert parse(raw, 100, 5000) == wanted


def test_noise_of_a_backend_is_extents_of_the_range() -> None:
    chance = random.Random(5)
    for _ in range(500):
        before, length = chance.randrange(4096), chance.randrange(1, 1 << 40)
        words = [chance.choice([0, 1, 2, 3, 9, 1 << 20, chance.randrange(1 << 64)]) for _ in range(MOST)]
        told = parse(b"".join(word.to_bytes(8, sys.byteorder) for word in words), before, length)
        assert told
        assert all(size > 0 for size, _ in told)
        assert sum(size for size, _ in told) <= length
        assert all(one.hole != other.hole for one, other in itertools.pairwise(told))


@pytest.mark.parametrize("way", ["map", "copy"])
def test_a_disk_tells_its_holes(setting: Setting, served: Served, way: str) -> None:
    sparse(setting.path, SIZE, [(1 << 20, 64 << 10)])
    disk = served(way=way)
    assert disk.features.extents
    assert disk.features.discard_zeroes
    assert disk.extents(0, SIZE, timeout=PATIENCE) == (
        Extent(1 << 20, hole=True),
        Extent(64 << 10, hole=False),
        Extent(SIZE - (1 << 20) - (64 << 10), hole=True),
    )
    assert disk.extents(100, 1000, timeout=PATIENCE) == (Extent(1000, hole=True),)
    assert disk.extents((1 << 20) - 7, 8, timeout=PATIENCE) == (Extent(7, hole=True), Extent(1, hole=False))
    for wrong in ((0, 0), (SIZE, 1), (-1, 5)):
        with pytest.raises(ValueError, match=r"extent|not all on"):
            disk.extents(*wrong)
    disk.write(0, b"x" * 4096)
    assert disk.extents(0, 4096, timeout=PATIENCE) == (Extent(4096, hole=False),)
    disk.discard(0, 4096)
    assert disk.extents(0, 4096, timeout=PATIENCE) == (Extent(4096, hole=True),)


# A full disk.


def limited(domain: Domain, device: Device, path: str, most: int) -> None:
    """A backend whose file can grow no further than that: what the kernel says is what it says of a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    serve(domain, device, path, {})


def test_a_full_disk_is_named_and_what_fits_is_written(setting: Setting) -> None:
    os.truncate(setting.path, 0)
    os.truncate(setting.path, SIZE)
    setting.attach()
    with Program(setting.dom0, limited, DEVICE, str(setting.path), 1 << 20):
        disk = setting.open()
        disk.write(0, b"a" * 8192, timeout=PATIENCE)
        for offset in (1 << 20, (1 << 20) - 4096):  # the other begins where there is room, and ends where there is none
            with pytest.raises(DeviceError, match="no room left") as caught:
                disk.write(offset, b"b" * 8192, timeout=PATIENCE)
            assert caught.value.errno == errno.ENOSPC
        assert disk.read(0, 8192, timeout=PATIENCE) == b"a" * 8192
        disk.close()


def test_a_frontend_that_has_not_asked_for_it_gets_the_error_that_blkif_has(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gntalloc.frontend import session

    monkeypatch.setattr(session, "TELLS_FULL", "feature-of-nobody")
    setting.attach()
    with Program(setting.dom0, limited, DEVICE, str(setting.path), 1 << 20):
        disk = setting.open()
        with pytest.raises(DeviceError, match="status -1") as caught:
            disk.write(2 << 20, b"b" * 8192, timeout=PATIENCE)
        assert caught.value.errno == errno.EIO
        disk.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_found_out_after_a_part(image: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """The kernel writes what fits, and says why it was not all with the next call."""
    written: list[tuple[int, int]] = []

    def fill(file: int, views: list[memoryview], offset: int) -> int:
        if offset >= 1024:
            raise OSError(code, os.strerror(code))
        written.append((offset, sum(map(len, views))))
        return min(700, sum(map(len, views)))

    here = opened(image)
    monkeypatch.setattr(os, "pwritev", fill)
    with pytest.raises(Full):
        here.write([memoryview(bytes(600)), memoryview(bytes(1448))], 0)
    assert written == [(0, 2048), (700, 1348)]
    here.close()


# A disk that grows.


def until(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_a_disk_that_grows_is_told(setting: Setting, served: Served) -> None:
    disk = served()
    assert disk.size == SIZE
    os.truncate(setting.path, SIZE + (1 << 20) + 100)  # what is no whole sector does not count
    until(lambda: disk.size != SIZE, f"it still has {disk.size} bytes")
    assert disk.size == SIZE + (1 << 20)
    disk.write(SIZE, b"n" * 4096, timeout=PATIENCE)
    assert setting.now()[SIZE : SIZE + 4096] == b"n" * 4096
    assert disk.read(0, 4096, timeout=PATIENCE) == setting.content[:4096]


def test_who_reads_beyond_the_old_end_finds_the_new_one(setting: Setting, served: Served) -> None:
    """Nobody has to ask for the size first."""
    disk = served()
    os.truncate(setting.path, 2 * SIZE)

    def read() -> bool:
        try:
            return disk.read(2 * SIZE - 512, 512, timeout=PATIENCE) == bytes(512)
        except ValueError:
            return False

    until(read, "it never grew")


def test_growing_hides_no_end_of_the_backend(setting: Setting, served: Served) -> None:
    """The news of both come the same way."""
    disk = served()
    os.truncate(setting.path, 2 * SIZE)
    until(lambda: disk.size == 2 * SIZE, "it never grew")
    setting.detach()

    def goes_on() -> bool:
        assert disk.size == 2 * SIZE
        return bool(disk.read(0, 512, timeout=PATIENCE))

    with pytest.raises(PeerClosed, match=r"is gone|went to"):
        until(lambda: not goes_on(), "it goes on")


def test_a_disk_that_grows_is_told_to_asyncio(setting: Setting) -> None:
    setting.attach()
    setting.backend()

    async def main() -> None:
        async with await aio.disk(setting.guest, timeout=PATIENCE) as disk:
            os.truncate(setting.path, SIZE + 4096)
            async with asyncio.timeout(PATIENCE):
                while disk.size == SIZE:  # noqa: ASYNC110  nothing else tells
                    await asyncio.sleep(0.01)
            assert disk.size == SIZE + 4096
            assert await disk.read(SIZE, 4096) == bytes(4096)

    run(main)


def test_a_stock_backend_that_grows_is_told(setting: Setting, served: Served) -> None:
    """As Linux's and QEMU's do it: the sectors, and the state once more."""
    disk = served()
    with setting.dom0.store.transaction() as transaction:
        transaction.write(f"{DEVICE.back}/sectors", str((SIZE + 8192) // 512))
        transaction.write(f"{DEVICE.back}/state", "4")
    until(lambda: disk.size == SIZE + 8192, f"it has {disk.size}")
    setting.dom0.store.remove(f"{DEVICE.back}/sectors")  # as when it is detached
    disk._session.refresh()
    assert disk.size == SIZE + 8192


def test_news_that_a_sleeping_read_has_taken_is_not_lost(setting: Setting, served: Served) -> None:
    disk = served()
    link = disk._session.link
    assert link is not None
    setting.dom0.store.write(f"{DEVICE.back}/sectors", str(2 * SIZE // 512))
    setting.dom0.store.write(f"{DEVICE.back}/state", "4")

    def told() -> bool:
        disk.read(0, SIZE, timeout=PATIENCE)
        return disk._session.offer.size == 2 * SIZE  # nobody has asked for the size

    until(told, "no read has taken the news")


def test_news_that_a_look_has_taken_is_told_to_who_sleeps(setting: Setting, served: Served) -> None:
    """It may have been the backend's end."""
    disk = served()
    link = disk._session.link
    assert link is not None
    until(lambda: not link.sleep(timeout=0) or link.verdict() is not None, "the first event never ends")
    setting.dom0.store.write(f"{DEVICE.back}/state", "4")
    until(link.has_news, "no news")
    assert link.sleep(timeout=0)
    assert not link.sleep(timeout=0)
