"""Check paths in xenstore, and read the permission entries of a node.

Client and server share the rules. The client uses them to explain a refusal. It enforces them only where breaking them
would break the connection: daemons differ in the characters that they accept, and the daemon decides.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Self

from gntalloc.digits import whole_number

__all__ = ["ABSOLUTE_MAX", "ACCESS", "RELATIVE_MAX", "Permission", "problem"]

ABSOLUTE_MAX = 3072
RELATIVE_MAX = 2048

_FOREIGN = re.compile(r"[^A-Za-z0-9/_@-]")

ACCESS = {"n": "no access", "r": "read", "w": "write", "b": "read and write"}


def problem(path: str, *, watch: bool = False) -> str | None:
    """Say why this is not a path. None: it is one.

    Args:
        path: absolute, or relative to the domain's own /local/domain/<domid>.
        watch: whether the special names @introduceDomain and @releaseDomain are allowed.
    """
    if not path:
        return "a path cannot be empty"
    if found := _FOREIGN.search(path):
        return f"{found[0]!r} cannot be in a path: letters, digits and - / _ @ can"
    if path.startswith("@"):
        return None if watch else "names with @ in front can only be watched"
    if "//" in path:
        return "two slashes in a row"
    if path.endswith("/") and path != "/":
        return "a path cannot end in a slash"
    limit = ABSOLUTE_MAX if path.startswith("/") else RELATIVE_MAX
    if len(path) > limit:
        return f"{len(path)} bytes; at most {limit} are allowed"
    return None


class Permission(NamedTuple):
    """Say what one domain may do with a node.

    The first entry of a node names its owner, which may do everything. The letter of that entry holds for every domain
    without an entry of its own.
    """

    domid: int
    access: str

    def __str__(self) -> str:
        return f"{self.access}{self.domid}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `b0`, `r3` and the like.

        Raises:
            ValueError: the text is no permission.
        """
        access, number = text[:1], text[1:]
        domid = whole_number(number, 0xFFFF)
        if access not in ACCESS or domid is None:
            raise ValueError(f"{text[:40]!r} is not a permission: one of the letters n r w b, then a domid")
        return cls(domid, access)
