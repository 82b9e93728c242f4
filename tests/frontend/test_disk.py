"""A disk: our frontend, our backend in another process and domain. What any backend must do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.frontend.conftest import Setting

    from gntalloc.frontend.blkfront import BlockDevice

    Served = Callable[..., BlockDevice]

PATIENCE = 20.0


@pytest.mark.parametrize("way", ["map", "copy"])
def test_what_is_in_the_file_is_read_and_what_is_written_is_in_the_file(
    served: Served, setting: Setting, way: str
) -> None:
    disk = served(way=way)
    assert disk.size == len(setting.content)
    assert disk.read(0, disk.size, timeout=PATIENCE) == setting.content
    new = setting.content[::-1][: 1 << 20]
    disk.write(512 * 7, new, timeout=PATIENCE)
    disk.flush(timeout=PATIENCE)
    expected = setting.content[: 512 * 7] + new + setting.content[512 * 7 + len(new) :]
    assert setting.now() == expected
    assert disk.read(0, disk.size, timeout=PATIENCE) == expected
