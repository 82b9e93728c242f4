"""Read numbers that came from outside: in addresses, options and nodes of xenstore.

str.isdigit takes ² and ४ for digits. int takes ४, 1_000 and spaces too, and fails with 5,000 digits. A number here has
the digits 0 to 9 alone.
"""

from __future__ import annotations

__all__ = ["whole_number"]

_MOST_DIGITS = 20  # of 2**64


def whole_number(text: str | bytes, most: int = (1 << 64) - 1) -> int | None:
    """Read a number from 0 to `most`, of ASCII digits alone. None: the text is no such number."""
    if not (text.isascii() and text.isdigit()) or len(text) > _MOST_DIGITS:
        return None
    number = int(text)
    return number if number <= most else None
