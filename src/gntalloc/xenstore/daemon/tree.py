"""Keep nodes, and check their names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gntalloc.xenstore.daemon.permissions import Entry

__all__ = ["Node", "Tree", "above", "home", "is_name", "last", "parent", "too_long"]

_NAME = re.compile(r"/|(?:/[A-Za-z0-9_@-]+)+")
_HOME = re.compile(r"/local/domain/(?:-[0-9]{1,4}|[0-9]{1,5})/")

_HEADER = 24  # bytes that the daemon's database needs for a node, and 8 for each permission
_ENTRY = 8


class Node(NamedTuple):
    """Hold one node. It is never changed, but replaced."""

    generation: int
    permissions: tuple[Entry, ...]
    value: bytes = b""
    children: tuple[str, ...] = ()
    names: int = 0
    """Bytes of the children's names, with a zero each."""

    @property
    def size(self) -> int:
        """The bytes that count against a quota."""
        return _HEADER + _ENTRY * len(self.permissions) + len(self.value) + self.names

    def of(self, generation: int) -> Node:
        """Make the same node of that generation."""
        return Node(generation, self.permissions, self.value, self.children, self.names)

    def with_child(self, name: str) -> Node:
        """Make the node with one more child, the last."""
        children = (*self.children, name)
        return Node(self.generation, self.permissions, self.value, children, self.names + len(name) + 1)

    def without_child(self, name: str) -> Node:
        """Make the node with one child fewer."""
        place = self.children.index(name)
        children = self.children[:place] + self.children[place + 1 :]
        return self._replace(children=children, names=self.names - len(name) - 1)

    def without_first(self, count: int) -> Node:
        """Make the node without its first children."""
        children = self.children[count:]
        return self._replace(children=children, names=sum(len(name) + 1 for name in children))

    def listing(self) -> bytes:
        """List the children's names, as an answer has them."""
        return b"".join(name.encode() + b"\0" for name in self.children)


class Tree(dict[str, Node]):
    """Keep all nodes by name, and the count of changes that tells one state of a node from another."""

    def __init__(self) -> None:
        super().__init__()
        self.generation = 0
        self.owned: dict[int, dict[str, None]] = {}
        """The names of the nodes that each number owns. Numbers that own none are not in it."""

    def advance(self) -> int:
        """Begin the next generation, and return it."""
        self.generation += 1
        return self.generation

    def grow(self, owner: int, nodes: dict[str, Node]) -> None:
        """Add nodes of one owner that were not there."""
        self.update(nodes)
        self.owned.setdefault(owner, {}).update(dict.fromkeys(nodes))

    def owner_changed(self, path: str, old: Node | None, new: Node | None) -> None:
        """Note which domain owns a node now. None: there was none, or there is none any more."""
        before = None if old is None else old.permissions[0].domid
        now = None if new is None else new.permissions[0].domid
        if before == now:
            return
        if before is not None:
            names = self.owned[before]
            del names[path]
            if not names:
                del self.owned[before]
        if now is not None:
            self.owned.setdefault(now, {})[path] = None

    def above_owned(self, domid: int) -> set[str]:
        """Give the names of the nodes that this number owns, and of all above them."""
        found: set[str] = set()
        for path in self.owned.get(domid, ()):
            name = path
            while name not in found:
                found.add(name)
                name = parent(name)
        return found


def is_name(path: str, longest: int) -> bool:
    """Say whether a node can be called that. A name below a domain's home may have `longest` bytes from there on."""
    return bool(_NAME.fullmatch(path)) and _counted(path) <= longest


def too_long(path: str, longest: int) -> str:
    """Say why a node cannot be called that, if the quota is the reason. The text is empty otherwise."""
    length = _counted(path)
    return f"path-max {longest}: the path has {length} bytes" if length > longest else ""


def _counted(path: str) -> int:
    found = _HOME.match(path)
    return len(path) - (found.end() if found else 0)


def home(domid: int) -> str:
    """Give the path of a domain's own nodes."""
    return f"/local/domain/{domid}"


def parent(path: str) -> str:
    """Give the node above; / is above itself."""
    return path.rpartition("/")[0] or "/"


def last(path: str) -> str:
    """Give the last part of a name."""
    return path.rpartition("/")[2]


def above(path: str) -> list[str]:
    """List the node itself and all above it, up to /."""
    names = [path]
    while path != "/":
        path = parent(path)
        names.append(path)
    return names
