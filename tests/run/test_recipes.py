"""The recipes of docs/run.md for tests of two domains, as they stand there, four of each at once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
LIMIT = 300.0

pytestmark = pytest.mark.timeout(400)

# What the recipes call server and client is one program of the tests.
WRAPPED = """
#define main vchan
#include "{programs}/vchan.c"
#undef main
int main(int argc, char **argv)
{{
    char *all[] = {{argv[0], "{end}", argv[1], argv[2], "4096", "{task}", "10", "700", 0}};
    return argc == 3 ? vchan(8, all) : 2;
}}
"""


def recipe(language: str, words: str) -> str:
    """The block of that language in docs/run.md which has these words."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / "run.md").read_text(), re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if words in block]
    return str(found)


def environment() -> dict[str, str]:
    """Where `gntalloc` is found as a command."""
    return {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def needs(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"there is no {program} (apt install {program})")
    return found


def write_programs(folder: Path) -> None:
    needs("gcc")
    if not Path("/usr/include/libxenvchan.h").exists():
        pytest.skip("Xen's headers are not there (apt install libxen-dev)")
    for end, task in (("server", "echo"), ("client", "ask")):
        (folder / f"{end}.c").write_text(WRAPPED.format(programs=PROGRAMS, end=end, task=task))


def test_shell(tmp_path: Path) -> None:
    write_programs(tmp_path)
    for end in ("server", "client"):
        run("cc", "-o", end, f"{end}.c", "-lxenvchan", cwd=tmp_path)
    script = recipe("sh", "--pair")
    with ThreadPoolExecutor(4) as pool:
        for output in pool.map(lambda _: run("sh", "-c", script, cwd=tmp_path), range(4)):
            assert "2 | " in output


def test_a_machine_around_a_command(tmp_path: Path) -> None:
    script = recipe("sh", "gntalloc machine --domain 1")
    (tmp_path / "Makefile").write_text("check:\n\tgntalloc run --domid 2 -- sh -c 'echo $$GNTALLOC_DOMAIN'\n")
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda _: run("sh", "-c", script, cwd=tmp_path), range(4)))
    assert len(set(outputs)) == 4, "each has its own machine"


def test_cmake(tmp_path: Path) -> None:
    needs("cmake")
    write_programs(tmp_path)
    text = recipe("cmake", "--pair")
    test = text[text.index("add_test") :]
    more = [test.replace("NAME echo", f"NAME echo-{number}") for number in range(3)]
    (tmp_path / "CMakeLists.txt").write_text("\n".join([text, *more]))
    run("cmake", "-B", "build", cwd=tmp_path)
    run("cmake", "--build", "build", cwd=tmp_path)
    output = run("ctest", "-j", "4", "--output-on-failure", cwd=tmp_path / "build")
    assert "100% tests passed, 0 tests failed out of 4" in output


def test_cargo(tmp_path: Path) -> None:
    needs("cargo")
    (tmp_path / ".cargo").mkdir()
    (tmp_path / ".cargo" / "config.toml").write_text(recipe("toml", "runner"))
    (tmp_path / "Cargo.toml").write_text('[package]\nname = "pair"\nversion = "0.1.0"\nedition = "2021"\n')
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "lib.rs").write_text("")
    (tmp_path / "tests").mkdir()
    text = recipe("rust", "in_domain")
    for number in range(4):
        (tmp_path / "tests" / f"echo{number}.rs").write_text(text)
    output = run("cargo", "test", "--offline", cwd=tmp_path)
    assert output.count("test each_domain_finds_its_devices ... ok") == 4
