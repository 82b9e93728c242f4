"""Be the other end of the demo: `python -m gntalloc.demo.grantee stream GRANTS`, or a part in one of the scenes.

A part prints "ready" when it has done its first half. Then it waits for a line, or to be killed.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import sys
from typing import TYPE_CHECKING

from gntalloc.demo.stream import receive
from gntalloc.domain import Domain, current_domain
from gntalloc.errors import GntallocError
from gntalloc.guest.grant import Grant
from gntalloc.libc import check, libc
from gntalloc.maps import PAGE_SIZE, Mapping

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Play the part that is asked for."""
    part, text = arguments
    domain = current_domain()
    PARTS[part](domain, text)
    return 0


def _stream(domain: Domain, text: str) -> None:
    receive(domain, text)


def _hold(domain: Domain, text: str) -> None:
    with domain.map(Grant.parse(text)):
        _ready()
        sys.stdin.readline()


def _hold_silently(domain: Domain, text: str) -> None:
    """Map the page, then close every line to the machine: from here on only the kernel can tell of the page."""
    mapped = domain.map(Grant.parse(text))
    domain.devices.close()
    domain.close()
    _ready()
    sys.stdin.readline()
    del mapped


def _attack(domain: Domain, text: str) -> None:
    """Try to write to a read-only grant, by every means that a program could have."""
    stolen: list[int] = []
    place = Mapping.place

    def steal(self: Mapping, start: int, length: int, descriptor: int, offset: int, *, shared: bool = True) -> None:
        stolen.append(os.dup(descriptor))  # the library closes its own; an attacker would not
        place(self, start, length, descriptor, offset, shared=shared)

    Mapping.place = steal  # type: ignore[method-assign]
    mapped = domain.map(Grant.parse(text))
    Mapping.place = place  # type: ignore[method-assign]
    address = mapped._mapping.address  # noqa: SLF001  an attacker reads private fields
    again = os.open(f"/proc/self/fd/{stolen[0]}", os.O_RDWR)
    answers = [
        ("keep the descriptor and open it again for writing, through /proc/self/fd", "opened"),
        ("write to that", _answer(lambda: os.write(again, b"x"))),
        ("map that writable", _answer(lambda: mmap.mmap(again, PAGE_SIZE).close())),
        ("shrink it under the granter", _answer(lambda: os.ftruncate(again, 0))),
        ("mprotect the mapping writable", _answer(lambda: check(libc.mprotect(address, PAGE_SIZE, 3)))),
        ("write through /proc/self/mem", _answer(lambda: _write_memory(address))),
        ("store a byte at its address", _store(address)),
    ]
    print(json.dumps(answers))


def _ready() -> None:
    print("ready", flush=True)


def _answer(attack: Callable[[], object]) -> str:
    try:
        attack()
    except OSError as error:
        code = error.errno or 0
        return f"{errno.errorcode.get(code, code)} ({os.strerror(code)})"
    return "it worked"


def _write_memory(address: int) -> None:
    descriptor = os.open("/proc/self/mem", os.O_RDWR)
    try:
        os.pwrite(descriptor, b"x", address)
    finally:
        os.close(descriptor)


def _store(address: int) -> str:
    """Let a child store a byte there, and tell what became of it."""
    child = os.fork()
    if not child:
        ctypes.memset(address, 0x78, 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "it worked"


PARTS: dict[str, Callable[[Domain, str], None]] = {
    "stream": _stream,
    "hold": _hold,
    "hold-silently": _hold_silently,
    "attack": _attack,
}

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except GntallocError as error:
        print(f"grantee: {error}", file=sys.stderr)
        sys.exit(1)
