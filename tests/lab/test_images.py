"""The folder of images, and the parts they are made of."""

import gzip
import lzma
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gntalloc.errors import NoMachine
from gntalloc.lab import images, machine_tools
from gntalloc.lab.cpio import Archive
from gntalloc.lab.errors import BuildFailed, LabError, NothingToRunOn
from gntalloc.lab.images import Images, Manifest
from gntalloc.lab.kernel import unwrapped
from gntalloc.lab.modules import load_order
from gntalloc.lab.payload import payload

MANIFEST = Manifest("bookworm", "4.17.7", "6.1.1-1", "6.1.0-1-amd64", {"python3": "3.11"}, [])


def make(cache: Path, name: str = "one") -> Path:
    folder = cache / "images" / name
    folder.mkdir(parents=True)
    MANIFEST.write(folder / "manifest.json")
    images.make_current(folder)
    return folder


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path / "m")
    assert Manifest.read(tmp_path / "m") == MANIFEST


def test_without_images_the_error_says_how_to_make_them(cache: Path) -> None:
    with pytest.raises(NothingToRunOn, match="gntalloc lab build") as caught:
        Images.current()
    assert isinstance(caught.value, NoMachine)


def test_the_set_made_last_is_the_current_one(cache: Path) -> None:
    make(cache, "one")
    folder = make(cache, "two")
    assert Images.current().folder == folder


def test_images_of_another_format_are_not_booted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(cache)
    monkeypatch.setattr(images, "FORMAT", 99)
    with pytest.raises(NothingToRunOn, match="another version"):
        Images.current()


def test_two_builds_at_once_are_refused(cache: Path) -> None:
    with images.build_lock(), pytest.raises(BuildFailed, match="another build"), images.build_lock():
        pass


def test_missing_programs_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_tools, "_SEARCHED", "/nowhere")
    with pytest.raises(NothingToRunOn) as caught:
        machine_tools.need("boot the lab", "qemu-system-x86_64", "mke2fs")
    assert "no qemu-system-x86_64, mke2fs" in str(caught.value)
    assert "apt install qemu-system-x86 e2fsprogs" in str(caught.value)
    assert isinstance(caught.value, LabError)


def test_an_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    cpio = shutil.which("cpio") or shutil.which("busybox")
    if cpio is None:
        pytest.skip("this machine has neither cpio nor busybox to read it with")
    archive = Archive()
    archive.file("a/b/c", b"hello", mode=0o755)
    archive.symlink("a/l", "b/c")
    archive.directory("empty")
    data = archive.finish()
    assert len(data) % 512 == 0
    command = [cpio, *(["cpio"] if cpio.endswith("busybox") else []), "-id"]
    subprocess.run(command, input=data, cwd=tmp_path, check=True, capture_output=True, timeout=50)
    assert (tmp_path / "a/l").read_bytes() == b"hello"
    assert (tmp_path / "a/b/c").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "empty").is_dir()


def test_a_headers_numbers_are_where_the_kernel_looks() -> None:
    archive = Archive()
    archive.character_device("dev/console", 5, 1)
    data = archive.finish()
    header = data[data.index(b"070701", 6) :]  # behind the entry of "dev" itself
    fields = [int(header[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
    assert header.startswith(b"070701")
    assert fields[1] == 0o020600
    assert fields[9:11] == [5, 1]
    assert fields[11] == len("dev/console") + 1


def test_files_come_along_under_their_own_names(tmp_path: Path) -> None:
    (tmp_path / "suite/below").mkdir(parents=True)
    (tmp_path / "suite/below/test.py").write_text("x = 1")
    (tmp_path / "suite/__pycache__").mkdir()
    (tmp_path / "suite/__pycache__/old.pyc").write_text("")
    data = payload([tmp_path / "suite"])
    assert b"lab/files/suite/below/test.py\0" in data
    assert b"old.pyc" not in data
    assert b"lab/site/gntalloc/errors.py\0" in data
    assert f"lab/site/gntalloc/__pycache__/errors.{sys.implementation.cache_tag}.pyc\0".encode() in data
    assert b"\0init\0" not in data[:4]


def bzimage(packed: bytes) -> bytes:
    image = bytearray(1024)
    image[0x1F1] = 1
    struct.pack_into("<II", image, 0x248, 16, len(packed))
    return bytes(image) + bytes(16) + packed


@pytest.mark.parametrize("pack", [lambda data: lzma.compress(data) + b"size", gzip.compress])
def test_a_kernel_is_unwrapped(pack: Callable[[bytes], bytes]) -> None:
    kernel = b"\x7fELF" + bytes(1000)
    assert unwrapped(bzimage(pack(kernel))) == kernel


def test_a_kernel_packed_otherwise_stays_as_it_is() -> None:
    image = bzimage(b"\x28\xb5\x2f\xfd zstd")
    assert unwrapped(image) == image


def test_modules_load_after_what_they_depend_on(tmp_path: Path) -> None:
    for name, depends in (("ext4", b"jbd2,crc16"), ("jbd2", b""), ("crc16", b""), ("xen-gntdev", b"xen_evtchn")):
        (tmp_path / f"{name}.ko").write_bytes(b"x\0depends=" + depends + b"\0y")
    (tmp_path / "modules.builtin").write_text("kernel/drivers/xen/xen-evtchn.ko\n")
    assert [path.stem for path in load_order(tmp_path, ("ext4", "xen-gntdev"))] == [
        "jbd2",
        "crc16",
        "ext4",
        "xen-gntdev",
    ]
    with pytest.raises(BuildFailed, match="overlay"):
        load_order(tmp_path, ("overlay",))
