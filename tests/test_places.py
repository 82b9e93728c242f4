"""Where machines are."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from gntalloc import places
from gntalloc.errors import GntallocError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_the_top_folder_is_in_the_users_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert places.top_folder() == str(tmp_path / "gntalloc")
    for nothing in ("", "/nowhere/at/all"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", nothing)
        assert places.top_folder() in {"/run/gntalloc", f"/tmp/gntalloc-{os.getuid()}"}


@pytest.mark.parametrize("name", ["", ".", "..", "x" * 200])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(GntallocError):
        places.machine_folder(name)


def test_a_name_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert places.machine_folder("one") == str(tmp_path / "gntalloc" / "one")
    assert places.machine_folder("/some/where") == "/some/where"
    monkeypatch.chdir(tmp_path)
    assert places.machine_folder("./here") == str(tmp_path / "here")


def test_every_path_that_is_allowed_is_short_enough_for_a_socket() -> None:
    import socket

    longest = "/tmp/" + "x" * (places.LONGEST_PATH - len("/tmp//32751.store-"))
    folder = places.machine_folder(longest)
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(FileNotFoundError):
        sock.connect(places.store_path(folder, 32751) + "-")
    with pytest.raises(GntallocError, match="shorter"):
        places.machine_folder(longest + "x")


def test_machines_are_those_with_a_control_socket(tmp_path: Path) -> None:
    assert places.machines() == []
    places.make_top_folder()
    assert places.machines() == []
    for name in ("two", "one", "left"):
        (tmp_path / "gntalloc" / name).mkdir()
    for name in ("two", "one"):
        (tmp_path / "gntalloc" / name / "control").touch()
    assert places.machines() == ["one", "two"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    places.make_top_folder()
    os.chown(tmp_path / "gntalloc", 65534, 65534)
    with pytest.raises(GntallocError, match="not a folder of yours"):
        places.make_top_folder()


def test_a_link_to_somewhere_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "gntalloc").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GntallocError, match="not a folder of yours"):
        places.make_top_folder()
