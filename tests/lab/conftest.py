"""The lab's unit tests never boot. Those that do are in test_boot.py, behind GNTALLOC_LAB=1."""

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gntalloc" / "lab"
