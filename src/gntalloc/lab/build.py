"""Build the images: resolve, download, unpack, assemble. They are complete at the end, or nothing has changed."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gntalloc.lab import machine_tools, modules
from gntalloc.lab.apt import DEFAULT_KEYRING, Apt, Mirrors, Package
from gntalloc.lab.cpio import Archive
from gntalloc.lab.errors import BuildFailed, explain
from gntalloc.lab.images import FORMAT, Images, Manifest, build_lock, cache_folder, make_current
from gntalloc.lab.kernel import gunzipped, unwrapped

__all__ = ["RELEASE", "Report", "build", "choose_packages"]

RELEASE = "bookworm"

# Called with the name of a step, and with the part of it that is done, from 0 to 1, or None where that is unknown.
Report = Callable[[str, float | None], None]

_HYPERVISOR = re.compile(r"xen-hypervisor-([0-9]{1,4}\.[0-9]{1,4})-amd64$")

# The packages whose names carry no version of Xen. click and rich are for this project's command line.
_PACKAGES = (
    "linux-image-amd64",
    "busybox-static",
    "e2fsprogs",
    "kmod",
    "python3",
    "python3-click",
    "python3-rich",
    "libatomic1",
    "libxenevtchn1",
    "libxengnttab1",
    "xenstore-utils",
)

# Folders that no program in a domain reads.
_PRUNED = (
    "boot",
    "usr/lib/modules",
    "usr/share/doc",
    "usr/share/i18n",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
)

_PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
)
_GROUP = "root:x:0:\ntty:x:5:\nuser:x:1000:\nnogroup:x:65534:\n"
_HOSTS = "127.0.0.1 localhost dom0 pv pvh\n"


@dataclass(frozen=True)
class _Unpacked:
    """Name the folders of the unpacked packages: the root's, and two of which only a part is needed."""

    root: Path
    kernel: Path
    hypervisor: Path


def choose_packages(hypervisors: list[str], extra: list[str]) -> list[str]:
    """Name the packages to install.

    Args:
        hypervisors: The release's packages that look like a hypervisor; the newest is taken.
        extra: More packages that the user wants.
    """
    versions = [match[1] for match in map(_HYPERVISOR.match, hypervisors) if match]
    if not versions:
        raise BuildFailed(
            explain(
                "find a hypervisor",
                "this release has no package xen-hypervisor-*-amd64",
                "Try --release bookworm",
            )
        )
    newest = max(versions, key=lambda version: [int(part) for part in version.split(".")])
    of_xen = [f"xen-hypervisor-{newest}-amd64", f"xen-utils-{newest}", f"libxenmisc{newest}"]
    return [*of_xen, *_PACKAGES, *extra]


def build(
    report: Report,
    *,
    release: str = RELEASE,
    mirrors: Mirrors | None = None,
    keyring: Path = DEFAULT_KEYRING,
    extra: list[str] | None = None,
    force: bool = False,
) -> tuple[Images, bool]:
    """Make the images of a release and let `lab run` use them.

    Args:
        report: Told of each step.
        release: Debian's name for the release.
        mirrors: The mirrors to fetch from; this machine's own if not given.
        keyring: Debian's public keys.
        extra: Packages to add.
        force: Make them again even if these very versions are there.

    Returns:
        The images, and whether they had to be made.
    """
    programs = machine_tools.need("build the lab's images", *machine_tools.BUILD)
    extra = sorted(set(extra or []))
    with build_lock():
        apt = Apt(programs, cache_folder() / "apt")
        report("Reading the package lists", None)
        apt.use(release, mirrors, keyring)
        wanted = choose_packages(apt.names("xen-hypervisor-"), extra)
        plan = apt.plan(wanted)
        manifest = _manifest(release, plan, extra)
        folder = cache_folder() / "images" / _name(manifest)
        made = force or not (folder / "manifest.json").is_file()
        if made:
            size = sum(package.size for package in plan) / 1e6
            title = f"Downloading {len(plan)} packages, {size:.0f} MB"
            report(title, 0.0)
            apt.fetch(wanted, lambda part: report(title, part))
            _assemble(folder, apt, plan, manifest, programs, report)
        make_current(folder)
    return Images(folder, manifest), made


def _manifest(release: str, plan: list[Package], extra: list[str]) -> Manifest:
    versions = {package.name: package.version for package in plan}
    try:
        hypervisor = next(name for name in versions if _HYPERVISOR.match(name))
        image = next(name for name in versions if re.match(r"linux-image-\d", name))
    except StopIteration:
        raise BuildFailed(
            explain("plan the images", "apt would fetch no hypervisor or no kernel", "Try --release bookworm")
        ) from None
    return Manifest(
        release=release,
        xen=versions[hypervisor],
        linux=versions[image],
        kernel=image.removeprefix("linux-image-"),
        packages=dict(sorted(versions.items())),
        extra=extra,
    )


def _name(manifest: Manifest) -> str:
    everything = repr((FORMAT, manifest.packages, modules.WANTED)).encode()
    short = hashlib.sha256(everything).hexdigest()[:8]
    xen = re.split(r"[+-]", manifest.xen)[0]
    return f"{manifest.release}-xen{xen}-linux{manifest.linux}-{short}"


def _assemble(
    folder: Path, apt: Apt, plan: list[Package], manifest: Manifest, programs: dict[str, str], report: Report
) -> None:
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=folder.parent) as temporary:
        unpacked = _unpack(Path(temporary), apt, plan, manifest, programs["dpkg"], report)
        made = Path(temporary) / "made"
        made.mkdir()
        report("Compiling Python's library", None)
        _finish_root(unpacked.root)
        report("Making the disk and the initramfs", None)
        _boot_files(unpacked, manifest, made)
        _disk(unpacked.root, made / "root.ext4", programs["mke2fs"])
        manifest.write(made / "manifest.json")
        # A folder cannot replace another that has files: with --force, the old one steps aside first.
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        made.rename(folder)


def _unpack(temporary: Path, apt: Apt, plan: list[Package], manifest: Manifest, dpkg: str, report: Report) -> _Unpacked:
    places = _Unpacked(temporary / "root", temporary / "kernel", temporary / "hypervisor")
    for done, package in enumerate(plan):
        report("Unpacking", done / len(plan))
        place = places.root
        if package.name == f"linux-image-{manifest.kernel}":
            place = places.kernel
        elif _HYPERVISOR.match(package.name):
            place = places.hypervisor
        _call([dpkg, "-x", str(apt.archives / package.file), str(place)], f"unpack {package.file}")
    return places


def _finish_root(root: Path) -> None:
    """Do the steps of the packages' own install scripts that the lab needs."""
    for name in ("bin", "sbin", "lib", "lib64"):
        _merge(root / name, root / "usr" / name)
    for name in ("dev", "proc", "sys", "run", "tmp", "root", "mnt", "lab"):
        (root / name).mkdir(exist_ok=True)
    for name, target in (("run", "/run"), ("lock", "/run/lock")):
        if not (root / "var" / name).exists():
            (root / "var" / name).symlink_to(target)
    for name, text in (("passwd", _PASSWD), ("group", _GROUP), ("hosts", _HOSTS), ("hostname", "lab\n")):
        (root / "etc" / name).write_text(text)
    _busybox(root)
    # Without this every start of Python in the lab compiles its library again, on an emulated processor.
    python = next((root / "usr/bin").glob("python3.[0-9]*"))
    library = root / "usr/lib" / python.name
    compile_all = ["-I", "-m", "compileall", "-q", "-s", str(root), "-p", "/", "-x", "/test/"]
    _call(
        [*_foreign(root, python), *compile_all, str(library), str(root / "usr/lib/python3/dist-packages")],
        "compile Python's library",
    )


def _merge(folder: Path, into: Path) -> None:
    """Move all that is in /bin to /usr/bin and so on, as Debian's installer does, and leave a link."""
    for path in folder.iterdir() if folder.is_dir() else []:
        target = into / path.name
        into.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            _merge_below(path, target)
        else:
            path.rename(target)
    if folder.is_dir():
        folder.rmdir()
    folder.symlink_to(f"usr/{folder.name}")


def _merge_below(folder: Path, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _merge_below(path, into / path.name)
        else:
            path.rename(into / path.name)
    folder.rmdir()


def _busybox(root: Path) -> None:
    """Let busybox be every command that no package brought: a shell, an editor, cat and ls."""
    busybox = root / "usr/bin/busybox"
    for applet in _call([str(busybox), "--list"], "list busybox's commands").split():
        if not any((root / place / applet).exists() for place in ("usr/bin", "usr/sbin")):
            (root / "usr/bin" / applet).symlink_to("busybox")


def _foreign(root: Path, program: Path) -> list[str]:
    """Start a program of the image here, with the image's own loader and libraries."""
    libraries = root / "usr/lib/x86_64-linux-gnu"
    return [str(root / "usr/lib64/ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(program)]


def _boot_files(unpacked: _Unpacked, manifest: Manifest, made: Path) -> None:
    hypervisor = next((unpacked.hypervisor / "boot").glob("xen-*.gz"))
    # QEMU's loader takes the ELF file that is inside.
    (made / "xen").write_bytes(gunzipped(hypervisor.read_bytes(), "hypervisor"))
    kernel = unwrapped((unpacked.kernel / "boot" / f"vmlinuz-{manifest.kernel}").read_bytes())
    (made / "vmlinux").write_bytes(kernel)
    files = modules.load_order(unpacked.kernel / "lib/modules" / manifest.kernel)
    for pruned in _PRUNED:
        shutil.rmtree(unpacked.root / pruned, ignore_errors=True)
    # The guests' kernel and the modules of all domains: for `xl create`, and to load them again with other settings.
    (unpacked.root / "boot").mkdir()
    (unpacked.root / "boot" / "vmlinux").write_bytes(kernel)
    library = unpacked.root / "usr/lib/modules" / manifest.kernel
    library.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, library / file.name)
    archive = Archive()
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", (unpacked.root / "usr/bin/busybox").read_bytes(), mode=0o755)
    for file in files:
        archive.file(f"modules/{file.name}", file.read_bytes())
    archive.file("modules/order", "".join(f"{file.name}\n" for file in files).encode())
    (made / "initramfs.gz").write_bytes(gzip.compress(archive.finish(), 6, mtime=0))


def _disk(root: Path, disk: Path, mke2fs: str) -> None:
    size = sum(path.lstat().st_size + 4096 for path in root.rglob("*"))
    megabytes = size * 5 // 4 // 1024**2 + 16
    # No journal and no reserve: the disk is never written to again.
    options = [
        "-q",
        "-t",
        "ext4",
        "-O",
        "^has_journal",
        "-m",
        "0",
        "-d",
        str(root),
        str(disk),
        f"{megabytes}M",
    ]
    _call([mke2fs, *options], "make the disk")


def _call(command: list[str], asked: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        raise BuildFailed(
            explain(
                asked,
                f"{Path(command[0]).name} failed with {done.returncode}",
                "Check that the disk has room, and try again",
                log=done.stderr.strip(),
            )
        )
    return done.stdout
