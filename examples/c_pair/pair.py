"""Run the two programs in two domains of a machine: python pair.py GRANTER GRANTEE. CMakeLists.txt has it as a test."""

from __future__ import annotations

import subprocess
import sys

from gntalloc.testing import running_programs


def main(granter: str, grantee: str) -> None:
    with running_programs() as run:  # all of it ends with the block, and must have given back what it took
        server = run(1, [granter, "2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert server.process.stdout is not None
        reference = server.process.stdout.readline().strip()
        client = run(2, [grantee, "1", reference], stdout=subprocess.PIPE, text=True)
        said, _ = client.process.communicate(timeout=30)
        client.result(timeout=30)  # raises, if its exit status is not 0
        if said != "hello from C\n":
            sys.exit(f"the grantee read {said!r}")
        server.process.communicate("", timeout=30)  # the end of its input
        server.result(timeout=30)


if __name__ == "__main__":
    main(*sys.argv[1:])
