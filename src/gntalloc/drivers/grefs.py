"""Keep granted pages: one page, the pages of an open file, and what is told of a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gntalloc.drivers.chardev import File, Frame
    from gntalloc.drivers.notify import Promise

__all__ = ["FileState", "GrantInfo", "Gref"]


class Gref:
    """Keep one granted page."""

    __slots__ = ("born", "domid", "file", "frame", "index", "promise", "readonly", "ref", "state", "users")

    def __init__(
        self, file: File, state: FileState, index: int, frame: Frame, domid: int, readonly: bool, ref: int, born: float
    ) -> None:
        self.file = file
        self.state = state
        self.index = index
        self.frame = frame
        self.domid = domid
        self.readonly = readonly
        self.ref = ref
        self.users = 1  # the file's list
        self.promise: Promise | None = None  # what to do when the last user goes
        self.born = born


class FileState:
    """Keep the state of an open file: its pages by index, those off its list but not free yet, and the next index."""

    __slots__ = ("grefs", "next_index", "released")

    def __init__(self) -> None:
        self.grefs: dict[int, Gref] = {}
        self.released: dict[int, Gref] = {}
        self.next_index = 0


class GrantInfo(NamedTuple):
    """Describe one page, for people and programs to look at."""

    ref: int
    peer: int
    writable: bool
    opener: int  # pid
    users: int  # 0: released, and lingers
    mapped_by: tuple[int, ...]
    held: bool
    age: float  # seconds
