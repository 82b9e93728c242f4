"""Keep the images: their manifests, their folder, and the set to use.

~/.cache/gntalloc/lab/
├── apt/                     the lab's own apt
├── current -> images/NAME   the set that `lab run` boots
├── images/NAME/             one set, complete or not there at all
└── lock                     held by a build
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gntalloc.lab.errors import BuildFailed, NothingToRunOn, explain

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FORMAT", "Images", "Manifest", "build_lock", "cache_folder", "make_current"]

# Raised when images of an older lab can no longer be booted by this one.
FORMAT = 2


@dataclass(frozen=True)
class Manifest:
    """Tell what a set of images was made from."""

    release: str
    xen: str
    linux: str
    kernel: str
    packages: dict[str, str]
    extra: list[str]
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """Write the manifest as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest back.

        Raises:
            ValueError, TypeError, AttributeError, RecursionError: it is none.
        """
        known: dict[str, Any] = json.loads(path.read_text())
        manifest = cls(**known)
        words = [manifest.release, manifest.xen, manifest.linux, manifest.kernel, *manifest.packages.values()]
        if not all(isinstance(word, str) for word in [*words, *manifest.extra]):
            raise TypeError("a version that is no text")
        return manifest

    @property
    def versions(self) -> dict[str, str]:
        """The versions that results depend on, for records of a run."""
        return {"debian": self.release, "xen": self.xen, "linux": self.linux, "kernel": self.kernel}


@dataclass(frozen=True)
class Images:
    """Name one complete set of images."""

    folder: Path
    manifest: Manifest

    hypervisor = property(lambda self: self.folder / "xen")
    kernel = property(lambda self: self.folder / "vmlinux")
    initramfs = property(lambda self: self.folder / "initramfs.gz")
    root = property(lambda self: self.folder / "root.ext4")

    @classmethod
    def current(cls, asked: str = "boot the lab") -> Images:
        """Find the set that was built last.

        Raises:
            NothingToRunOn: No set was built, or only by an older version of this program.
        """
        folder = cache_folder() / "current"
        try:
            manifest = Manifest.read(folder / "manifest.json")
        except FileNotFoundError:
            raise NothingToRunOn(
                explain(
                    asked,
                    f"there are no images in {cache_folder()}",
                    "Make them once with: gntalloc lab build",
                )
            ) from None
        except (TypeError, ValueError, AttributeError, RecursionError):
            manifest = None
        if manifest is None or manifest.format != FORMAT:
            raise NothingToRunOn(
                explain(
                    asked,
                    "the images are of another version of gntalloc",
                    "Make new ones with: gntalloc lab build",
                )
            )
        return cls(folder.resolve(), manifest)


def cache_folder() -> Path:
    """Give the folder where the lab keeps its images."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "gntalloc" / "lab"


def make_current(folder: Path) -> None:
    """Let `lab run` use this set from now on. There is no moment without one."""
    link = cache_folder() / "current"
    new = link.with_name("current.new")
    new.unlink(missing_ok=True)
    new.symlink_to(folder.relative_to(cache_folder()))
    new.rename(link)


@contextlib.contextmanager
def build_lock() -> Iterator[None]:
    """Keep a second build out of the folder while this one works."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with open(cache_folder() / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildFailed(
                explain("build the images", "another build is at work in the same cache", "Wait until it is done")
            ) from None
        yield
