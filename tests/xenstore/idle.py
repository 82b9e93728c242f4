"""Domains of a real Xen that never run, whose xenstore connections dom0 uses in their stead. For the lab's dom0 only.

A guest talks with xenstored over a ring in a page of its own, which the toolstack grants to dom0 before the guest's
first instruction. So a guest that is created paused has a connection that nobody uses: dom0 maps the page and plays the
guest, without a guest kernel in between that would have its own opinions. It cannot ring the guest's bell, but the
daemon looks at all rings whenever it looks at anything: a question over dom0's socket does.

The guest's kernel is 4 KiB of nothing: it only has to be loaded.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import gntalloc

if TYPE_CHECKING:
    from gntalloc.guest.pages import MappedPages

RING_REF = 1  # GNTTAB_RESERVED_XENSTORE, of public/grant_table.h
SIZE = 1024  # of each of the two rings
INDEXES = 2 * SIZE  # where they are: four of 32 bits
REQUEST_TAKEN, REQUEST_PUT, ANSWER_TAKEN, ANSWER_PUT = range(4)

_SETTINGS = 'name = "{name}"\ntype = "pv"\nkernel = "{kernel}"\nmemory = 16\nvcpus = 1\nvif = []\ndisk = []\n'


class Ring:
    """The guest's end of a connection to xenstored: `send` and `receive`, neither of which waits."""

    def __init__(self, domid: int) -> None:
        self.domid = domid
        self._pages: MappedPages = gntalloc.current_domain().map(domid, RING_REF, writable=True)
        self._memory = self._pages.memory
        # As numbers of the machine, each stored in one piece: a daemon that saw half an index would end the connection.
        self._indexes = self._memory[INDEXES : INDEXES + 16].cast("I")

    def send(self, data: bytes) -> int:
        """Put as much as there is room for, and tell how much that was."""
        put = self._indexes[REQUEST_PUT]
        room = SIZE - (put - self._indexes[REQUEST_TAKEN] & 0xFFFFFFFF)
        data = data[:room]
        for place, byte in enumerate(data, put):
            self._memory[place % SIZE] = byte
        self._indexes[REQUEST_PUT] = put + len(data) & 0xFFFFFFFF
        return len(data)

    def receive(self) -> bytes:
        """Take what is there."""
        taken, put = self._indexes[ANSWER_TAKEN], self._indexes[ANSWER_PUT]
        data = bytes(self._memory[SIZE + place % SIZE] for place in range(taken, taken + (put - taken & 0xFFFFFFFF)))
        self._indexes[ANSWER_TAKEN] = put
        return data


def create(names: list[str]) -> dict[str, int]:
    """Make domains that do not run, and tell their numbers."""
    kernel = Path("/run/idle-kernel")
    kernel.write_bytes(_kernel())
    _xl("mem-set", "0", "800m")
    domids = {}
    for name in names:
        settings = Path(f"/run/idle-{name}.cfg")
        settings.write_text(_SETTINGS.format(name=f"idle-{name}", kernel=kernel))
        _xl("create", "-q", "-p", str(settings))
        domids[name] = int(_xl("domid", f"idle-{name}"))
    return domids


def destroy(name: str) -> None:
    """End one of them."""
    _xl("destroy", f"idle-{name}")


def _xl(*arguments: str) -> str:
    done = subprocess.run(["xl", *arguments], capture_output=True, text=True, check=False, timeout=50)
    if done.returncode:
        raise RuntimeError(f"xl {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def _kernel() -> bytes:
    """An ELF file that Xen's toolstack takes for a kernel: one page of zeros, and notes (public/elfnote.h) about it."""
    base = 0x100000
    notes = b"".join(
        _note(kind, content)
        for kind, content in (
            (1, struct.pack("<Q", base)),  # where to begin
            (3, struct.pack("<Q", 0)),  # virtual addresses start at
            (5, b"xen-3.0\0"),
            (6, b"none\0"),
            (8, b"generic\0"),
            (9, b"yes\0"),  # three-level page tables: what everybody says
        )
    )
    header = b"\x7fELF" + bytes([2, 1, 1, 0]) + bytes(8)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    at = 64 + 2 * 56
    load = struct.pack("<IIQQQQQQ", 1, 7, 4096, base, base, 4096, 4096, 4096)
    note = struct.pack("<IIQQQQQQ", 4, 4, at, 0, 0, len(notes), len(notes), 4)
    return (header + load + note + notes).ljust(4096, b"\0") + bytes(4096)


def _note(kind: int, content: bytes) -> bytes:
    padded = content + bytes(-len(content) % 4)
    return struct.pack("<III", 4, len(content), kind) + b"Xen\0" + padded
