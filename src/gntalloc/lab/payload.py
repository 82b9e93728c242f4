"""Make the archive that every boot brings along: the init scripts, the agent, and this project's own package.

Nothing of it is in the images. So the images change only when Debian's packages do, and the lab always runs the code
that is here now.
"""

from __future__ import annotations

import importlib.util
import marshal
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import gntalloc
from gntalloc.lab.cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["files_below", "payload"]

_INSIDE = Path(__file__).with_name("inside")
_SITE = "lab/site"
_CHECKED_HASH = (3).to_bytes(4, "little")


def payload(files: Iterable[str | Path] = ()) -> bytes:
    """Make the archive that is appended to the initramfs.

    Args:
        files: The user's files and folders, for the working directory of every domain.
    """
    archive = Archive()
    for script, name in (("init.sh", "init"), ("start.sh", "lab/start"), ("attach.sh", "lab/attach")):
        archive.file(name, (_INSIDE / script).read_bytes(), mode=0o755)
    for module in sorted(_INSIDE.glob("*.py")):
        archive.file(f"lab/agent/inside/{module.name}", module.read_bytes())
    package = Path(gntalloc.__file__).parent
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            name = f"{_SITE}/gntalloc/{path.relative_to(package)}"
            content = path.read_bytes()
            archive.file(name, content, mtime=int(path.stat().st_mtime))
            if path.suffix == ".py":
                archive.file(importlib.util.cache_from_source(name), _compiled(content, f"/{name}"))
    archive.file(f"{_SITE}/gntalloc.dist-info/METADATA", _metadata().encode())
    archive.directory("lab/files")
    for source, name in files_below(files):
        status = source.stat()
        archive.file(
            f"lab/files/{name}", source.read_bytes(), mode=stat.S_IMODE(status.st_mode), mtime=int(status.st_mtime)
        )
    return archive.finish()


def files_below(paths: Iterable[str | Path]) -> Iterator[tuple[Path, str]]:
    """Yield the files among the paths and below them, and the names they have in the lab."""
    for path in map(Path, paths):
        if not path.is_dir():
            yield path, path.name
            continue
        top = path.resolve()
        for file in sorted(top.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                yield file, str(file.relative_to(top.parent))


def _compiled(source: bytes, name: str) -> bytes:
    """Compile a module as Python keeps it beside the source. Another version of Python ignores the result.

    In the lab it takes half a minute to compile the modules of one command. Source: PEP 552, checked hashes.
    """
    code = compile(source, name, "exec", dont_inherit=True)
    return importlib.util.MAGIC_NUMBER + _CHECKED_HASH + importlib.util.source_hash(source) + marshal.dumps(code)


def _metadata() -> str:
    """Write the metadata that `gntalloc --version` reads."""
    return f"Metadata-Version: 2.1\nName: gntalloc\nVersion: {gntalloc.__version__}\n"
