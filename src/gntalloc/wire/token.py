"""Make tokens. A program that holds a home writes one there, and tells it to the machine over its call channel.

No byte of a token is below 128. Ports, which are written to homes too, have such a byte in each four. So no port is
taken for a token, nor a token for a port.
"""

from __future__ import annotations

import os

__all__ = ["SIZE_OF_TOKEN", "is_token", "make_token"]

SIZE_OF_TOKEN = 16
"""Bytes of a token; seven bits of each are random."""


def make_token() -> bytes:
    """Make a token that no other program can guess."""
    return bytes(byte | 0x80 for byte in os.urandom(SIZE_OF_TOKEN))


def is_token(data: bytes) -> bool:
    """Say whether these bytes could be a token."""
    return len(data) == SIZE_OF_TOKEN and min(data) >= 0x80
