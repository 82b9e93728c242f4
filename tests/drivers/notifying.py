"""Asking the drivers for a notification."""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING

from gntalloc.abi.gntdev import SET_UNMAP_NOTIFY

if TYPE_CHECKING:
    from fake_program import Program


BYTE, EVENT, BOTH = 1, 2, 3


def set_notify(program: Program, index: int, action: int, port: int = 0) -> None:
    program.ioctl(SET_UNMAP_NOTIFY, pack("=QII", index, action, port))
