"""What test suites import, yours and ours: standard library only, and no test framework.

    before = Snapshot.of(machine)
    ...                                  # what is to be tested
    assert_cleaned_up(machine, before)   # no descriptor, no map, no grant, no page is left over

`FakeMemory` is a program's memory with holes, for whoever tests a driver; `recount` sees that the books of a machine in
this process are right.
"""

from gntalloc.testing.cleanup import Snapshot, assert_cleaned_up
from gntalloc.testing.memory import FakeMemory
from gntalloc.testing.recount import recount

__all__ = ["FakeMemory", "Snapshot", "assert_cleaned_up", "recount"]
