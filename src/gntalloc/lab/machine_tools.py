"""Find the programs of this machine that make the lab, and name the Debian package of each."""

from __future__ import annotations

import os
import shutil

from gntalloc.lab.errors import NothingToRunOn, explain

__all__ = ["BUILD", "EMULATOR", "need"]

EMULATOR = "qemu-system-x86_64"

PACKAGES = {
    EMULATOR: "qemu-system-x86",
    "apt-get": "apt",
    "apt-cache": "apt",
    "dpkg": "dpkg",
    "mke2fs": "e2fsprogs",
}

BUILD = ("apt-get", "apt-cache", "dpkg", "mke2fs")

# mke2fs is in /usr/sbin, which not every user has in PATH.
_SEARCHED = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def need(asked: str, *programs: str) -> dict[str, str]:
    """Find the programs, or say in one error which are missing and how to get all of them.

    Args:
        asked: The user's request, for the error's text.
        programs: Names of programs.

    Returns:
        The path of each.

    Raises:
        NothingToRunOn: At least one is missing.
    """
    found = {program: shutil.which(program, path=_SEARCHED) for program in programs}
    missing = [program for program, path in found.items() if path is None]
    if missing:
        packages = " ".join(dict.fromkeys(PACKAGES.get(program, program) for program in missing))
        raise NothingToRunOn(
            explain(
                asked,
                f"this machine has no {', '.join(missing)}",
                f"On Debian or Ubuntu: apt install {packages}",
            )
        )
    return {program: path for program, path in found.items() if path is not None}
