"""Serve CONTROL, the administrator's commands: those that change nothing outside the daemon."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from gntalloc.xenstore.daemon.arguments import integer, strings
from gntalloc.xenstore.daemon.limits import Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from gntalloc.xenstore.daemon.domains import Domain, Domains
    from gntalloc.xenstore.daemon.limits import Quotas

__all__ = ["Control"]

OK = b"OK\0"


class Control:
    """Carry out the commands check, help, log, print, quota and quota-soft.

    Args:
        quotas: the quotas of every domain.
        domains: the known domains.
        unread: tells how many answers a domain has not read.
    """

    def __init__(self, quotas: Quotas, domains: Domains, unread: Callable[[Domain], int]) -> None:
        self._quotas = quotas
        self._domains = domains
        self._unread = unread
        self._soft = {"memory": 2 << 20}
        self._commands: dict[bytes, Callable[[list[bytes]], bytes]] = {
            b"check": lambda rest: _no(rest) or OK,
            b"help": self._help,
            b"log": lambda rest: OK if rest in ([b"on"], [b"off"]) else _refuse(),
            b"print": lambda rest: OK if len(rest) == 1 else _refuse(),
            b"quota": self._quota,
            b"quota-soft": self._quota_soft,
        }

    def obey(self, body: bytes) -> bytes:
        """Carry out one command.

        Raises:
            Refused: EINVAL: there is no such command, or not with these arguments. ENOENT: there is no such domain.
        """
        name, *rest = strings(body, 1)
        command = self._commands.get(name)
        return _refuse() if command is None else command(rest)

    def _help(self, rest: list[bytes]) -> bytes:
        _no(rest)
        return b"".join(name + b"\n" for name in self._commands) + b"\0"

    def _quota(self, rest: list[bytes]) -> bytes:
        if not rest:
            return _table({name.replace("_", "-"): value for name, value in self._quotas.all().items()})
        if rest[0] == b"set":
            name, value = _setting(rest[1:])
            name = name.replace("-", "_")
            if name not in self._quotas.all():
                return _refuse()
            setattr(self._quotas, name, value)
            return OK
        if len(rest) != 1:
            return _refuse()
        domain = self._domains.get(integer(rest[0]))
        if domain is None:
            raise Refused(errno.ENOENT)
        used = {"nodes": domain.nodes, "watches": domain.watches, "transactions": domain.transactions}
        used |= {"outstanding": self._unread(domain), "memory": domain.memory}
        return b"Domain %d:\n" % domain.domid + _table(used)

    def _quota_soft(self, rest: list[bytes]) -> bytes:
        if not rest:
            return _table(self._soft)
        if rest[0] != b"set":
            return _refuse()
        name, value = _setting(rest[1:])
        if name not in self._soft:
            return _refuse()
        self._soft[name] = value
        return OK


def _setting(rest: list[bytes]) -> tuple[str, int]:
    if len(rest) != 2 or integer(rest[1]) < 1:
        raise Refused(errno.EINVAL)
    return rest[0].decode("latin-1"), integer(rest[1])


def _table(rows: dict[str, int]) -> bytes:
    return "".join(f"{name:<17}: {value:8}\n" for name, value in rows.items()).encode() + b"\0"


def _no(rest: list[bytes]) -> bytes:
    return _refuse() if rest else b""


def _refuse() -> bytes:
    raise Refused(errno.EINVAL)
