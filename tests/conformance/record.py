"""Ask the judges: one boot of a real Xen with dom0, a PV and a PVH guest, and the rows in each and between them.

`python tests/conformance/record.py` writes what they say to judged.json, which the other tests and the docs go by. A
row of it changes only this way.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rows import BETWEEN_DOMAINS, ROWS

from gntalloc.lab import Lab, Outcome, Session

HERE = Path(__file__).parent
JUDGED = HERE / "judged.json"
FILES = [HERE / name for name in ("seat.py", "driving.py", "rows.py", "event_rows.py", "far.py", "judge.py")]


def ask_all(session: Session) -> dict[str, Any]:
    """Every judge's answers: judge -> {facts, rows}.

    A judge alone grants to itself and maps its own grants. A PVH guest cannot (see rows.py): what it maps is granted
    by dom0.
    """
    alone = [key for key in ROWS if key not in BETWEEN_DOMAINS]
    return {
        "dom0": _alone(session, "dom0", []),
        "pv": _alone(session, "pv", []),
        "pvh": _merged(_alone(session, "pvh", alone), _together(session, "pvh", "into")),
        "pv to dom0": _together(session, "pv", "out-of"),
        "pvh to dom0": _together(session, "pvh", "out-of"),
    }


def _alone(session: Session, domain: str, keys: list[str]) -> dict[str, Any]:
    return _read(session.run(["python3", "judge.py", "kernel", "out.json", *keys], domain, fetch=["out.json"]))


def _together(session: Session, guest: str, way: str) -> dict[str, Any]:
    commands = {guest: ["python3", "far.py", "serve"], "dom0": ["python3", "judge.py", way, "out.json"]}
    return _read(session.run_together(commands, fetch={"dom0": ["out.json"]})["dom0"])


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {"facts": first["facts"], "rows": first["rows"] | second["rows"]}


def _read(outcome: Outcome) -> dict[str, Any]:
    assert outcome.exit_status == 0, outcome.output + outcome.errors
    (raw,) = outcome.files.values()
    judged: dict[str, Any] = json.loads(raw)
    return judged


def main() -> None:
    """Boot, ask, write."""
    with Lab.find().boot(("pv", "pvh"), files=FILES, timeout=400) as session:
        judged = ask_all(session)
    JUDGED.write_text(json.dumps(judged, indent=1, sort_keys=True) + "\n")
    print(f"{sum(len(judge['rows']) for judge in judged.values())} answers written to {JUDGED.name}")


if __name__ == "__main__":
    main()
