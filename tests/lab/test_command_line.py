"""`gntalloc lab` as far as it goes without booting."""

import io
import json
import sys
from pathlib import Path

import pytest

from gntalloc.cli import main
from gntalloc.cli.labelled import Labelled
from gntalloc.lab import machine_tools
from gntalloc.lab.images import Manifest
from gntalloc.lab.qemu import arguments


def exit_of(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as caught:
        main(["lab", *arguments])
    return caught.value.code


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--guest", "hvm", "--", "true"],
        ["run", "--pair", "--", "true"],
        ["run", "--pair", "--in-guest", "true"],
        ["run", "--in-dom0", "true", "--", "true"],
        ["run", "--file", "/no/such/file", "--", "true"],
        ["shell"],
    ],
)
def test_wrong_usage_is_2(
    arguments: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert exit_of(arguments) == 2
    assert "Error" in capfd.readouterr().err


def test_no_images_is_3_and_says_what_to_do(
    cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_tools, "need", lambda _asked, *programs: dict.fromkeys(programs, "/bin/false"))
    assert exit_of(["run", "--", "true"]) == 3
    assert "gntalloc lab build" in capfd.readouterr().err


def test_no_qemu_is_3_and_says_what_to_do(
    cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_tools, "_SEARCHED", "/nowhere")
    assert exit_of(["run", "--", "true"]) == 3
    assert "apt install qemu-system-x86" in capfd.readouterr().err


def test_with_json_an_error_is_json_too(
    cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_tools, "need", lambda _asked, *programs: dict.fromkeys(programs, "/bin/false"))
    assert exit_of(["run", "--json", "--", "true"]) == 3
    assert json.loads(capfd.readouterr().out)["kind"] == "NothingToRunOn"


def test_info_shows_what_would_boot(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = cache / "images" / "one"
    folder.mkdir(parents=True)
    Manifest("bookworm", "4.17.7", "6.1.1-1", "6.1.0-1-amd64", {"python3": "3.11"}, []).write(folder / "manifest.json")
    (cache / "current").symlink_to(folder)
    assert exit_of(["info", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["xen"] == "4.17.7"


def test_labels_keep_lines_whole(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    show = Labelled(["dom0", "pv"])
    show("pv", 1, b"one\ntw")
    show("dom0", 1, b"other\n")
    show("pv", 1, b"o\nrest")
    show.finish()
    sys.stdout.flush()
    assert capfdbinary.readouterr().out == b"pv   | one\ndom0 | other\npv   | two\npv   | rest\n"


def test_qemu_gets_memory_for_all_domains() -> None:
    command = arguments("qemu", dom0_memory=1024, guests_memory=512, descriptor=7)
    assert int(command[command.index("-m") + 1]) > 1024 + 512
    assert "socket,id=agent,fd=7" in command
    assert "oops=panic" in command[command.index("-initrd") + 1]
