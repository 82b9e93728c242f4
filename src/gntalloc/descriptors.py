"""List the files that a process has open, as /proc tells."""

from __future__ import annotations

import os

__all__ = ["open_files"]


def open_files(pid: int | None = None) -> list[str]:
    """List the targets of a process's descriptors, one entry each, without the code that it runs.

    A library may keep its own file open: libffi 3.8 does, from `import ctypes` on. No program opened that descriptor,
    and nobody can write to it.

    Args:
        pid: this process if not given.

    Raises:
        OSError: the process is gone, or belongs to another user.
    """
    folder = f"/proc/{os.getpid() if pid is None else pid}"
    code = _code(folder)
    found = []
    for name in os.listdir(f"{folder}/fd"):
        try:
            target = os.readlink(f"{folder}/fd/{name}")
            if target not in code or not _is_read_only(f"{folder}/fdinfo/{name}"):
                found.append(target)
        except FileNotFoundError:  # the descriptor that listed the others
            continue
    return found


def _code(folder: str) -> set[str]:
    """List the files that are mapped to be executed."""
    with open(f"{folder}/maps", encoding="utf-8", errors="surrogateescape") as lines:
        fields = [line.rstrip("\n").split(maxsplit=5) for line in lines]
    return {each[5] for each in fields if len(each) == 6 and "x" in each[1]}


def _is_read_only(path: str) -> bool:
    with open(path, encoding="ascii") as lines:
        flags = next(line.split()[1] for line in lines if line.startswith("flags:"))
    return int(flags, 8) & os.O_ACCMODE == os.O_RDONLY
