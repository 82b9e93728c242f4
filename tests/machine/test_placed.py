"""PLACED is posted, not called: what if the machine hears of it late."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from struct import pack
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))

from raw_client import RawClient

from gntalloc import wire

if TYPE_CHECKING:
    from gntalloc import Domain

ANYWHERE = 0x10000


def test_a_map_that_was_gone_before_the_machine_heard_of_it_was_there(alice: Domain, bob: Domain) -> None:
    with RawClient(alice) as client:
        handle, home = client.open("gntalloc")
        index, refs = client.alloc(handle, bob.domid, flags=0)
        mapped = client.mmap(handle, index).close()
        client.call(wire.HELLO, pack("=I", wire.VERSION))  # when that is answered the munmap has been seen
        client.send(wire.PLACED, wire.PLACED_REQUEST.pack(mapped.result, ANYWHERE))
        client.call(wire.HELLO, pack("=I", wire.VERSION))
        with bob.map(alice.domid, refs, timeout=0) as pages:
            assert bytes(pages.memory[:4]) == bytes(4)
        os.close(home)
