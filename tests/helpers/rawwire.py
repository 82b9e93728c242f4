"""The wire as a hostile client sees it: numbers and layouts to be packed by hand, whole or not."""

from __future__ import annotations

from struct import Struct

from gntalloc.wire import memory
from gntalloc.wire.memory import MAX_REGIONS, decode_regions, encode_regions
from gntalloc.wire.messages import (
    FORMS,
    VERSION,
    Attach,
    Behalf,
    Brought,
    Control,
    Hello,
    Holders,
    Home,
    Ioctl,
    Keep,
    Lend,
    MapAnswer,
    Mmap,
    Notify,
    Open,
    Read,
    Serve,
    Share,
    ShareAnswer,
    Show,
    Write,
    kind_of,
)
from gntalloc.wire.stream import (
    HEADER,
    MAX_PAYLOAD,
    REPLY,
    Decoder,
    Garbage,
    Message,
    Reply,
    decode_reply,
    encode,
    encode_reply,
)
from gntalloc.wire.token import make_token

__all__ = [
    "HEADER",
    "MAX_PAYLOAD",
    "MAX_REGIONS",
    "REPLY",
    "VERSION",
    "Decoder",
    "Garbage",
    "Message",
    "Reply",
    "decode_regions",
    "decode_reply",
    "encode",
    "encode_regions",
    "encode_reply",
    "make_token",
]

HELLO = kind_of(Hello)
OPEN = kind_of(Open)
SHOW = kind_of(Show)
IOCTL = kind_of(Ioctl)
MMAP = kind_of(Mmap)
NOTIFY = kind_of(Notify)
READ = kind_of(Read)
WRITE = kind_of(Write)
HOLDERS = kind_of(Holders)
CONTROL = kind_of(Control)
SHARE = kind_of(Share)
ATTACH = kind_of(Attach)
SERVE = kind_of(Serve)
BEHALF = kind_of(Behalf)
BROUGHT = kind_of(Brought)
KEEP = kind_of(Keep)
HOME = kind_of(Home)
LEND = kind_of(Lend)
HELLO_REQUEST = FORMS[Hello].head
OPEN_REQUEST = FORMS[Open].head
IOCTL_REQUEST = FORMS[Ioctl].head
MMAP_REQUEST = FORMS[Mmap].head
SHARE_REQUEST = FORMS[Share].head
SHARE_ANSWER = FORMS[ShareAnswer].head
ATTACH_REQUEST = FORMS[Attach].head
NOTIFY_REQUEST = FORMS[Notify].head
HOLDERS_REQUEST = FORMS[Holders].head
LEND_REQUEST = FORMS[Lend].head
SHOW_REQUEST = FORMS[Show].head
KEEP_REQUEST = FORMS[Keep].head
HOME_REQUEST = FORMS[Home].head
MARK = FORMS[MapAnswer].head
PIECE = Struct("=IQQ")


def Region(address: int, writable: bool, data: bytes | bytearray) -> memory.Region:  # noqa: N802  as it was
    """Make a stretch of memory, of any bytes."""
    return memory.Region(address, bytearray(data), writable=writable)
