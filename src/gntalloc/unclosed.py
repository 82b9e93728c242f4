"""Warn of objects that were never closed, as Python does of its own files.

`__del__` also runs while the interpreter ends. Then nothing can be imported, and a module's names may be None already.
So everything that it needs then is a default of a parameter. It need not close anything then: the kernel takes pages,
ports and descriptors back, as after SIGKILL.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["warn_unclosed"]


def warn_unclosed(
    thing: object,
    owner: int | None = None,
    *,
    _getpid: Callable[[], int] = os.getpid,
    _warn: Callable[..., None] = warnings.warn,
    _is_ending: Callable[[], bool] = sys.is_finalizing,
) -> bool:
    """Warn that `thing` was never closed. False: the interpreter is ending, so leave the closing to the kernel.

    Args:
        thing: the object that is lost; its repr goes into the warning.
        owner: the pid of the process that made it. A child made by fork has a copy, and need not close the copy.
            None: each process has its own object.

    Raises:
        ResourceWarning: warnings are errors.
    """
    ending = _is_ending()
    try:
        if owner is None or owner == _getpid():
            _warn(f"{thing!r} was never closed; use it in a `with`", ResourceWarning, source=thing, stacklevel=3)
    except Warning:
        raise
    except Exception:
        if not ending:
            raise
    return not ending
