"""Role: which bytes and words of the shared page are the server's, and which the client's. Pure."""

from __future__ import annotations

import sys
from typing import NamedTuple

from gntalloc.vchan.extension import CLI_STATE, SRV_STATE
from gntalloc.vchan.layout import (
    CLI_LIVE,
    CLI_NOTIFY,
    LEFT_CONS,
    LEFT_PROD,
    RIGHT_CONS,
    RIGHT_PROD,
    SRV_LIVE,
    SRV_NOTIFY,
)

__all__ = ["CLIENT", "SERVER", "Role", "flag_word"]


class Role(NamedTuple):
    """Name the bytes and words of the page by whose they are, as one end sees it."""

    my_live: int
    peer_live: int
    asking: int  # the byte in which this end sets bits
    asked: int  # the byte in which the peer does
    writes: tuple[int, int]  # the words of the index this end moves as a writer, and of the reader's
    reads: tuple[int, int]
    my_state: int
    peer_state: int
    reads_left: bool


SERVER = Role(
    SRV_LIVE,
    CLI_LIVE,
    CLI_NOTIFY,
    SRV_NOTIFY,
    (RIGHT_PROD, RIGHT_CONS),
    (LEFT_CONS, LEFT_PROD),
    SRV_STATE,
    CLI_STATE,
    reads_left=True,
)
CLIENT = Role(
    CLI_LIVE,
    SRV_LIVE,
    SRV_NOTIFY,
    CLI_NOTIFY,
    (LEFT_PROD, LEFT_CONS),
    (RIGHT_CONS, RIGHT_PROD),
    CLI_STATE,
    SRV_STATE,
    reads_left=False,
)


def flag_word(at: int, value: int) -> int:
    """Give the four bytes from cli_live on as one number, with `value` in one of them."""
    return int.from_bytes(bytes(value if byte == at else 0 for byte in range(CLI_LIVE, CLI_LIVE + 4)), sys.byteorder)
