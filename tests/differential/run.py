"""The long run of random operations.

    export PYTHONPATH=tests/conformance
    python tests/differential/run.py --operations 50000 [--judges dom0,pv] [--seed 0] [--record FILE]

Boots a real Xen, gives each judge its share of the operations, does the same on a machine of ours with
behaviour="linux", and shows every difference, some of them shrunk. Exit status 1 if there is one.

    python tests/differential/run.py --again [FILE]

does without a Xen: it holds ours against what the judges said in a run that was recorded, and needs two minutes for the
50,513 operations of recorded.jsonl.xz. With --under-run too, ours is system calls on what `gntalloc run` serves.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from differ import Difference, first_difference
from judges import JUDGES, ask, boot, episodes_for
from replay import replay_on_machine, replay_under_run
from shrink import shrink

from gntalloc.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable

    from world import Episode

    from gntalloc.lab import Session


RECORDED = Path(__file__).parent / "recorded.jsonl.xz"

Answers = dict[str, dict[int, list[Any]]]


def write_record(path: Path, work: dict[str, dict[int, Episode]], answers: Answers) -> None:
    """What the judges were asked and said, as JSON lines, compressed."""
    with lzma.open(path, "wt") as out:
        for name, episodes in work.items():
            for number, episode in episodes.items():
                for operation, answer in zip(episode, answers[name][number], strict=True):
                    print(json.dumps({"judge": name, "episode": number, **operation, "answer": answer}), file=out)


def read_record(path: Path = RECORDED) -> tuple[dict[str, dict[int, Episode]], Answers]:
    """The other way round."""
    work: dict[str, dict[int, Episode]] = {}
    answers: Answers = {}
    with lzma.open(path, "rt") as lines:
        for line in lines:
            operation = json.loads(line)
            name, number, answer = (operation.pop(key) for key in ("judge", "episode", "answer"))
            work.setdefault(name, {}).setdefault(number, []).append(operation)
            answers.setdefault(name, {}).setdefault(number, []).append(answer)
    return work, answers


def differences(
    name: str, episodes: dict[int, Episode], theirs: dict[int, list[Any]], *, under_run: bool = False
) -> dict[int, Difference]:
    """Episodes that ours answers differently, and where."""
    judge = JUDGES[name]
    ours = (replay_under_run if under_run else replay_on_machine)(episodes.values(), alone=judge.alone)
    found = {
        number: first_difference(episode, theirs[number], answers, pv=judge.pv)
        for (number, episode), answers in zip(episodes.items(), ours, strict=True)
    }
    return {number: difference for number, difference in found.items() if difference is not None}


def asking(session: Session, name: str) -> Callable[[list[Episode]], list[bool]]:
    """What `shrink` asks: which of these differ."""

    def differ(candidates: list[Episode]) -> list[bool]:
        numbered = dict(enumerate(candidates))
        found = differences(name, numbered, ask(session, {name: numbered})[name])
        return [number in found for number in numbered]

    return differ


def show(name: str, episodes: dict[int, Episode], found: dict[int, Difference]) -> int:
    """Print what differs, and say how many episodes do."""
    count = sum(map(len, episodes.values()))
    print(f"{name}: {count} operations, {len(found)} of {len(episodes)} episodes differ", flush=True)
    for number, difference in found.items():
        print(f"  episode {number}, {difference}", flush=True)
    return len(found)


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--operations", type=int, default=50_000, help="of all judges together")
    parser.add_argument("--judges", default=",".join(JUDGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="write operations and the judges' answers there: .jsonl.xz")
    parser.add_argument("--again", type=Path, nargs="?", const=RECORDED, help="no Xen: what was recorded there")
    parser.add_argument("--shrink", type=int, default=1, help="so many differing episodes of each judge")
    parser.add_argument("--under-run", action="store_true", help="ours is system calls under `gntalloc run`")
    options = parser.parse_args()
    if options.again:
        work, answers = read_record(options.again)
        bad = 0
        for name, episodes in work.items():
            bad += show(name, episodes, differences(name, episodes, answers[name], under_run=options.under_run))
        sys.exit(bool(bad))
    names = options.judges.split(",")
    share = -(-options.operations // len(names))
    work = {
        name: episodes_for(JUDGES[name], options.seed + 1_000_000 * place, share) for place, name in enumerate(names)
    }
    bad = 0
    with boot(Lab.find()) as session:
        answers = ask(session, work)
        if options.record:
            write_record(options.record, work, answers)
        for name, episodes in work.items():
            found = differences(name, episodes, answers[name])
            bad += show(name, episodes, found)
            for number in list(found)[: options.shrink]:
                episode = episodes[number][: found[number].step + 1]
                for operation in shrink(episode, asking(session, name), pv=JUDGES[name].pv):
                    print(f"    {json.dumps(operation)}", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
