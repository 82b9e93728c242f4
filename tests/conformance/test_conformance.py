"""Ours against what the real drivers answered, and, with GNTALLOC_LAB=1, the real drivers against that record."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from compare import NOT_DONE, PAGE, documented, judged, page, text, verdict, verdict_of_run
from judge import judge_machine, judge_run
from record import ask_all
from rows import BETWEEN_DOMAINS, NOT_RUN, PROBES, ROWS

if TYPE_CHECKING:
    from gntalloc.lab import Session

LAB = os.environ.get("GNTALLOC_LAB") == "1"


@pytest.fixture(scope="session")
def ours() -> dict[str, Any]:
    """All rows on a machine of our own."""
    return judge_machine(list(ROWS))


@pytest.fixture(scope="session")
def under_run() -> dict[str, Any]:
    """All rows by the kernel's seat, under `gntalloc run`."""
    return judge_run(list(ROWS))


@pytest.mark.timeout(200)
@pytest.mark.parametrize("key", ROWS)
def test_a_program_under_run_sees_the_same_or_the_page_says_why_not(
    key: str, ours: dict[str, Any], under_run: dict[str, Any]
) -> None:
    found = verdict_of_run(key, under_run["rows"][key], ours["rows"][key], documented("run.md"))
    assert not found.startswith("WRONG"), f"row {key}, {ROWS[key].title}: {found}"


@pytest.mark.timeout(200)
@pytest.mark.parametrize("key", ROWS)
def test_ours_answers_as_the_real_driver_or_says_why_not(key: str, ours: dict[str, Any]) -> None:
    found = verdict(key, ours["rows"][key], judged(), documented())
    assert found.verdict != "WRONG", f"row {key}, {ROWS[key].title}: {found.why}"


def test_the_page_is_up_to_date(ours: dict[str, Any], under_run: dict[str, Any]) -> None:
    assert PAGE.read_text() == page(ours, under_run), "run python tests/conformance/compare.py"


def test_every_row_of_the_specification_is_run_or_says_why_not() -> None:
    numbered = {key for key in {*ROWS, *NOT_RUN} if key.isdigit()}
    assert {str(number) for number in range(1, 92)} <= numbered


def test_every_documented_difference_is_about_a_row_that_is_run() -> None:
    assert set(documented()) <= set(ROWS)
    assert set(documented("run.md")) <= set(ROWS)
    assert set(NOT_DONE) <= set(ROWS)


def test_every_judge_answered_every_row() -> None:
    for name, judge in judged().items():
        assert set(judge["rows"]) == set(BETWEEN_DOMAINS if "to" in name.split() else ROWS), name
        broken = {key: answer for key, answer in judge["rows"].items() if "broke" in answer}
        assert broken == {}, name


def eras(rows: dict[str, Any]) -> dict[str, set[int]]:
    """Probe -> with the fix (0) or without (1), as each of its rows says."""
    return {
        probe: {answers[key].index(text(rows[key])) for key in answers if key in rows}
        for probe, answers in PROBES.items()
    }


def test_the_rows_of_a_probe_agree() -> None:
    for name, judge in judged().items():
        for probe, said in eras(judge["rows"]).items():
            assert len(said) < 2, (name, probe)


@pytest.mark.skipif(not LAB, reason="boots a real Xen: set GNTALLOC_LAB=1")
@pytest.mark.timeout(600)
def test_the_real_drivers_still_answer_as_recorded(xen: Session) -> None:
    """Rows that a probe decides may change with the kernel, all of a probe together; the others may not."""
    now = ask_all(xen)
    recorded = judged()
    probed = {key for answers in PROBES.values() for key in answers}
    changed = {
        (name, key): (text(recorded[name]["rows"][key]), text(answer))
        for name, judge in now.items()
        for key, answer in judge["rows"].items()
        if answer != recorded[name]["rows"][key] and key not in probed
    }
    assert changed == {}
    for name, judge in now.items():
        for probe, said in eras(judge["rows"]).items():
            assert len(said) < 2, (name, probe)
