"""The tree of errors."""

from __future__ import annotations

import errno
import pickle

import pytest

from gntalloc import errors

ALL = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", ALL)
def test_each_is_an_oserror_with_an_errno_and_survives_pickle(kind: type[errors.GntallocError]) -> None:
    error = kind("what was asked, what stood in the way, what to do")
    assert isinstance(error, OSError)
    assert (error.errno, str(error)) == (kind.code, "what was asked, what stood in the way, what to do")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(error, protocol))
        assert (type(copy), copy.errno, str(copy)) == (kind, error.errno, str(error))


def test_a_device_error_has_the_drivers_errno() -> None:
    error = errors.DeviceError(errno.ENOSPC, "the limit")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.errno, str(copy), type(copy)) == (errno.ENOSPC, "the limit", errors.DeviceError)


def test_notes_and_attributes_survive_too() -> None:
    error = errors.ViewsStillExported("a view")
    error.add_note("a note")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["a note"]


@pytest.mark.parametrize(
    ("kind", "also"),
    [
        (errors.ViewsStillExported, BufferError),
        (errors.TimedOut, TimeoutError),
        (errors.MachineGone, ConnectionError),
        (errors.BadGrantText, ValueError),
    ],
)
def test_each_is_what_it_stands_for(kind: type[Exception], also: type[Exception]) -> None:
    assert issubclass(kind, also)
