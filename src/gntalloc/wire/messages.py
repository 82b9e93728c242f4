"""Define every kind of message, each a named tuple: its number, its fields, and their form on the wire.

`encode(Open(flags, name))` makes a payload, and `decode(Open, payload)` makes a message of it. The frame of an answer
(`stream.Reply`) has its error, the reason of that, and its result, a number. docs/wire.md has the table that is made
from this module.

A Notify and a Behalf get no reply. They are served in their turn, as requests are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from gntalloc.wire.form import BYTES, DOMIDS, PIECES, REFERENCES, REGIONS, TEXT, Form, Piece
from gntalloc.wire.stream import Garbage

if TYPE_CHECKING:
    from gntalloc.wire.memory import Region

__all__ = [
    "FORMS",
    "KINDS",
    "MORE",
    "NOBODY",
    "PLACE",
    "TAKE_OVER",
    "UNASKED",
    "VERSION",
    "Attach",
    "Behalf",
    "Brought",
    "Control",
    "Hello",
    "Holders",
    "HoldersAnswer",
    "Home",
    "Ioctl",
    "IoctlAnswer",
    "Keep",
    "Lend",
    "MapAnswer",
    "Mmap",
    "Notify",
    "Open",
    "Piece",
    "Read",
    "Serve",
    "Share",
    "ShareAnswer",
    "Show",
    "ShowAnswer",
    "Write",
    "decode",
    "encode",
    "frame",
    "frame_reply",
    "kind_of",
]

M = TypeVar("M")

VERSION = 7
NOBODY = 0
"""The id of an answer to a program that is refused at the door."""
UNASKED = 0xFFFFFFFF
"""The id of a message that the machine sends unasked."""


class Hello(NamedTuple):
    """Begin. The result is the domid."""

    version: int


class Open(NamedTuple):
    """Open a device. The result is the file's handle; the answer's descriptor is its home."""

    flags: int
    name: str


class Show(NamedTuple):
    """Show a home over a new channel. The result is the file's handle on this channel. Answer: ShowAnswer.

    The home is named by its inode. A `token` (wire/token.py) has been written to it before, which only its holders can
    do. EBADF: the domain has no such home. EACCES: this token was not read there.
    """

    inode: int
    token: bytes


class ShowAnswer(NamedTuple):
    """Say what file a home is of."""

    flags: int
    name: str


class Ioctl(NamedTuple):
    """Call a driver. The result is what it returned. Answer: IoctlAnswer, also if it refuses."""

    handle: int
    request: int
    address: int
    regions: list[Region]


class IoctlAnswer(NamedTuple):
    """Give back what the driver wrote, before it failed too."""

    written: list[Region]


class Notify(NamedTuple):
    """Send an event through a port of evtchn. It is not answered."""

    handle: int
    port: int


class Mmap(NamedTuple):
    """Map part of a file. Answer: MapAnswer."""

    handle: int
    prot: int
    shared: int
    offset: int
    length: int


class MapAnswer(NamedTuple):
    """Say what to map, with a descriptor for each memory file.

    If `mark` is not 0, each description is to be locked when all is mapped, before its descriptor is closed: see
    `descriptions.lock_place`.
    """

    mark: int
    pieces: tuple[Piece, ...]


class Share(NamedTuple):
    """Call ALLOC_GREF, and map all that it made. The result is the index. Answer: ShareAnswer, with one descriptor.

    The pages are taken back when the last of this map is gone. With `keep` they stay on the file's list as well.
    """

    handle: int
    domid: int
    flags: int
    pages: int
    keep: int


class ShareAnswer(NamedTuple):
    """Say where the pages begin in their memory file, and their references. `mark`: see MapAnswer."""

    mark: int
    offset: int
    refs: bytes


class Attach(NamedTuple):
    """Call MAP_GRANT_REF, and map that at address `place`. The result is the index. Answer: MapAnswer.

    The references are given up when the last of this map is gone. With `keep` they stay on the file's list as well.
    """

    handle: int
    granter: int
    writable: int
    keep: int
    place: int
    refs: bytes


class Read(NamedTuple):
    """Read a file. The result is the length, the body the bytes. Of evtchn there are none: they are on the home."""

    handle: int
    size: int


class Write(NamedTuple):
    """Write to a file. The result is the length."""

    handle: int
    data: bytes


class Holders(NamedTuple):
    """Ask which peers hold pages. The result is 1 if any does. Answer: HoldersAnswer.

    If asked to `wait`, the answer has a descriptor then, which hangs up when none does any more.
    """

    handle: int
    wait: int
    start: int
    pages: int


class HoldersAnswer(NamedTuple):
    """List the domains that map any of the pages."""

    mapped_by: tuple[int, ...]


class Control(NamedTuple):
    """Give the machine an order, in JSON, over the control channel. The body of the answer is JSON too.

    The answer may come in parts, replies of the same id. The result of all but the last is MORE, which is 1.
    """

    order: bytes


MORE = 1
"""The result of an answer of which another part follows."""


class Lend(NamedTuple):
    """Ask for a line over which the machine takes a seccomp listener. The result is 1 if it may take any.

    The answer's descriptor is the line: send the listener there, with one byte, and then Serve here. `namespace` is the
    caller's, of processes.
    """

    namespace: int


class Serve(NamedTuple):
    """Ask the machine to serve the calls of a `run`, whose listener was sent over the line. The result is 1 if it does.

    The answer's descriptor is the page where calls are noted (syscalls/listener.py).
    """


class Behalf(NamedTuple):
    """Say for which process what follows is. It is not answered.

    With `by_offset` the process makes its maps itself, at the offset that it asks for.
    """

    process: int
    by_offset: int


class Brought(NamedTuple):
    """Hand a system call over to the supervisor, unasked, also between a request and its reply.

    PLACE: an mmap, to be answered with these pieces. TAKE_OVER: any call, and from now on all others too; those that
    the machine had taken by then follow in messages of their own. The call is `syscalls.listener.Call`. `mark`: see
    MapAnswer.
    """

    what: int
    mark: int
    call: bytes
    pieces: tuple[Piece, ...]


PLACE, TAKE_OVER = 1, 2


class Keep(NamedTuple):
    """Keep a file open without a home, as long as anything is mapped of it."""

    handle: int


class Home(NamedTuple):
    """Ask for another home of a file that is kept, which is the answer's descriptor. The file lives in both."""

    handle: int


FORMS: dict[type, Form] = {
    Hello: Form("=I", kind=1),
    Open: Form("=I", TEXT, kind=2),
    Show: Form("=Q16s", kind=3),
    ShowAnswer: Form("=I", TEXT),
    Ioctl: Form("=IIQ", REGIONS, kind=4),
    IoctlAnswer: Form("=", REGIONS),
    Mmap: Form("=IIIQQ", kind=5),
    MapAnswer: Form("=Q", PIECES),
    Notify: Form("=II", kind=6),
    Read: Form("=II", kind=7),
    Write: Form("=I", BYTES, kind=8),
    Holders: Form("=IIQQ", kind=9),
    HoldersAnswer: Form("=", DOMIDS),
    Control: Form("=", BYTES, kind=10),
    Share: Form("=IHHII", kind=11),
    ShareAnswer: Form("=QQ", REFERENCES),
    Serve: Form(kind=12),
    Behalf: Form("=II", kind=13),
    Brought: Form("=IQ64s", PIECES, kind=14, descriptors="one for each memory file"),
    Keep: Form("=I", kind=15),
    Home: Form("=I", kind=16),
    Lend: Form("=Q", kind=17),
    Attach: Form("=IIIIQ", REFERENCES, kind=18),
}
"""The form of each kind of message; of a request also its number."""
KINDS: dict[int, type] = {form.kind: each for each, form in FORMS.items() if form.kind}
"""Every kind of request, by its number."""


def kind_of(message: type) -> int:
    """Give the number of a kind of request."""
    return FORMS[message].kind


def encode(message: tuple[Any, ...]) -> bytes:
    """Make the payload of a message."""
    return FORMS[type(message)].encode(message)


def frame(message: tuple[Any, ...], number: int, descriptors: int = 0) -> bytes:
    """Make a whole request, with so many descriptors to come along."""
    return FORMS[type(message)].frame(message, number, descriptors)


def frame_reply(message: tuple[Any, ...], kind: int, number: int, *, result: int = 0, descriptors: int = 0) -> bytes:
    """Make a whole reply to request `number` of this kind, with so many descriptors to come along."""
    return FORMS[type(message)].frame_reply(message, kind, number, result, descriptors)


def decode(kind: type[M], payload: bytes) -> M:
    """Make a message of a payload.

    Raises:
        Garbage: it is no whole message of that kind.
    """
    try:
        message: M = _new(kind, FORMS[kind].decode(payload))
    except Garbage as error:
        raise Garbage(f"{kind.__name__}: {error}") from None
    return message


_new: Any = tuple.__new__  # of a NamedTuple: in half the time
