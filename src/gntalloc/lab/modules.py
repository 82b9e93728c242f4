"""Choose the kernel modules that a domain needs, and the order in which they load."""

from __future__ import annotations

import re
from pathlib import Path

from gntalloc.lab.errors import BuildFailed, explain

__all__ = ["WANTED", "load_order"]

# Modules that no dependency names come first: ext4's checksums find their algorithm by name, not by symbol.
WANTED = (
    "crc32c_generic",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "xen-blkfront",
    "ext4",
    "overlay",
    "xen-privcmd",
    "xenfs",
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "loop",
    "xen-blkback",
)

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def load_order(folder: Path, wanted: tuple[str, ...] = WANTED) -> list[Path]:
    """List the files of the wanted modules and of all they depend on, dependencies first.

    depmod would know as well, but it belongs to the image and not to this machine. A module's own file names the
    modules that it depends on.

    Args:
        folder: A kernel's /lib/modules/VERSION.
        wanted: Names of modules. A module that is built into the kernel has no file, and is left out.
    """
    files = {_key(path.name.removesuffix(".ko")): path for path in folder.rglob("*.ko")}
    built_in = {
        _key(Path(line).name.removesuffix(".ko"))
        for line in (folder / "modules.builtin").read_text(errors="replace").split()
    }
    order: dict[str, Path] = {}
    seen: set[str] = set()

    def visit(name: str) -> None:
        key = _key(name)
        if key in seen or key in built_in:
            return
        seen.add(key)
        if key not in files:
            raise BuildFailed(
                explain(
                    f"find the kernel module {name}",
                    f"{folder.name} has neither its file nor the driver built in",
                    "The lab needs Debian's plain kernel; the one for clouds cannot be dom0",
                )
            )
        match = _DEPENDS.search(files[key].read_bytes())
        for dependency in match[1].decode(errors="replace").split(",") if match and match[1] else []:
            visit(dependency)
        order[key] = files[key]

    for name in wanted:
        visit(name)
    return list(order.values())


def _key(name: str) -> str:
    """Make a module's name of its file's, which may have hyphens."""
    return name.replace("-", "_")
