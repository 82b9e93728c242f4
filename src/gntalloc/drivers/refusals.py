"""Say why gntalloc refuses a call."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from gntalloc.abi.gntalloc import FLAG_WRITABLE
from gntalloc.abi.grants import DOMID_FIRST_RESERVED
from gntalloc.errors import DeviceError
from gntalloc.maps import PAGE_SIZE

if TYPE_CHECKING:
    from gntalloc.abi.gntalloc import AllocGref

__all__ = ["asked_for", "check_sense", "not_there", "why_not"]


def check_sense(asked: AllocGref, owner: int) -> None:
    """Refuse an ALLOC that Linux lets pass and that no program can have meant.

    Raises:
        DeviceError: EINVAL: it is such a one.
    """
    if not asked.count:
        raise DeviceError(errno.EINVAL, "no pages were asked for; this machine is strict, so ask for one at least")
    if asked.flags & ~FLAG_WRITABLE:
        what = f"flags {asked.flags:#x} have more than writable ({FLAG_WRITABLE})"
        raise DeviceError(errno.EINVAL, f"{what}, and this machine is strict; leave the others 0")
    if asked.domid == owner or asked.domid >= DOMID_FIRST_RESERVED:
        what = "one's own" if asked.domid == owner else "no domain's"
        raise DeviceError(
            errno.EINVAL,
            f"domid {asked.domid} is {what} number, and this machine is strict; grant to another domain, from 0 to "
            f"{DOMID_FIRST_RESERVED - 1}",
        )


def not_there(offset: int, count: int, missing: int) -> DeviceError:
    """Make the error of an mmap of pages of which the one at index `missing` is not there."""
    what = f"{count} pages at index {offset:#x} were to be mapped"
    return DeviceError(errno.ENOENT, f"{what}, and {why_not(offset, count, missing)}")


def why_not(index: int, count: int, missing: int) -> str:
    """Say why pages are not there: the one at index `missing` is not."""
    if not count:
        return "no pages is never a range"
    if index % PAGE_SIZE:
        return f"an index is a multiple of {PAGE_SIZE}"
    return f"this file has no page at index {missing:#x}: never allocated here, or freed already"


def asked_for(count: int) -> str:
    """Say how many pages were asked for."""
    return "1 page was asked for" if count == 1 else f"{count} pages were asked for"
