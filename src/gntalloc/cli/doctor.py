"""Run `gntalloc doctor`."""

from __future__ import annotations

import json
import sys

import click

from gntalloc.cli import probes, run_probes
from gntalloc.cli.probe import Finding, look
from gntalloc.cli.show import table

__all__ = ["command", "look_at_everything"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object: `ok`, and what was found.")
@click.option("--strict", is_flag=True, help="Fail also if `gntalloc run` would not work: for CI.")
def command(as_json: bool, strict: bool) -> None:
    """Try what gntalloc needs of this computer, and say what to do where something is lacking.

    The exit status is 0 if a machine can run here without Xen, and 1 if not. With --strict it is 1 also if unmodified
    programs cannot be run.
    """
    findings = look_at_everything()
    ok = all(finding.ok for finding in findings if finding.required or (strict and finding.of_run))
    if as_json:
        print(json.dumps({"ok": ok, "findings": [finding._asdict() for finding in findings]}))
    else:
        _show(findings)
    sys.exit(0 if ok else 1)


def look_at_everything() -> list[Finding]:
    """Try everything, and first all that is required."""
    return [look(each) for each in sorted([*probes.PROBES, *run_probes.PROBES], key=lambda probe: not probe.required)]


def _show(findings: list[Finding]) -> None:
    rows = [(_verdict(finding), finding.name, finding.found) for finding in findings]
    table(("", "what", "found"), rows)
    lacking = [finding for finding in findings if not finding.ok]
    if lacking:
        print()
        advice = [(finding.name, finding.purpose, finding.advice) for finding in lacking]
        table(("lacking", "good for", "what to do"), advice)
    print()
    if any(finding.required for finding in lacking):
        print("A machine cannot run here.")
    else:
        print("A machine can run here, without Xen.")
        if any(finding.of_run for finding in lacking):
            print("Unmodified programs cannot: `gntalloc run` would not work.")
        else:
            print("So can unmodified programs, with `gntalloc run`.")


def _verdict(finding: Finding) -> str:
    if finding.ok:
        return "ok"
    return "MISSING" if finding.required else "not run" if finding.of_run else "optional"
