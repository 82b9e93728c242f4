"""Fetch Debian packages for the images, by apt, into a folder of the lab's own.

This machine's package database is neither read nor changed, and no root is needed. Apt gets its own sources list, state
and cache, and an empty list of installed packages, so it resolves everything from the ground up. It reaches a mirror
(by proxies and the like) as this machine's apt does. Signatures are checked with Debian's keyring.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gntalloc.lab.errors import BuildFailed, NothingToRunOn, explain

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DEFAULT_KEYRING", "Apt", "Mirrors", "Package", "machine_mirrors", "parse_plan"]

DEFAULT_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_LINE = re.compile(r"'(?P<uri>[^']+)' (?P<file>(?P<name>[^_ ]+)_(?P<version>[^_ ]+)_[^_ ]+\.deb) (?P<size>[0-9]{1,15})")

# The last folder of any Debian mirror, but for a snapshot's date.
_DEBIAN = re.compile(r"/debian(?P<security>-security)?(/\d{8}T\d{6}Z)?/?$")


@dataclass(frozen=True)
class Package:
    """Describe one package that apt decided to fetch."""

    name: str
    version: str
    file: str
    size: int


@dataclass(frozen=True)
class Mirrors:
    """Name the mirrors of Debian's archive and of its security updates."""

    archive: str = "http://deb.debian.org/debian"
    security: str = "http://deb.debian.org/debian-security"

    def sources(self, release: str, keyring: Path) -> str:
        """Write the sources list of one release."""
        signed = f"[signed-by={keyring}]"
        return (
            f"deb {signed} {self.archive} {release} main\n"
            f"deb {signed} {self.archive} {release}-updates main\n"
            f"deb {signed} {self.security} {release}-security main\n"
        )


def machine_mirrors(targets: str) -> Mirrors:
    """Take the mirrors that this machine's apt uses, where they are Debian's, else the public ones.

    Args:
        targets: The addresses of all its sources, one a line.
    """
    found: dict[str, str] = {}
    for address in targets.split():
        if match := _DEBIAN.search(address):
            found.setdefault("security" if match["security"] else "archive", address.rstrip("/"))
    return Mirrors(**found)


def parse_plan(text: str) -> list[Package]:
    """Read the answer of `apt-get --print-uris`."""
    return [
        # A colon of a version is written %3a in a file's name.
        Package(match["name"], urllib.parse.unquote(match["version"]), match["file"], int(match["size"]))
        for match in map(_LINE.match, text.splitlines())
        if match
    ]


class Apt:
    """Run apt with a folder of its own."""

    def __init__(self, programs: dict[str, str], folder: Path) -> None:
        self._get, self._cache = programs["apt-get"], programs["apt-cache"]
        self._folder = folder
        self.archives = folder / "cache" / "archives"

    def use(self, release: str, mirrors: Mirrors | None = None, keyring: Path = DEFAULT_KEYRING) -> None:
        """Set up the folder for a release and fetch the lists of its packages.

        Args:
            release: Debian's name for it.
            mirrors: The mirrors to fetch from; those of this machine's apt if not given.
            keyring: The keys that are trusted.
        """
        if not keyring.is_file():
            raise NothingToRunOn(
                explain(
                    f"fetch packages of Debian {release}",
                    f"there is no keyring {keyring} to check their signatures with",
                    "On Debian or Ubuntu: apt install debian-archive-keyring",
                )
            )
        if mirrors is None:
            targets = subprocess.run(
                [self._get, "indextargets", "--format", "$(REPO_URI)"],
                capture_output=True,
                text=True,
                check=False,
            )
            mirrors = machine_mirrors(targets.stdout)
        for needed in (
            self._folder / "lists" / "partial",
            self.archives / "partial",
            self._folder / "nowhere" / "partial",
        ):
            needed.mkdir(parents=True, exist_ok=True)
        (self._folder / "status").touch()
        (self._folder / "sources.list").write_text(mirrors.sources(release, keyring))
        self._run([self._get, "update", "-qq"], f"fetch the package lists of Debian {release}")

    def names(self, prefix: str) -> list[str]:
        """List the packages whose names begin so."""
        return self._run([self._cache, "pkgnames", prefix], f"look for packages {prefix}*").split()

    def plan(self, packages: list[str]) -> list[Package]:
        """Resolve the packages and all they depend on."""
        # Apt leaves files that are there already out of its answer. So this question has a folder without files.
        nowhere = ["-o", f"Dir::Cache::archives={self._folder / 'nowhere'}"]
        wanted = [self._get, *nowhere, "install", "--print-uris", "-qq", "-y", *packages]
        return parse_plan(self._run(wanted, f"resolve {' '.join(packages)}"))

    def fetch(self, packages: list[str], report: Callable[[float], None]) -> None:
        """Download the packages and all they depend on, telling how much is done, from 0 to 1."""
        read, write = os.pipe()
        status = ["-o", f"APT::Status-Fd={write}"]
        command = [self._get, *self._options(), *status, "install", "--download-only", "-qq", "-y", *packages]
        with subprocess.Popen(
            command, pass_fds=[write], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as apt:
            os.close(write)
            with os.fdopen(read) as lines:
                for line in lines:
                    kind, _, rest = line.partition(":")
                    if kind == "dlstatus":
                        with contextlib.suppress(ValueError, IndexError):  # it only shows how far this is
                            report(float(rest.split(":")[1]) / 100)
            assert apt.stderr is not None
            problems = apt.stderr.read()
        if apt.returncode:
            raise _failed("download packages", problems)

    def _run(self, command: list[str], asked: str) -> str:
        program, *arguments = command
        done = subprocess.run([program, *self._options(), *arguments], capture_output=True, text=True, check=False)
        # apt-get update calls it success when a list could not be fetched, and only warns.
        if done.returncode or "W: Failed to fetch" in done.stderr:
            raise _failed(asked, done.stderr)
        return done.stdout

    def _options(self) -> list[str]:
        folder = self._folder
        settings = {
            "Dir::State": folder,
            "Dir::State::lists": "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "Dir::Cache::archives": "archives",
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": folder / "nowhere",
            "Dir::Etc::preferencesparts": folder / "nowhere",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
        }
        return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]


def _failed(asked: str, problems: str) -> BuildFailed:
    tail = "\n".join(problems.strip().splitlines()[-12:])
    return BuildFailed(
        explain(
            asked,
            "apt failed",
            "Check the network, the mirror (--mirror URL or GNTALLOC_LAB_MIRROR) and the packages' names",
            log=tail,
        )
    )
