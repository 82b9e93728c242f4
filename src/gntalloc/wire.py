"""Messages between a program and the machine. Sans-I/O: bytes in, bytes out.

They travel on a stream socket. Every message is a header of 12 bytes and a payload:

    length u32    of the payload, at most MAX_PAYLOAD
    kind u16      what it is; a reply has the bit REPLY set
    descriptors u16   how many descriptors belong to it, in order (SCM_RIGHTS)
    id u32        a reply has its request's

A program may send a request before the reply to the one before has come. Replies keep the order of requests.
An IOCTL with the bit UNANSWERED, and a PLACED, get no reply. The machine serves them before anything that was sent
later, by whomever, as long as nobody sends more than MOST_UNANSWERED of them between two requests with a reply.

    kind      payload of the request                                      result, payload and descriptors of the reply
    HELLO     version u32                                                 domid
    OPEN      flags u32, name                                             handle; one descriptor: the home
    SHOW      nothing; one descriptor: a home                             handle; flags u32, name
    IOCTL     handle u32, request u32, address u64, regions               what the driver returned; regions it wrote
    MMAP      handle u32, prot u32, shared u32, offset u64, length u64    number of the record; confirm u8, pieces;
                                                                          a descriptor for each memory file
    IOCTL_MMAP  handle u32, request u32, address u64, prot u32,           of the ioctl; error i32, length of the reason
              shared u32, length u64, place u64, regions: ALLOC_GREF or   u32, number of the record u64, confirm u32,
              MAP_GRANT_REF, then an mmap at the index that the driver    number of pieces u32, the reason, the pieces,
              has put at byte 8 of its argument, which the program        regions; a descriptor for each memory file.
              will have at `place`                                        If the ioctl fails: as IOCTL
    PLACED    record u64, address u64; sent if `confirm` is not 0         (none: it is not answered)
    READ      handle u32, size u32                                        length; the bytes (of evtchn none: they are
                                                                          on the home, unless lost: EFBIG)
    WRITE     handle u32, the bytes                                       length
    HOLDERS   handle u32, wait u32, index u64, count u64                  held 0 or 1; domids u32 each; if asked to wait
                                                                          one descriptor, at its end of file when free
    SERVE     number of its namespace of processes u64; one descriptor:   1: the machine serves those calls from now on;
              where the calls of programs come from (seccomp)             one descriptor: see calls/listener.py. 0: not
    BEHALF    pid u32, by offset u32: what follows is on behalf of this   (none: it is not answered)
              process; if not 0, its maps are made at the offset it asks
              for
    KEEP      handle u32; one descriptor: its home, which the machine     0
              holds as well, as long as anything is mapped of the file
    HOME      handle u32                                                  0; one descriptor: the home that is kept
    CONTROL   JSON                                                        0; JSON

The machine says by itself, to who sent SERVE, also between a request and its reply:

    BROUGHT   what u32, confirm u32, record u64, the call, pieces; a descriptor for each memory file. It is to answer
              this call: PLACE, an mmap, which makes these pieces; TAKE_OVER, any call, and from now on all others too;
              those that the machine had taken by then follow in messages of their own

A region is address u64, length u32, flags u32 (bit 0: writable), and its bytes. A piece is the
place of its descriptor in the message u32, offset u64, length u64.
A reply's payload begins with error i32 (an errno or 0), length of the reason u32, result i64, and the reason.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "BEHALF",
    "BROUGHT",
    "CONTROL",
    "HELLO",
    "HOLDERS",
    "HOME",
    "IOCTL",
    "IOCTL_MMAP",
    "KEEP",
    "MAX_DESCRIPTORS",
    "MAX_PAYLOAD",
    "MAX_REGIONS",
    "MMAP",
    "MOST_UNANSWERED",
    "OPEN",
    "PLACE",
    "PLACED",
    "READ",
    "REPLY",
    "SERVE",
    "SHOW",
    "TAKE_OVER",
    "UNANSWERED",
    "VERSION",
    "WRITE",
    "Decoder",
    "Garbage",
    "Message",
    "Region",
    "Reply",
    "decode_regions",
    "decode_reply",
    "encode",
    "encode_regions",
    "encode_reply",
]

VERSION = 4
MAX_PAYLOAD = 1 << 21  # the answer to an mmap of 65536 scattered pages is two thirds of this
MAX_REGIONS = 4096  # of one ioctl
MAX_DESCRIPTORS = 253  # SCM_MAX_FD: of one sendmsg; a message with more is sent in parts

MOST_UNANSWERED = 8  # in a row

HELLO, OPEN, SHOW, IOCTL, MMAP, PLACED, READ, WRITE, HOLDERS, CONTROL, IOCTL_MMAP, SERVE, BEHALF, BROUGHT = range(1, 15)
KEEP, HOME = 15, 16
PLACE, TAKE_OVER = 1, 2
REPLY = 0x8000
UNANSWERED = 0x4000

HEADER = Struct("=IHHI")
HELLO_REQUEST = Struct("=I")
OPEN_REQUEST = Struct("=I")
IOCTL_REQUEST = Struct("=IIQ")
MMAP_REQUEST = Struct("=IIIQQ")
IOCTL_MMAP_REQUEST = Struct("=IIQIIQQ")
IOCTL_MMAP_REPLY = Struct("=iIQII")
PLACED_REQUEST = Struct("=QQ")
READ_REQUEST = Struct("=II")
WRITE_REQUEST = Struct("=I")
HOLDERS_REQUEST = Struct("=IIQQ")
SHOW_REPLY = Struct("=I")
CONFIRM = Struct("=B")
SERVE_REQUEST = Struct("=Q")
BEHALF_REQUEST = Struct("=II")
KEEP_REQUEST = HOME_REQUEST = Struct("=I")
BROUGHT_HEAD = Struct("=IIQ")
PIECE = Struct("=IQQ")
_REGION = Struct("=QII")
_REPLY = Struct("=iIq")


class Garbage(ValueError):
    """What came is no message. There is no way to go on with this sender."""


class Message(NamedTuple):
    """One whole message, without its descriptors."""

    kind: int
    id: int
    descriptors: int
    payload: bytes


class Region(NamedTuple):
    """A stretch of memory that travels with an ioctl."""

    address: int
    writable: bool
    data: bytes | bytearray


class Reply(NamedTuple):
    """An answer: `error` is an errno or 0, `why` its reason."""

    error: int
    why: str
    result: int
    body: bytes


class Decoder:
    """Takes bytes as they come and gives whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def in_the_middle(self) -> bool:
        """Whether part of a message has come, and not the rest."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[Message]:
        """Add what came, and give every message that is whole now.

        Raises:
            Garbage: the length is beyond MAX_PAYLOAD.
        """
        buffer = self._buffer
        if buffer:
            buffer += data
            if len(buffer) < _end_of_message(buffer, 0):
                return []  # and it is not copied before it is whole, however small the pieces are that it comes in
            data = bytes(buffer)
            buffer.clear()
        messages: list[Message] = []
        start, size = 0, len(data)
        while start < size:
            end = _end_of_message(data, start)
            if end > size:
                buffer += data[start:]
                break
            _, kind, descriptors, number = HEADER.unpack_from(data, start)
            messages.append(Message(kind, number, descriptors, data[start + HEADER.size : end]))
            start = end
        return messages


def _end_of_message(data: bytes | bytearray, start: int) -> int:
    """Where the message ends that begins at `start`, or at least its header."""
    if len(data) - start < HEADER.size:
        return start + HEADER.size
    length: int = HEADER.unpack_from(data, start)[0]
    if length > MAX_PAYLOAD:
        raise Garbage(f"a message of {length} bytes was announced, and {MAX_PAYLOAD} is the most")
    return start + HEADER.size + length


def encode(kind: int, number: int, payload: bytes = b"", descriptors: int = 0) -> bytes:
    """One message, ready to send."""
    return HEADER.pack(len(payload), kind, descriptors, number) + payload


def encode_reply(
    kind: int,
    number: int,
    *,
    error: int = 0,
    why: str = "",
    result: int = 0,
    body: bytes = b"",
    descriptors: int = 0,
) -> bytes:
    """The answer to request `number`."""
    reason = why.encode(errors="replace") if why else b""
    payload = _REPLY.pack(error, len(reason), result) + reason + body
    return HEADER.pack(len(payload), kind | REPLY, descriptors, number) + payload


def decode_reply(payload: bytes) -> Reply:
    """The other way round.

    Raises:
        Garbage: it is shorter than it says.
    """
    if len(payload) < _REPLY.size:
        raise Garbage("a reply without its head")
    error, length, result = _REPLY.unpack_from(payload)
    end = _REPLY.size + length
    if len(payload) < end:
        raise Garbage("a reply without its reason")
    why = payload[_REPLY.size : end].decode(errors="replace") if length else ""
    return Reply(error, why, result, payload[end:])


def encode_regions(regions: Iterable[Region]) -> bytes:
    """Regions, one after the other."""
    return b"".join([_REGION.pack(address, len(data), writable) + data for address, writable, data in regions])


def decode_regions(data: bytes) -> list[Region]:
    """The other way round.

    Raises:
        Garbage: the last one is not whole, or there are too many.
    """
    if len(data) >= _REGION.size:
        address, length, flags = _REGION.unpack_from(data)
        if len(data) == _REGION.size + length:  # just one, as nearly always
            return [Region(address, bool(flags & 1), bytearray(data[_REGION.size :]))]
    regions: list[Region] = []
    at = 0
    while at < len(data):
        if len(regions) == MAX_REGIONS:
            raise Garbage(f"more than {MAX_REGIONS} regions")
        if len(data) - at < _REGION.size:
            raise Garbage("a region without its head")
        address, length, flags = _REGION.unpack_from(data, at)
        at += _REGION.size
        if len(data) - at < length:
            raise Garbage("a region shorter than it says")
        regions.append(Region(address, bool(flags & 1), bytearray(data[at : at + length])))
        at += length
    return regions
