"""Try an installed wheel from a folder that is not the repository.

    try_wheel.py FOLDER-OF-ITS-PYTHON WHEEL     README's programs run, the command says its version, its files are in it
    try_wheel.py --plugin FOLDER-OF-ITS-PYTHON  the pytest beside it finds the plugin by itself, and a test passes

Exits 1 with the reason.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = {"gntalloc/py.typed", "gntalloc_pytest.py", "gntalloc/run/valgrind.supp"}
PATIENCE = 120

A_TEST = """
def test_a_channel(gntalloc_channels):
    gntalloc_channels.server.send(b"hello")
    assert gntalloc_channels.client.recv() == b"hello"
"""


def main(folder: str, wheel: str) -> None:
    """Raise at the first thing that is not as it must be."""
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version, "pyproject.toml has no version"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        headers = Parser().parsestr(archive.read(metadata).decode())
    assert headers["Version"] == version[1], headers["Version"]
    assert names >= FILES, FILES - names
    description = str(headers.get_payload())
    relative = re.findall(r"\]\((?![a-z]+:|#)[^)]*\)", description)
    assert not relative, f"links of the description that hold in the repository only: {relative}"
    programs = re.findall(r"```python\n(.*?)```", description, re.DOTALL)
    assert programs, "the description has no program"
    with tempfile.TemporaryDirectory() as elsewhere:
        for number, program in enumerate(programs):
            (Path(elsewhere) / f"program{number}.py").write_text(program)
            say(call(elsewhere, f"{folder}/python", "-W", "error", f"program{number}.py"))
        said = call(elsewhere, f"{folder}/gntalloc", "--version")
        assert said == f"gntalloc {version[1]}\n", said
        say(call(elsewhere, f"{folder}/gntalloc", "run", "--valgrind-suppressions"))
        say(call(elsewhere, f"{folder}/gntalloc", "demo", sys.executable).splitlines()[-1])


def try_plugin(folder: str) -> None:
    """Raise if pytest does not find the fixtures, or the test does not pass."""
    with tempfile.TemporaryDirectory() as elsewhere:
        (Path(elsewhere) / "test_it.py").write_text(A_TEST)
        said = call(elsewhere, f"{folder}/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py")
    assert "1 passed" in said, said
    say(said.splitlines()[-1])


def call(folder: str, *command: str) -> str:
    """Run a program, and return its output. It must end well."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def say(text: str) -> None:
    """For the log."""
    print(f"wheel:   {text.strip()}", file=sys.stderr)


if __name__ == "__main__":
    try:
        if sys.argv[1] == "--plugin":
            try_plugin(*sys.argv[2:])
        else:
            main(*sys.argv[1:])
    except AssertionError as reason:
        sys.exit(f"wheel: {reason}")
