"""Whom the machine's sockets let in: a domain's user, root, and the machine's owner; a stranger does not even knock."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from limits import status_of

from gntalloc.machine.machine import Machine as Core
from gntalloc.machine.server import Server

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")

PATIENCE = 20.0
OWNER, USER, STRANGER = 65533, 65532, 65531  # nobody's numbers


@contextmanager
def server_of(uid: int, folder: Path) -> Iterator[str]:
    """A machine of this user, with a domain for USER; gives its folder."""
    os.chown(folder, uid, uid)
    child = os.fork()
    if not child:
        try:
            become(uid)
            server = Server(Core(), str(folder))
            server.create(1, uid=USER)
            (folder / "ready").touch()
            server.run()
        finally:
            os._exit(1)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (folder / "ready").exists():
            assert time.monotonic() < deadline, "the machine has not begun"
            time.sleep(0.005)
        yield str(folder)
    finally:
        os.kill(child, signal.SIGKILL)
        status_of(child)


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def connect_as(uid: int, path: str) -> int:
    """The errno of a connect as this user. 0: it has come about."""
    child = os.fork()
    if not child:
        code = 255
        try:
            become(uid)
            with socket.socket(socket.AF_UNIX) as sock:
                code = sock.connect_ex(path)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(status_of(child))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that all users may enter."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o711)
        inner = Path(made) / "machine"
        inner.mkdir(mode=0o700)
        yield inner


def has_access_lists(folder: Path) -> bool:
    """Whether the file system of this folder can name users."""
    try:
        os.getxattr(folder, "system.posix_acl_access")
    except OSError as error:
        return error.errno == errno.ENODATA
    return True


@pytest.mark.parametrize("owner", [0, OWNER], ids=["root's", "a user's"])
@pytest.mark.parametrize("what", ["1", "1.store"])
def test_a_stranger_cannot_knock_at_a_domain(folder: Path, owner: int, what: str) -> None:
    listed = has_access_lists(folder)
    with server_of(owner, folder) as where:
        path = f"{where}/{what}"
        assert connect_as(USER, path) == 0
        assert connect_as(0, path) == 0
        if owner and not listed:
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
            pytest.skip(f"the file system of {folder} has no access control lists")
        assert connect_as(STRANGER, path) == errno.EACCES


@pytest.mark.parametrize("owner", [0, OWNER], ids=["root's", "a user's"])
def test_the_machines_own_door_is_its_owners(folder: Path, owner: int) -> None:
    with server_of(owner, folder) as where:
        assert connect_as(owner, f"{where}/control") == 0
        for other in (USER, STRANGER):
            assert connect_as(other, f"{where}/control") == errno.EACCES


def test_where_users_cannot_be_named_all_may_knock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are refused by their number, as before."""

    def cannot(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "setxattr", cannot)
    with server_of(OWNER, folder) as where:
        for user in (USER, STRANGER):
            assert connect_as(user, f"{where}/1") == 0
