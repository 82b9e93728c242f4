"""A xenstored for tests: one connection, strict about the wire, in a thread. Not the one the machine runs.

What a client gets wrong on the wire is kept in `complaints`, which the fixture looks at in the end.
"""

from __future__ import annotations

import socket
import threading
from struct import Struct

HEADER = Struct("=IIII")
HOME = "/local/domain/7"
OK = b"OK\0"

# By number, independently of the tables that are under test.
DIRECTORY, READ, GET_PERMS, WATCH, UNWATCH, BEGIN, END = range(1, 8)
GET_DOMAIN_PATH, WRITE, MKDIR, RM, SET_PERMS, WATCH_EVENT, ERROR, IS_INTRODUCED = range(10, 18)
DIRECTORY_PART = 22

Tree = dict[str, tuple[bytes, tuple[str, ...]]]


class Refusal(Exception):
    """The request gets an ERROR with this name."""


class Daemon:
    """Serves one end of a socket pair until it is closed.

    Args:
        device: behave as the kernel's device: WATCH and UNWATCH are answered with id 0, the first event comes before
            the answer, and events carry ids that mean nothing.
    """

    def __init__(self, *, device: bool = False) -> None:
        self.ours, theirs = socket.socketpair()
        self.client = theirs.detach()
        self.device = device
        self.complaints: list[str] = []
        self.requests: list[int] = []
        self.tree: Tree = {"/": (b"", ("n0",)), "/local/domain/7/domid": (b"7", ("n0", "r7"))}
        self.generation = 1
        self.transactions: dict[int, tuple[int, Tree]] = {}
        self.watches: list[tuple[str, str]] = []
        self.mute: set[int] = set()  # types that get no answer
        self.conflicts = 0  # commits to refuse
        self.pieces = 0  # send answers in pieces of so many bytes; 0: whole
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.ours.close() if not self.thread.is_alive() else self.ours.shutdown(socket.SHUT_RDWR)
        self.thread.join(5)
        self.ours.close()

    def serve(self) -> None:
        try:
            while header := self.receive(16):
                kind, req_id, tx_id, length = HEADER.unpack(header)
                if length > 4096 or req_id == 0:
                    self.complaints.append(f"header {(kind, req_id, tx_id, length)}")
                    return
                self.requests.append(kind)
                self.answer(kind, req_id, tx_id, self.receive(length))
        except OSError:
            pass

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (more := self.ours.recv(size - len(data))):
            data += more
        return data

    def send(self, kind: int, req_id: int, tx_id: int, body: bytes) -> None:
        data = HEADER.pack(kind, req_id, tx_id, len(body)) + body
        step = self.pieces or len(data)
        for start in range(0, len(data), step):
            self.ours.sendall(data[start : start + step])

    def answer(self, kind: int, req_id: int, tx_id: int, body: bytes) -> None:
        fired: list[str] = []
        try:
            if kind in (WATCH, UNWATCH):
                self.watch(kind, req_id, body)
                return
            reply = self.carry_out(kind, tx_id, body, fired)
        except Refusal as refusal:
            kind, reply = ERROR, str(refusal).encode() + b"\0"
        if kind not in self.mute:
            self.send(kind, req_id, tx_id, reply)
        for path in fired:
            self.fire(path)

    def fire(self, changed: str) -> None:
        """Tell every watch that covers this path."""
        for path, token in self.watches:
            if path in ("/", changed) or changed.startswith(path + "/"):
                self.event(changed, token)
            elif not path.startswith(("/", "@")) and (changed + "/").startswith(f"{HOME}/{path}/"):
                self.event(changed[len(HOME) + 1 :], token)

    def event(self, path: str, token: str) -> None:
        ids = (0xDEAD, 0xBEEF) if self.device else (0, 0)
        self.send(WATCH_EVENT, *ids, f"{path}\0{token}\0".encode())

    def watch(self, kind: int, req_id: int, body: bytes) -> None:
        path, token = self.strings(body, 2)
        ids = (0, 0) if self.device else (req_id, 0)
        if kind == WATCH:
            if (path, token) in self.watches:
                raise Refusal("EEXIST")
            self.watches.append((path, token))
            if self.device:
                self.event(path, token)
            self.send(kind, *ids, OK)
            if not self.device:
                self.event(path, token)
        else:
            if (path, token) not in self.watches:
                raise Refusal("ENOENT")
            self.watches.remove((path, token))
            self.event(path, token)  # one that was on its way
            self.send(kind, *ids, OK)

    def strings(self, body: bytes, count: int | None = None) -> list[str]:
        parts = body.split(b"\0")
        if parts.pop() or (count is not None and len(parts) != count):
            self.complaints.append(f"strings {body!r}")
            raise Refusal("EINVAL")
        return [part.decode() for part in parts]

    def carry_out(self, kind: int, tx_id: int, body: bytes, fired: list[str]) -> bytes:
        if kind == BEGIN:
            if body != b"\0" or tx_id:
                self.complaints.append(f"begin {body!r}")
            number = len(self.transactions) + 100
            self.transactions[number] = (self.generation, dict(self.tree))
            return f"{number}\0".encode()
        if kind == END:
            (how,) = self.strings(body, 1)
            return self.end(tx_id, how)
        if kind == GET_DOMAIN_PATH:
            return f"/local/domain/{int(self.strings(body, 1)[0])}\0".encode()
        if kind == IS_INTRODUCED:
            return b"T\0" if self.strings(body, 1) == ["7"] else b"F\0"
        if tx_id and tx_id not in self.transactions:
            raise Refusal("ENOENT")
        tree = self.transactions[tx_id][1] if tx_id else self.tree
        raw, nul, rest = body.partition(b"\0")
        if not nul:
            self.complaints.append(f"no NUL after the path: {body!r}")
        path = raw.decode() if raw.startswith(b"/") else f"{HOME}/{raw.decode()}"
        if "//" in path or "!" in path:
            raise Refusal("EINVAL")
        if kind in (WRITE, MKDIR):
            if kind == WRITE or path not in tree:
                for parent in parents(path):
                    tree.setdefault(parent, (b"", ("n7",)))
                tree[path] = (rest, tree.get(path, (b"", ("n7",)))[1])
                self.changed(tx_id, path, fired)
            return OK
        if kind == RM:
            if path.rpartition("/")[0] not in tree:
                raise Refusal("ENOENT")
            for name in [name for name in tree if name == path or name.startswith(path + "/")]:
                del tree[name]
            self.changed(tx_id, path, fired)
            return OK
        if path not in tree:
            raise Refusal("ENOENT")
        value, permissions = tree[path]
        if kind == READ:
            if "secret" in path:
                raise Refusal("EACCES")
            return value
        if kind == GET_PERMS:
            return "".join(entry + "\0" for entry in permissions).encode()
        if kind == SET_PERMS:
            tree[path] = (value, tuple(self.strings(rest)))
            self.changed(tx_id, path, fired)
            return OK
        names = "".join(name + "\0" for name in children(tree, path)).encode()
        if kind == DIRECTORY:
            if len(names) > 4096:
                raise Refusal("E2BIG")
            return names
        if kind == DIRECTORY_PART:
            (offset,) = self.strings(rest, 1)
            return self.part(names, int(offset))
        raise Refusal("ENOSYS")

    def changed(self, tx_id: int, path: str, fired: list[str]) -> None:
        if not tx_id:
            self.generation += 1
            fired.append(path)

    def end(self, tx_id: int, how: str) -> bytes:
        if tx_id not in self.transactions or how not in ("T", "F"):
            raise Refusal("ENOENT")
        generation, tree = self.transactions.pop(tx_id)
        if how == "T":
            if generation != self.generation or self.conflicts:
                self.conflicts -= 1
                raise Refusal("EAGAIN")
            self.tree = tree
            self.generation += 1
        return OK

    def part(self, names: bytes, offset: int) -> bytes:
        """A generation, then as many whole names as fit; an empty one after the last."""
        head = f"{self.generation}\0".encode()
        room = 4096 - len(head) - 1
        piece = names[offset : offset + room]
        if offset + len(piece) < len(names):
            return head + piece[: piece.rindex(b"\0") + 1]
        return head + piece + b"\0"


def parents(path: str) -> list[str]:
    found = []
    while path := path.rpartition("/")[0]:
        found.append(path)
    return found


def children(tree: Tree, path: str) -> list[str]:
    prefix = path.rstrip("/") + "/"
    return sorted({name[len(prefix) :].split("/")[0] for name in tree if name.startswith(prefix) and name != "/"})
