"""The numbers as they are on x86-64 and Arm, written down once by hand: no header or compiler is needed."""

from __future__ import annotations

import pickle
import struct
from typing import TYPE_CHECKING, Any

import pytest

from gntalloc.abi import evtchn, gntalloc, gntdev, grants, ioc

if TYPE_CHECKING:
    from types import ModuleType

    from gntalloc.abi.layout import KernelStruct

REQUESTS = {
    "IOCTL_GNTALLOC_ALLOC_GREF": 0x00184705,
    "IOCTL_GNTALLOC_DEALLOC_GREF": 0x00104706,
    "IOCTL_GNTALLOC_SET_UNMAP_NOTIFY": 0x00104707,
    "IOCTL_GNTDEV_MAP_GRANT_REF": 0x00184700,
    "IOCTL_GNTDEV_UNMAP_GRANT_REF": 0x00104701,
    "IOCTL_GNTDEV_GET_OFFSET_FOR_VADDR": 0x00184702,
    "IOCTL_GNTDEV_SET_MAX_GRANTS": 0x00044703,
    "IOCTL_GNTDEV_SET_UNMAP_NOTIFY": 0x00104707,
    "IOCTL_GNTDEV_GRANT_COPY": 0x00104708,
    "IOCTL_GNTDEV_DMABUF_EXP_FROM_REFS": 0x00144709,
    "IOCTL_GNTDEV_DMABUF_EXP_WAIT_RELEASED": 0x0008470A,
    "IOCTL_GNTDEV_DMABUF_IMP_TO_REFS": 0x0014470B,
    "IOCTL_GNTDEV_DMABUF_IMP_RELEASE": 0x0008470C,
    "IOCTL_EVTCHN_BIND_VIRQ": 0x00044500,
    "IOCTL_EVTCHN_BIND_INTERDOMAIN": 0x00084501,
    "IOCTL_EVTCHN_BIND_UNBOUND_PORT": 0x00044502,
    "IOCTL_EVTCHN_UNBIND": 0x00044503,
    "IOCTL_EVTCHN_NOTIFY": 0x00044504,
    "IOCTL_EVTCHN_RESET": 0x00004505,
    "IOCTL_EVTCHN_RESTRICT_DOMID": 0x00024506,
    "IOCTL_EVTCHN_BIND_STATIC": 0x00044507,
}

# One example of each struct, as Python and as the bytes of a little-endian machine.
EXAMPLES = [
    (gntalloc.AllocGref(0x0102, 1, 3, 0x5000), "0201 0100 03000000 0050000000000000"),
    (gntalloc.DeallocGref(0x1000, 2), "0010000000000000 02000000 00000000"),
    (gntalloc.UnmapNotify(0x1015, 3, 7), "1510000000000000 03000000 07000000"),
    (gntdev.GrantRef(1, 8), "01000000 08000000"),
    (gntdev.MapGrantRef(2, 0x3000), "02000000 00000000 0030000000000000"),
    (gntdev.UnmapGrantRef(0x3000, 2), "0030000000000000 02000000 00000000"),
    (gntdev.GetOffsetForVaddr(0x7000, 0x3000, 2), "0070000000000000 0030000000000000 02000000 00000000"),
    (gntdev.SetMaxGrants(16), "10000000"),
    (gntdev.UnmapNotify(0x1014, 1, 0), "1410000000000000 01000000 00000000"),
    (gntdev.ForeignPage(8, 0x0100, 2), "08000000 0001 0200"),
    (gntdev.GrantCopySegment(0x7000, 9, 4, 2, -3), "0070000000000000 0900000000000000 0400 0200 fdff 0000"),
    (gntdev.GrantCopy(1, 0x7000), "01000000 00000000 0070000000000000"),
    (gntdev.DmabufExpFromRefs(1, 2, 3, 4), "01000000 02000000 03000000 04000000"),
    (gntdev.DmabufExpWaitReleased(3, 1000), "03000000 e8030000"),
    (gntdev.DmabufImpToRefs(3, 2, 4, 0), "03000000 02000000 04000000 00000000"),
    (gntdev.DmabufImpRelease(3, 0), "03000000 00000000"),
    (evtchn.BindVirq(1), "01000000"),
    (evtchn.BindInterdomain(1, 5), "01000000 05000000"),
    (evtchn.BindUnboundPort(1), "01000000"),
    (evtchn.Unbind(5), "05000000"),
    (evtchn.Notify(5), "05000000"),
    (evtchn.RestrictDomid(1), "0100"),
    (evtchn.BindStatic(5), "05000000"),
]
STRUCTS = gntalloc.STRUCTS + gntdev.STRUCTS + evtchn.STRUCTS


def test_request_numbers() -> None:
    ours = {name: number for module in (gntalloc, gntdev, evtchn) for number, name in module.IOCTLS.items()}
    assert ours == REQUESTS


def test_a_request_number_tells_the_size_of_its_argument() -> None:
    assert ioc.size_of(gntalloc.ALLOC_GREF) == gntalloc.AllocGref.SIZE == 24
    assert ioc.size_of(evtchn.RESET) == 0
    assert ioc.size_of(ioc.ioc(ioc.READ | ioc.WRITE, "G", 5, 24)) == 24


def test_direction_bits_make_another_number() -> None:
    assert ioc.ioc(ioc.READ | ioc.WRITE, "G", 5, 24) == 0xC0184705


@pytest.mark.parametrize(("example", "text"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_bytes(example: KernelStruct, text: str) -> None:
    expected = bytes.fromhex(text)
    assert example.pack() == expected
    assert type(example).unpack_from(b"??" + expected, 2) == example
    assert pickle.loads(pickle.dumps(example)) == example


def test_every_struct_has_an_example() -> None:
    assert {type(example) for example, _ in EXAMPLES} == {*STRUCTS, gntdev.ForeignPage}


@pytest.mark.parametrize("kernel_struct", STRUCTS, ids=lambda kernel_struct: kernel_struct.__name__)
def test_fields_and_layout_say_the_same(kernel_struct: type[KernelStruct]) -> None:
    """Bytes that differ, unpacked, are found at the offsets that FIELDS names."""
    raw = bytes(range(1, kernel_struct.LAYOUT.size + 1))
    value: Any = kernel_struct.unpack_from(raw)
    offsets = {name: (offset, size) for name, offset, size in kernel_struct.FIELDS}
    for name, number in value._asdict().items():
        offset, size = offsets[name]
        assert number.to_bytes(size, "little") == raw[offset : offset + size], name
    assert kernel_struct.LAYOUT.size <= kernel_struct.SIZE
    assert max(offset + size for _, offset, size in kernel_struct.FIELDS) <= kernel_struct.SIZE


@pytest.mark.parametrize("value", [-1, 1 << 16])
def test_a_value_that_does_not_fit_is_an_error(value: int) -> None:
    with pytest.raises(struct.error):
        gntalloc.AllocGref(domid=value, flags=0, count=1, index=0).pack()


def test_a_foreign_page_is_a_word() -> None:
    page = gntdev.ForeignPage(ref=8, offset=0x100, domid=2)
    assert page.to_word() == 8 | 0x100 << 32 | 2 << 48
    assert gntdev.ForeignPage.from_word(page.to_word()) == page


def test_the_grant_table() -> None:
    assert grants.V1_ENTRIES_PER_FRAME == 512
    assert grants.V2_ENTRIES_PER_FRAME == 256
    assert grants.MAX_FRAMES * grants.V1_ENTRIES_PER_FRAME == 32768
    assert grants.DOMID_SELF == grants.DOMID_FIRST_RESERVED == 0x7FF0
    assert sorted(grants.STATUS_NAMES) == list(range(-13, 1))
    for name, value in vars(grants).items():
        if f"GNTST_{name.lower()}" in grants.STATUS_NAMES.values():
            assert grants.STATUS_NAMES[value] == f"GNTST_{name.lower()}"


@pytest.mark.parametrize("module", [evtchn, gntalloc, gntdev, grants, ioc])
def test_all_names_exist(module: ModuleType) -> None:
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
