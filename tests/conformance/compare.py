"""Hold ours against the judges: same, a documented difference, or wrong; and draw the table of docs/conformance.md.

`python tests/conformance/compare.py` writes that page anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent

from record import JUDGED  # noqa: E402
from rows import NOT_RUN, ROWS  # noqa: E402

DOCS = HERE.parent.parent / "docs"
PAGE = DOCS / "conformance.md"

# Rows our drivers do not do yet: row -> what is missing. Empty it, never hide in it.
NOT_DONE: dict[str, str] = {}

# The modern guest, whose gntdev ours is to be like; the others are shown beside it.
LIKE = "pvh"


class Verdict(NamedTuple):
    """What came of one row."""

    key: str
    ours: str
    judges: dict[str, str]
    verdict: str  # same, difference, not done, n/a, WRONG
    why: str


def judged() -> dict[str, Any]:
    """What the judges said, as recorded."""
    answers: dict[str, Any] = json.loads(JUDGED.read_text())
    return answers


def documented(page: str = "differences.md") -> dict[str, str]:
    """Row -> the question it answers differently, from this page: the first column of its tables names rows."""
    differences: dict[str, str] = {}
    for line in (DOCS / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 3 and re.fullmatch(r"(G?\d+)(, G?\d+)*", cells[1]):
            for key in cells[1].split(", "):
                differences[key] = cells[2]
    return differences


def text(answer: dict[str, str]) -> str:
    """One answer as a line."""
    return answer["saw"] if "saw" in answer else "; ".join(f"{kind}: {what}" for kind, what in answer.items())


def verdict(key: str, ours: dict[str, str], judges: dict[str, Any], differences: dict[str, str]) -> Verdict:
    """Judge one row."""
    said = {name: text(judge["rows"][key]) for name, judge in judges.items() if key in judge["rows"]}
    mine = text(ours)
    if "n/a" in ours:
        return Verdict(key, "n/a", said, "n/a", ours["n/a"])
    if mine == said[LIKE]:
        if key in differences:
            return Verdict(key, mine, said, "WRONG", "docs/differences.md names it, and there is none")
        if key in NOT_DONE:
            return Verdict(key, mine, said, "WRONG", "it is in NOT_DONE, and it is done")
        return Verdict(key, mine, said, "same", "")
    if key in differences:
        return Verdict(key, mine, said, "difference", differences[key])
    if key in NOT_DONE:
        return Verdict(key, mine, said, "not done", NOT_DONE[key])
    return Verdict(
        key, mine, said, "WRONG", f"ours answers {mine!r}, a {LIKE} guest {said[LIKE]!r}: see differences.md"
    )


def verdict_of_run(key: str, run: dict[str, str], ours: dict[str, str], hides: dict[str, str]) -> str:
    """Judge one row under `gntalloc run`: "" as it should be, what docs/run.md calls the difference, or WRONG."""
    answer = text(run)
    if "n/a" in run:
        return f"n/a: {run['n/a']}"
    like = {text(ours), text(judged()[LIKE]["rows"][key])}
    if "n/a" in ours:
        like.discard(text(ours))
    if answer in like:
        return "WRONG: docs/run.md names it, and there is no difference" if key in hides else ""
    if key in hides:
        return f"[run](run.md): {hides[key]}"
    return f"WRONG: under run it answers {answer!r}, and neither the others nor docs/run.md say so"


def page(ours: dict[str, Any], run: dict[str, Any]) -> str:
    """docs/conformance.md."""
    judges = judged()
    differences = documented()
    hides = documented("run.md")
    verdicts = [verdict(key, ours["rows"][key], judges, differences) for key in ROWS]
    names = list(judges)
    counts = {
        kind: sum(each.verdict == kind for each in verdicts) for kind in ("same", "difference", "not done", "n/a")
    }
    lines = [
        "# Conformance: the real drivers and ours, row by row",
        "",
        "`python tests/conformance/compare.py` makes this page; do not edit it. `python tests/conformance/record.py`",
        "has recorded the answers of the judges from a real Xen in QEMU. `make lab-test` asks them again and fails if",
        "an answer has changed. Ours is the native provider, the default behaviour, on a machine without Xen. `run` is",
        "the judges' own program, system calls on /dev/xen, under `gntalloc run --all-opens`.",
        "",
        f"{len(verdicts)} rows are run: {counts['same']} answered the same, {counts['difference']} differ and say why",
        f"([differences](differences.md)), {counts['not done']} are not done yet, {counts['n/a']} cannot be expressed",
        f"by the native provider. {len(NOT_RUN)} more are not run anywhere, with the reason.",
        "",
        "## Judges",
        "",
        "| judge | what it is |",
        "|---|---|",
        *(f"| {name} | {_facts(name, judges[name]['facts'])} |" for name in names),
        "",
        "dom0 and the PV guest grant to themselves and map their own grants, from two processes. A PVH guest cannot:",
        "that spoils its kernel's memory. Dom0 grants the pages that it maps. `to dom0` is a guest that grants and",
        "dom0 that maps.",
        "",
        "## Rows",
        "",
        f"| row | what is done | specification | {' | '.join(names)} | ours | | run |",
        f"|---|---|---|{'---|' * len(names)}---|---|---|",
    ]
    for each in verdicts:
        row = ROWS[each.key]
        answers = [_cell(each.judges[name]) if name in each.judges else "" for name in names]
        end = each.verdict if not each.why else f"{each.verdict}: {each.why}"
        under = run["rows"][each.key]
        besides = verdict_of_run(each.key, under, ours["rows"][each.key], hides)
        if besides and "n/a" not in under:
            besides = f"{text(under)}; {besides}"
        elif not besides:
            besides = "same" if text(under) == each.ours else text(under)
        cells = [each.key, row.title, row.says, *answers, _cell(each.ours), end, _cell(besides)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Not run", "", "| row | what is done | specification | why not |", "|---|---|---|---|"]
    lines += [f"| {key} | {title} | {says} | {why} |" for key, (title, says, why) in NOT_RUN.items()]
    return "\n".join(lines) + "\n"


def _cell(answer: str) -> str:
    return answer.replace("|", "\\|")


def _facts(name: str, facts: dict[str, str]) -> str:
    xen = ".".join(
        facts[part].lstrip(".") for part in ("version/major", "version/minor", "version/extra") if part in facts
    )
    return f"Xen {xen}, Linux {facts['kernel']} ({facts['version']}), guest type {facts.get('guest_type', '?')}"


def main() -> None:
    """Write the page."""
    from judge import judge_machine, judge_run

    PAGE.write_text(page(judge_machine(list(ROWS)), judge_run(list(ROWS))))


if __name__ == "__main__":
    main()
