from __future__ import annotations

import errno
import pickle

import pytest

from gntalloc.xenstore.errors import Conflict, Denied, NoNode, StoreError, error_for
from gntalloc.xenstore.path import Permission, problem


@pytest.mark.parametrize("path", ["/", "/local/domain/0", "data/x-1_@", "a", "/" + "x" * 3071, "x" * 2048, "/a@b/c"])
def test_paths(path: str) -> None:
    assert problem(path) is None


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "empty"),
        ("/a b", "' '"),
        ("/a\0b", "x00"),
        ("/ä", "ä"),
        ("/a//b", "two slashes"),
        ("/a/", "end in a slash"),
        ("/" + "x" * 3072, "3073 bytes"),
        ("x" * 2049, "2049 bytes"),
        ("@releaseDomain", "watched"),
    ],
)
def test_not_paths(path: str, why: str) -> None:
    assert why in str(problem(path))


def test_special_names_can_be_watched() -> None:
    assert problem("@releaseDomain", watch=True) is None


@pytest.mark.parametrize("text", ["n0", "r1", "w65535", "b32752"])
def test_permissions(text: str) -> None:
    assert str(Permission.parse(text)) == text


@pytest.mark.parametrize("text", ["", "r", "x1", "1", "r-1", "r65536", "r 1", "r1 ", "r\u0661"])
def test_not_permissions(text: str) -> None:
    with pytest.raises(ValueError, match="not a permission"):
        Permission.parse(text)


def test_a_refusal_without_a_path_is_about_privilege() -> None:
    assert "privileged domain" in str(error_for(errno.EACCES, "is domain introduced: 3"))
    assert "permissions" in str(error_for(errno.EACCES, "read", "/a"))


@pytest.mark.parametrize(
    ("code", "kinds"),
    [
        (errno.ENOENT, (NoNode, FileNotFoundError)),
        (errno.EACCES, (Denied, PermissionError)),
        (errno.EPERM, (Denied, PermissionError)),
        (errno.EAGAIN, (Conflict,)),
        (errno.ENOSPC, (StoreError,)),
        (errno.EISCONN, (StoreError,)),
    ],
)
def test_an_errno_is_an_exception_of_its_kind(code: int, kinds: tuple[type, ...]) -> None:
    error = error_for(code, "read", "/a")
    assert all(isinstance(error, kind) for kind in kinds)
    assert error.errno == code
    assert str(error).startswith("xenstore read /a: ")
    assert str(error).endswith(f"({errno.errorcode[code]})")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.errno) == (type(error), str(error), code)
    assert (again.operation, again.path) == ("read", "/a")
