"""peer.c, compiled here against the libxenvchan that the lab has."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gntalloc.lab import Session

__all__ = ["peer"]


def peer(session: Session, folder: Path) -> Path:
    """Compile it into a folder. Needs gcc and Xen's headers (Debian: gcc libc6-dev libxen-dev)."""
    library = folder / "libxenvchan.so"  # its name has Xen's version, which may be another here
    (library_there,) = session.fetch(["/usr/lib/x86_64-linux-gnu/libxenvchan.so.*.*.*"]).values()
    library.write_bytes(library_there)
    program = folder / "peer"
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-s", "-Wl,--allow-shlib-undefined"]
    command += ["-o", str(program), str(Path(__file__).with_name("peer.c")), str(library)]
    subprocess.run(command, check=True, timeout=50)
    return program
