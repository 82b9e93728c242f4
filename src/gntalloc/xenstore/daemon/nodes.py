"""Serve the requests about nodes: read them, write them, list them, and say who may.

Sources: as of `server`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from gntalloc.xenstore import wire
from gntalloc.xenstore.daemon import arguments
from gntalloc.xenstore.daemon.control import OK
from gntalloc.xenstore.daemon.limits import Quotas, Refused
from gntalloc.xenstore.daemon.permissions import OWNER, READ, WRITE, Entry, pack, parse
from gntalloc.xenstore.daemon.tree import Node, parent
from gntalloc.xenstore.wire import Type

if TYPE_CHECKING:
    from gntalloc.steps import Steps
    from gntalloc.xenstore.daemon.domains import Domains
    from gntalloc.xenstore.daemon.request import Handler, Request

__all__ = ["Nodes"]


class Nodes:
    """Serve these requests.

    Args:
        quotas: the quotas of each domain.
        domains: the domains that permissions can name.
        special: the permissions of the names that begin with @, by name.
    """

    def __init__(self, quotas: Quotas, domains: Domains, special: dict[str, tuple[Entry, ...]]) -> None:
        self._quotas = quotas
        self._domains = domains
        self._special = special
        self.handlers: dict[Type, Handler] = {
            Type.DIRECTORY: self._directory,
            Type.DIRECTORY_PART: self._directory_part,
            Type.READ: self._read,
            Type.GET_PERMS: self._get_perms,
            Type.WRITE: self._write,
            Type.MKDIR: self._mkdir,
            Type.RM: self._rm,
            Type.SET_PERMS: self._set_perms,
        }

    def _directory(self, request: Request) -> bytes:
        node = self._node(request, READ)
        if node.names > wire.PAYLOAD_MAX:
            raise Refused(errno.E2BIG, f"the answer has {node.names} bytes, and a message {wire.PAYLOAD_MAX}")
        return node.listing()

    def _directory_part(self, request: Request) -> bytes:
        if arguments.count(request.body) != 2:
            raise Refused(errno.EINVAL)
        path, offset, *_ = request.body.split(b"\0")
        node = request.view.get(request.whole(path), READ)
        head = b"%d\0" % node.generation
        start = arguments.decimal(offset)
        if start >= node.names:
            return head + b"\0"
        names = node.listing()[start:]
        room = wire.PAYLOAD_MAX - len(head) - 1
        if len(names) <= room:
            return head + names + b"\0"
        return head + names[: names.rindex(b"\0", 0, room) + 1]

    def _read(self, request: Request) -> bytes:
        return self._node(request, READ).value

    def _get_perms(self, request: Request) -> bytes:
        return pack(self._node(request, READ).permissions)

    def _write(self, request: Request) -> Steps[bytes]:
        first, value = _split(request.body)
        path = request.whole(first)
        view = request.view
        try:
            node = view.get(path, WRITE)
        except Refused as refusal:
            if refusal.code != errno.ENOENT:
                raise
            node = yield from view.making(path, value)
        else:
            node = view.put(path, node._replace(value=value))
        view.tell(path, node)
        return OK

    def _mkdir(self, request: Request) -> Steps[bytes]:
        path = request.whole(arguments.one(request.body))
        try:
            request.view.get(path, WRITE)
        except Refused as refusal:
            if refusal.code != errno.ENOENT:
                raise
            node = yield from request.view.making(path, b"")
            request.view.tell(path, node)
        return OK

    def _rm(self, request: Request) -> Steps[bytes]:
        path = request.whole(arguments.one(request.body))
        try:
            request.view.get(path, WRITE)
        except Refused as refusal:
            if refusal.code != errno.ENOENT or request.view.find(parent(path)) is None:
                raise
            return OK
        if path == "/":
            raise Refused(errno.EINVAL)
        yield from request.view.removing(path)
        return OK

    def _set_perms(self, request: Request) -> bytes:
        first, *texts = arguments.strings(request.body, 2)
        view = request.view
        if view.limited and len(texts) > self._quotas.permissions:
            raise Refused(errno.ENOSPC, f"permissions {self._quotas.permissions}: {len(texts)} were given")
        entries = self._domains.meant(parse(texts))
        if self._domains.know(entries[0].domid) is None:
            raise Refused(errno.ENOENT)
        if first.startswith(b"@"):
            return self._set_special(request, first.decode("latin-1"), entries)
        path = request.whole(first)
        node = view.get(path, WRITE | OWNER)
        before = node.permissions
        if view.limited and entries[0].domid != before[0].domid:
            raise Refused(errno.EPERM)
        changed = view.change_owner(node, entries)
        try:
            changed = view.put(path, changed)
        except Refused:
            view.change_owner(changed, before)
            raise
        view.tell(path, changed, before=before)
        return OK

    def _set_special(self, request: Request, name: str, entries: tuple[Entry, ...]) -> bytes:
        before = self._special.get(name)
        if before is None:
            raise Refused(errno.EINVAL)
        if request.session.rights(before) & (WRITE | OWNER) != WRITE | OWNER:
            raise Refused(errno.EACCES)
        self._special[name] = entries
        return OK

    def _node(self, request: Request, wanted: int) -> Node:
        return request.view.get(request.whole(arguments.one(request.body)), wanted)


def _split(body: bytes) -> tuple[bytes, bytes]:
    """Split a body into a path and the bytes that follow it.

    Raises:
        Refused: EINVAL: there is no path.
    """
    path, end, rest = body.partition(b"\0")
    if not end:
        raise Refused(errno.EINVAL)
    return path, rest
