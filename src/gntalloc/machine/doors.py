"""Listen on the machine's sockets, and decide which programs may come in.

The decision falls at connect, by the user that the kernel names (SO_PEERCRED). The modes of the sockets only keep other
users from connecting at all. No socket here takes descriptors: see unasked.py.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from gntalloc import clock
from gntalloc.errors import DeviceError, GntallocError
from gntalloc.machine.loop import READABLE
from gntalloc.machine.speaker import RUNNABLE
from gntalloc.machine.turns import OWN
from gntalloc.places import control_path, domain_path, store_path
from gntalloc.unasked import Inlet, refuse
from gntalloc.wire.messages import NOBODY, Hello, kind_of
from gntalloc.wire.stream import encode_reply

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from gntalloc.machine.machine import Guest
    from gntalloc.machine.speaker import Speaker
    from gntalloc.machine.turns import Turns
    from gntalloc.unasked import Disposal

__all__ = ["Doors", "Peer"]

log = logging.getLogger("gntalloc.machine")

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_BACKLOG = 512
_ACL_VERSION, _ACL_ENTRY = struct.Struct("<I"), struct.Struct("<HHI")  # an entry: tag, permissions, user or group
_NOBODY = 0xFFFFFFFF  # where an entry names neither
_NEVER_WAIT = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class Peer(NamedTuple):
    """Name the process at the other end of a socket, as the kernel named it at connect."""

    pid: int
    uid: int

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """Ask the kernel for the process at the other end of `sock`."""
        pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return cls(pid, uid)


class Door:
    """Be a socket that programs connect to: a `Speaker`. They are let in one after the other, in its turns.

    Args:
        listener: the socket.
        let_in_one: lets the next program in, or refuses it. False: there is none.
    """

    companion: Speaker | None = None
    weight = 0
    standing = READABLE

    def __init__(self, listener: socket.socket, let_in_one: Callable[[], bool]) -> None:
        self._listener = listener
        self._let_in_one = let_in_one

    def fileno(self) -> int:
        """See `Speaker`."""
        return self._listener.fileno()

    def receive(self, events: int) -> None:
        """See `Speaker`. A program has knocked."""
        self.standing = RUNNABLE

    def flush(self) -> None:
        """See `Speaker`. Nothing is ever sent here."""

    def admit(self) -> None:
        """See `Speaker`."""

    def take_turn(self, until: float) -> None:
        """See `Speaker`. Let programs in until then, one at least."""
        while self._let_in_one():
            if clock.now() >= until:
                return
        self.standing = READABLE

    def stalled(self, now: float) -> bool:
        """See `Speaker`."""
        return False

    def close(self) -> None:
        """See `Speaker`. `Doors` closes the socket."""


class Doors:
    """Keep the sockets in a machine's folder.

    Args:
        turns: gives each door its turns. A domain's doors have an account of their own, so that programs that only
            knock keep nobody waiting but those that knock there too.
        folder: the folder for the sockets.
        disposal: closes descriptors that come over the control socket, though none are due.
    """

    def __init__(self, turns: Turns, folder: str, disposal: Disposal) -> None:
        self._turns = turns
        self._folder = folder
        self._disposal = disposal
        self._listeners: dict[str, socket.socket] = {}
        self._doors: dict[str, Door] = {}
        self._disposals: dict[str, Disposal] = {}
        self._spare = _spare_descriptor()

    def open_control(self, let_in: Callable[[socket.socket], None]) -> None:
        """Open the control socket, where the machine's owner, and root, give orders.

        Raises:
            GntallocError: the socket cannot be made.
        """

        def accept(sock: socket.socket) -> None:
            if Peer.of(sock).uid in {os.getuid(), 0}:
                let_in(sock)
            else:
                Inlet(sock, self._disposal).close()

        self._listen(control_path(self._folder), os.getuid(), accept, self._disposal, OWN)

    def open_domain(
        self,
        guest: Guest,
        let_in: Callable[[socket.socket, Guest, Peer], None],
        let_in_to_store: Callable[[socket.socket, Guest, Peer], None],
    ) -> None:
        """Let programs of the domain's user, and root, into a domain and its xenstore.

        Either of the functions that are given may refuse a program with DeviceError.

        Raises:
            GntallocError: a socket cannot be made. Then there is none.
        """
        if guest.uid != os.getuid():
            os.chmod(self._folder, 0o711)
        store, domain = store_path(self._folder, guest.domid), domain_path(self._folder, guest.domid)

        def accept(sock: socket.socket) -> None:
            try:
                let_in(sock, guest, _entitled(sock, guest))
            except DeviceError as why:
                log.info("refused pid %d: %s", Peer.of(sock).pid, why)
                _refuse(sock, why)
                Inlet(sock, guest.disposal).close()

        def accept_to_store(sock: socket.socket) -> None:
            try:
                let_in_to_store(sock, guest, _entitled(sock, guest))
            except DeviceError as why:  # xenstore's wire has no message for it
                log.info("refused a program at xenstore: %s", why)
                Inlet(sock, guest.disposal).close()

        key = _key(guest.domid)
        self._turns.open_account(key, guest.uid)
        try:
            self._listen(store, guest.uid, accept_to_store, guest.disposal, key)
            self._listen(domain, guest.uid, accept, guest.disposal, key)
        except GntallocError:
            self.shut_domain(guest.domid)
            raise

    def shut_domain(self, domid: int) -> None:
        """Let no program into a domain any more."""
        self._shut(domain_path(self._folder, domid))
        self._shut(store_path(self._folder, domid))
        self._turns.close_account(_key(domid))

    def close(self) -> None:
        """Remove all sockets from the folder."""
        for path in list(self._listeners):
            self._shut(path)
        if self._spare >= 0:
            os.close(self._spare)

    def _listen(
        self, path: str, uid: int, accept: Callable[[socket.socket], None], disposal: Disposal, key: Hashable
    ) -> None:
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            why = f"{path} cannot be listened on: {error.strerror}"
            raise GntallocError(error.errno or errno.EIO, why) from None
        refuse(listener)  # first: what is accepted has it from here
        door = Door(listener, lambda: self._let_in_one(path, accept, disposal))
        unheard = path + "-"
        try:
            if os.path.lexists(path):
                raise FileExistsError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            listener.bind(unheard)
            _reserve(unheard, uid)
            listener.listen(_BACKLOG)
            listener.setblocking(False)
            self._turns.add(door, key)
            os.rename(unheard, path)  # a program that sees it there may connect at once
        except OSError as error:
            self._turns.drop(door, "it cannot be opened")
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(unheard)
            raise GntallocError(error.errno or errno.EIO, f"{path} cannot be listened on: {error.strerror}") from None
        self._listeners[path] = listener
        self._doors[path] = door
        self._disposals[path] = disposal

    def _shut(self, path: str) -> None:
        listener = self._listeners.pop(path, None)
        if listener is None:
            return  # it was shut because of what came there
        self._turns.drop(self._doors.pop(path), "it is shut")
        Inlet(listener, self._disposals.pop(path)).close()
        try:
            os.unlink(path)
        except OSError:
            pass  # another process has cleared the folder before us, or has taken it from us

    def _let_in_one(self, path: str, accept: Callable[[socket.socket], None], disposal: Disposal) -> bool:
        """Let the next program in, or refuse it. False: no program is at that door, or it is shut."""
        listener = self._listeners.get(path)
        if listener is None:
            return False
        if disposal.full:
            log.error("%s is shut: %d descriptors that were sent there cannot be closed", path, disposal.held)
            self._shut(path)
            return False
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return False
        except ConnectionAbortedError:
            return True
        except OSError:
            # No descriptors are left. Accept the program with the spare one and hang up, or it would wake us for ever.
            if self._spare >= 0:
                os.close(self._spare)
            try:
                Inlet(listener.accept()[0], disposal).close()
            except OSError:
                pass  # the program gave up by itself
            self._spare = _spare_descriptor()
            return True
        try:
            accept(sock)
        except OSError as error:
            log.info("refused a program: %s", error)
            Inlet(sock, disposal).close()
        except Exception:
            log.exception("a program could not be let in")
            Inlet(sock, disposal).close()
        return True


def _key(domid: int) -> Hashable:
    """Name the account of a domain's doors."""
    return "doors", domid


def _spare_descriptor() -> int:
    """Open a descriptor that can be given up for another. -1: none is left."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _reserve(path: str, uid: int) -> None:
    """Let programs of this user alone reach a socket, and root's; all programs if the file system cannot do that.

    Root gives it to the user. Another owner of a machine names the user in an access control list (acl(5)).
    """
    os.chmod(path, 0o600)
    if uid == os.getuid():
        return
    try:
        if os.getuid() == 0:
            os.chown(path, uid, -1)
        else:
            os.setxattr(path, "system.posix_acl_access", _access_for(uid))
    except OSError:
        os.chmod(path, 0o666)


def _access_for(uid: int) -> bytes:
    """Make the list that lets the owner and this user in, as the kernel keeps it (linux/posix_acl_xattr.h)."""
    owner, user, group, mask, others = 0x01, 0x02, 0x04, 0x10, 0x20
    entries = (owner, 6, _NOBODY), (user, 6, uid), (group, 0, _NOBODY), (mask, 6, _NOBODY), (others, 0, _NOBODY)
    return _ACL_VERSION.pack(2) + b"".join(_ACL_ENTRY.pack(*entry) for entry in entries)


def _entitled(sock: socket.socket, guest: Guest) -> Peer:
    peer = Peer.of(sock)
    if peer.uid not in {guest.uid, 0}:
        why = f"domain {guest.domid} is for uid {guest.uid}, and this program runs as {peer.uid}"
        raise DeviceError(errno.EACCES, why)
    return peer


def _refuse(sock: socket.socket, why: DeviceError) -> None:
    reply = encode_reply(kind_of(Hello), NOBODY, error=why.errno or errno.EACCES, why=str(why))
    try:
        sock.send(reply, _NEVER_WAIT)
    except OSError:
        pass  # the program did not even wait for the answer
