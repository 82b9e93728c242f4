from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from gntalloc.cli import doctor
from gntalloc.probes import Finding

if TYPE_CHECKING:
    from collections.abc import Callable

GOOD = Finding("seals", ok=True, required=True, found="work", purpose="pages", advice="")
BAD = Finding("leases", ok=False, required=True, found="refused", purpose="knowing", advice="newer kernel")
SPARE = Finding("QEMU", ok=False, required=False, found="not there", purpose="the lab", advice="apt install it")


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    def run(findings: list[Finding], *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(doctor, "look_at_everything", lambda: findings)
        result = CliRunner().invoke(doctor.command, arguments)
        return result.exit_code, result.output

    return run


@pytest.mark.parametrize(
    ("findings", "strict", "code"),
    [
        ([GOOD], False, 0),
        ([GOOD, SPARE], False, 0),
        ([GOOD, SPARE], True, 1),
        ([GOOD], True, 0),
        ([GOOD, BAD], False, 1),
        ([BAD], True, 1),
    ],
)
def test_exit_status(ask: Callable[..., tuple[int, str]], findings: list[Finding], strict: bool, code: int) -> None:
    assert ask(findings, *(["--strict"] if strict else []))[0] == code
    assert ask(findings, "--json", *(["--strict"] if strict else []))[0] == code


def test_plain_text(ask: Callable[..., tuple[int, str]]) -> None:
    _, text = ask([GOOD, BAD, SPARE])
    assert text.splitlines() == [
        "          what    found",
        "ok        seals   work",
        "MISSING   leases  refused",
        "optional  QEMU    not there",
        "",
        "lacking  good for  what to do",
        "leases   knowing   newer kernel",
        "QEMU     the lab   apt install it",
        "",
        "A machine cannot run here.",
    ]
    assert ask([GOOD])[1].splitlines()[-1] == "A machine can run here, without Xen."


def test_json(ask: Callable[..., tuple[int, str]]) -> None:
    report = json.loads(ask([GOOD, SPARE], "--json")[1])
    assert report["ok"] is True
    assert report["findings"][1] == {
        "name": "QEMU",
        "ok": False,
        "required": False,
        "found": "not there",
        "purpose": "the lab",
        "advice": "apt install it",
    }


def test_for_real() -> None:
    command = [sys.executable, "-m", "gntalloc", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["ok"]
