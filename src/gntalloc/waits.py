"""Give waits their parts: sockets, epoll and poll, also in a program that gevent or eventlet has patched.

These libraries take epoll away, and give sockets that know neither MSG_DONTWAIT nor SO_RCVTIMEO. So `Socket` and
`epoll` here are Python's own, whatever has been put in their places. A wait that may be long uses `poll` or `ready`,
which are the program's: other greenlets run meanwhile. A question to the machine lets no greenlet run: the answer comes
at once.
"""

from __future__ import annotations

import _socket
import select
import sys
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

__all__ = ["POLLIN", "POLLOUT", "Socket", "epoll", "hung_up", "patched", "poll", "ready", "socketpair"]

POLLIN, POLLOUT = 1, 4  # as eventlet takes them away too
_HANGUP = 0x10


class Socket(_socket.socket):
    """Wrap the kernel's socket, as Python has it beneath socket.socket."""

    def accept(self) -> tuple[Socket, Any]:
        """Take the next connection, and give it with its other end's name."""
        descriptor, name = self._accept()  # type: ignore[attr-defined]
        return Socket(fileno=descriptor), name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def socketpair() -> tuple[Socket, Socket]:
    """Make two sockets that are connected, as socket.socketpair does."""
    one, other = _socket.socketpair()
    return Socket(fileno=one.detach()), Socket(fileno=other.detach())


def patched() -> bool:
    """Say whether gevent or eventlet has patched this program."""
    return not hasattr(select, "epoll")


def _own_epoll() -> type[select.epoll]:
    """Take epoll from another copy of the module, where it was removed from the copy that all modules share."""
    import importlib.util

    spec = sys.modules["select"].__spec__
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: type[select.epoll] = module.epoll
    return made


epoll = _own_epoll() if patched() else select.epoll


def ready(group: select.epoll, timeout: float | None) -> list[tuple[int, int]]:
    """Return what `group.poll` gives, within `timeout` seconds."""
    if not patched():
        return group.poll(timeout)
    waiting = poll()
    waiting.register(group.fileno(), POLLIN)
    waiting.poll(None if timeout is None else timeout * 1000)
    return group.poll(0)


def hung_up(descriptor: int) -> bool:
    """Say whether nobody is at the other end any more."""
    with epoll() as group:
        group.register(descriptor, 0)
        return any(events & _HANGUP for _, events in group.poll(0))


def poll() -> select.poll | _Selected:
    """Make an object like select.poll's. gevent has one that lets greenlets run; eventlet has none."""
    make: Callable[[], select.poll] | None = getattr(select, "poll", None)
    return _Selected() if make is None else make()


class _Selected:
    """Wait as select.poll does, by select.select, which eventlet has."""

    def __init__(self) -> None:
        self._wanted: dict[int, int] = {}

    def register(self, descriptor: int | socket.socket, events: int) -> None:
        """See select.poll."""
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self._wanted[number] = events

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        """See select.poll. The timeout is in milliseconds."""
        reads = [each for each, events in self._wanted.items() if events & POLLIN]
        writes = [each for each, events in self._wanted.items() if events & POLLOUT]
        readable, writable, _ = select.select(reads, writes, [], None if timeout is None else timeout / 1000)
        return [(each, POLLIN) for each in readable] + [(each, POLLOUT) for each in writable if each not in readable]
