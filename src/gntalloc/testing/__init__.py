"""What test suites import, yours and ours: standard library only, and no test framework.

    with two_domains() as (alice, bob):             # of a machine of their own; looks at the end what is left
        with alice.share(bob) as shared, bob.map(shared.grant) as mapped: ...

    with Program(bob, function, *args) as peer:     # a process of its own in a domain; can be killed
        peer.kill()

    with faults.pages(alice, 3): ...                # see `gntalloc.testing.faults`

    class TestMine(ChannelConformance): ...         # see `gntalloc.testing.channels`

    with Program(bob, ["./client"], unmodified=True): ...        # as under `gntalloc run`

pytest finds `gntalloc_machine`, `gntalloc_domains`, `gntalloc_channels` and `gntalloc_run` by itself.
docs/testing-your-code.md shows all of it.

`FakeMemory` is a program's memory with holes, for tests of a driver; `recount` sees that the books of a machine in
this process are right.

fixtures    two domains, a pair of channels: context managers
program     Program: a process of its own in a domain
unmodified  the same for a program as `gntalloc run` has it
cleanup     what was left behind, and by whom
faults      legal faults, on request
channels    a conformance kit for channels
checking    what the kit checks with
blocks      short tracebacks for failures in a `with`
memory      FakeMemory
recount     counts the books of a machine again
"""

from gntalloc.testing import faults
from gntalloc.testing.cleanup import Snapshot, assert_cleaned_up
from gntalloc.testing.fixtures import (
    Channels,
    Domains,
    Programs,
    channel_pair,
    checked_machine,
    running_programs,
    two_domains,
)
from gntalloc.testing.memory import FakeMemory
from gntalloc.testing.program import Program, ProgramFailed
from gntalloc.testing.recount import recount

__all__ = [
    "Channels",
    "Domains",
    "FakeMemory",
    "Program",
    "ProgramFailed",
    "Programs",
    "Snapshot",
    "assert_cleaned_up",
    "channel_pair",
    "checked_machine",
    "faults",
    "recount",
    "running_programs",
    "two_domains",
]
