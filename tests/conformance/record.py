"""Ask the judges: one boot of a real Xen with dom0, a PV and a PVH guest, and the rows in each and between them.

`python tests/conformance/record.py` writes what they say to judged.json, which the other tests and the docs go by. A
row of it changes only this way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gntalloc.lab import Lab, Session

HERE = Path(__file__).parent
JUDGED = HERE / "judged.json"
FILES = [HERE / name for name in ("seat.py", "driving.py", "rows.py", "far.py", "judge.py")]


def ask_all(session: Session, keys: list[str] | None = None) -> dict[str, Any]:
    """Every judge's answers: judge -> {facts, rows}."""
    judged: dict[str, Any] = {}
    for domain in ("dom0", "pv", "pvh"):
        outcome = session.run(["python3", "judge.py", "kernel", "out.json", *(keys or [])], domain, fetch=["out.json"])
        judged[domain] = _read(outcome, session.versions if domain == "dom0" else {})
    for guest in ("pv", "pvh"):
        commands = {guest: ["python3", "far.py", "serve"], "dom0": ["python3", "judge.py", "across", "out.json"]}
        outcomes = session.run_together(commands, fetch={"dom0": ["out.json"]})
        judged[f"{guest} to dom0"] = _read(outcomes["dom0"], {})
    return judged


def _read(outcome: Any, versions: dict[str, str]) -> dict[str, Any]:
    assert outcome.exit_status == 0, outcome.output + outcome.errors
    (raw,) = outcome.files.values()
    judged: dict[str, Any] = json.loads(raw)
    judged["facts"] |= versions
    return judged


def main() -> None:
    """Boot, ask, write."""
    with Lab.find().boot(("pv", "pvh"), files=FILES, timeout=400) as session:
        judged = ask_all(session, sys.argv[1:])
    if sys.argv[1:]:
        print(json.dumps(judged, indent=1))
        return
    JUDGED.write_text(json.dumps(judged, indent=1, sort_keys=True) + "\n")
    print(f"{sum(len(judge['rows']) for judge in judged.values())} answers written to {JUDGED.name}")


if __name__ == "__main__":
    main()
