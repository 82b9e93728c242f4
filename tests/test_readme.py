"""What the README shows, works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(
    ("program", "prints"),
    list(zip(PROGRAMS, ["domain 2 reads hello\n", "HELLO\n"], strict=True)),
    ids=["share", "channel"],
)
def test_the_programs_run(program: str, prints: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr) == (prints, "")


def test_the_program_in_the_package_s_own_words_runs() -> None:
    """The example in the docstring of `gntalloc`."""
    import gntalloc

    assert gntalloc.__doc__ is not None
    example = "\n".join(line[4:] for line in gntalloc.__doc__.splitlines() if line.startswith("    "))
    subprocess.run([sys.executable, "-W", "error", "-c", example], timeout=30, check=True)
