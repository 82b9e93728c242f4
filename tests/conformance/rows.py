"""The rows: what is done, and what was answered, in one short line that can be compared.

Numbers are those of the specification's table of bad and odd inputs; G rows are good paths. Event channels have a
module of their own, `event_rows`. A row is run with a
`Rig` of its own. What it returns is compared between seats; `says` is what the specification expects of Linux.
"""

from __future__ import annotations

import os
from struct import pack, unpack_from
from typing import TYPE_CHECKING, Any, NamedTuple

from driving import PAGE, READ, RW, NotApplicable, Program, Rig

from gntalloc.abi.evtchn import BIND_VIRQ
from gntalloc.abi.gntalloc import ALLOC_GREF, DEALLOC_GREF, SET_UNMAP_NOTIFY
from gntalloc.abi.gntdev import (
    DMABUF_IMP_RELEASE,
    GET_OFFSET_FOR_VADDR,
    GRANT_COPY,
    MAP_GRANT_REF,
    SET_MAX_GRANTS,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BETWEEN_DOMAINS", "NOT_RUN", "PROBES", "ROWS", "Row", "run"]

MADV_DONTNEED = 4


class Row(NamedTuple):
    """One row."""

    key: str
    title: str
    says: str
    run: Callable[[Rig], str]


ROWS: dict[str, Row] = {}

# Rows that no seat here runs, each with its reason.
NOT_RUN = {
    "1": (
        "open where there is no Xen",
        "ENOENT: no node",
        "the judges all run on Xen; without a machine it is NoMachine",
    ),
    "10": (
        "any ioctl from a 32-bit process",
        "ENOTTY",
        "no 32-bit Python in the lab's image, and none of ours to serve",
    ),
    "29": ("ALLOC with a full grant table", "ENOSPC", "it corrupts the real driver's counter; ours: tests/drivers"),
    "113": (
        "evtchn BIND_STATIC port 131072",
        "ENOMEM",
        "the lab's kernel is older than BIND_STATIC; ours: tests/drivers",
    ),
    "114": (
        "evtchn BIND_STATIC of a port on this file",
        "EISCONN",
        "the lab's kernel is older than BIND_STATIC; ours: tests/drivers",
    ),
}

# Rows with a granter and a grantee. In a PVH guest they must be in different domains: mapping its own grants spoils its
# memory (tried: the kernel dies a little later, in whatever comes along).
BETWEEN_DOMAINS = (
    *("22", "23", "25", "40", "51", "72", "76", "78", "82", "83", "84", "85", "86"),
    *("G1", "G2", "G3", "G4", "G6", "G8", "G9", "G10", "G11", "G13", "G14", "G15", "G17"),
    *("G32", "G33", "G34", "G35"),
)

# Where kernels of one version answer differently, because a fix was carried back to some: what tells, and for each row
# the answer with the fix and without. One row of a probe decides what the others have to say.
PROBES = {
    "ALLOC compares count with the limit before it allocates anything": {
        "18": ("ENOSPC", "ENOMEM"),
        "19": ("ENOSPC", "ENOMEM"),
    },
    "the limit is unsigned": {"21": ("EINVAL", "accepted")},
    "a MAP whose reply cannot be written is undone": {"71": ("EFAULT, next index 0", "EFAULT, next index 1")},
}


def row(key: str, title: str, says: str) -> Callable[[Callable[[Rig], str]], Callable[[Rig], str]]:
    """Put a function into ROWS."""

    def put(run: Callable[[Rig], str]) -> Callable[[Rig], str]:
        assert key not in ROWS, key
        ROWS[key] = Row(key, title, says, run)
        return run

    return put


def said(*answers: Any) -> str:
    """Answers as one line."""
    return ", ".join(map(str, answers))


def ok(answer: str) -> str:
    """A map's name is not to be compared."""
    return "0" if answer.startswith("m") else answer


def share(
    rig: Rig, count: int = 1, *, flags: int = 1, mapped: bool = True
) -> tuple[str, int, list[tuple[int, int]], str]:
    """Pages for the grantee: the granter's file, index, (domid, ref) pairs, and its map."""
    file = rig.granter.open("gntalloc")
    made = rig.granter.grant(file, count, domid=rig.grantee.domid, flags=flags)
    refs = [(rig.granter.domid, ref) for ref in made.refs]
    return file, made.index, refs, rig.granter.mmap(file, made.index, count * PAGE) if mapped else ""


def attach(program: Program, refs: list[tuple[int, int]], prot: int = RW, *, file: str | None = None) -> str:
    """Map these for the grantee: the map's name or an errno."""
    file = file or program.open("gntdev")
    result, index = program.reserve(file, refs)
    return program.mmap(file, index, len(refs) * PAGE, prot) if result == 0 else str(result)


def with_limit(program: Program, pages: int, body: Callable[[], str]) -> str:
    """Under another limit, which is put back."""
    before = program.must("get_limit")
    program.must("set_limit", pages)
    try:
        return body()
    finally:
        program.must("set_limit", before)


# gntalloc: the file.


@row("2", "open as another user", "EACCES")
def _(rig: Rig) -> str:
    return said(rig.granter.step("open_as_nobody", "gntalloc"))


@row("3", "read, write", "EINVAL, EINVAL")
def _(rig: Rig) -> str:
    file = rig.granter.open("gntalloc")
    return said(rig.granter.step("read", file, 4), rig.granter.step("write", file, "00000000"))


@row("4", "lseek", "ESPIPE")
def _(rig: Rig) -> str:
    return said(rig.granter.step("lseek", rig.granter.open("gntalloc")))


@row("5", "poll", "ready at once")
def _(rig: Rig) -> str:
    return "ready" if rig.granter.step("poll", rig.granter.open("gntalloc")) else "not ready"


def unknown(key: str, title: str, request: int) -> None:
    """A request number that is none."""

    @row(key, title, "ENOTTY")
    def _(rig: Rig) -> str:
        return said(rig.granter.ioctl(rig.granter.open("gntalloc"), request, bytes(64))[0])


unknown("6", "an unknown ioctl number", 0x00084709)
unknown("7", "gntdev's MAP on gntalloc", MAP_GRANT_REF)
unknown("8", "ALLOC with the i386 number", 0x00144705)
unknown("9", "ALLOC with direction bits", 0xC0184705)


# gntalloc: ALLOC.


@row("11", "ALLOC, NULL", "EFAULT")
def _(rig: Rig) -> str:
    return said(rig.granter.ioctl(rig.granter.open("gntalloc"), ALLOC_GREF, b"", null=True)[0])


@row("12", "ALLOC, only 20 bytes before an unmapped page", "EFAULT")
def _(rig: Rig) -> str:
    return said(rig.granter.ioctl(rig.granter.open("gntalloc"), ALLOC_GREF, pack("=HHIQI", 0, 1, 1, 0, 0))[0])


@row("13", "ALLOC count 0", "0, the next index, 24 bytes echoed")
def _(rig: Rig) -> str:
    file = rig.granter.open("gntalloc")
    rig.granter.grant(file, 2)
    data = pack("=HHIQ", 5, 7, 0, 99) + b"\xaa\xbb\xcc\xdd\x11\x22\x33\x44"
    result, after = rig.granter.ioctl(file, ALLOC_GREF, data)
    return said(result, f"index {unpack_from('=Q', after, 8)[0] // PAGE}", after[16:].hex())


@row("14", "ALLOC count 0 while in use > limit", "ENOSPC")
def _(rig: Rig) -> str:
    file = rig.granter.open("gntalloc")
    rig.granter.grant(file, 2)
    return with_limit(rig.granter, 1, lambda: said(rig.granter.alloc(file, 0).result))


@row("15", "ALLOC count = limit", "0")
def _(rig: Rig) -> str:
    return with_limit(rig.granter, 20, lambda: said(rig.granter.alloc(rig.granter.open("gntalloc"), 20).result))


@row("16", "ALLOC count = limit + 1", "ENOSPC")
def _(rig: Rig) -> str:
    return with_limit(rig.granter, 20, lambda: said(rig.granter.alloc(rig.granter.open("gntalloc"), 21).result))


@row("17", "ALLOC 1 when in use = limit, then again with room", "ENOSPC, index unchanged")
def _(rig: Rig) -> str:
    file = rig.granter.open("gntalloc")

    def body() -> str:
        rig.granter.grant(file, 3)
        refused = rig.granter.alloc(file, 1).result
        rig.granter.must("set_limit", 10)
        return said(refused, f"index {rig.granter.grant(file).index // PAGE}")

    return with_limit(rig.granter, 3, body)


@row("18", "ALLOC count 2 000 000", "ENOSPC; before the 2026 check ENOMEM")
def _(rig: Rig) -> str:
    return said(rig.granter.alloc(rig.granter.open("gntalloc"), 2_000_000).result)


@row("19", "ALLOC count 0xFFFFFFFF", "ENOSPC; before the 2026 check ENOMEM")
def _(rig: Rig) -> str:
    return said(rig.granter.alloc(rig.granter.open("gntalloc"), 0xFFFFFFFF).result)


@row("20", "limit 0, ALLOC 1", "ENOSPC")
def _(rig: Rig) -> str:
    return with_limit(rig.granter, 0, lambda: said(rig.granter.alloc(rig.granter.open("gntalloc")).result))


@row("21", "write -1 to the limit", "EINVAL in the newest kernels, accepted before")
def _(rig: Rig) -> str:
    before = rig.granter.must("get_limit")
    answer = rig.granter.step("set_limit", -1)
    rig.granter.must("set_limit", before)
    return "accepted" if answer is None else said(answer)


@row("22", "ALLOC flags 0xFFFE", "0, read-only for the peer")
def _(rig: Rig) -> str:
    _, _, refs, _ = share(rig, flags=0xFFFE)
    return said(
        "0", "writable map", ok(attach(rig.grantee, refs)), "read-only map", ok(attach(rig.grantee, refs, READ))
    )


@row("23", "ALLOC flags 0xFFFF", "0, writable")
def _(rig: Rig) -> str:
    _, _, refs, _ = share(rig, flags=0xFFFF)
    return said("0", "writable map", ok(attach(rig.grantee, refs)))


@row("24", "ALLOC for a domid of no domain", "0")
def _(rig: Rig) -> str:
    return said(rig.granter.alloc(rig.granter.open("gntalloc"), domid=12345).result)


@row("25", "ALLOC for DOMID_SELF; the peer maps", "0; maps never succeed")
def _(rig: Rig) -> str:
    file = rig.granter.open("gntalloc")
    made = rig.granter.alloc(file, domid=0x7FF0)
    rig.granter.mmap(file, made.index)
    return said(made.result, attach(rig.grantee, [(rig.granter.domid, made.refs[0])]))


@row("26", "ALLOC for domid 0xFFFF", "0")
def _(rig: Rig) -> str:
    return said(rig.granter.alloc(rig.granter.open("gntalloc"), domid=0xFFFF).result)


@row("27", "ALLOC, struct in read-only memory", "EFAULT, grants and index consumed")
def _(rig: Rig) -> str:
    file = rig.granter.open("gntalloc")
    refused = rig.granter.alloc(file, 3, readonly=True).result
    mapped = ok(rig.granter.mmap(file, 0, 3 * PAGE))
    return said(refused, f"the pages at index 0: {mapped}", f"next index {rig.granter.grant(file).index // PAGE}")


@row("28", "ALLOC, the array's end not writable", "EFAULT, index written, grants kept")
def _(rig: Rig) -> str:
    file = rig.granter.open("gntalloc")
    rig.granter.grant(file, 1)
    refused = rig.granter.alloc(file, 16, writable=24)
    mapped = ok(rig.granter.mmap(file, PAGE, 16 * PAGE))
    return said(refused.result, f"index {refused.index // PAGE}", f"the pages there: {mapped}")


@row("30", "ALLOC on an O_RDONLY file", "0")
def _(rig: Rig) -> str:
    return said(rig.granter.alloc(rig.granter.open("gntalloc", os.O_RDONLY)).result)


# gntalloc: DEALLOC.


@row("31", "DEALLOC, NULL", "EFAULT")
def _(rig: Rig) -> str:
    return said(rig.granter.ioctl(rig.granter.open("gntalloc"), DEALLOC_GREF, b"", null=True)[0])


@row("32", "DEALLOC count 0, valid index", "EINVAL")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, mapped=False)
    return said(rig.granter.dealloc(file, index, 0))


@row("33", "DEALLOC, unaligned index", "EINVAL")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, mapped=False)
    return said(rig.granter.dealloc(file, index + 4))


@row("34", "DEALLOC of another file's index", "EINVAL")
def _(rig: Rig) -> str:
    file, _, _, _ = share(rig, 2, mapped=False)
    other = rig.granter.open("gntalloc")
    rig.granter.grant(other)
    return said(rig.granter.dealloc(other, PAGE), rig.granter.dealloc(file, PAGE))


@row("35", "DEALLOC one too many, then the right count", "EINVAL, nothing freed")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, 3, mapped=False)
    return said(rig.granter.dealloc(file, index, 4), rig.granter.dealloc(file, index, 3))


@row("36", "DEALLOC twice", "0, EINVAL")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, mapped=False)
    return said(rig.granter.dealloc(file, index), rig.granter.dealloc(file, index))


@row("37", "DEALLOC of the middle of three", "0")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, 3, mapped=False)
    return said(rig.granter.dealloc(file, index + PAGE))


@row("38", "DEALLOC over two adjacent ALLOCs", "0")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, 2, mapped=False)
    rig.granter.grant(file, 2)
    return said(rig.granter.dealloc(file, index, 4))


@row("39", "DEALLOC over a freed hole", "EINVAL")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, 3, mapped=False)
    rig.granter.dealloc(file, index + PAGE)
    return said(rig.granter.dealloc(file, index, 3))


@row("40", "DEALLOC while mapped; write to it; the peer maps it", "0; page and grant live on")
def _(rig: Rig) -> str:
    file, index, refs, here = share(rig)
    freed = rig.granter.dealloc(file, index)
    rig.granter.must("poke", here, 0, "616263")
    there = attach(rig.grantee, refs)
    return said(freed, f"the peer reads {rig.grantee.step('peek', there, 0, 3)}" if ok(there) == "0" else there)


# gntalloc: SET_UNMAP_NOTIFY.


@row("41", "NOTIFY, NULL", "EFAULT")
def _(rig: Rig) -> str:
    return said(rig.granter.ioctl(rig.granter.open("gntalloc"), SET_UNMAP_NOTIFY, b"", null=True)[0])


@row("42", "NOTIFY, bad index and bad action", "ENOENT")
def _(rig: Rig) -> str:
    return said(rig.granter.notify(rig.granter.open("gntalloc"), 0, 4))


@row("43", "NOTIFY action 4, good index", "EINVAL")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, mapped=False)
    return said(rig.granter.notify(file, index, 4))


def bad_port(key: str, title: str, port: int) -> None:
    """SEND_EVENT on a port that is none of ours."""

    @row(key, title, "EINVAL")
    def _(rig: Rig) -> str:
        file, index, _, _ = share(rig, mapped=False)
        return said(rig.granter.notify(file, index, 2, port))


bad_port("44", "NOTIFY SEND_EVENT, port 0", 0)
bad_port("45", "NOTIFY SEND_EVENT, port never bound", 1000)
bad_port("47", "NOTIFY SEND_EVENT, port 0xFFFFFFFF", 0xFFFFFFFF)


@row("46", "NOTIFY SEND_EVENT, a port of the kernel's own", "EINVAL")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, mapped=False)
    return said(rig.granter.notify(file, index, 2, 1))


@row("48", "NOTIFY SEND_EVENT, another process's port", "0")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, mapped=False)
    return said(rig.granter.notify(file, index, 2, rig.program("neighbour").port()))


@row("49", "NOTIFY action 0", "0")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, mapped=False)
    return said(rig.granter.notify(file, index, 1), rig.granter.notify(file, index, 0))


@row("50", "NOTIFY after DEALLOC, still mapped", "ENOENT")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig)
    rig.granter.dealloc(file, index)
    return said(rig.granter.notify(file, index, 1))


@row("51", "NOTIFY CLEAR_BYTE, unaligned index; then free it", "0, that byte")
def _(rig: Rig) -> str:
    file, index, refs, here = share(rig)
    rig.granter.must("poke", here, 0, "11" * 16)
    there = attach(rig.grantee, refs)
    armed = rig.granter.notify(file, index + 7, 1)
    rig.granter.dealloc(file, index)
    rig.granter.must("munmap", here, 0, PAGE)
    rig.grantee.open("gntdev")  # ours clears the byte a moment after munmap, before it answers anything
    return said(armed, f"the peer reads {rig.grantee.step('peek', there, 0, 16)}")


# gntalloc: mmap.


@row("52", "mmap MAP_PRIVATE", "EINVAL")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, mapped=False)
    return ok(rig.granter.mmap(file, index, shared=False))


@row("53", "mmap MAP_PRIVATE at a bad offset", "EINVAL")
def _(rig: Rig) -> str:
    return ok(rig.granter.mmap(rig.granter.open("gntalloc"), 64 * PAGE, shared=False))


def open_mode(key: str, title: str, mode: int, prot: int, says: str) -> None:
    """mmap of a file not opened O_RDWR."""

    @row(key, title, says)
    def _(rig: Rig) -> str:
        file = rig.granter.open("gntalloc", mode)
        return ok(rig.granter.mmap(file, rig.granter.grant(file).index, prot=prot))


open_mode("54", "mmap shared PROT_READ, O_RDONLY", os.O_RDONLY, READ, "EINVAL")
open_mode("55", "mmap shared PROT_WRITE, O_RDONLY", os.O_RDONLY, RW, "EACCES")
open_mode("56", "mmap, O_WRONLY", os.O_WRONLY, RW, "EACCES")


@row("57", "mmap length 0", "EINVAL")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, mapped=False)
    return ok(rig.granter.mmap(file, index, 0))


@row("58", "mmap, offset not page aligned", "EINVAL")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, mapped=False)
    return ok(rig.granter.mmap(file, index + 8))


@row("59", "mmap, unknown offset", "ENOENT")
def _(rig: Rig) -> str:
    file, _, _, _ = share(rig, mapped=False)
    return ok(rig.granter.mmap(file, 64 * PAGE))


@row("60", "mmap longer than allocated", "ENOENT")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, 2, mapped=False)
    return ok(rig.granter.mmap(file, index, 3 * PAGE))


@row("61", "mmap after DEALLOC", "ENOENT")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, mapped=False)
    rig.granter.dealloc(file, index)
    return ok(rig.granter.mmap(file, index))


@row("62", "mmap over a freed hole", "ENOENT")
def _(rig: Rig) -> str:
    file, index, _, _ = share(rig, 3, mapped=False)
    rig.granter.dealloc(file, index + PAGE)
    return ok(rig.granter.mmap(file, index, 3 * PAGE))


@row("63", "mmap of the same range twice; write one, read the other", "0, 0")
def _(rig: Rig) -> str:
    file, index, _, first = share(rig)
    second = rig.granter.mmap(file, index)
    rig.granter.must("poke", first, 5, "77")
    return said(ok(first), ok(second), rig.granter.step("peek", second, 5, 1))


@row("64", "mremap larger", "EFAULT")
def _(rig: Rig) -> str:
    _, _, _, here = share(rig)
    return said(rig.granter.step("mremap", here, 2 * PAGE, True))


@row("65", "munmap half, touch the other half", "works")
def _(rig: Rig) -> str:
    _, _, _, here = share(rig, 2)
    half = rig.granter.step("munmap", here, 0, PAGE)
    rig.granter.must("poke", here, PAGE, "42")
    return said(half, rig.granter.step("peek", here, PAGE, 1))


@row("66", "MADV_DONTNEED, then touch", "SIGBUS")
def _(rig: Rig) -> str:
    _, _, _, here = share(rig)
    return said(rig.granter.step("madvise", here, MADV_DONTNEED), rig.granter.step("own_touch", here, 0))


@row("67", "close the file, use the map", "works")
def _(rig: Rig) -> str:
    file, _, _, here = share(rig)
    rig.granter.must("close", file)
    rig.granter.must("poke", here, 0, "01")
    return said(rig.granter.step("peek", here, 0, 1))


# gntdev.


@row("68", "gntdev MAP count 0", "EINVAL")
def _(rig: Rig) -> str:
    return said(rig.grantee.reserve(rig.grantee.open("gntdev"), [])[0])


@row("69", "gntdev MAP count 65537", "EINVAL")
def _(rig: Rig) -> str:
    return said(rig.grantee.ioctl(rig.grantee.open("gntdev"), MAP_GRANT_REF, pack("=I4xQ8x", 65537, 0))[0])


@row("70", "gntdev MAP, references unreadable", "EFAULT")
def _(rig: Rig) -> str:
    return said(rig.grantee.ioctl(rig.grantee.open("gntdev"), MAP_GRANT_REF, pack("=I4xQ8x", 40, 0))[0])


@row("71", "gntdev MAP, reply unwritable; then another MAP", "EFAULT, entry removed (E3: left behind)")
def _(rig: Rig) -> str:
    file = rig.grantee.open("gntdev")
    refused, _ = rig.grantee.ioctl(file, MAP_GRANT_REF, pack("=I4xQII", 1, 0, 0, 99), readonly=True)
    _, index = rig.grantee.reserve(file, [(0, 99)])
    return said(refused, f"next index {index // PAGE}")


@row("72", "gntdev MAP of a reference that does not exist, mmap", "0, EINVAL")
def _(rig: Rig) -> str:
    file = rig.grantee.open("gntdev")
    result, index = rig.grantee.reserve(file, [(rig.granter.domid, 20000)])
    return said(result, ok(rig.grantee.mmap(file, index)))


@row("73", "gntdev UNMAP, unknown index", "ENOENT")
def _(rig: Rig) -> str:
    return said(rig.grantee.unreserve(rig.grantee.open("gntdev"), 5 * PAGE, 1))


@row("74", "gntdev UNMAP, wrong count", "ENOENT")
def _(rig: Rig) -> str:
    file = rig.grantee.open("gntdev")
    _, index = rig.grantee.reserve(file, [(0, 99)])
    return said(rig.grantee.unreserve(file, index, 2))


@row("75", "gntdev UNMAP count 0", "0: matches any")
def _(rig: Rig) -> str:
    file = rig.grantee.open("gntdev")
    _, index = rig.grantee.reserve(file, [(0, 99), (0, 98)])
    return said(rig.grantee.unreserve(file, index, 0), rig.grantee.unreserve(file, index, 2))


@row("76", "gntdev UNMAP while mapped; read the map", "0, the map lives on")
def _(rig: Rig) -> str:
    _, _, refs, here = share(rig)
    rig.granter.must("poke", here, 0, "5a")
    file = rig.grantee.open("gntdev")
    _, index = rig.grantee.reserve(file, refs)
    there = rig.grantee.mmap(file, index)
    return said(rig.grantee.unreserve(file, index, 1), rig.grantee.step("peek", there, 0, 1))


@row("77", "gntdev GET_OFFSET of a foreign address", "EINVAL")
def _(rig: Rig) -> str:
    file = rig.grantee.open("gntdev")
    return said(rig.grantee.ioctl(file, GET_OFFSET_FOR_VADDR, pack("=QQI4x", 0x1000, 0, 0))[0])


@row("78", "gntdev GET_OFFSET of the map, and of the hole below it", "0; 0")
def _(rig: Rig) -> str:
    _, _, refs, _ = share(rig)
    file = rig.grantee.open("gntdev")
    _, index = rig.grantee.reserve(file, refs)
    there = rig.grantee.mmap(file, index)
    answers = []
    for address in (rig.grantee.must("address", there), rig.grantee.must("offset_hole", there)):
        result, after = rig.grantee.ioctl(file, GET_OFFSET_FOR_VADDR, pack("=QQI4x", address, 0, 0))
        answers.append(said(result, *(unpack_from("=QI", after, 8) if result == 0 else ())))
    return "; ".join(answers[:1])  # the hole below may belong to another map, so it is not compared


@row("79", "gntdev SET_MAX_GRANTS", "ENOTTY")
def _(rig: Rig) -> str:
    return said(rig.grantee.ioctl(rig.grantee.open("gntdev"), SET_MAX_GRANTS, pack("=I", 10))[0])


@row("80", "gntdev NOTIFY, bad index and bad action", "EINVAL")
def _(rig: Rig) -> str:
    return said(rig.grantee.notify(rig.grantee.open("gntdev"), 0, 4))


@row("81", "gntdev NOTIFY, unknown index, good action", "ENOENT")
def _(rig: Rig) -> str:
    return said(rig.grantee.notify(rig.grantee.open("gntdev"), 0, 1))


@row("82", "gntdev NOTIFY CLEAR_BYTE, read-only map", "EINVAL")
def _(rig: Rig) -> str:
    _, _, refs, _ = share(rig)
    file = rig.grantee.open("gntdev")
    _, index = rig.grantee.reserve(file, refs)
    rig.grantee.mmap(file, index, prot=READ)
    return said(rig.grantee.notify(file, index, 1))


@row("83", "gntdev mmap private and writable", "EINVAL")
def _(rig: Rig) -> str:
    _, _, refs, _ = share(rig)
    file = rig.grantee.open("gntdev")
    _, index = rig.grantee.reserve(file, refs)
    return ok(rig.grantee.mmap(file, index, shared=False))


@row("84", "gntdev mmap of a part of an entry", "EINVAL")
def _(rig: Rig) -> str:
    _, _, refs, _ = share(rig, 2)
    file = rig.grantee.open("gntdev")
    _, index = rig.grantee.reserve(file, refs)
    return ok(rig.grantee.mmap(file, index, PAGE))


@row("85", "gntdev mmap of the same entry again", "EINVAL")
def _(rig: Rig) -> str:
    _, _, refs, _ = share(rig)
    file = rig.grantee.open("gntdev")
    _, index = rig.grantee.reserve(file, refs)
    return said(ok(rig.grantee.mmap(file, index)), ok(rig.grantee.mmap(file, index)))


@row("86", "gntdev writable mmap of a read-only grant; then the entry read-only", "EINVAL")
def _(rig: Rig) -> str:
    _, _, refs, _ = share(rig, flags=0)
    file = rig.grantee.open("gntdev")
    _, index = rig.grantee.reserve(file, refs)
    return said(ok(rig.grantee.mmap(file, index)), ok(rig.grantee.mmap(file, index, prot=READ)))


def copy(
    rig: Rig, source: tuple[int, int, int] | int, dest: tuple[int, int, int] | int, length: int, flags: int
) -> tuple[Any, Any]:
    """GRANT_COPY of one segment: result and status."""
    words = [pack("=IHH", *side) if isinstance(side, tuple) else pack("=Q", side) for side in (source, dest)]
    there = rig.grantee.must("scratch")
    rig.grantee.must("poke", there, 0, (b"".join(words) + pack("=HHh2x", length, flags, 77)).hex())
    address = rig.grantee.must("address", there)
    head = pack("=I4xQ", 1, address)
    result, _ = rig.grantee.ioctl(rig.grantee.open("gntdev"), GRANT_COPY, head)
    status = unpack_from("=h", bytes.fromhex(rig.grantee.must("peek", there, 20, 2)))[0]
    return result, status


@row("87", "gntdev COPY local to local", "EINVAL")
def _(rig: Rig) -> str:
    return said(copy(rig, 0x1000, 0x2000, 16, 0)[0])


@row("88", "gntdev COPY offset 4095 length 2", "EINVAL")
def _(rig: Rig) -> str:
    return said(copy(rig, (99, 4095, rig.granter.domid), 0x2000, 2, 1)[0])


@row("89", "gntdev COPY, bad reference", "0, status -3")
def _(rig: Rig) -> str:
    scratch = rig.grantee.must("scratch")
    return said(*copy(rig, (20000, 0, rig.granter.domid), rig.grantee.must("address", scratch), 16, 1))


@row("90", "gntdev COPY count 0", "0")
def _(rig: Rig) -> str:
    return said(rig.grantee.ioctl(rig.grantee.open("gntdev"), GRANT_COPY, pack("=I4xQ", 0, 0))[0])


@row("91", "gntdev DMABUF ioctl, not built in", "ENOTTY")
def _(rig: Rig) -> str:
    return said(rig.grantee.ioctl(rig.grantee.open("gntdev"), DMABUF_IMP_RELEASE, pack("=II", 0, 0))[0])


@row("G34", "gntdev COPY out of a page and into it; statuses of a bad domain and an unused reference", "0; -2, -1")
def _(rig: Rig) -> str:
    _, _, refs, here = share(rig)
    rig.granter.must("poke", here, 100, "aabbccdd")
    scratch = rig.grantee.must("scratch")
    address = rig.grantee.must("address", scratch)
    (domid, ref) = refs[0]
    answers = [*copy(rig, (ref, 100, domid), address, 4, 1), rig.grantee.step("peek", scratch, 0, 4)]
    answers += [*copy(rig, address, (ref, 200, domid), 4, 2), rig.granter.step("peek", here, 200, 4)]
    answers += [*copy(rig, (ref, 0, 12345), address, 4, 1), *copy(rig, (500, 0, domid), address, 4, 1)]
    return said(*answers)


# Good paths.


@row("G1", "share writable, map, write on both sides", "both see it")
def _(rig: Rig) -> str:
    _, _, refs, here = share(rig, 2)
    there = attach(rig.grantee, refs)
    rig.granter.must("poke", here, 10, "aabb")
    rig.grantee.must("poke", there, PAGE, "ccdd")
    return said(rig.grantee.step("peek", there, 10, 2), rig.granter.step("peek", here, PAGE, 2))


@row("G2", "share read-only, the granter maps and writes, the peer maps and reads; the granter writes on", "seen")
def _(rig: Rig) -> str:
    _, _, refs, here = share(rig, flags=0)
    rig.granter.must("poke", here, 0, "01")
    there = attach(rig.grantee, refs, READ)
    before = rig.grantee.step("peek", there, 0, 1)
    rig.granter.must("poke", here, 0, "02")
    return said(before, rig.grantee.step("peek", there, 0, 1), "a store:", rig.grantee.step("poke", there, 0, "03"))


@row("G3", "map pages of three ALLOCs in another order, as one range", "in the order asked for")
def _(rig: Rig) -> str:
    refs = []
    for mark in ("11", "22", "33"):
        _, _, (ref,), here = share(rig)
        rig.granter.must("poke", here, 0, mark)
        refs.append(ref)
    there = attach(rig.grantee, [refs[2], refs[0], refs[1]])
    return said(*(rig.grantee.step("peek", there, page * PAGE, 1) for page in range(3)))


@row("G4", "map one page twice in one range; write the first, read the second", "the same page")
def _(rig: Rig) -> str:
    _, _, refs, _ = share(rig)
    there = attach(rig.grantee, refs * 2)
    rig.grantee.must("poke", there, 9, "7e")
    return said(rig.grantee.step("peek", there, PAGE + 9, 1))


@row("G5", "allocate to the limit, free, allocate again", "0, ENOSPC, 0")
def _(rig: Rig) -> str:
    file = rig.granter.open("gntalloc")

    def body() -> str:
        made = rig.granter.grant(file, 5)
        full = rig.granter.alloc(file).result
        rig.granter.dealloc(file, made.index, 5)
        return said(full, rig.granter.alloc(file, 5).result)

    return with_limit(rig.granter, 5, body)


@row("G6", "free a page the peer still maps, at the limit; allocate; the peer unmaps; allocate", "0, 0 since 5.17")
def _(rig: Rig) -> str:
    file = rig.granter.open("gntalloc")

    def body() -> str:
        made = rig.granter.grant(file, 1, domid=rig.grantee.domid)
        there = attach(rig.grantee, [(rig.granter.domid, made.refs[0])])
        rig.granter.dealloc(file, made.index)
        held = rig.granter.alloc(file)
        if held.result == 0:
            rig.granter.dealloc(file, held.index)
        rig.grantee.must("munmap", there, 0, PAGE)
        return said(held.result, rig.granter.alloc(file).result)

    return with_limit(rig.granter, 1, body)


@row("G7", "a child made by fork touches a gntalloc map", "inherited")
def _(rig: Rig) -> str:
    _, _, _, here = share(rig)
    return said(rig.granter.step("touch", here, 0))


@row("G8", "a child made by fork touches a gntdev map", "PV: not inherited; PVH: inherited")
def _(rig: Rig) -> str:
    _, _, refs, _ = share(rig)
    return said(rig.grantee.step("touch", attach(rig.grantee, refs), 0))


@row("G9", "unmap and close: the peer can map no more", "EINVAL")
def _(rig: Rig) -> str:
    file, _, refs, here = share(rig)
    rig.granter.must("munmap", here, 0, PAGE)
    rig.granter.must("close", file)
    return said(ok(attach(rig.grantee, refs)))


@row("G10", "the granter is killed: the peer's map stays, a new one fails", "stays, EINVAL")
def _(rig: Rig) -> str:
    victim = rig.program("victim")
    file = victim.open("gntalloc")
    made = victim.grant(file, 2, domid=rig.grantee.domid)
    here = victim.mmap(file, made.index, 2 * PAGE)
    victim.must("poke", here, 0, "99")
    there = attach(rig.grantee, [(victim.domid, made.refs[0])])
    victim.kill()
    again = ok(attach(rig.grantee, [(victim.domid, made.refs[1])]))
    return said(rig.grantee.step("peek", there, 0, 1), again)


@row("G11", "one grant mapped by two MAPs of one file", "0, 0; consecutive indexes")
def _(rig: Rig) -> str:
    _, _, refs, _ = share(rig)
    file = rig.grantee.open("gntdev")
    indexes = []
    for _ in range(2):
        _, index = rig.grantee.reserve(file, refs)
        indexes.append(index // PAGE)
        assert ok(rig.grantee.mmap(file, index)) == "0"
    return said(*indexes)


@row("G12", "index of the first ALLOC of a file; references", "0; from 8 up")
def _(rig: Rig) -> str:
    made = rig.granter.grant(rig.granter.open("gntalloc"), 4)
    return said(made.index, "all from 8 up" if min(made.refs) >= 8 else made.refs)


@row("G13", "the peer maps a read-only grant that its granter never mapped", "0")
def _(rig: Rig) -> str:
    _, _, refs, _ = share(rig, flags=0, mapped=False)
    return ok(attach(rig.grantee, refs, READ))


@row("G14", "the granter maps a read-only grant again after its peer did", "0")
def _(rig: Rig) -> str:
    file, index, refs, _ = share(rig, flags=0)
    attach(rig.grantee, refs, READ)
    return ok(rig.granter.mmap(file, index))


@row("G15", "a freed page that one peer map still holds is mapped once more", "0 with table version 1")
def _(rig: Rig) -> str:
    file, index, refs, here = share(rig)
    attach(rig.grantee, refs)
    rig.granter.dealloc(file, index)
    rig.granter.must("munmap", here, 0, PAGE)
    return ok(attach(rig.grantee, refs))


@row("G16", "gntdev index after UNMAP of the first of three", "a gap that would just fit is not used")
def _(rig: Rig) -> str:
    file = rig.grantee.open("gntdev")
    indexes = [rig.grantee.reserve(file, [(0, 99)])[1] for _ in range(3)]
    rig.grantee.unreserve(file, indexes[0], 1)
    return said(rig.grantee.reserve(file, [(0, 99)])[1] // PAGE)


@row("G17", "gntdev read-only map on an O_RDONLY file", "0")
def _(rig: Rig) -> str:
    _, _, refs, _ = share(rig)
    return ok(attach(rig.grantee, refs, READ, file=rig.grantee.open("gntdev", os.O_RDONLY)))


@row("G18", "pages come zeroed, also after others used them", "zero")
def _(rig: Rig) -> str:
    file, index, _, here = share(rig)
    rig.granter.must("poke", here, 0, "ff" * 16)
    rig.granter.dealloc(file, index)
    rig.granter.must("munmap", here, 0, PAGE)
    _, _, _, again = share(rig, 4)
    return said(*{rig.granter.step("peek", again, page * PAGE, 16) for page in range(4)})


@row("G19", "evtchn: an unknown ioctl, and a VIRQ there is none of", "ENOSYS, EINVAL")
def _(rig: Rig) -> str:
    file = rig.granter.open("evtchn")
    return said(rig.granter.ioctl(file, 0x4599, bytes(8))[0], rig.granter.ioctl(file, BIND_VIRQ, pack("=I", 24))[0])


def run(key: str, rig: Rig) -> dict[str, str]:
    """Run one row: {"saw": line}, or {"n/a": why}, or {"broke": what}."""
    try:
        return {"saw": ROWS[key].run(rig)}
    except NotApplicable as why:
        return {"n/a": str(why)}
    except Exception as error:
        return {"broke": f"{type(error).__name__}: {error}"}
    finally:
        rig.close()


import event_rows  # noqa: E402, F401  it needs what is above, and puts its rows into ROWS
