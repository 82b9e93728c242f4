"""What a toolstack writes for a device: a folder for each end, which names the other, with the rights they need.

    /local/domain/<frontend>/device/<kind>/<number>           the frontend's; the backend may read it
    /local/domain/<backend>/backend/<kind>/<frontend>/<number>   the backend's; the frontend may read it

Only domain 0 may do so, or whoever owns all these folders. Source: libxl_device.c of Xen, for nodes and rights.
"""

from __future__ import annotations

import contextlib
import errno
import re
from typing import TYPE_CHECKING, NamedTuple

from gntalloc.digits import whole_number
from gntalloc.errors import DeviceError
from gntalloc.xenstore.errors import Denied, NoNode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gntalloc.xenstore.client import Store, Transaction

__all__ = ["Device", "attach", "detach", "devices", "disk_number"]

_NAME = re.compile("xvd([a-p])([1-9]|1[0-5])?")


class Device(NamedTuple):
    """A device by its address: its kind ("vbd" is a disk), its number, and the domains of its two ends.

    Some backends look for their devices under another kind than the frontend's: QEMU's disks are "qdisk" there.
    """

    kind: str
    number: int
    frontend: int
    backend: int
    served_as: str = ""

    @property
    def front(self) -> str:
        """The frontend's folder."""
        return f"/local/domain/{self.frontend}/device/{self.kind}/{self.number}"

    @property
    def back(self) -> str:
        """The backend's folder."""
        return f"/local/domain/{self.backend}/backend/{self.served_as or self.kind}/{self.frontend}/{self.number}"


def attach(
    store: Store, device: Device, front: Mapping[str, str] | None = None, back: Mapping[str, str] | None = None
) -> None:
    """Make the folders of both ends, in state 1. What was there before is replaced.

    Args:
        store: domain 0's.
        device: which.
        front: nodes of this kind of device, in the frontend's folder.
        back: the same, in the backend's.

    Raises:
        Denied: this store's domain may not.
        DeviceError: ESRCH one of the two domains is not there.
    """
    f, b = device.frontend, device.backend
    common = {"online": "1", "state": "1"}
    sides = (
        (device.front, f, b, {"backend": device.back, "backend-id": str(b), "state": "1", **(front or {})}),
        (device.back, b, f, {"frontend": device.front, "frontend-id": str(f), **common, **(back or {})}),
    )

    def write(tree: Transaction) -> None:
        for folder, owner, reader, nodes in sides:
            with contextlib.suppress(NoNode):
                tree.remove(folder)
            tree.mkdir(folder)
            tree.set_permissions(folder, (f"n{owner}", f"r{reader}"))
            for name, value in nodes.items():
                tree.write(f"{folder}/{name}", value)
                tree.set_permissions(f"{folder}/{name}", (f"n{owner}", f"r{reader}"))
        errors = f"/local/domain/{b}/error"
        if not tree.exists(errors):  # where a backend complains
            tree.mkdir(errors)
            tree.set_permissions(errors, (f"n{b}",))

    try:
        store.transact(write)
    except NoNode:  # whose the folders would be
        raise DeviceError(
            errno.ESRCH, f"{device.front} cannot be made: there is no domain {f}, or no domain {b}; make it first"
        ) from None


def detach(store: Store, device: Device) -> None:
    """Remove both folders, whatever state they are in. Their ends find that the other is gone."""
    for folder in (device.front, device.back):
        with contextlib.suppress(NoNode):
            store.remove(folder)


def devices(store: Store, domid: int, kind: str) -> tuple[Device, ...]:
    """List the devices of a kind that domain `domid` is the frontend of."""
    try:
        names = store.list(f"/local/domain/{domid}/device/{kind}")
    except (NoNode, Denied):
        return ()
    found = []
    for name in sorted(names):
        number = whole_number(name)
        if number is None:
            continue
        with contextlib.suppress(NoNode, Denied):
            backend = whole_number(store.read_text(f"/local/domain/{domid}/device/{kind}/{name}/backend-id"), 0xFFFF)
            if backend is not None:
                found.append(Device(kind, number, domid, backend))
    return tuple(found)


def disk_number(name: str) -> int:
    """Give the number of a disk by its name: xvda is 51712, xvda1 51713. A number as text is itself.

    Raises:
        ValueError: no such name.
    """
    number = whole_number(name)
    if number is not None:
        return number
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name[:40]!r} is no disk; they are called xvda to xvdp, xvda1 to xvdp15, or a number such as 51712"
        )
    return (202 << 8) + 16 * (ord(match[1]) - ord("a")) + int(match[2] or 0)
