"""The long run: `python tests/xenstore/xs_run.py --requests 20000 [--seed 0] [--record FILE]`.

Boots a real Xen, gives its xenstored random requests of four connections, gives ours the same, and shows every reply
that differs. Exit status 1 if one does. With --record the requests and the real answers are written as one JSON file,
which `make test` replays against ours (xs_recorded.json).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from xs_generate import generate
from xs_judge import FILES, ask, compare

from gntalloc.lab import Lab

LENGTH = 100  # of an episode
A_BOOT = 100  # episodes; a line of progress each


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    numbers = range(options.seed, options.seed + -(-options.requests // LENGTH))
    episodes = {number: generate(number, LENGTH) for number in numbers}
    differing = 0
    answers = {}
    for first in range(0, len(numbers), A_BOOT):
        some = {number: episodes[number] for number in numbers[first : first + A_BOOT]}
        with Lab.find().boot(files=FILES, timeout=3000) as session:
            theirs = ask(session, some, timeout=3000)
        found = compare(some, theirs)
        for difference in found:
            print(difference)
        answers.update(theirs)
        differing += len(found)
        count = sum(map(len, some.values()))
        print(f"episodes {min(some)} to {max(some)}: {count} replies, {len(found)} differ")
    if options.record:
        lines = [json.dumps([number, episodes[number], answers[number]]) for number in numbers]
        options.record.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
