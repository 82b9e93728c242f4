"""Programs in C, built once, and `gntalloc run` with a machine that the test's runs share."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from runs import Runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROGRAMS = Path(__file__).parent / "programs"
LIBRARIES = {"share": ["xengnttab"], "map": ["xengnttab"], "vchan": ["xenvchan"], "storm": ["xengnttab"]}


def lacking() -> str | None:
    """Why programs of Xen's libraries cannot be built here."""
    if shutil.which("gcc") is None:
        return "there is no gcc (apt install gcc)"
    if not Path("/usr/include/xengnttab.h").exists():
        return "Xen's headers are not there (apt install libxen-dev)"
    return None


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Compile one of the programs: its path."""
    why = lacking()
    folder = tmp_path_factory.mktemp("programs")

    def build_one(name: str, *options: str) -> str:
        if why:
            pytest.skip(why)
        target = folder / (name + "".join(options))
        if not target.exists():
            libraries = [f"-l{library}" for library in LIBRARIES.get(name, [])]
            source = str(PROGRAMS / f"{name}.c")
            subprocess.run(
                ["gcc", "-O1", "-Wall", "-Werror", *options, source, "-o", str(target), *libraries],
                check=True,
                timeout=50,
            )
        return str(target)

    return build_one


@pytest.fixture
def runs() -> Iterator[Runs]:
    """Runs that share a machine of their own."""
    all_of_it = Runs()
    yield all_of_it
    all_of_it.finish()
